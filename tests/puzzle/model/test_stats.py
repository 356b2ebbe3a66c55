from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.config import RopeConfig
from puzzle.model import stats
from puzzle.model.architecture import Architecture, AttentionConfig, FFNConfig, dense_blocks
from puzzle.model.checkpoint import build_model

VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": True},
    {"qkv_bias": True},
    {"qk_norm": True, "head_dim": 32},
    {"sliding_window": 4},
]


def llama(num_blocks: int, hidden_dim: int, num_heads: int, ffn_dim: int) -> Architecture:
    return Architecture(
        vocab_size=128_256,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        head_dim=128,
        blocks=dense_blocks(num_blocks, num_kv_heads=8, ffn_dim=ffn_dim),
        max_positions=131_072,
        rope=RopeConfig(theta=500_000.0),
    )


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("fixture", ["pico_architecture", "heterogeneous_architecture"])
def test_counts_equal_the_built_module(fixture: str, changes: dict[str, Any], request: pytest.FixtureRequest) -> None:
    architecture = replace(request.getfixturevalue(fixture), **changes)
    model = build_model(architecture, seed=0, dtype=torch.bfloat16)
    parameters = list(model.parameters())
    assert stats.num_params(architecture) == sum(parameter.numel() for parameter in parameters)
    assert stats.weight_bytes(architecture, 2) == sum(parameter.nbytes for parameter in parameters)
    for block, module in zip(architecture.blocks, model.model.layers, strict=True):
        assert stats.block_params(architecture, block) == sum(parameter.numel() for parameter in module.parameters())
    blocks = sum(stats.block_params(architecture, block) for block in architecture.blocks)
    assert stats.other_params(architecture) == stats.num_params(architecture) - blocks


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "head_dim": 32}])
def test_kv_bytes_equal_the_filled_cache(heterogeneous_architecture: Architecture, changes: dict[str, Any]) -> None:
    architecture = replace(heterogeneous_architecture, **changes)
    num_tokens = 6
    with torch.no_grad():
        cache = build_model(architecture, seed=0)(torch.zeros(1, num_tokens, dtype=torch.long)).past_key_values
    filled = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert stats.kv_bytes_per_token(architecture, 4) * num_tokens == filled


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"head_dim": 32}])
def test_flops_equal_the_counted_operators(heterogeneous_architecture: Architecture, changes: dict[str, Any]) -> None:
    architecture = replace(heterogeneous_architecture, **changes)
    num_tokens = 8
    model = build_model(architecture, seed=0)
    # Plain operators, which the counter sees; they also compute the masked half, so every token attends to all.
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, num_tokens, dtype=torch.long))
    assert stats.flops_per_token(architecture, num_tokens) * num_tokens == counter.get_total_flops()


def test_sliding_window_bounds_attention_flops(pico_architecture: Architecture) -> None:
    windowed = replace(pico_architecture, sliding_window=16)
    assert stats.flops_per_token(windowed, 256) == stats.flops_per_token(pico_architecture, 16)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 64])
def test_flops_of_a_sequence_are_the_sum_over_its_positions(
    heterogeneous_architecture: Architecture, window: int | None
) -> None:
    architecture = replace(heterogeneous_architecture, sliding_window=window)
    counted = sum(stats.flops_per_token(architecture, position) for position in range(1, 8))
    assert stats.sequence_flops(architecture, 7) == counted
    head = 2 * architecture.vocab_size * architecture.hidden_dim
    assert stats.sequence_flops(architecture, 7, head=False) == counted - 7 * head


def test_published_parameter_counts() -> None:
    assert stats.num_params(llama(32, 4096, 32, 14_336)) == 8_030_261_248
    assert stats.num_params(llama(80, 8192, 64, 28_672)) == 70_553_706_496
    assert stats.num_params(llama(126, 16_384, 128, 53_248)) == 405_853_388_800


def test_kv_bytes_of_llama_8b() -> None:
    architecture = llama(32, 4096, 32, 14_336)
    # 32 blocks x (key and value) x 8 KV heads x 128 channels x 2 bytes.
    assert stats.kv_bytes_per_token(architecture, 2) == 131_072
    assert stats.attention_kv_bytes_per_token(architecture, AttentionConfig(num_kv_heads=4), 2) == 2048


def test_no_op_costs_nothing(pico_architecture: Architecture) -> None:
    attention, ffn = AttentionConfig(kind="no_op"), FFNConfig(kind="no_op")
    assert stats.attention_params(pico_architecture, attention) == 0
    assert stats.ffn_params(pico_architecture, ffn) == 0
    assert stats.attention_kv_bytes_per_token(pico_architecture, attention, 2) == 0
    assert stats.attention_flops_per_token(pico_architecture, attention, 128) == 0
