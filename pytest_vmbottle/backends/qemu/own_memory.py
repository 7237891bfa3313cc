"""Memory that a running clone has beyond its pack, and how it gets into another clone of the same pack."""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Self

import attrs

from pytest_vmbottle.backends.qemu.pages import Area, find_area, own_pages, read_pages, write_pages
from pytest_vmbottle.errors import CatalogError

__all__ = ["OWN_MEMORY", "Memory", "OwnMemory", "copier"]

OWN_MEMORY = "own.bin"
"""Name of the file in a snapshot."""
_MAGIC = b"vmbottle own 1\n\0"
_HEAD, _AREA = struct.Struct("<16s2Q"), struct.Struct("<2Q")
_MOST_AREAS = 1 << 20
_SPARE = 4 << 20
"""Bytes that a guest may write between the first look at its pages and its stop, without costing it time."""
_RAM = "ram0"
# A line of `info mtree -f`. What it names by another word than these, such as "i/o", is no memory.
_REGION = re.compile(r"^  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:ram|rom|romd)\): (\S+)", re.MULTILINE)
_HOST_ADDRESS = re.compile(r" is 0x([0-9a-f]+)")


class Memory:
    """The memory of a running QEMU whose guest's RAM is a private mapping of a pack's."""

    def __init__(self, pid: int, ram: Path, monitor: Callable[[str], str]) -> None:
        """Find it.

        Args:
            pid: QEMU's process id.
            ram: The pack's file.
            monitor: Function that runs a command of QEMU's monitor for people, and returns what that prints.

        Raises:
            OSError: It cannot be seen.
            LookupError: The file is not mapped.
        """
        self._pid, self._monitor = pid, monitor
        self.ram = find_area(pid, ram)

    def others(self) -> tuple[Area, ...]:
        """Return the other memory that its guest sees, by the guest's addresses: the firmware's, and a display's."""
        views = self._monitor("info mtree -f").replace("\r", "").split("FlatView #")
        seen = next(view for view in views if ' AS "memory"' in view)
        found = [(int(start, 16), int(last, 16), name) for start, last, name in _REGION.findall(seen)]
        return tuple(Area(start, last - start + 1) for start, last, name in found if name != _RAM)

    def at(self, address: int) -> int:
        """Return where an address of the guest is in QEMU's memory.

        Raises:
            LookupError: There is no memory.
        """
        answer = self._monitor(f"gpa2hva {address:#x}")
        found = _HOST_ADDRESS.search(answer)
        if found is None:
            raise LookupError(answer.strip())
        return int(found[1], 16)

    def own(self, area: Area) -> tuple[Area, ...]:
        """Return the parts of an area that are in no file."""
        return own_pages(self._pid, area)

    def read(self, areas: Sequence[Area], target: mmap.mmap) -> None:
        """Copy parts of the memory, one behind the other."""
        read_pages(self._pid, areas, target)

    def write(self, areas: Sequence[Area], source: mmap.mmap) -> None:
        """Write what `read` has copied."""
        write_pages(self._pid, areas, source)


@attrs.frozen(kw_only=True, eq=False)
class OwnMemory:
    """The own memory of a clone at one moment.

    Attributes:
        ram: The parts of the RAM, by their offsets.
        others: The parts of the other memory, by the guest's addresses.
        content: Their content, one behind the other.
    """

    ram: tuple[Area, ...]
    others: tuple[Area, ...]
    content: mmap.mmap

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return sum(area.size for area in (*self.ram, *self.others))

    def save(self, file: int) -> None:
        """Write it into an open, empty file."""
        areas = [_AREA.pack(area.start, area.size) for area in (*self.ram, *self.others)]
        head = b"".join((_HEAD.pack(_MAGIC, len(self.ram), len(self.others)), *areas))
        with memoryview(self.content) as content:
            for part in (memoryview(head), content[: self.size]):
                left = part
                while left:
                    left = left[os.write(file, left) :]

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Self]:
        """Open what `save` has written, for the length of a block.

        Raises:
            CatalogError: The file is damaged.
        """
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
            magic, *counts = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, 0)
            if magic != _MAGIC or sum(counts) > _MOST_AREAS:
                raise CatalogError(f"{path} is damaged: it does not begin as it must")
            packed = file.read(_AREA.size * sum(counts))
            if len(packed) != _AREA.size * sum(counts):
                raise CatalogError(f"{path} is damaged: it is cut off")
            areas = tuple(Area(*each) for each in _AREA.iter_unpack(packed))
            # A buffer of our own and not a map of the file: it begins at no page, and who shortens the file would end this process.
            size = sum(area.size for area in areas)
            if size != os.fstat(file.fileno()).st_size - file.tell():
                raise CatalogError(f"{path} is damaged: it has not what it announces")
            with closing(mmap.mmap(-1, max(size, 1))) as content:
                file.readinto(memoryview(content)[:size])
                yield cls(ram=areas[: counts[0]], others=areas[counts[0] :], content=content)

    def into_ram(self, memory: Memory) -> None:
        """Write the parts of the RAM into the RAM of another clone.

        Raises:
            CatalogError: They do not fit.
        """
        if any(not _is_within(area, [Area(0, memory.ram.size)]) for area in self.ram):
            raise CatalogError("a saved page lies outside of the RAM")
        memory.write([Area(memory.ram.start + area.start, area.size) for area in self.ram], self.content)

    def into_others(self, memory: Memory) -> None:
        """Write the other parts, when the other clone has its devices where this one had them.

        Raises:
            CatalogError: They do not fit.
        """
        known = memory.others()
        if any(not _is_within(area, known) for area in self.others):
            raise CatalogError("a saved page lies outside of the memory")
        begin = sum(area.size for area in self.ram)
        with closing(mmap.mmap(-1, max(self.size - begin, 1))) as content:
            content[: self.size - begin] = self.content[begin : self.size]
            memory.write([Area(memory.at(area.start), area.size) for area in self.others], content)


@contextmanager
def copier(memory: Memory) -> Iterator[Callable[[], OwnMemory]]:
    """Prepare a copy while the machine still runs; the block gets the function that makes it when the machine stands still.

    Raises:
        OSError, LookupError: The memory cannot be read.
    """
    others = [(area, memory.at(area.start)) for area in memory.others()]
    # Its pages are made before they are needed: that takes longer than to fill them.
    size = sum(area.size for area in memory.own(memory.ram)) + sum(area.size for area, _ in others) + _SPARE
    with ExitStack() as stack:
        prepared = stack.enter_context(closing(_pages(size)))

        def copy() -> OwnMemory:
            ram = memory.own(memory.ram)
            rest = [(area, there, memory.own(Area(there, area.size))) for area, there in others]
            found = (*ram, *(own for *_, owned in rest for own in owned))
            needed = sum(area.size for area in found)
            content = prepared if needed <= len(prepared) else stack.enter_context(closing(_pages(needed)))
            memory.read(found, content)
            return OwnMemory(
                ram=tuple(Area(own.start - memory.ram.start, own.size) for own in ram),
                others=tuple(Area(area.start + own.start - there, own.size) for area, there, owned in rest for own in owned),
                content=content,
            )

        yield copy


def _pages(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


def _is_within(area: Area, known: Iterable[Area]) -> bool:
    return any(each.start <= area.start and area.end <= each.end for each in known)
