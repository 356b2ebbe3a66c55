"""The log that W&B keeps of a run on disk: LevelDB's log format, records in blocks. Torch-free.

W&B writes it in whole blocks, so a process that is killed takes with it what stood in the last one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 32_768
FILE_HEADER_BYTES = 7
PART_HEADER = struct.Struct("<IHB")
"""Checksum, length and kind of one part of a record."""

WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
"""Kinds of parts; a record that does not fit its block is cut into several."""


def read_records(file: Path) -> Iterator[bytes]:
    """Records of the log in order, up to the first that is not whole."""
    data = file.read_bytes()
    position, record = FILE_HEADER_BYTES, b""
    while position + PART_HEADER.size <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < PART_HEADER.size:
            position += left
            continue
        _, length, kind = PART_HEADER.unpack_from(data, position)
        start = position + PART_HEADER.size
        position = start + length
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or position > len(data):
            return
        record += data[start:position]
        if kind in (WHOLE, LAST):
            yield record
            record = b""
