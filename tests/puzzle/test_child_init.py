"""Every child init against the mathematics that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from distill.config import RopeConfig
from puzzle.child_init import (
    init_attention,
    init_ffn,
    kept_channels,
    linear_attention,
    linear_ffn,
    pool_kv_heads,
    slice_ffn,
)
from puzzle.library import subblock_of
from puzzle.model.architecture import Architecture, AttentionConfig, FFNConfig, dense_blocks

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
    assert kept_channels(ranking, 4).tolist() == [0, 1, 4, 5]
    assert set(kept_channels(ranking, 2).tolist()) < set(kept_channels(ranking, 4).tolist())


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
    child = init_attention(
        block, AttentionConfig(num_kv_heads=1), parent=architecture.blocks[0].attention, architecture=architecture
    )
    for projection in ("k_proj", "v_proj"):
        bias = block[f"self_attn.{projection}.bias"].view(KV_HEADS, HEAD_DIM).mean(0)
        torch.testing.assert_close(child[f"self_attn.{projection}.bias"], bias)
        assert child[f"self_attn.{projection}.weight"].shape == (HEAD_DIM, HIDDEN)
    untouched = ("q_proj.weight", "q_proj.bias", "q_norm.weight", "k_norm.weight", "o_proj.weight")
    assert all(child[f"self_attn.{name}"] is block[f"self_attn.{name}"] for name in untouched)
    assert not any(subblock_of(name) == "ffn" for name in child)


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
