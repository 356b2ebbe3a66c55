"""Pico models with norms, biases and widths that differ, so that a wrong index or a forgotten scale shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import RopeConfig
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.checkpoint import build_model, save_model

Block = tuple[int | None, int | None]
"""KV heads and FFN width; None: no-op."""

MakeArchitecture = Callable[..., Architecture]
MakeCheckpoint = Callable[..., Architecture]


def _architecture(*blocks: Block, vocab_size: int = 64, **fields: Any) -> Architecture:
    return Architecture(
        vocab_size=vocab_size,
        hidden_dim=32,
        num_heads=4,
        head_dim=8,
        max_positions=128,
        rope=RopeConfig(theta=10_000.0),
        blocks=tuple(
            BlockConfig(
                attention=NO_ATTENTION if heads is None else AttentionConfig(num_kv_heads=heads),
                ffn=NO_FFN if width is None else FFNConfig(ffn_dim=width),
                parent_block_indices=(index,),
            )
            for index, (heads, width) in enumerate(blocks)
        ),
        **fields,
    )


def _checkpoint(
    directory: Path, *blocks: Block, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any
) -> Architecture:
    architecture = _architecture(*blocks, **fields)
    model = build_model(architecture, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.3, 2.0, generator=generator)
            else:
                parameter.normal_(0.0, 0.15, generator=generator)
    save_model(model.to(dtype), directory, architecture=architecture, tokenizer_from=None, dtype=dtype)
    return architecture


@pytest.fixture
def make_architecture() -> MakeArchitecture:
    """``make_architecture((2, 256), (None, 512), ...)``: blocks as (KV heads, FFN width)."""
    return _architecture


@pytest.fixture
def make_checkpoint() -> MakeCheckpoint:
    """``make_checkpoint(directory, (2, 256), ..., dtype=...)``: the same, written with random weights."""
    return _checkpoint
