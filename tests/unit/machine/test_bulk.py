"""Much data by a disk, or by SSH where there is none: here the guest is this host's shell, and what it finds as its disk a file."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from pytest_vmbottle.backends.port import NotPlugged
from pytest_vmbottle.channels.port import Command, Finished
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.machine import bulk
from pytest_vmbottle.machine.bulk import Bulk

DATA = os.urandom((1 << 20) + 700)
FIND = read_script("pytest_vmbottle.machine", "bulk_disk.sh")
CAT = Command(argv=("cat",), env=(("PATH", os.environ["PATH"]),))


class Guest:
    """An instance with a port for disks. `disks` are those it was given: whether they could be written, and their content at the end."""

    def __init__(self, find: str = "", *, refused: str = "") -> None:
        self.refused = refused
        self.disks: list[tuple[bool, int]] = []
        self.by_ssh = 0
        self._file = -1
        self._find = find

    @contextmanager
    def disk(self, file: int, *, serial: str, writable: bool, deadline: Deadline) -> Iterator[Callable[[], int]]:
        del deadline
        assert len(serial) <= 20
        if self.refused:
            raise NotPlugged(self.refused)
        self._file = file
        self.disks.append((writable, os.fstat(file).st_size))
        yield lambda: 0

    def channel(self, *, deadline: Deadline, bulk: bool = False) -> Any:
        del deadline
        self.by_ssh += bulk
        return self

    def run(self, command: Command, *, deadline: Deadline) -> Finished:
        argv = tuple(
            word.replace(FIND, self._find or f"shift 2; size={len(DATA)} disk=/proc/self/fd/{self._file}\n") for word in command.argv
        )
        done = subprocess.run(
            argv, input=command.input, env=dict(command.environment), capture_output=True, pass_fds=[self._file], check=False
        )
        return Finished(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr, timed_out=deadline.expired)

    def put(self, source: BinaryIO, command: Command, *, deadline: Deadline) -> Finished:
        del command, deadline
        return Finished(returncode=0, stdout=source.read())

    def get(self, command: Command, sink: BinaryIO, *, deadline: Deadline) -> Finished:
        del command, deadline
        sink.write(DATA)
        return Finished(returncode=0)


def as_instance(guest: Guest) -> Any:
    return guest


def put(guest: Guest, source: BinaryIO, *, framed: bool = False) -> Finished:
    return Bulk(as_instance(guest)).put(source, len(DATA), CAT, deadline=Deadline(30), framed=framed)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(DATA)
    return tmp_path / "file"


def test_a_file_is_the_disk_that_the_guest_reads_from_and_cannot_be_written_by_it(file: Path) -> None:
    guest = Guest()
    with file.open("r+b") as source:
        assert put(guest, source).stdout == DATA

    assert guest.disks == [(False, len(DATA))]
    assert guest.by_ssh == 0


def test_a_command_that_knows_where_its_input_ends_reads_the_disk_itself(file: Path) -> None:
    with file.open("rb") as source:
        assert put(Guest(), source, framed=True).stdout == DATA


@pytest.mark.parametrize("skipped", [0, 5])
def test_what_is_no_file_of_the_host_or_only_a_part_of_one_is_made_a_file(file: Path, skipped: int) -> None:
    file.write_bytes(b"x" * skipped + DATA)
    with file.open("rb") as source:
        source.seek(skipped)
        assert put(Guest(), source).stdout == DATA
    memory = io.BytesIO(b"x" * skipped + DATA)
    memory.seek(skipped)
    assert put(Guest(), memory).stdout == DATA


def test_a_file_that_shrinks_meanwhile_is_not_taken_for_whole(file: Path) -> None:
    class Shrinking(Guest):
        def run(self, command: Command, *, deadline: Deadline) -> Finished:
            os.truncate(file, 10)
            return super().run(command, deadline=deadline)

    with file.open("rb") as source, pytest.raises(OSError, match="copied"):
        put(Shrinking(), source)


def get(guest: Guest, command: Command, sink: BinaryIO, size: int = len(DATA)) -> Finished:
    return Bulk(as_instance(guest)).get(command, sink, size, deadline=Deadline(30))


def test_what_a_command_writes_to_the_disk_is_what_the_file_has_and_no_more(file: Path, tmp_path: Path) -> None:
    guest = Guest()
    with (tmp_path / "out").open("w+b") as sink:
        finished = get(guest, Command(argv=("cat", str(file)), env=CAT.env), sink)

        assert (finished.returncode, finished.stdout, sink.tell()) == (0, b"", len(DATA))
    assert (tmp_path / "out").read_bytes() == DATA
    assert guest.disks[0][0] is True
    assert guest.disks[0][1] % 512 == 0


def test_what_comes_from_the_disk_can_go_to_memory(file: Path) -> None:
    sink = io.BytesIO()
    get(Guest(), Command(argv=("cat", str(file)), env=CAT.env), sink)

    assert sink.getvalue() == DATA


def test_a_command_that_fails_says_so_and_leaves_nothing_in_the_file(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+b") as sink:
        finished = get(Guest(), Command(argv=("sh", "-c", "echo some; echo reason >&2; exit 7"), env=CAT.env), sink)

    assert (finished.returncode, finished.stderr, (tmp_path / "out").stat().st_size) == (7, b"reason\n", 0)


@pytest.mark.parametrize("said", ["9" * 30, "-5", "", "lots", "99999999999999999"])
def test_a_guest_that_lies_about_the_size_gets_no_more_than_its_disk_into_the_file(tmp_path: Path, said: str) -> None:
    class Liar(Guest):
        def run(self, command: Command, *, deadline: Deadline) -> Finished:
            del command, deadline
            return Finished(returncode=0, stdout=said.encode())

    with (tmp_path / "out").open("w+b") as sink:
        get(Liar(), CAT, sink, 4096)

    assert (tmp_path / "out").stat().st_size <= 4096 + bulk._SLACK


def test_a_full_disk_of_the_host_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "_is_full", lambda _: True)
    with (tmp_path / "out").open("w+b") as sink, pytest.raises(OSError, match="on the host"):
        get(Guest(), Command(argv=("false",), env=CAT.env), sink)


def test_without_a_disk_data_goes_by_ssh(file: Path) -> None:
    guest = Guest(refused="there is no port")
    with file.open("rb") as source:
        assert put(guest, source).stdout == DATA

    assert (guest.disks, guest.by_ssh) == ([], 1)


def test_a_guest_that_sees_no_disk_is_given_none_a_second_time(file: Path) -> None:
    guest = Guest(find="exit 79\n")
    ways = Bulk(as_instance(guest))
    for _ in range(2):
        with file.open("rb") as source:
            assert ways.put(source, len(DATA), CAT, deadline=Deadline(30)).stdout == DATA
        sink = io.BytesIO()
        ways.get(CAT, sink, len(DATA), deadline=Deadline(30))
        assert sink.getvalue() == DATA

    assert len(guest.disks) == 1
    assert guest.by_ssh == 4


def test_a_long_copy_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, file: Path) -> None:
    monkeypatch.setattr(bulk, "_EVERY", 0.01)
    with caplog.at_level("INFO", logger="pytest_vmbottle"), file.open("rb") as source:
        Bulk(as_instance(Guest())).put(source, len(DATA), Command(argv=("sleep", "0.5"), env=CAT.env), deadline=Deadline(30), framed=True)

    assert "copied 0 B of about 1.0 MiB" in caplog.text
