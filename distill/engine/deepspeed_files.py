"""Files of a resume point of the DeepSpeed engine: one per parameter, whole, read at any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from distill.engine.random_state import write_random_state

STATE = "zero"
"""Directory of a resume point with one file per parameter."""


def write(directory: Path, share: Iterable[tuple[str, dict[str, Tensor]]], random: dict[str, Tensor]) -> None:
    """Write this rank's share, tensors by parameter, and its random state into ``directory``, one file at a time."""
    state = directory / STATE
    state.mkdir(exist_ok=True)
    for name, tensors in share:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, state / f"{name}.safetensors")
    write_random_state(directory, random)
