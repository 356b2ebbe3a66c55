"""Sharded safetensors files that are written tensor by tensor, in any order, without a shard in memory.

The shapes of all tensors are known beforehand, so every file's header, and the place of every tensor in it, is settled
before the first tensor comes. Files are named ``.part`` until the last tensor has come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from puzzle.model.safetensors_file import StoredTensor, copy_bytes, encode_header, start_writing, write_from
from puzzle.model.tensor_layout import Shapes
from puzzle.model.tensor_reader import WEIGHTS_FILE

MAX_WAITING_PIECES = 4
"""Pieces of one tensor that are made and not yet written."""


class ShardWriter:
    """The weight files of one checkpoint."""

    def __init__(self, directory: Path, shapes: Shapes, *, dtype: torch.dtype, max_shard_bytes: int) -> None:
        """Lay out the files and write their headers."""
        self._directory = directory
        self._num_bytes = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        self.weight_map: dict[str, str] = {}
        """File of every tensor, under its final name."""
        self._offsets: dict[str, int] = {}
        shards = plan_shards(self._num_bytes, max_shard_bytes)
        for index, names in enumerate(shards, start=1):
            file = WEIGHTS_FILE if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            head, offsets = encode_header({name: shapes[name] for name in names}, dtype)
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
        """Write tensor ``name``: ``pieces`` are contiguous, on the CPU, and one after another have all its bytes."""
        offset = self._offsets[name]
        end = offset + self._num_bytes[name]
        # One thread writes while this one makes the next pieces: either is busy with memory more than with the disk.
        with self._open(name) as target, ThreadPoolExecutor(max_workers=1) as thread:
            written: deque[Future[None]] = deque()
            for piece in pieces:
                assert offset + piece.nbytes <= end, f"{name}: more than {self._num_bytes[name]} bytes"
                if len(written) >= MAX_WAITING_PIECES:
                    written.popleft().result()
                written.append(thread.submit(write_from, target, offset, piece))
                offset += piece.nbytes
            for future in written:
                future.result()
            start_writing(target, self._offsets[name], self._num_bytes[name])
        assert offset == end, f"{name}: {end - offset} of {self._num_bytes[name]} bytes are missing"

    def copy(self, name: str, sources: Iterable[tuple[BinaryIO, StoredTensor]]) -> None:
        """Write tensor ``name`` from the bytes of ``sources``, one after another."""
        offset = self._offsets[name]
        end = offset + self._num_bytes[name]
        with self._open(name) as target:
            for source, stored in sources:
                copy_bytes(source, stored.offset, target, offset, stored.num_bytes)
                offset += stored.num_bytes
            start_writing(target, self._offsets[name], self._num_bytes[name])
        assert offset == end, f"{name}: {end - offset} of {self._num_bytes[name]} bytes are missing"

    def finish(self) -> None:
        """Give the files their final names; every tensor has been written."""
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
