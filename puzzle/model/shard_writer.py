"""Sharded safetensors files that are written tensor by tensor, in any order, without a shard in memory.

The shapes of all tensors are known beforehand, so every file's header, and the place of every tensor in it, is settled
before the first tensor comes. Files are named ``.part`` until the last tensor has come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from puzzle.model.safetensors_file import StoredTensor, copy_bytes, encode_header, start_writing, write_from
from puzzle.model.tensor_layout import Shapes
from puzzle.model.tensor_reader import WEIGHTS_FILE

NUM_THREADS = 4
"""That read and write beside the one that makes the pieces: disks and memory are busy at once then."""
MAX_WAITING_JOBS = 8
"""Pieces of one tensor that are made and not yet written."""
COPY_BYTES = 16 * 2**20
"""Of one job of a copy."""

Job = Callable[[], None]


class ShardWriter:
    """The weight files of one checkpoint."""

    def __init__(
        self, directory: Path, shapes: Shapes, dtypes: Mapping[str, torch.dtype], *, max_shard_bytes: int
    ) -> None:
        """Lay out the files and write their headers."""
        self._directory = directory
        self._threads = ThreadPoolExecutor(max_workers=NUM_THREADS, thread_name_prefix="shards")
        self._num_bytes = {name: prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
        self.weight_map: dict[str, str] = {}
        """File of every tensor, under its final name."""
        self._offsets: dict[str, int] = {}
        shards = plan_shards(self._num_bytes, max_shard_bytes)
        for index, names in enumerate(shards, start=1):
            file = WEIGHTS_FILE if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            head, offsets = encode_header({name: shapes[name] for name in names}, dtypes)
            self._part(file).write_bytes(head)
            self._offsets |= offsets
            self.weight_map |= dict.fromkeys(names, file)

    @property
    def files(self) -> tuple[str, ...]:
        """Final names, in order."""
        return tuple(dict.fromkeys(self.weight_map.values()))

    @property
    def total_bytes(self) -> int:
        """Of all tensors."""
        return sum(self._num_bytes.values())

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write tensor ``name``: ``pieces`` one after another have all its bytes; each is contiguous, on the CPU and in
        memory of its own."""

        def jobs(target: BinaryIO) -> Iterator[tuple[int, Job]]:
            offset = self._offsets[name]
            for piece in pieces:
                yield piece.nbytes, partial(write_from, target, offset, piece)
                offset += piece.nbytes

        self._run(name, jobs)

    def copy(self, name: str, sources: Iterable[tuple[BinaryIO, StoredTensor]]) -> None:
        """Write tensor ``name`` from the bytes of ``sources``, one after another."""

        def jobs(target: BinaryIO) -> Iterator[tuple[int, Job]]:
            offset = self._offsets[name]
            for source, stored in sources:
                for start in range(0, stored.num_bytes, COPY_BYTES):
                    count = min(COPY_BYTES, stored.num_bytes - start)
                    yield count, partial(copy_bytes, source, stored.offset + start, target, offset + start, count)
                offset += stored.num_bytes

        self._run(name, jobs)

    def _run(self, name: str, jobs: Callable[[BinaryIO], Iterator[tuple[int, Job]]]) -> None:
        """Do ``jobs``, each with the bytes that it writes, several at once; all are done on return."""
        left = self._num_bytes[name]
        with self._open(name) as target:
            waiting: deque[Future[None]] = deque()
            try:
                for num_bytes, job in jobs(target):
                    left -= num_bytes
                    assert left >= 0, f"{name}: more than {self._num_bytes[name]} bytes"
                    if len(waiting) >= MAX_WAITING_JOBS:
                        waiting.popleft().result()
                    waiting.append(self._threads.submit(job))
                for future in waiting:
                    future.result()
            finally:
                # No job may find its file closed, or its number given to another file.
                wait(waiting)
            start_writing(target, self._offsets[name], self._num_bytes[name])
        assert left == 0, f"{name}: {left} of {self._num_bytes[name]} bytes are missing"

    def finish(self) -> None:
        """Give the files their final names; every tensor has been written."""
        self._threads.shutdown()
        for file in self.files:
            self._part(file).rename(self._directory / file)

    def _part(self, file: str) -> Path:
        return self._directory / f"{file}.part"

    def _open(self, name: str) -> BinaryIO:
        return self._part(self.weight_map[name]).open("r+b", buffering=0)


def plan_shards(num_bytes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names of every shard, in the order given; a tensor of more than ``max_shard_bytes`` has a shard of its own."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in num_bytes.items():
        if not shards or filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
