from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fusion import fuse
from fusion.fuse import fold_scale, fuse_checkpoint
from puzzle.model.checkpoint import CheckpointWriter, TensorReader, load_model, read_architecture

A = (2, 256)
FFN = (None, 256)
IDENTITY = (None, None)
GROUPS = ((1, 3), (5, 6))
BLOCKS = (A, FFN, (None, 768), (None, 512), A, (None, 512), FFN, FFN, A)


def read_all(directory):
    with TensorReader(directory) as reader:
        return {name: reader.read(name) for name in reader.names()}


def ffn_update(tensors, block, hidden, *, norm_block, eps):
    prefix = f"model.layers.{block}.mlp"
    scale = tensors[f"model.layers.{norm_block}.post_attention_layernorm.weight"]
    normed = hidden / (hidden.pow(2).mean(-1, keepdim=True) + eps).sqrt() * scale
    gate, up, down = (tensors[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T


def parallel_logits(model, groups, norm, input_ids):
    """The unfused model with the members of every group side by side, written by hand (paper, eq. 5)."""
    blocks = model.model.layers
    hidden = model.model.embed(input_ids)
    shared = model.model.attention_inputs(hidden)
    last_of = dict(groups)
    index = 0
    while index < len(blocks):
        last = last_of.get(index)
        if last is None:
            hidden = blocks[index](hidden, **shared)
        else:
            members = range(index, last + 1)
            norms = [blocks[member if norm == "folded" else last].post_attention_layernorm for member in members]
            updates = [blocks[member].mlp(norm(hidden)) for member, norm in zip(members, norms, strict=True)]
            hidden = hidden + sum(updates)
        index = (index if last is None else last) + 1
    return model.lm_head(model.model.norm(hidden))


@pytest.mark.parametrize("norm", ["folded", "last"])
@pytest.mark.parametrize("widths", [(256, 512), (512, 256, 768), (256,) * 5, (256, 1024, 512, 768, 256, 512)])
def test_fused_ffn_is_the_sum_of_its_members_in_fp64(tmp_path, make_checkpoint, norm, widths):
    source, out = tmp_path / "source", tmp_path / "out"
    architecture = make_checkpoint(source, A, *[(None, width) for width in widths], dtype=torch.float64)
    last = len(widths)
    fused = fuse_checkpoint(source, out, ((1, last),), norm)
    assert fused.blocks[1].ffn.ffn_dim == sum(widths)

    before, after = read_all(source), read_all(out)
    assert after["model.layers.1.mlp.up_proj.weight"].dtype == torch.float64
    hidden = torch.randn(16, architecture.hidden_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    eps = architecture.norm_eps
    expected = sum(
        ffn_update(before, member, hidden, norm_block=member if norm == "folded" else last, eps=eps)
        for member in range(1, last + 1)
    )
    actual = ffn_update(after, 1, hidden, norm_block=1, eps=eps)
    # Equal but for the order of fp64 sums over some 1,000 channels.
    assert (actual - expected).norm() / expected.norm() < 1e-12


@pytest.mark.parametrize("norm", ["folded", "last"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_embeddings": True}, {"qkv_bias": True, "family": "qwen2"}, {"qk_norm": True, "family": "qwen3"}],
    ids=["llama", "tied", "qkv_bias", "qk_norm"],
)
def test_fused_model_equals_the_model_with_parallel_members(tmp_path, make_checkpoint, norm, fields):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, *BLOCKS, **fields)
    fuse_checkpoint(source, out, GROUPS, norm)
    input_ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = parallel_logits(load_model(source), GROUPS, norm, input_ids)
        actual = load_model(out)(input_ids).logits
    # fp32 rounding of the folded weights and of sums in another order, through nine blocks.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_norms_differ(tmp_path, make_checkpoint):
    """Were the two norms the same computation, the tests above could not tell them apart."""
    make_checkpoint(tmp_path / "source", *BLOCKS)
    input_ids = torch.arange(16)[None]
    logits = {}
    for norm in ("folded", "last"):
        fuse_checkpoint(tmp_path / "source", tmp_path / norm, GROUPS, norm)
        logits[norm] = load_model(tmp_path / norm)(input_ids).logits
    assert (logits["folded"] - logits["last"]).abs().max() > 1e-2


def test_architecture_and_untouched_tensors(tmp_path, make_checkpoint):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, *BLOCKS, qkv_bias=True, family="qwen2", dtype=torch.bfloat16)
    returned = fuse_checkpoint(source, out, GROUPS, "folded")
    assert read_architecture(out) == returned
    assert [block.parent_block_indices for block in returned.blocks] == [(0,), (1, 2, 3), (4,), (5, 6), (7,), (8,)]

    before, after = read_all(source), read_all(out)
    new_index = {0: 0, 4: 2, 7: 4, 8: 5}
    untouched = 0
    for name, tensor in before.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in new_index:
                continue
            parts[2] = str(new_index[int(parts[2])])
        copied = after[".".join(parts)]
        assert copied.dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(copied, tensor), name
        untouched += 1
    assert len(after) == untouched + 2 * 4


def test_norm_last_moves_weights_without_changing_them(tmp_path, make_checkpoint):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, A, FFN, (None, 512), dtype=torch.bfloat16)
    fuse_checkpoint(source, out, ((1, 2),), "last")
    before, after = read_all(source), read_all(out)
    for name, dim in (("gate", 0), ("up", 0), ("down", 1)):
        members = [before[f"model.layers.{index}.mlp.{name}_proj.weight"] for index in (1, 2)]
        assert torch.equal(after[f"model.layers.1.mlp.{name}_proj.weight"], torch.cat(members, dim))
    norm = "post_attention_layernorm.weight"
    assert torch.equal(after[f"model.layers.1.{norm}"], before[f"model.layers.2.{norm}"])


def test_folding_rounds_once(tmp_path, make_checkpoint):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, A, FFN, FFN, dtype=torch.bfloat16)
    fuse_checkpoint(source, out, ((1, 2),), "folded")
    before, after = read_all(source), read_all(out)
    weight = before["model.layers.2.mlp.gate_proj.weight"]
    exact = fold_scale(weight, before["model.layers.2.post_attention_layernorm.weight"])
    assert exact.dtype == torch.float64
    assert torch.equal(after["model.layers.1.mlp.gate_proj.weight"][256:], exact.to(torch.bfloat16))
    assert torch.equal(after["model.layers.1.post_attention_layernorm.weight"], torch.ones(32, dtype=torch.bfloat16))


def test_scale_of_one_rounds_less_in_bf16_than_the_last_members_scale():
    """The choice that fuse_checkpoint documents, on a norm and projections as the model computes them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 256, generator=generator)
    scales = [torch.empty(256).uniform_(0.3, 2.0, generator=generator).bfloat16() for _ in range(4)]
    weights = [torch.randn(256, 256, generator=generator).bfloat16() for _ in scales]
    normed = F.rms_norm(hidden, (256,))
    exact = torch.cat([normed.double() @ fold_scale(w, s).T for w, s in zip(weights, scales, strict=True)], dim=1)

    def error(fused_scale):
        folded = [fold_scale(w, s) / fused_scale.double() for w, s in zip(weights, scales, strict=True)]
        activations = normed.bfloat16() * fused_scale
        return (activations.double() @ torch.cat(folded).bfloat16().double().T - exact).norm() / exact.norm()

    assert error(torch.ones(256).bfloat16()) < 0.95 * error(scales[-1])


def test_norm_scale_of_zero_is_folded_like_any_other(tmp_path, make_checkpoint):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, A, FFN, FFN)
    file = next(source.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.2.post_attention_layernorm.weight"][:5] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    fuse_checkpoint(source, out, ((1, 2),), "folded")
    gate = read_all(out)["model.layers.1.mlp.gate_proj.weight"]
    assert gate.isfinite().all()
    assert (gate[256:, :5] == 0).all()


def test_sharded_checkpoint_is_streamed(tmp_path, make_checkpoint, monkeypatch):
    """From many shards to many shards: the same tensors as from one file to one file."""
    single, sharded, out = tmp_path / "single", tmp_path / "sharded", tmp_path / "out"
    architecture = make_checkpoint(single, *BLOCKS)
    tensors = read_all(single)
    with CheckpointWriter(sharded, architecture, dtype=torch.float32, max_shard_bytes=100_000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(t.numel() for t in read_all(sharded).values())

    fuse_checkpoint(single, tmp_path / "expected", GROUPS, "folded")
    monkeypatch.setattr(
        fuse, "CheckpointWriter", lambda *args, **kwargs: CheckpointWriter(*args, **kwargs, max_shard_bytes=100_000)
    )
    fuse_checkpoint(sharded, out, GROUPS, "folded")
    assert len(list(out.glob("*.safetensors"))) > 3
    expected, actual = read_all(tmp_path / "expected"), read_all(out)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def drop(tensors):
    del tensors["model.layers.2.mlp.up_proj.weight"]


def narrow(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"][:128].clone()


def add_bias(tensors):
    tensors["model.layers.2.mlp.up_proj.bias"] = torch.zeros(256)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"it lacks \['model.layers.2.mlp.up_proj.weight'\]"),
        (narrow, r"model.layers.2.mlp.up_proj.weight is \[128, 32\], config.json says \[256, 32\]"),
        (add_bias, r"it lacks \[\] and has \['model.layers.2.mlp.up_proj.bias'\] besides"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, make_checkpoint, damage, message):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, A, FFN, FFN)
    file = next(source.glob("*.safetensors"))
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        fuse_checkpoint(source, out, ((1, 2),), "folded")
    assert not out.exists()


@pytest.mark.parametrize("groups", [((0, 1),), ((2, 3),), ((1, 2), (2, 3)), ((1, 7),), ()])
def test_bad_groups_are_refused_before_anything_is_written(tmp_path, make_checkpoint, groups):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, A, FFN, FFN, IDENTITY, A)
    with pytest.raises(ValueError, match=r"fuse"):
        fuse_checkpoint(source, out, groups, "folded")
    assert not out.exists()


def test_fused_model_is_not_fused_again(tmp_path, make_checkpoint):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, A, FFN, FFN, FFN)
    fuse_checkpoint(source, out, ((1, 2),), "folded")
    with pytest.raises(ValueError, match="already fused from parent blocks"):
        fuse_checkpoint(out, tmp_path / "again", ((1, 2),), "folded")
