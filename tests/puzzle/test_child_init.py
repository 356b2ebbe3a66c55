"""Every child init against the mathematics that it stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from distill.config import RopeConfig
from puzzle import child_init
from puzzle.blockwise import build_block
from puzzle.child_init import (
    CheckpointInit,
    KVInit,
    init_attention,
    init_ffn,
    kept_first,
    linear_attention,
    linear_ffn,
    pool_kv_heads,
    select_kv_heads,
    slice_ffn,
)
from puzzle.config import SpaceConfig
from puzzle.importance import Rankings
from puzzle.library import Mode, Replacement, library_replacements, subblock_of
from puzzle.model.architecture import NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig, dense_blocks
from puzzle.model.checkpoint import TensorReader, build_model
from puzzle.model.tensor_layout import block_prefix, block_shapes
from puzzle.space import block_variants

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 32, 8, 4, 4, 512


@pytest.fixture
def architecture() -> Architecture:
    return Architecture(
        vocab_size=64,
        hidden_dim=HIDDEN,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        blocks=dense_blocks(2, KV_HEADS, FFN),
        max_positions=64,
        rope=RopeConfig(theta=10_000.0),
        qkv_bias=True,
        qk_norm=True,
    )


@pytest.fixture
def block() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "input_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.q_proj.bias": (HEADS * HEAD_DIM,),
        "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj.bias": (KV_HEADS * HEAD_DIM,),
        "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj.bias": (KV_HEADS * HEAD_DIM,),
        "self_attn.q_norm.weight": (HEAD_DIM,),
        "self_attn.k_norm.weight": (HEAD_DIM,),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "post_attention_layernorm.weight": (HIDDEN,),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def swiglu(tensors: dict[str, Tensor], x: Tensor, channels: Tensor | None = None) -> Tensor:
    inner = silu(x @ tensors["mlp.gate_proj.weight"].T) * (x @ tensors["mlp.up_proj.weight"].T)
    if channels is not None:
        mask = torch.zeros(inner.shape[-1])
        mask[channels] = 1
        inner = inner * mask
    return inner @ tensors["mlp.down_proj.weight"].T


def test_sliced_ffn_is_the_parent_with_its_other_channels_zeroed(block: dict[str, Tensor]) -> None:
    ranking = torch.randperm(FFN, generator=torch.Generator().manual_seed(1))
    child = init_ffn(block, FFNConfig(ffn_dim=256), parent=FFNConfig(ffn_dim=FFN), ranking=ranking)
    x = torch.randn(5, HIDDEN)
    # fp32 sums of 512 terms of size ~30 in another order
    torch.testing.assert_close(swiglu(child, x), swiglu(block, x, ranking[:256]), rtol=1e-4, atol=1e-2)
    assert child["mlp.gate_proj.weight"].shape == (256, HIDDEN)
    assert child["post_attention_layernorm.weight"] is block["post_attention_layernorm.weight"]


def test_kept_channels_are_nested_and_in_the_parents_order() -> None:
    ranking = torch.tensor([5, 1, 4, 0, 3, 2])
    assert kept_first(ranking, 4).tolist() == [0, 1, 4, 5]
    assert set(kept_first(ranking, 2).tolist()) < set(kept_first(ranking, 4).tolist())


def test_slice_ffn_takes_the_same_channels_of_all_three_matrices(block: dict[str, Tensor]) -> None:
    kept = torch.tensor([0, 7, 300])
    ffn = {name: tensor for name, tensor in block.items() if subblock_of(name) == "ffn"}
    child = slice_ffn(ffn, kept)
    assert torch.equal(child["mlp.up_proj.weight"][1], block["mlp.up_proj.weight"][7])
    assert torch.equal(child["mlp.gate_proj.weight"][2], block["mlp.gate_proj.weight"][300])
    assert torch.equal(child["mlp.down_proj.weight"][:, 2], block["mlp.down_proj.weight"][:, 300])


def test_pooled_kv_head_is_the_mean_of_its_group(block: dict[str, Tensor]) -> None:
    weight = block["self_attn.k_proj.weight"]
    heads = [weight[h * HEAD_DIM : (h + 1) * HEAD_DIM] for h in range(KV_HEADS)]
    expected = torch.cat([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2])
    torch.testing.assert_close(pool_kv_heads(weight, KV_HEADS, 2), expected)


def test_pooling_equal_heads_changes_nothing() -> None:
    head = torch.randn(HEAD_DIM, HIDDEN)
    pooled = pool_kv_heads(head.repeat(KV_HEADS, 1), KV_HEADS, 2)
    torch.testing.assert_close(pooled, head.repeat(2, 1))


def test_init_attention_pools_weights_and_biases_of_keys_and_values_alone(
    block: dict[str, Tensor], architecture: Architecture
) -> None:
    own = architecture.blocks[0].attention
    child = init_attention(block, AttentionConfig(num_kv_heads=1), parent=own, architecture=architecture, ranking=None)
    for projection in ("k_proj", "v_proj"):
        bias = block[f"self_attn.{projection}.bias"].view(KV_HEADS, HEAD_DIM).mean(0)
        torch.testing.assert_close(child[f"self_attn.{projection}.bias"], bias)
        assert child[f"self_attn.{projection}.weight"].shape == (HEAD_DIM, HIDDEN)
    untouched = ("q_proj.weight", "q_proj.bias", "q_norm.weight", "k_norm.weight", "o_proj.weight")
    assert all(child[f"self_attn.{name}"] is block[f"self_attn.{name}"] for name in untouched)
    assert not any(subblock_of(name) == "ffn" for name in child)


def attention_output(
    architecture: Architecture, tensors: Mapping[str, Tensor], num_kv_heads: int, hidden: Tensor
) -> Tensor:
    """What an attention adds to ``hidden``, by the model's own modules, in fp64."""
    attention = AttentionConfig(num_kv_heads=num_kv_heads)
    block = BlockConfig(attention=attention, ffn=NO_FFN, parent_block_indices=(0,))
    model = build_model(architecture.with_blocks((block,)), seed=0, dtype=torch.float64)
    model.set_attn_implementation("eager")
    attention_tensors = {name: t.double() for name, t in tensors.items() if subblock_of(name) == "attention"}
    layer = build_block(model, architecture, block, attention_tensors)
    with torch.no_grad():
        return layer.attention_update(hidden, **model.model.attention_inputs(hidden))


def without_groups(tensors: Mapping[str, Tensor], removed: set[int]) -> dict[str, Tensor]:
    """The parent's attention, the columns of W_o that read the query heads of ``removed`` KV heads zeroed."""
    weight = tensors["self_attn.o_proj.weight"].clone()
    columns = weight.view(HIDDEN, KV_HEADS, -1)
    for group in removed:
        columns[:, group] = 0
    return {**tensors, "self_attn.o_proj.weight": weight}


@pytest.mark.parametrize(
    ("ranking", "num_kept", "removed"),
    [([2, 1, 3, 0], 2, {0, 3}), ([3, 0, 1, 2], 2, {1, 2}), ([2, 0, 1, 3], 1, {0, 1, 3})],
)
@pytest.mark.parametrize("further", [{"qkv_bias": True, "qk_norm": True}, {"qkv_bias": False, "qk_norm": False}])
def test_selected_kv_heads_give_the_parents_output_without_the_other_groups(
    block: dict[str, Tensor],
    architecture: Architecture,
    ranking: list[int],
    num_kept: int,
    removed: set[int],
    further: dict[str, bool],
) -> None:
    architecture = replace(architecture, **further)
    names = block_shapes(architecture, architecture.blocks[0])
    parent = {name: tensor for name, tensor in block.items() if name in names}
    variant, own = AttentionConfig(num_kv_heads=num_kept), architecture.blocks[0].attention
    child = init_attention(parent, variant, parent=own, architecture=architecture, ranking=torch.tensor(ranking))
    hidden = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = attention_output(architecture, without_groups(parent, removed), KV_HEADS, hidden)
    torch.testing.assert_close(attention_output(architecture, child, num_kept, hidden), expected, rtol=1e-9, atol=1e-9)
    # All query heads are still there: pruning of the KV cache, not of Q and O.
    assert child["self_attn.q_proj.weight"].shape == parent["self_attn.q_proj.weight"].shape


def test_selection_keeps_an_output_bias_and_is_group_major(block: dict[str, Tensor]) -> None:
    """The bias of W_o is a vector over hidden channels, not over heads."""
    bias = torch.arange(HIDDEN)
    attention = {name: tensor for name, tensor in block.items() if subblock_of(name) == "attention"}
    tensors = attention | {"self_attn.o_proj.bias": bias}
    child = select_kv_heads(tensors, torch.tensor([1, 3]), num_heads=HEADS, num_kv_heads=KV_HEADS)
    assert torch.equal(child["self_attn.o_proj.bias"], bias)
    # KV head 1 with its query heads 2, 3 and those of KV head 0; KV head 3 with 6, 7 and those of KV head 2.
    heads = [2, 3, 0, 1, 6, 7, 4, 5]
    for name in ("self_attn.q_proj.weight", "self_attn.q_proj.bias"):
        assert torch.equal(child[name].unflatten(0, (HEADS, -1)), tensors[name].unflatten(0, (HEADS, -1))[heads])
    for name in ("self_attn.k_proj.bias", "self_attn.v_proj.weight"):
        assert torch.equal(child[name].unflatten(0, (2, -1)), tensors[name].unflatten(0, (KV_HEADS, -1))[[1, 3]])
    columns = child["self_attn.o_proj.weight"].unflatten(1, (HEADS, -1))
    assert columns.abs().sum(dim=(0, 2)).ne(0).tolist() == [True, True, False, False] * 2


def test_keeping_all_kv_heads_changes_nothing(block: dict[str, Tensor]) -> None:
    attention = {name: tensor for name, tensor in block.items() if subblock_of(name) == "attention"}
    child = select_kv_heads(attention, torch.arange(KV_HEADS), num_heads=HEADS, num_kv_heads=KV_HEADS)
    assert all(torch.equal(child[name], attention[name]) for name in attention)


def test_linear_attention_is_the_attention_of_a_single_token(block: dict[str, Tensor]) -> None:
    v_proj, o_proj = block["self_attn.v_proj.weight"], block["self_attn.o_proj.weight"]
    x = torch.randn(3, HIDDEN)
    values = (x @ v_proj.T).view(3, KV_HEADS, HEAD_DIM)
    # a token that sees itself alone has attention weight 1: query head h returns the value of KV head h // (8/4)
    heads = torch.stack([values[:, h // (HEADS // KV_HEADS)] for h in range(HEADS)], dim=1)
    expected = heads.flatten(1) @ o_proj.T
    weight = linear_attention(v_proj, o_proj, num_heads=HEADS, num_kv_heads=KV_HEADS)
    torch.testing.assert_close(x @ weight.T, expected, rtol=1e-4, atol=1e-3)


def test_linear_ffn_is_the_product_of_up_and_down(block: dict[str, Tensor], architecture: Architecture) -> None:
    x = torch.randn(3, HIDDEN)
    up, down = block["mlp.up_proj.weight"], block["mlp.down_proj.weight"]
    torch.testing.assert_close(x @ linear_ffn(up, down).T, (x @ up.T) @ down.T, rtol=1e-4, atol=1e-2)
    child = init_ffn(block, FFNConfig(kind="linear"), parent=architecture.blocks[0].ffn, ranking=None)
    assert set(child) == {"post_attention_layernorm.weight", "mlp.linear_mlp.weight"}


def test_own_width_takes_the_parents_tensors(block: dict[str, Tensor], architecture: Architecture) -> None:
    own = architecture.blocks[0].ffn
    child = init_ffn(block, own, parent=own, ranking=None)
    assert all(child[name] is block[name] for name in child)


def test_results_keep_the_parents_data_type(block: dict[str, Tensor]) -> None:
    half = block["self_attn.k_proj.weight"].bfloat16()
    assert pool_kv_heads(half, KV_HEADS, 2).dtype == torch.bfloat16
    assert (
        linear_ffn(block["mlp.up_proj.weight"].bfloat16(), block["mlp.down_proj.weight"].bfloat16()).dtype
        == torch.bfloat16
    )


KV1, W256 = AttentionConfig(num_kv_heads=1), FFNConfig(ffn_dim=256)
LINEAR = AttentionConfig(kind="linear")
OWN_BLOCK = dense_blocks(1, num_kv_heads=2, ffn_dim=512)[0]


@pytest.mark.parametrize("kv_init", ["mean_pool", "select"])
def test_checkpoint_init_gives_every_form_of_replacement_the_tensors_of_its_shape(
    lively_parent_dir: Path, pico_architecture: Architecture, kv_init: KVInit
) -> None:
    own = pico_architecture.blocks[2]
    generator = torch.Generator().manual_seed(0)
    rankings = Rankings(
        channels={2: torch.randperm(512, generator=generator)},
        kv_heads={2: torch.tensor([1, 0])} if kv_init == "select" else {},
        criterion="independent",
    )
    pairs = [(KV1, W256), (own.attention, W256), (LINEAR, FFNConfig(kind="linear")), (KV1, own.ffn)]
    alone = [
        Replacement(block=2, attention=KV1),
        Replacement(block=2, attention=LINEAR, beside="no_op"),
        Replacement(block=2, ffn=W256),
        Replacement(block=2, ffn=W256, beside="no_op"),
        Replacement(block=2, ffn=own.ffn, beside="no_op"),
    ]
    with TensorReader(lively_parent_dir) as reader:
        init = CheckpointInit(reader, pico_architecture, rankings, kv_init)
        for replacement in (*alone, *(Replacement(block=2, attention=a, ffn=f) for a, f in pairs)):
            config = BlockConfig(
                attention=replacement.attention or AttentionConfig(kind="no_op"),
                ffn=replacement.ffn or NO_FFN,
                parent_block_indices=(2,),
            )
            found = {name: tuple(tensor.shape) for name, tensor in init(replacement).items()}
            assert found == block_shapes(pico_architecture, config)
        pair = init(Replacement(block=2, attention=KV1, ffn=W256))
        # Both subblocks of a pair start where each starts alone.
        parts = init(Replacement(block=2, attention=KV1)) | init(Replacement(block=2, ffn=W256))
        assert all(torch.equal(pair[name], parts[name]) for name in pair)
        key = reader.read(block_prefix(2) + "self_attn.k_proj.weight").unflatten(0, (2, -1))
    expected = key[1] if kv_init == "select" else key.mean(dim=0)
    torch.testing.assert_close(pair["self_attn.k_proj.weight"], expected)


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_tensors_of_a_block_are_read_once_for_all_its_replacements(
    lively_parent_dir: Path,
    pico_architecture: Architecture,
    space: SpaceConfig,
    mode: Mode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variants = [block_variants(pico_architecture, index, space) for index in range(4)]
    rankings = Rankings(channels=dict.fromkeys(range(4), torch.arange(512)), kv_heads={}, criterion="independent")
    read, num_products = Counter[str](), Counter[str]()

    def counting_read(reader: TensorReader, name: str, plain: Any = TensorReader.read) -> Tensor:
        read[name] += 1
        return plain(reader, name)

    def counting_linear_ffn(up_proj: Tensor, down_proj: Tensor) -> Tensor:
        num_products["ffn"] += 1
        return linear_ffn(up_proj, down_proj)

    monkeypatch.setattr(TensorReader, "read", counting_read)
    monkeypatch.setattr(child_init, "linear_ffn", counting_linear_ffn)
    with TensorReader(lively_parent_dir) as reader:
        init = CheckpointInit(reader, pico_architecture, rankings, "mean_pool")
        for replacement in library_replacements(pico_architecture, variants, mode):
            init.origin(replacement)
            init(replacement)
    blocks = [block_prefix(index) + name for index in range(4) for name in block_shapes(pico_architecture, OWN_BLOCK)]
    # The attention of block 0 stays: of a pair its tensors are needed, alone they are not.
    needed = [name for name in blocks if mode == "coupled" or not (".0." in name and subblock_of(name[15:]) != "ffn")]
    assert read == Counter(needed)
    assert num_products["ffn"] == 4


@pytest.mark.parametrize(
    ("replacement", "origin"),
    [
        (Replacement(block=1, ffn=W256), {"channels": "independent"}),
        (Replacement(block=1, ffn=W256, beside="no_op"), {"channels": "independent"}),
        (Replacement(block=1, ffn=FFNConfig(ffn_dim=512), beside="no_op"), {}),
        (Replacement(block=1, ffn=FFNConfig(kind="linear")), {}),
        (Replacement(block=1, attention=KV1), {"kv_heads": "select"}),
        (Replacement(block=1, attention=LINEAR), {}),
        (Replacement(block=1, attention=KV1, ffn=W256), {"kv_heads": "select", "channels": "independent"}),
    ],
    ids=lambda value: value.name if isinstance(value, Replacement) else "",
)
def test_origin_names_what_the_first_weights_depend_on_beside_the_parent(
    lively_parent_dir: Path, pico_architecture: Architecture, replacement: Replacement, origin: dict[str, str]
) -> None:
    """Rankings that differ by rounding have the same criterion, and what starts from them the same origin."""
    with TensorReader(lively_parent_dir) as reader:
        for order in (torch.arange(512), torch.arange(512).flip(0)):
            rankings = Rankings(channels={1: order}, kv_heads={1: torch.tensor([1, 0])}, criterion="independent")
            assert CheckpointInit(reader, pico_architecture, rankings, "select").origin(replacement) == origin
        other = replace(rankings, criterion="iterative in 4 rounds")
        found = CheckpointInit(reader, pico_architecture, other, "mean_pool").origin(replacement)
    further = {"channels": "iterative in 4 rounds", "kv_heads": "mean_pool"}
    assert found == {name: further[name] for name in origin}
