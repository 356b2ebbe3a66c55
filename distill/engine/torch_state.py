"""State of a torch engine on disk: any number of ranks writes it, any other can read it, sharded or not.

Weights and optimizer state go through ``torch.distributed.checkpoint``. Its index is a pickle: resume points are
private to the run that wrote them, and not for exchange.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint

from distill import distributed
from distill.config import require
from distill.engine.random_state import load_random_state, save_random_state
from distill.optim import optimizer_tensors

_TENSORS = "tensors"


def save(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Write the state into ``directory``; every rank calls it."""
    with _perhaps_alone() as alone:
        writer = checkpoint.FileSystemWriter(directory / _TENSORS)
        checkpoint.save(_tensors(model, optimizer), storage_writer=writer, no_dist=alone)
    save_random_state(directory, device)


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Undo of :func:`save`, into ``model`` and ``optimizer`` in place; every rank calls it."""
    require(
        (directory / _TENSORS).is_dir(),
        f"{directory} is no resume point of engine.name=torch; go on with the engine that wrote it, or remove it and "
        "start from the model",
    )
    with _perhaps_alone() as alone:
        reader = checkpoint.FileSystemReader(directory / _TENSORS)
        checkpoint.load(_tensors(model, optimizer), storage_reader=reader, no_dist=alone)
    load_random_state(directory, device)


@contextmanager
def _perhaps_alone() -> Iterator[bool]:
    """Whether this process is the only one, which torch warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield distributed.world_size() == 1


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state by name; the storage is that of the parameters. Tied parameters stand there once."""
    weights = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    return weights | {f"optimizer/{name}": value for name, value in optimizer_tensors(optimizer).items()}
