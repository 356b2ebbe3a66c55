"""The processes that run one stage together, started by torchrun; a single process where there is no torchrun.

Processes work together only inside :func:`together`. Outside of it each counts as the only one: what the first process
does while the others wait for it needs no thought of them.
"""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from distill.config import require

PATIENCE = timedelta(days=30)
"""Others wait while the first process runs a stage of its own, for days if it must. A process that ends closes its
connections, and torchrun ends the others, so that no timeout is needed to notice."""
TIMEOUT = timedelta(minutes=30)
"""Of one message between processes that train: beyond it one of them hangs. The first step may compile for minutes."""
STORAGE_TIMEOUT = timedelta(hours=6)
"""Of one message between processes that read or write a resume point or a model, at different speeds."""

_together = False
_timeout = PATIENCE
_shares_gpu = False
"""Whether another process has this one's CUDA device."""


def join() -> None:
    """Meet the other processes of this torchrun. Each gets the CUDA device of its local rank where there is one.

    Tensors on a CPU travel through gloo, tensors on a GPU through NCCL, pickled objects through gloo. Processes that
    share a device may still work on the CPU: :func:`check_own_gpu` refuses them otherwise.
    """
    global _shares_gpu
    has_cuda = torch.cuda.is_available()
    if has_cuda and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo", timeout=PATIENCE)
    if has_cuda:
        gpus: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gpus, _gpu())
        _shares_gpu = len(set(gpus)) < len(gpus)


def _gpu() -> tuple[Any, ...]:
    """What tells this process's CUDA device from all others, also where each process sees one device as number 0."""
    index = torch.cuda.current_device()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return socket.gethostname(), visible, index, str(torch.cuda.get_device_properties(index).uuid)


def check_own_gpu() -> None:
    """Refuse work on GPUs where two processes of this torchrun have the same one, which NCCL cannot serve.

    Raises:
        ValueError: there are more processes than GPUs on a host.
    """
    num_gpus = torch.cuda.device_count()
    require(
        not _shares_gpu,
        f"torchrun has started {os.environ.get('LOCAL_WORLD_SIZE', 'several')} processes on this host, where torch "
        f"finds {num_gpus} CUDA device{'s' * (num_gpus != 1)}, and each process needs one of its own; start torchrun "
        f"with --nproc-per-node {num_gpus}, or set engine.device=cpu",
    )


def leave() -> None:
    """Undo of :func:`join`. Only where all went well: it may wait for the others."""
    if distributed.is_initialized():
        _groups.clear()
        distributed.destroy_process_group()


def local_rank() -> int:
    """Number of this process on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def limited(timeout: timedelta) -> Iterator[None]:
    """Have each message between processes that work together fail after ``timeout``: inside, no one waits longer.

    A process that waits for gloo raises ``RuntimeError``; one that waits for NCCL is ended by torch's watchdog.
    """
    before = _timeout
    _set_timeout(timeout)
    try:
        yield
    finally:
        _set_timeout(before)


def _set_timeout(timeout: timedelta) -> None:
    global _timeout
    _timeout = timeout
    if world_size() > 1:
        distributed.distributed_c10d._set_pg_timeout(timeout)


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


def gather_objects(value: Any, group: distributed.ProcessGroup | None = None) -> list[Any]:
    """``value`` of every process, by rank, on every process. Values are pickled: for records, not for tensors.

    Args:
        value: of this process.
        group: :func:`background_group` in the thread that it is for; None elsewhere.
    """
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    distributed.all_gather_object(gathered, value, group)
    return gathered


def barrier(group: distributed.ProcessGroup | None = None) -> None:
    """Wait for all processes; ``group`` as in :func:`gather_objects`."""
    gather_objects(None, group)


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


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of ``tensor`` over all processes, in place. On a GPU the stream waits, not the host."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def all_reduce_sums(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum over all processes of each scalar, which all have under the same names, in one message."""
    total = all_reduce_sum(torch.stack(list(values.values())))
    return dict(zip(values, total.unbind(), strict=True))


@dataclass(frozen=True, kw_only=True)
class DataRanks:
    """Which sequences, and which part of each, this process sees: consecutive ranks share sequences."""

    data_rank: int
    num_data_ranks: int
    part: int
    """Index of this process's part of every sequence."""
    num_parts: int
    group: distributed.ProcessGroup | None
    """The processes that share this one's sequences; None: it has them whole."""


def data_ranks(num_parts: int) -> DataRanks:
    """Deal the processes into groups of ``num_parts`` that share their sequences. Every process calls it.

    Raises:
        ValueError: the groups do not come out even.
    """
    require(
        world_size() % num_parts == 0,
        f"engine.sequence_parallel={num_parts} does not divide {world_size()} processes; start a multiple of it",
    )
    return DataRanks(
        data_rank=rank() // num_parts,
        num_data_ranks=world_size() // num_parts,
        part=rank() % num_parts,
        num_parts=num_parts,
        group=_consecutive_group(num_parts) if num_parts > 1 else None,
    )


def everyone() -> distributed.ProcessGroup:
    """Group of all processes; of this one alone where it is the only one."""
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        atexit.register(leave)
    if world_size() == distributed.get_world_size():
        return distributed.group.WORLD
    if 1 not in _groups:
        _groups[1] = distributed.new_group([distributed.get_rank()], use_local_synchronization=True)
    return _groups[1]


_groups: dict[int, distributed.ProcessGroup] = {}
"""By size: a group holds connections until the end, so that each is made once."""


def background_group() -> distributed.ProcessGroup | None:
    """All processes, for one thread of each that writes beside the one that trains; None where there is only one.

    Messages of two threads in one group could be taken for each other. Its own, through gloo, fail after
    :data:`STORAGE_TIMEOUT`. Every process calls it in its main thread.
    """
    if world_size() == 1:
        return None
    if _BACKGROUND not in _groups:
        _groups[_BACKGROUND] = distributed.new_group(backend="gloo", timeout=STORAGE_TIMEOUT)
    return _groups[_BACKGROUND]


_BACKGROUND = 0
"""In place of a size."""


def _consecutive_group(size: int) -> distributed.ProcessGroup:
    if size not in _groups:
        _groups[size], _ = distributed.new_subgroups(size, timeout=TIMEOUT)
    return _groups[size]
