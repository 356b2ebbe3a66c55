from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fusion import fuse, verify
from fusion.fuse import fold_scale, fuse_checkpoint
from fusion.verify import verify_fusion
from launch import artifact
from launch.artifact import Artifact, Recipe
from launch.stage import StageContext, StageResult
from launch.store import Job, Store
from puzzle.model import shard_writer, tensor_reader
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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(256, 512), (512, 256, 768), (256,) * 5, (256, 1024, 512, 768, 256, 512)])
def test_fused_ffn_is_the_sum_of_its_members(tmp_path, make_checkpoint, norm, dtype, widths):
    source, out = tmp_path / "source", tmp_path / "out"
    architecture = make_checkpoint(source, A, *[(None, width) for width in widths], dtype=dtype)
    last = len(widths)
    fused = fuse_checkpoint(source, out, ((1, last),), norm)
    assert fused.blocks[1].ffn.ffn_dim == sum(widths)

    before, after = read_all(source), read_all(out)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    # bf16 weights are stored, not computed with.
    computed = torch.promote_types(dtype, torch.float32)
    before, after = ({name: tensor.to(computed) for name, tensor in tensors.items()} for tensors in (before, after))
    hidden = torch.randn(16, architecture.hidden_dim, dtype=computed, generator=torch.Generator().manual_seed(1))
    eps = architecture.norm_eps
    expected = sum(
        ffn_update(before, member, hidden, norm_block=member if norm == "folded" else last, eps=eps)
        for member in range(1, last + 1)
    )
    actual = ffn_update(after, 1, hidden, norm_block=1, eps=eps)
    # fp64: sums of some 1,000 channels in another order. fp32: the same, and one rounding of the folded weights.
    # bf16: that rounding alone, by 2^-9 relative in gate and up each; where it does not happen, fp32's.
    allowed = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8 if norm == "folded" else 1e-5}[dtype]
    assert (actual - expected).norm() / expected.norm() < allowed


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folding_rounds_once(tmp_path, make_checkpoint, dtype):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, A, FFN, FFN, dtype=dtype)
    fuse_checkpoint(source, out, ((1, 2),), "folded")
    before, after = read_all(source), read_all(out)
    weight, scale = (before[f"model.layers.2.{name}"] for name in (fuse.GATE, fuse.NORM))
    exact = weight.double() * scale.double()
    assert torch.equal(after["model.layers.1.mlp.gate_proj.weight"][256:], exact.to(dtype))
    assert torch.equal(after["model.layers.1.post_attention_layernorm.weight"], torch.ones(32, dtype=dtype))


def test_norms_of_another_data_type_are_folded_before_they_are_rounded(tmp_path, make_checkpoint):
    """Some checkpoints keep fp32 norms beside bf16 matrices."""
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, A, FFN, FFN, dtype=torch.bfloat16)
    file = next(source.glob("*.safetensors"))
    scale = torch.linspace(0.3, 2.0, 32)
    tensors = load_file(file) | {f"model.layers.2.{fuse.NORM}": scale}
    save_file(tensors, file, metadata={"format": "pt"})
    fuse_checkpoint(source, out, ((1, 2),), "folded")
    exact = tensors[f"model.layers.2.{fuse.GATE}"].double() * scale.double()
    assert torch.equal(read_all(out)["model.layers.1.mlp.gate_proj.weight"][256:], exact.bfloat16())


def test_scale_of_one_rounds_less_in_bf16_than_the_last_members_scale():
    """The choice that fuse_checkpoint documents, on a norm and projections as the model computes them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 256, generator=generator)
    scales = [torch.empty(256).uniform_(0.3, 2.0, generator=generator).bfloat16() for _ in range(4)]
    weights = [torch.randn(256, 256, generator=generator).bfloat16() for _ in scales]
    normed = F.rms_norm(hidden, (256,))

    def fold(weight, scale):
        return fold_scale(weight.double(), scale.double(), torch.float64)

    exact = torch.cat([normed.double() @ fold(w, s).T for w, s in zip(weights, scales, strict=True)], dim=1)

    def error(fused_scale):
        folded = [fold(w, s) / fused_scale.double() for w, s in zip(weights, scales, strict=True)]
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


@pytest.mark.parametrize("norm", ["folded", "last"])
def test_memory_is_bounded_by_chunks_of_rows(tmp_path, make_checkpoint, monkeypatch, norm):
    """No tensor is read or written as a whole, and chunks that end within a member change nothing."""
    source = tmp_path / "source"
    make_checkpoint(source, *BLOCKS)
    fuse_checkpoint(source, tmp_path / "expected", GROUPS, norm)
    sizes = []

    def noted(function):
        def call(stream, offset, tensor):
            sizes.append(tensor.nbytes)
            function(stream, offset, tensor)

        return call

    # The widest fused down projection has rows of 6,144 bytes: the least that can be held of it.
    chunk = 7_000
    monkeypatch.setattr(tensor_reader, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(tensor_reader, "read_into", noted(tensor_reader.read_into))
    monkeypatch.setattr(shard_writer, "write_from", noted(shard_writer.write_from))
    fuse_checkpoint(source, tmp_path / "out", GROUPS, norm)
    assert 0 < max(sizes) <= chunk
    expected, actual = read_all(tmp_path / "expected"), read_all(tmp_path / "out")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


class Killed(BaseException):
    """As SIGKILL leaves it: no handler cleans up."""


def fuse_job(source, store):
    """What stage fuse does, as the store runs it."""

    def body(context):
        fuse_checkpoint(source, context.out, ((1, 2),), "folded")
        verify_fusion(source, context.out, ((1, 2),), "folded")
        return StageResult(headline="fused")

    def context(out, resume):
        return StageContext(out=out, resume=resume, pool=store.pool, run_name="test", step_name="fuse")

    recipe = Recipe(stage="fuse", stage_version=1, config={})
    return Job(recipe=recipe, kind="model", inputs={}, body=body, context=context)


def killed(*_, **__):
    raise Killed


def killed_after_some_rows(*arguments):
    yield next(ROWS(*arguments))
    raise Killed


ROWS = fuse._folded_rows


@pytest.mark.parametrize(
    ("owner", "name", "replaced"),
    [
        (fuse, "_folded_rows", killed_after_some_rows),
        (verify, "_check", killed),
        (artifact, "sha256_of", killed),
        (artifact.json, "dump", killed),
    ],
    ids=["fusing", "verifying", "hashing", "manifest"],
)
def test_killed_fusion_is_no_model_and_starts_again_in_the_store(
    tmp_path, make_checkpoint, monkeypatch, owner, name, replaced
):
    source = tmp_path / "source"
    make_checkpoint(source, A, FFN, FFN, FFN)
    fuse_checkpoint(source, tmp_path / "expected", ((1, 2),), "folded")
    store = Store(tmp_path / "store")
    job = fuse_job(source, store)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, replaced)
        with pytest.raises(Killed):
            store.get_or_compute(job, on_wait=print)
    assert store.find(job.recipe) is None
    assert not store.path(job.recipe).exists()
    torn = store.unfinished_path(job.recipe)
    assert list(torn.glob("*.safetensors*"))
    with pytest.raises(ValueError, match="is not an artifact"):
        Artifact.load(torn)

    committed, found = store.get_or_compute(job, on_wait=print)
    assert not found
    assert committed.path == store.path(job.recipe)
    assert not torn.exists()
    for file in ("model.safetensors", "config.json"):
        assert (committed.path / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


def test_fusion_that_is_killed_among_the_tensors_leaves_no_model(tmp_path, make_checkpoint, monkeypatch):
    source, torn = tmp_path / "source", tmp_path / "torn"
    make_checkpoint(source, A, FFN, FFN, FFN)
    monkeypatch.setattr(fuse, "_folded_rows", killed_after_some_rows)
    with pytest.raises(Killed):
        fuse_checkpoint(source, torn, ((1, 2),), "folded")
    assert list(torn.glob("*.safetensors.part"))
    for read in (read_architecture, load_model, TensorReader):
        with pytest.raises(ValueError, match=r"has no config.json|has neither"):
            read(torn)


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


def drop_from_shard(shard):
    tensors = load_file(shard)
    tensors.popitem()
    save_file(tensors, shard, metadata={"format": "pt"})


def cut_shard(shard):
    shard.write_bytes(shard.read_bytes()[:-4])


def quantise_shard(shard):
    tensors = load_file(shard)
    name, tensor = tensors.popitem()
    save_file(tensors | {name: tensor.to(torch.float8_e4m3fn)}, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_from_shard, r"lacks the tensor '.*' that the index places there"),
        (cut_shard, r"is no readable safetensors file: it has \d+ bytes, its header describes \d+"),
        (quantise_shard, r"is stored as F8_E4M3, not as one of"),
        (lambda shard: shard.unlink(), r"shard model-\d+-of-\d+.safetensors that .* names is missing"),
    ],
    ids=["tensor_missing", "cut_off", "quantised", "shard_missing"],
)
def test_damaged_shard_is_one_error_before_anything_is_written(tmp_path, make_checkpoint, damage, message):
    single, source, out = tmp_path / "single", tmp_path / "source", tmp_path / "out"
    architecture = make_checkpoint(single, *BLOCKS)
    with (
        TensorReader(single) as reader,
        CheckpointWriter(source, architecture, dtype=torch.float32, max_shard_bytes=100_000) as writer,
    ):
        for name in reader.names():
            writer.copy(name, reader)
    files = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    damage(source / files["model.layers.7.mlp.up_proj.weight"])
    with pytest.raises(ValueError, match=message) as error:
        fuse_checkpoint(source, out, GROUPS, "folded")
    assert "\n" not in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((), r"fuse.groups is empty; name at least one"),
        (((0, 1),), r"block 0 of group \[0, 1\] has attention kv2"),
        (((3, 4),), r"block 4 of group \[3, 4\] has FFN no_op, not SwiGLU"),
        (((1, 2), (2, 3)), r"\[1, 2\] and \[2, 3\] overlap or are out of order"),
        (((1, 7),), r"\[1, 7\] must name at least two blocks within 0..5"),
        (((1, 1),), r"\[1, 1\] must name at least two blocks within 0..5"),
    ],
)
def test_bad_groups_are_refused_before_anything_is_written(tmp_path, make_checkpoint, groups, message):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, A, FFN, FFN, FFN, IDENTITY, A)
    with pytest.raises(ValueError, match=message):
        fuse_checkpoint(source, out, groups, "folded")
    assert not out.exists()


def test_fused_model_is_not_fused_again(tmp_path, make_checkpoint):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, A, FFN, FFN, FFN)
    fuse_checkpoint(source, out, ((1, 2),), "folded")
    with pytest.raises(ValueError, match="already fused from parent blocks"):
        fuse_checkpoint(out, tmp_path / "again", ((1, 2),), "folded")
