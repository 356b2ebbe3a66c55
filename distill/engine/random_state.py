"""Random state of each rank on disk; it comes back where the number of ranks is the same."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import distributed


def random_state(device: torch.device) -> dict[str, Tensor]:
    """A copy of the state of torch's generators, of the CPU and of ``device``."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def write_random_state(directory: Path, state: dict[str, Tensor]) -> None:
    """Write this rank's :func:`random_state` into ``directory``."""
    save_file(state, _file(directory))


def load_random_state(directory: Path, device: torch.device) -> None:
    """Undo of :func:`write_random_state`. Written by another number of ranks, it is left alone."""
    if not _file(directory).is_file():
        return
    state = load_file(_file(directory))
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _file(directory: Path) -> Path:
    return directory / f"random_{distributed.rank()}_of_{distributed.world_size()}.safetensors"
