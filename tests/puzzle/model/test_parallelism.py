from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from distill.config import EngineConfig
from puzzle.model.architecture import Architecture, AttentionConfig, FFNConfig
from puzzle.model.parallelism import check_parallelism, num_real_blocks

# The pico parent: 4 heads, 2 KV heads, FFN 512, vocabulary 320. The heterogeneous model: KV heads 2 and 1, FFNs 512 and
# 256, six blocks of which one is a dummy.


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_parallel": 2},
        # Two KV heads over four ranks: each is repeated.
        {"sequence_parallel": 4},
        {"name": "megatron", "tensor_parallel": 4},
        {"name": "megatron", "tensor_parallel": 2, "pipeline_parallel": 4},
    ],
)
def test_models_that_can_be_dealt(
    pico_architecture: Architecture, heterogeneous_architecture: Architecture, options: dict[str, Any]
) -> None:
    for architecture in (pico_architecture, heterogeneous_architecture):
        check_parallelism(architecture, EngineConfig(**options))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {},
            {"sequence_parallel": 3},
            "engine.sequence_parallel=3: it does not divide the 4 attention heads of the student; "
            "set engine.sequence_parallel=2 or 4",
        ),
        ({}, {"sequence_parallel": 8}, r"does not divide the 4 attention heads .*set engine.sequence_parallel=4$"),
        (
            {"sliding_window": 128},
            {"sequence_parallel": 2},
            r"128 tokens that attention looks back .*sequence_parallel=1$",
        ),
        (
            {"num_heads": 6, "vocab_size": 510},
            {"name": "megatron", "tensor_parallel": 3},
            r"engine.tensor_parallel=3: the 2 KV heads of block 0 are neither a multiple .*tensor_parallel=2$",
        ),
        (
            {"vocab_size": 321},
            {"name": "megatron", "tensor_parallel": 2},
            r"engine.tensor_parallel=2: it does not divide the vocabulary of 321 rows of the student; "
            r"set engine.tensor_parallel=1$",
        ),
        (
            {},
            {"name": "megatron", "pipeline_parallel": 5},
            r"engine.pipeline_parallel=5: more stages than the 4 blocks with attention or FFN of the student; "
            r"set engine.pipeline_parallel=4",
        ),
        (
            {"parallel_windows": ((1, 2),)},
            {"name": "megatron"},
            r"the student runs blocks 1-2 in parallel; set engine.name=torch engine.shard=true",
        ),
    ],
)
def test_models_that_cannot_be_dealt_name_the_nearest_setting(
    pico_architecture: Architecture, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_parallelism(replace(pico_architecture, **changes), EngineConfig(**options), role="student")
    assert "\n" not in str(caught.value)


def test_ffn_widths_and_heads_of_every_block_count(heterogeneous_architecture: Architecture) -> None:
    wide = replace(heterogeneous_architecture, num_heads=512, vocab_size=512, hidden_dim=512)
    with pytest.raises(ValueError, match=r"does not divide the 256 channels of the FFN in block 1 .*=256$"):
        check_parallelism(wide, EngineConfig(name="megatron", tensor_parallel=512))


def test_a_model_without_attention_needs_no_heads(heterogeneous_architecture: Architecture) -> None:
    attention_free = replace(heterogeneous_architecture, blocks=heterogeneous_architecture.blocks[1:3])
    check_parallelism(attention_free, EngineConfig(sequence_parallel=3))


def test_megatron_asks_for_heads_and_rows_where_blocks_have_no_heads(
    heterogeneous_architecture: Architecture,
) -> None:
    linear = replace(
        heterogeneous_architecture.blocks[0], attention=AttentionConfig(kind="linear"), ffn=FFNConfig(kind="linear")
    )
    headless = replace(heterogeneous_architecture, blocks=(linear,), num_heads=6, vocab_size=512)
    with pytest.raises(ValueError, match=r"=4: it does not divide the 6 attention heads .*tensor_parallel=2$"):
        check_parallelism(headless, EngineConfig(name="megatron", tensor_parallel=4))
    odd = replace(headless, num_heads=4, hidden_dim=66)
    with pytest.raises(ValueError, match=r"divide the 66 rows of the linear replacement in block 0 .*=2$"):
        check_parallelism(odd, EngineConfig(name="megatron", tensor_parallel=4))


def test_dummies_are_no_stage(heterogeneous_architecture: Architecture) -> None:
    assert num_real_blocks(heterogeneous_architecture) == 5
    with pytest.raises(ValueError, match="more stages than the 5 blocks"):
        check_parallelism(heterogeneous_architecture, EngineConfig(name="megatron", pipeline_parallel=6))
