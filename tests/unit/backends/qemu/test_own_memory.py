"""Own pages of a process, and what a clone's memory has beyond its pack's, with processes that map files as QEMU does."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmbottle import CatalogError
from pytest_vmbottle.backends.qemu import pages
from pytest_vmbottle.backends.qemu.own_memory import Memory, OwnMemory, copier
from pytest_vmbottle.backends.qemu.pages import Area, find_area, own_pages
from pytest_vmbottle.host.files import descriptor

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAGE = mmap.PAGESIZE
_PAGES = 2048
# Maps a file privately, writes to the pages that it is told, and prints what it sees at the end of its input.
_MAPPER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
for page in map(int, sys.argv[2:]):
    mapped[page * mmap.PAGESIZE] = 1 + page % 200
mapped[5 * mmap.PAGESIZE]
print("mapped", flush=True)
sys.stdin.read()
sys.stdout.buffer.write(mapped[:])
"""
_OWN = (0, 1, 2, 7, *range(100, 1800, 2), _PAGES - 1)


@contextmanager
def _mapping(file: Path, *written: int) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-c", _MAPPER, str(file), *map(str, written)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"mapped\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "ram.img"
    path.write_bytes(bytes(range(256)) * (_PAGE * _PAGES // 256))
    return path


def _numbers(area: Area, own: tuple[Area, ...]) -> tuple[int, ...]:
    return tuple(page for each in own for page in range((each.start - area.start) // _PAGE, (each.end - area.start) // _PAGE))


def test_the_own_pages_of_a_process_are_those_that_it_has_written_to(ram: Path) -> None:
    with _mapping(ram, *_OWN) as process:
        area = find_area(process.pid, ram)
        assert area.size == _PAGE * _PAGES
        own = own_pages(process.pid, area)
        assert _numbers(area, own) == _OWN
        # The way of older kernels finds the same.
        with descriptor(Path(f"/proc/{process.pid}/pagemap"), os.O_RDONLY) as file:
            entries = os.pread(file, _PAGES * 8, area.start // _PAGE * 8)
        assert pages._mapped(entries, area.start) == own


def test_a_scan_that_has_more_runs_than_one_answer_goes_on_behind_the_last_one(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _mapping(ram, *_OWN) as process:
        area = find_area(process.pid, ram)
        whole = own_pages(process.pid, area)
        for few in (1, 7, 512, len(whole)):
            monkeypatch.setattr(pages, "_REGIONS", few)
            assert own_pages(process.pid, area) == whole


def test_a_file_that_is_not_mapped_is_said_so(ram: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with _mapping(ram) as process, pytest.raises(LookupError, match="not mapped"):
        find_area(process.pid, tmp_path / "other")


def _monitor(_: str) -> str:
    """A machine that has nothing but its RAM."""
    return 'FlatView #0\r\n AS "memory", root: system\r\n  0000000000000000-00000000007fffff (prio 0, ram): ram0\r\n'


def _copied(process: subprocess.Popen[bytes], ram: Path, into: Path) -> None:
    memory = Memory(process.pid, ram, _monitor)
    with copier(memory) as copy, descriptor(into, os.O_WRONLY | os.O_CREAT) as file:
        copy().save(file)


def test_what_one_clone_has_written_is_in_another_one_of_the_same_pack_and_nothing_else(ram: Path, tmp_path: Path) -> None:
    before = ram.read_bytes()
    with _mapping(ram, *_OWN) as first, _mapping(ram) as second:
        _copied(first, ram, tmp_path / "own.bin")
        with OwnMemory.opened(tmp_path / "own.bin") as own:
            assert (own.others, own.size) == ((), len(_OWN) * _PAGE)
            own.into_ram(Memory(second.pid, ram, _monitor))
        both = [process.communicate()[0] for process in (first, second)]
    assert both[0] == both[1] != before
    assert ram.read_bytes() == before


def test_a_copy_has_what_is_written_after_it_was_prepared(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_vmbottle.backends.qemu.own_memory._SPARE", mmap.PAGESIZE)
    with _mapping(ram) as process:
        memory = Memory(process.pid, ram, _monitor)
        with copier(memory) as copy, closing(mmap.mmap(-1, 3 * _PAGE)) as new:
            new[:] = b"n" * len(new)
            memory.write([Area(memory.ram.start + 9 * _PAGE, len(new))], new)
            own = copy()
            assert own.ram == (Area(9 * _PAGE, 3 * _PAGE),)
            assert own.content[: own.size] == new[:]


@pytest.fixture
def saved(ram: Path, tmp_path: Path) -> bytes:
    with _mapping(ram, 3, 5) as process:
        _copied(process, ram, tmp_path / "own.bin")
    return (tmp_path / "own.bin").read_bytes()


@pytest.mark.parametrize("change", [slice(0, 1), slice(16, 24), slice(24, 32), slice(40, 48)], ids=["magic", "count", "others", "size"])
def test_a_damaged_file_is_refused(saved: bytes, tmp_path: Path, change: slice) -> None:
    damaged = bytearray(saved)
    damaged[change] = b"\xff" * (change.stop - change.start)
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(CatalogError, match="damaged"), OwnMemory.opened(tmp_path / "damaged"):
        pass


@given(st.data())
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = file_of(3, 5)
    path = tmp_path_factory.mktemp("cut") / "own.bin"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CatalogError, match="damaged"), OwnMemory.opened(path):
        pass


def file_of(*numbers: int) -> bytes:
    """A file with these pages."""
    head = b"vmbottle own 1\n\0" + len(numbers).to_bytes(8, "little") + bytes(8)
    areas = b"".join((number * _PAGE).to_bytes(8, "little") + _PAGE.to_bytes(8, "little") for number in numbers)
    return head + areas + bytes(_PAGE * len(numbers))


def test_pages_outside_of_the_ram_are_never_written(ram: Path, tmp_path: Path) -> None:
    for wrong in (_PAGES, -1 % (1 << 52)):
        (tmp_path / "own.bin").write_bytes(file_of(0, wrong))
        with (
            _mapping(ram) as process,
            OwnMemory.opened(tmp_path / "own.bin") as own,
            pytest.raises(CatalogError, match="outside of the RAM"),
        ):
            own.into_ram(Memory(process.pid, ram, _monitor))
