"""Pages of a guest's RAM that are its own: what its QEMU has written to a private mapping of a pack's RAM.

The kernel copies a page of a private mapping when it is written to first. So a running clone is its pack's RAM and these pages, mostly a
few MiB, which are found without reading the RAM.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

__all__ = ["Area", "find_area", "own_pages", "read_pages", "write_pages"]

_PAGE = mmap.PAGESIZE
_ENTRY = 8
"""Bytes that `/proc/PID/pagemap` has for each page."""
# The top byte of an entry: bit 7 for a page in memory, 6 for one in swap, 5 for a page of a file (pagemap.rst of the kernel).
_OWN = bytes(bool(top & 0xC0) and not top & 0x20 for top in range(256))
_RUN = re.compile(rb"\x01+")
_PIECES = 1024
"""Most areas of one call (IOV_MAX)."""

# The ioctl PAGEMAP_SCAN, in Linux 6.7 and later, and its struct pm_scan_arg (linux/fs.h).
_SCAN = 0xC0606610
_SCAN_ARGUMENT = struct.Struct("=12Q")
_REGION = struct.Struct("=3Q")
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_REGIONS = 8192
"""Runs of one answer."""


@attrs.frozen
class Area:
    """Part of a process's memory.

    Attributes:
        start: Its address.
        size: Its bytes.
    """

    start: int
    size: int

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.start + self.size


def find_area(pid: int, file: Path) -> Area:
    """Find where a process has mapped a file.

    Raises:
        LookupError: It has not mapped it, or not in one piece.
    """
    status = file.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    found: Area | None = None
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, _, _, where, inode, *_ = line.split(maxsplit=5)
        if (where, inode) != (device, str(status.st_ino)):
            continue
        start, end = (int(part, 16) for part in addresses.split("-"))
        # A part with other flags is an entry of its own.
        if found is not None and found.end != start:
            raise LookupError(f"{file} is mapped in pieces")
        found = Area(start if found is None else found.start, end - (start if found is None else found.start))
    if found is None:
        raise LookupError(f"{file} is not mapped")
    return found


def own_pages(pid: int, area: Area) -> tuple[Area, ...]:
    """Return the parts of a private mapping that are the process's own, in order.

    Raises:
        OSError: They may not be seen.
    """
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            return tuple(_scanned(fd, area))
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
        return _mapped(os.pread(fd, area.size // _PAGE * _ENTRY, area.start // _PAGE * _ENTRY), area.start)
    finally:
        os.close(fd)


def _scanned(fd: int, area: Area) -> Iterator[Area]:
    answer = ctypes.create_string_buffer(_REGION.size * _REGIONS)
    # An inverted category counts where it is not set: no page of a file, but one that is somewhere.
    wanted = (_IS_FILE, _IS_FILE, _IS_PRESENT | _IS_SWAPPED, _IS_FILE)
    start, count = area.start, _REGIONS
    while count == _REGIONS:
        # Fields: size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask, category_anyof_mask,
        # return_mask.
        argument = (_SCAN_ARGUMENT.size, 0, start, area.end, 0, ctypes.addressof(answer), _REGIONS, 0, *wanted)
        count = fcntl.ioctl(fd, _SCAN, bytearray(_SCAN_ARGUMENT.pack(*argument)))
        for first, end, _ in _REGION.iter_unpack(answer.raw[: count * _REGION.size]):
            yield Area(first, end - first)
            # Not from `walk_end`, which Linux 6.18 leaves where it was before the last 512 runs.
            start = end


def _mapped(entries: bytes, start: int) -> tuple[Area, ...]:
    # Sliced and translated by C code: a loop over the pages of 1 GiB takes ten times as long.
    marks = entries[_ENTRY - 1 :: _ENTRY].translate(_OWN)
    return tuple(Area(start + run.start() * _PAGE, (run.end() - run.start()) * _PAGE) for run in _RUN.finditer(marks))


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)


def read_pages(pid: int, areas: Sequence[Area], target: mmap.mmap) -> None:
    """Copy parts of a process's memory, one behind the other.

    Raises:
        OSError: They cannot be read.
    """
    _copy(_libc.process_vm_readv, pid, areas, target)


def write_pages(pid: int, areas: Sequence[Area], source: mmap.mmap) -> None:
    """Write what `read_pages` has copied into another process.

    Raises:
        OSError: It cannot be written.
    """
    _copy(_libc.process_vm_writev, pid, areas, source)


def _copy(call: ctypes._FuncPtr, pid: int, areas: Sequence[Area], memory: mmap.mmap) -> None:  # type: ignore[name-defined]
    held = ctypes.c_char.from_buffer(memory)
    here = ctypes.addressof(held)
    del held  # or the map could not be closed
    for first in range(0, len(areas), _PIECES):
        some = areas[first : first + _PIECES]
        size = sum(area.size for area in some)
        local = _Iovec(here, size)
        remote = (_Iovec * len(some))(*(_Iovec(area.start, area.size) for area in some))
        done = call(pid, ctypes.byref(local), 1, remote, len(some), 0)
        if done != size:
            error = ctypes.get_errno() if done < 0 else errno.EFAULT
            raise OSError(error, f"{os.strerror(error)}: the memory of the process {pid}")
        here += size
