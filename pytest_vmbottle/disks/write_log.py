"""Log of everything that a guest wrote to a disk, in order: what QEMU's block driver `blklogwrites` leaves.

Format: Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md/dm-log-writes.c in Linux, and block/blklogwrites.c in QEMU. A
sector with a superblock is followed by entries, each of them a sector of four numbers, and the data from the next sector on.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import attrs

__all__ = ["SECTOR", "Entry", "read_log"]

SECTOR = 512
"""Bytes of a sector, of the disk and of the log."""

_SUPER = struct.Struct("<QQQI")
_MAGIC, _VERSION = 0x6A736677736872, 1
_ENTRY = struct.Struct("<QQQQ")
_FLUSH, _FUA, _DISCARD = 1, 2, 4


@attrs.frozen(kw_only=True)
class Entry:
    """One request of the guest.

    Attributes:
        sector: The first sector of the disk that it changes.
        count: How many sectors it changes; 0 for a flush alone.
        data: Offset of its data in the log, in bytes; None if the sectors were discarded, and read as zeros.
        flush: Whether everything that had been written before it is safe when it ends.
        fua: Whether it is safe itself when it ends.
        end: Offset in the log at which the entry ends, in bytes.
    """

    sector: int
    count: int
    data: int | None
    flush: bool
    fua: bool
    end: int


def read_log(path: Path) -> tuple[Entry, ...]:
    """Read the entries of a log, up to one that is not complete.

    The number in the superblock is not trusted: QEMU writes it at a flush only.

    Raises:
        ValueError: The file is no such log.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        magic, version, _, sector_size = _SUPER.unpack(file.read(_SUPER.size).ljust(_SUPER.size, b"\0"))
        # Before the first flush there is no superblock, but a hole.
        if (magic, version, sector_size) not in ((_MAGIC, _VERSION, SECTOR), (0, 0, 0)):
            raise ValueError(f"{path} is not a log of writes with sectors of {SECTOR} bytes")
        entries, at = [], SECTOR
        while at + SECTOR <= size:
            file.seek(at)
            sector, count, flags, _ = _ENTRY.unpack(file.read(_ENTRY.size))
            discarded, end = bool(flags & _DISCARD), at + SECTOR + (0 if flags & _DISCARD else count * SECTOR)
            # An entry whose place was taken and which was not yet written reads as zeros; a real one changes something, or is a flush.
            if end > size or not (count or flags & _FLUSH):
                break
            entries.append(
                Entry(
                    sector=sector,
                    count=count,
                    data=None if discarded else at + SECTOR,
                    flush=bool(flags & _FLUSH),
                    fua=bool(flags & _FUA),
                    end=end,
                )
            )
            at = end
    return tuple(entries)
