"""Overlays that are written in one go: qcow2 files with some blocks of a disk, on top of an image that stays as it is.

Format: docs/interop/qcow2.txt in QEMU. A cluster of the file is a block, so nothing beneath has to be read for a part of a cluster.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

__all__ = ["LARGEST", "SMALLEST", "write_overlay"]

SMALLEST, LARGEST = 1 << 9, 1 << 16
"""Bytes of blocks: QEMU takes no smaller cluster, and larger ones than its own gain nothing."""

_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_MAGIC, _VERSION, _REFCOUNT_ORDER = b"QFI\xfb", 3, 4  # counts of 2^4 bits
_REFCOUNT_BYTES, _ENTRY_BYTES = 2, 8
_ALONE = 1 << 63  # what the entry leads to has no other user, and may be written over
_ZEROS = 1


def write_overlay(
    path: Path, *, size: int, block: int = LARGEST, blocks: Mapping[int, int | None] = MappingProxyType({}), data: BinaryIO | None = None
) -> None:
    """Write an overlay into a new file, by default an empty one.

    Args:
        path: The file, which must not exist.
        size: Bytes of the disk.
        block: Bytes of a block, a power of two from `SMALLEST` to `LARGEST`.
        blocks: Where the content of a block is in `data`, by the block's number; None for one that reads as zeros.
        data: An open file; not needed without blocks.

    Raises:
        OSError: It cannot be written; what there is of it stays.
    """
    held = sorted(number for number, offset in blocks.items() if offset is not None)
    per_table = block // _ENTRY_BYTES
    tables = sorted({number // per_table for number in blocks})
    top = _clusters(-(-size // (block * per_table)) * _ENTRY_BYTES, block)
    table_of_counts, counts = _count_clusters(1 + top + len(tables) + len(held), block)
    # In this order: header, table of counts, counts, the upper table, lower tables, blocks.
    first_top = 1 + table_of_counts + counts
    first_table = first_top + top
    first_held = first_table + len(tables)
    total = first_held + len(held)
    places = {number: (first_held + index) * block for index, number in enumerate(held)}
    with open(path, "xb", opener=_private) as file:
        header = _HEADER.pack(
            *(_MAGIC, _VERSION, 0, 0, block.bit_length() - 1, size, 0),
            *(-(-size // (block * per_table)), first_top * block, block, table_of_counts, 0, 0),
            *(0, 0, 0, _REFCOUNT_ORDER, _HEADER.size),
        )
        file.write(header.ljust(block, b"\0"))
        file.write(_entries(((1 + table_of_counts + index) * block for index in range(counts)), table_of_counts * block))
        file.write((struct.pack(">H", 1) * total).ljust(counts * block, b"\0"))
        at = {table: (first_table + index) * block | _ALONE for index, table in enumerate(tables)}
        file.write(_entries((at.get(index, 0) for index in range(max(at, default=-1) + 1)), top * block))
        for table in tables:
            numbers = range(table * per_table, (table + 1) * per_table)
            file.write(_entries((_entry(number, blocks, places) for number in numbers), block))
        if data is not None:
            for start, length in _runs([blocks[number] for number in held], block):
                data.seek(start)
                file.write(data.read(length).ljust(length, b"\0"))


def _entry(number: int, blocks: Mapping[int, int | None], places: Mapping[int, int]) -> int:
    if number not in blocks:
        return 0
    return places[number] | _ALONE if number in places else _ZEROS


def _entries(values: Iterable[int], length: int) -> bytes:
    found = tuple(values)
    return struct.pack(f">{len(found)}Q", *found).ljust(length, b"\0")


def _clusters(length: int, block: int) -> int:
    return -(-length // block)


def _count_clusters(others: int, block: int) -> tuple[int, int]:
    """Return how many clusters the table of reference counts and the counts take, which count themselves too."""
    table = counts = 1
    while True:
        wanted = _clusters((others + table + counts) * _REFCOUNT_BYTES, block)
        wanted_table = _clusters(wanted * _ENTRY_BYTES, block)
        if (wanted, wanted_table) == (counts, table):
            return table, counts
        counts, table = wanted, wanted_table


def _runs(offsets: Iterable[int | None], block: int) -> Iterable[tuple[int, int]]:
    """Join blocks that lie behind each other, so that they are copied by one read."""
    start = end = None
    for offset in offsets:
        if offset is None:
            continue
        if end == offset:
            end += block
            continue
        if start is not None and end is not None:
            yield start, end - start
        start, end = offset, offset + block
    if start is not None and end is not None:
        yield start, end - start


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
