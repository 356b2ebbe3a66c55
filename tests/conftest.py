"""Pico models that every test package shares: seconds on a CPU, through the real checkpoint format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before transformers is imported: no test reaches for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

from distill import distributed
from distill.config import RopeConfig
from distill.data.tokenizer import train_tokenizer
from puzzle.model.architecture import (
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    AttentionConfig,
    BlockConfig,
    FFNConfig,
    dense_blocks,
)
from puzzle.model.checkpoint import build_model, load_model, save_model
from puzzle.model.modeling_decilm import DeciLMForCausalLM

VOCAB_SIZE = 320
TOKENIZER_TEXT = (
    "The block library holds every replacement that the search may choose from.",
    "A fused FFN reads what its members read and adds up what they would have added.",
    "def blocks(parent: Architecture) -> Iterator[BlockConfig]: yield from parent.blocks",
)


@pytest.fixture(autouse=True)
def _no_process_group_outlives_its_test() -> Iterator[None]:
    """An engine that deals the weights of one process makes a group, which would last as long as the process."""
    yield
    distributed.leave()


def _architecture(blocks: tuple[BlockConfig, ...]) -> Architecture:
    return Architecture(
        vocab_size=VOCAB_SIZE,
        hidden_dim=64,
        num_heads=4,
        head_dim=16,
        blocks=blocks,
        max_positions=256,
        rope=RopeConfig(theta=10_000.0),
        token_ids={"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    )


@pytest.fixture(scope="session")
def pico_architecture() -> Architecture:
    """Four Llama-shaped blocks, hidden 64, 4 heads, 2 KV heads, FFN 512, vocabulary 320, 256 positions."""
    return _architecture(dense_blocks(4, num_kv_heads=2, ffn_dim=512))


@pytest.fixture(scope="session")
def heterogeneous_architecture() -> Architecture:
    """Six blocks with every kind of attention and FFN; one of them is a dummy."""
    subblocks = (
        (AttentionConfig(num_kv_heads=2), FFNConfig(ffn_dim=512)),
        (NO_ATTENTION, FFNConfig(ffn_dim=256)),
        (AttentionConfig(kind="linear"), FFNConfig(ffn_dim=512)),
        (AttentionConfig(num_kv_heads=1), FFNConfig(kind="linear")),
        (NO_ATTENTION, NO_FFN),
        (AttentionConfig(num_kv_heads=2), NO_FFN),
    )
    return _architecture(
        tuple(
            BlockConfig(attention=attention, ffn=ffn, parent_block_indices=(index,))
            for index, (attention, ffn) in enumerate(subblocks)
        )
    )


@pytest.fixture(scope="session")
def pico_parent_dir(pico_architecture: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model directory of a randomly initialised pico model with its own tokenizer. Not to be written to."""
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TOKENIZER_TEXT, VOCAB_SIZE, tokenizer)
    directory = tmp_path_factory.mktemp("pico") / "parent"
    save_model(
        build_model(pico_architecture, seed=0), directory, architecture=pico_architecture, tokenizer_from=tokenizer
    )
    return directory


@pytest.fixture
def pico_model(pico_parent_dir: Path) -> DeciLMForCausalLM:
    """The pico parent, loaded anew for every test."""
    return load_model(pico_parent_dir)
