"""Logs of writes, as QEMU leaves them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pytest_vmbottle.disks.write_log import SECTOR, read_log

SUPER = struct.pack("<QQQI", 0x6A736677736872, 1, 0, SECTOR).ljust(SECTOR, b"\0")


def entry(sector: int, count: int, flags: int = 0, data: bytes = b"") -> bytes:
    return struct.pack("<QQQQ", sector, count, flags, 0).ljust(SECTOR, b"\0") + data


def written(folder: Path, *parts: bytes) -> Path:
    path = folder / "log"
    path.write_bytes(b"".join(parts))
    return path


def test_entries_are_told_in_order_with_the_place_of_their_data(tmp_path: Path) -> None:
    log = written(tmp_path, SUPER, entry(8, 2, data=b"a" * 1024), entry(0, 0, 1), entry(16, 8, 4), entry(4, 1, 2, b"b" * 512))
    first, flush, discard, fua = read_log(log)
    assert (first.sector, first.count, first.data) == (8, 2, 1024)
    assert (flush.flush, flush.count) == (True, 0)
    assert (discard.count, discard.data) == (8, None)
    assert fua.fua
    assert log.read_bytes()[fua.data or 0 :][:512] == b"b" * 512
    assert fua.end == log.stat().st_size


def test_a_log_before_its_first_flush_has_no_superblock_and_is_read_all_the_same(tmp_path: Path) -> None:
    (only,) = read_log(written(tmp_path, bytes(SECTOR), entry(8, 1, data=b"a" * 512)))
    assert (only.sector, only.count) == (8, 1)


@pytest.mark.parametrize("cut", [1, 511, 512, 513, 1000])
def test_an_entry_that_was_not_written_to_its_end_is_left_out_with_what_follows(tmp_path: Path, cut: int) -> None:
    whole = b"".join([SUPER, entry(8, 1, data=b"a" * 512), entry(16, 1, data=b"b" * 512)])
    (only,) = read_log(written(tmp_path, whole[:-cut]))
    assert only.sector == 8


def test_an_entry_whose_place_was_taken_and_not_yet_filled_ends_the_log(tmp_path: Path) -> None:
    assert len(read_log(written(tmp_path, SUPER, entry(8, 1, data=b"a" * 512), bytes(1024), entry(16, 1, data=b"b" * 512)))) == 1


@pytest.mark.parametrize(
    "head", [b"QFI\xfb", struct.pack("<QQQI", 0x6A736677736872, 1, 0, 4096), struct.pack("<QQQI", 0x6A736677736872, 2, 0, 512)]
)
def test_what_is_no_log_is_refused(tmp_path: Path, head: bytes) -> None:
    with pytest.raises(ValueError, match="log of writes"):
        read_log(written(tmp_path, head.ljust(SECTOR, b"\1")))


def test_an_empty_log_has_no_entries(tmp_path: Path) -> None:
    assert read_log(written(tmp_path)) == ()
