"""The processes that run one stage together, started by torchrun; a single process where there is no torchrun.

Processes work together only inside :func:`together`. Outside of it each counts as the only one: what the first process
does while the others wait for it needs no thought of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

TIMEOUT = timedelta(days=30)
"""Others wait while the first process runs a stage of its own, for days if it must. A process that ends closes its
connections, and torchrun ends the others, so that no timeout is needed to notice."""

_together = False


def join() -> None:
    """Meet the other processes of this torchrun. Each gets the CUDA device of its local rank where there is one.

    Tensors on a CPU travel through gloo, tensors on a GPU through NCCL, pickled objects through gloo.
    """
    has_cuda = torch.cuda.is_available()
    if has_cuda and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo", timeout=TIMEOUT)


def leave() -> None:
    """Undo of :func:`join`. Only where all went well: it may wait for the others."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def local_rank() -> int:
    """Number of this process on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def together() -> Iterator[None]:
    """All processes run what is inside. They leave it at the same time, unless one of them fails."""
    global _together
    _together = distributed.is_initialized()
    try:
        yield
        barrier()
    finally:
        _together = False


def rank() -> int:
    """Number of this process."""
    return distributed.get_rank() if _together else 0


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if _together else 1


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return rank() == 0


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every process, by rank, on every process. Values are pickled: for records, not for tensors."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def barrier() -> None:
    """Wait for all processes."""
    gather_objects(None)


def from_first(value: Any = None) -> Any:
    """``value`` of the first process, on every process; also outside of :func:`together`. It is pickled."""
    values = [value]
    distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def claim(name: str) -> bool:
    """Whether this process is the first to claim ``name``. Needs no answer of another process."""
    return _store().add(name, 1) == 1


def is_claimed(name: str) -> bool:
    """Whether a process has claimed ``name``."""
    return distributed.is_initialized() and _store().check([name])


def _store() -> Any:
    return distributed.PrefixStore("claims", distributed.distributed_c10d._get_default_store())


def start_send(tensor: Tensor, *, to: int) -> distributed.Work:
    """Send ``tensor`` to rank ``to`` without waiting. It must stay as it is until the handle's ``wait`` returns."""
    return distributed.isend(tensor, dst=to)


def receive_into(tensor: Tensor, *, source: int) -> None:
    """Fill ``tensor`` with what rank ``source`` sends next. On a GPU the stream waits, not the host."""
    distributed.recv(tensor, src=source)
