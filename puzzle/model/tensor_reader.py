"""Reading of safetensors directories, single-file or sharded, tensor by tensor and row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from distill.config import require
from puzzle.model.safetensors_file import DTYPES, StoredTensor, read_header, read_into

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHUNK_BYTES = 2**20
"""Of a tensor that passes through memory in rows: small enough to be written while it is in the processor's cache."""


def read_json(path: Path) -> dict[str, Any]:
    """Object in a JSON file.

    Raises:
        ValueError: the file is not JSON or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    require(isinstance(content, dict), f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


class TensorReader:
    """Tensors of a safetensors directory, single-file or sharded, one at a time or row by row."""

    def __init__(self, directory: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> None:
        """Look into the index, or into the header of a single file; no tensor is read.

        A shard's header is read, and a damaged shard refused, when the first of its tensors is asked for.

        Args:
            directory: with safetensors files.
            dtypes: those that may be asked for, by their names in the files; tensors of others are refused.

        Raises:
            ValueError: there is no safetensors file, a single one is damaged, the index is none, or a shard that it
                names is missing.
        """
        self.directory = directory
        self._dtypes = dtypes
        self._stack = ExitStack()
        self._streams: dict[str, BinaryIO] = {}
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        if (directory / INDEX_FILE).is_file():
            self._files = _weight_map(directory / INDEX_FILE)
            for file in sorted(set(self._files.values())):
                require((directory / file).is_file(), f"{directory}: shard {file} that {INDEX_FILE} names is missing")
        else:
            found = (directory / WEIGHTS_FILE).is_file()
            require(found, f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; expected one of them")
            self._files = dict.fromkeys(self._header(WEIGHTS_FILE), WEIGHTS_FILE)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._streams.clear()
        self._stack.close()

    def _header(self, file: str) -> dict[str, StoredTensor]:
        if file not in self._headers:
            self._headers[file] = read_header(self.directory / file)
        return self._headers[file]

    def _locate(self, name: str) -> StoredTensor:
        file = self._files.get(name)
        require(file is not None, f"{self.directory} has no tensor {name!r}")
        assert file is not None
        stored = self._header(file).get(name)
        require(stored is not None, f"{self.directory / file} lacks the tensor {name!r} that the index places there")
        assert stored is not None
        return stored

    def _stream(self, file: str) -> BinaryIO:
        if file not in self._streams:
            stream = (self.directory / file).open("rb", buffering=0)
            self._streams[file] = self._stack.enter_context(stream)
        return self._streams[file]

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor ``name``, from the header."""
        return self._locate(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Data type of tensor ``name``, from the header.

        Raises:
            ValueError: the weights are quantised.
        """
        stored = self._locate(name).dtype
        known = ", ".join(self._dtypes)
        require(stored in self._dtypes, f"{self.directory}: {name} is stored as {stored}, not as one of {known}")
        return self._dtypes[stored]

    def read(self, name: str) -> Tensor:
        """Tensor ``name`` on the CPU, in its stored data type.

        Raises:
            ValueError: there is no such tensor, or its weights are quantised.
        """
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        stored = self._locate(name)
        read_into(self._stream(self._files[name]), stored.offset, tensor)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the first dimension of tensor ``name``; no other is read."""
        stored = self._locate(name)
        num_rows, *rest = stored.shape
        assert 0 <= start <= stop <= num_rows, (name, start, stop, num_rows)
        tensor = torch.empty((stop - start, *rest), dtype=self.dtype(name))
        read_into(self._stream(self._files[name]), stored.offset + start * (stored.num_bytes // num_rows), tensor)
        return tensor

    def row_chunks(self, name: str, chunk_bytes: int | None = None) -> Iterator[Tensor]:
        """Tensor ``name`` in runs of rows of some ``chunk_bytes`` (CHUNK_BYTES), each in memory of its own."""
        stored = self._locate(name)
        for rows in row_ranges(stored.shape[0], stored.num_bytes // stored.shape[0], chunk_bytes):
            yield self.rows(name, rows.start, rows.stop)

    def place(self, name: str) -> tuple[BinaryIO, StoredTensor]:
        """Where the bytes of tensor ``name`` are: an open file, valid as long as this reader, and the place in it."""
        stored = self._locate(name)
        return self._stream(self._files[name]), stored


def _weight_map(path: Path) -> dict[str, str]:
    """File of every tensor, by an index."""
    found = read_json(path).get("weight_map")
    require(
        isinstance(found, dict) and all(isinstance(file, str) for file in found.values()),
        f"{path} has no weight_map from tensors to files; write or download it again",
    )
    assert isinstance(found, dict)
    return found


def row_ranges(num_rows: int, row_bytes: int, chunk_bytes: int | None = None) -> Iterator[range]:
    """``num_rows`` rows in order, in runs of some ``chunk_bytes`` (CHUNK_BYTES) and one row at least."""
    step = max(1, (chunk_bytes or CHUNK_BYTES) // row_bytes)
    for start in range(0, num_rows, step):
        yield range(start, min(start + step, num_rows))
