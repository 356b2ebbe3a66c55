"""The safetensors format: where every tensor of a file stands, so that its bytes can be moved without being held.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> data type, shape and where the
bytes begin and end, counted from the header's end) and the bytes. Files are read and written at offsets, not mapped:
the pages of a mapping count as memory of the process, and the writer of the official library wants all tensors at once.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from distill.config import require
from puzzle.model.tensor_layout import Shapes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""Names in the header of a safetensors file."""

FP8_DTYPES = DTYPES | {"F8_E4M3": torch.float8_e4m3fn}
"""With the one of weights that mean nothing without their scales: who reads them asks for it."""

_NAMES = {dtype: name for name, dtype in FP8_DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit: a file that is none could claim any length."""
_COPY_BYTES = 8 * 2**20
"""Moved at once, so that the next are on their way meanwhile."""
_AHEAD_BYTES = 8 * 2**20
"""How far ahead of what is read the kernel is told to fetch: its own guess is 128 KiB."""
_NO_KERNEL_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor in a safetensors file, by its header."""

    file: str
    """Name of the file."""
    dtype: str
    """Key of FP8_DTYPES; other quantised files have others."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    num_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of ``path`` by name; no tensor is read.

    Raises:
        ValueError: not a safetensors file, or one that was cut off.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            require(2 <= length <= _MAX_HEADER_BYTES, f"it claims a header of {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        start = _LENGTH_BYTES + length
        tensors = {name: _stored(path.name, entry, start) for name, entry in header.items()}
        _check_extent(tensors, start, path.stat().st_size)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}; write or download it again") from error
    return tensors


def _stored(file: str, entry: dict[str, Any], start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    dtype, shape, num_bytes = entry["dtype"], tuple(entry["shape"]), end - begin
    if dtype in FP8_DTYPES:
        expected = prod(shape) * FP8_DTYPES[dtype].itemsize
        require(num_bytes == expected, f"{dtype} of shape {list(shape)} takes {expected} bytes, not {num_bytes}")
    return StoredTensor(file=file, dtype=dtype, shape=shape, offset=start + begin, num_bytes=num_bytes)


def _check_extent(tensors: dict[str, StoredTensor], start: int, num_bytes: int) -> None:
    end = start
    for stored in sorted(tensors.values(), key=lambda stored: (stored.offset, stored.num_bytes)):
        require(stored.offset == end, f"its tensors leave a gap or overlap at byte {end}")
        end += stored.num_bytes
    require(num_bytes == end, f"it has {num_bytes} bytes, its header describes {end}")


def encode_header(shapes: Shapes, dtypes: Mapping[str, torch.dtype]) -> tuple[bytes, dict[str, int]]:
    """First bytes of a file with tensors of ``shapes`` and ``dtypes``, and the offset of every tensor in it.

    The header is padded to a multiple of 8 bytes, so that tensors are aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, shape in shapes.items():
        begins[name], end = end, end + prod(shape) * dtypes[name].itemsize
        entries[name] = {"dtype": _NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [begins[name], end]}
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    head = len(content).to_bytes(_LENGTH_BYTES, "little") + content
    return head, {name: len(head) + begin for name, begin in begins.items()}


def read_into(stream: BinaryIO, offset: int, tensor: Tensor) -> None:
    """Fill contiguous CPU ``tensor`` with the bytes from ``offset`` on.

    Raises:
        ValueError: the file ends before.
    """
    view = _bytes_of(tensor)
    end = offset + len(view)
    _fetch_ahead(stream, offset + _AHEAD_BYTES, len(view))
    while view:
        count = os.preadv(stream.fileno(), [view], offset)
        require(count > 0, _cut_off(stream, end))
        view, offset = view[count:], offset + count


def write_from(stream: BinaryIO, offset: int, tensor: Tensor) -> None:
    """Write the bytes of contiguous CPU ``tensor`` from ``offset`` on."""
    view = _bytes_of(tensor)
    while view:
        count = os.pwrite(stream.fileno(), view, offset)
        view, offset = view[count:], offset + count


def copy_bytes(source: BinaryIO, source_offset: int, target: BinaryIO, offset: int, num_bytes: int) -> None:
    """Copy ``num_bytes`` from file to file, within the kernel where it can.

    Raises:
        ValueError: ``source`` ends before.
    """
    copied = _kernel_copy(source, source_offset, target, offset, num_bytes)
    while copied < num_bytes:
        content = os.pread(source.fileno(), min(_COPY_BYTES, num_bytes - copied), source_offset + copied)
        require(len(content) > 0, _cut_off(source, source_offset + num_bytes))
        copied += os.pwrite(target.fileno(), content, offset + copied)


def _kernel_copy(source: BinaryIO, source_offset: int, target: BinaryIO, offset: int, num_bytes: int) -> int:
    """Bytes that the kernel has copied; fewer than asked for where it cannot, or where ``source`` ends."""
    copied = 0
    if not hasattr(os, "copy_file_range"):
        return copied
    while copied < num_bytes:
        places = (source_offset + copied, offset + copied)
        _fetch_ahead(source, places[0] + _AHEAD_BYTES, _COPY_BYTES)
        try:
            wanted = min(_COPY_BYTES, num_bytes - copied)
            count = os.copy_file_range(source.fileno(), target.fileno(), wanted, *places)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            break
        if count == 0:
            break
        copied += count
    return copied


def start_writing(stream: BinaryIO, offset: int, num_bytes: int) -> None:
    """Tell the kernel to begin with writing a range to the disk, and not to keep it cached. Does not wait."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _fetch_ahead(stream: BinaryIO, offset: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), offset, num_bytes, os.POSIX_FADV_WILLNEED)


def _cut_off(stream: BinaryIO, end: int) -> str:
    return f"{stream.name} ends before byte {end}, which its header promises; write or download it again"


def _bytes_of(tensor: Tensor) -> memoryview:
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
