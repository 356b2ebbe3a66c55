"""State of a torch engine on disk: any number of ranks writes it, any other can read it, sharded or not.

Weights and optimizer state go through ``torch.distributed.checkpoint``. Its index is a pickle: resume points are
private to the run that wrote them, and not for exchange.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, checkpoint
from torch.distributed.tensor import DTensor

from distill import distributed
from distill.config import require
from distill.engine.random_state import load_random_state, random_state, write_random_state
from distill.optim import optimizer_tensors

_TENSORS = "tensors"


@dataclass(frozen=True, kw_only=True)
class State:
    """What this rank writes."""

    tensors: dict[str, Tensor]
    """Its shards, and its share of what every rank has whole."""
    random: dict[str, Tensor]
    alone: bool
    """Whether there is no other rank."""
    group: ProcessGroup | None
    """Over which the ranks talk while they write; None: the one that they train with."""

    def write(self, directory: Path) -> None:
        """Write it into ``directory``; every rank calls it."""
        writer = checkpoint.FileSystemWriter(directory / _TENSORS)
        checkpoint.save(self.tensors, storage_writer=writer, process_group=self.group, no_dist=self.alone)
        write_random_state(directory, self.random)


def current(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> State:
    """The state itself, which the next step changes."""
    return State(
        tensors=_own_share(_tensors(model, optimizer)), random=random_state(device), alone=_is_alone(), group=None
    )


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> State:
    """A copy of the state in CPU memory, which any thread may write; every rank calls it."""
    tensors = _own_share(_tensors(model, optimizer))
    return State(
        tensors={name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()},
        random=random_state(device),
        alone=_is_alone(),
        group=distributed.background_group(),
    )


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Undo of :meth:`State.write`, into ``model`` and ``optimizer`` in place; every rank calls it."""
    require(
        (directory / _TENSORS).is_dir(),
        f"{directory} is no resume point of engine.name=torch; go on with the engine that wrote it, or remove it and "
        "start from the model",
    )
    reader = checkpoint.FileSystemReader(directory / _TENSORS)
    checkpoint.load(_tensors(model, optimizer), storage_reader=reader, no_dist=_is_alone())
    load_random_state(directory, device)


def _is_alone() -> bool:
    """Whether this process is the only one, which torch warns of."""
    # For good: filters belong to all threads, and one that is taken back would be missing in the thread that writes.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    return distributed.world_size() == 1


def _own_share(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this rank keeps of sharded tensors, and its share of those that each rank has whole."""
    whole = [name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)]
    others = set(whole) - set(whole[distributed.rank() :: distributed.world_size()])
    return {name: tensor for name, tensor in tensors.items() if name not in others}


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and optimizer state by name; the storage is that of the parameters. Tied parameters stand there once."""
    weights = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    return weights | {f"optimizer/{name}": value for name, value in optimizer_tensors(optimizer).items()}
