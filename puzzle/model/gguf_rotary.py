"""The order of rotary channels in GGUF files: llama.cpp turns neighbouring ones together, transformers two halves."""

from __future__ import annotations

from torch import Tensor

ROTATED = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
"""Ends of the names of tensors whose rows change places."""


def rotary_halves(rows: Tensor, *, head_dim: int) -> Tensor:
    """``rows [heads * head_dim, ...]`` from neighbouring pairs (llama.cpp) to halves (ours)."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def rotary_neighbours(rows: Tensor, *, head_dim: int) -> Tensor:
    """Inverse of :func:`rotary_halves`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
