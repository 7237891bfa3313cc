"""The record of a serial console: bounded, followed, searched, and looked through for a kernel's troubles."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_vmbottle.backends import console
from pytest_vmbottle.backends.console import Console, Cursor, Recorder
from pytest_vmbottle.backends.kernel_watch import KernelWatch, troubles
from pytest_vmbottle.host.deadline import Deadline


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "console.log"


@pytest.fixture
def guest(path: Path) -> Iterator[socket.socket]:
    """Stream that a guest writes to; it is recorded at `path`."""
    ours, its = socket.socketpair()
    recorder = Recorder(ours, path)
    yield its
    its.close()
    recorder.finish()
    recorder.close()
    recorder.close()


def recorded(path: Path, text: str) -> bool:
    return bool(Deadline(60).poll(lambda: text in Console(path).text, every=0.01))


def test_what_a_guest_says_is_recorded_for_this_user_alone_and_shown_without_control_characters(path: Path, guest: socket.socket) -> None:
    guest.sendall(b"\x1b[31mred\r\n\xff end\n")
    assert recorded(path, "\\x1b[31mred\n\ufffd end\n")
    assert path.stat().st_mode & 0o077 == 0


def test_a_console_that_never_stops_takes_bounded_room_and_its_end_is_kept(
    path: Path, guest: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_PIECE", 100_000)
    for number in range(30_000):
        guest.sendall(b"line %07d of many\n" % number)
    assert recorded(path, "0029999 of many")
    assert sum(file.stat().st_size for file in path.parent.iterdir()) <= 2 * (100_000 + (1 << 16))
    lines = Console(path).text.splitlines()[1:]
    assert lines == [f"line {number:07} of many" for number in range(30_000 - len(lines), 30_000)]
    assert len(lines) > 4000


def test_a_disk_that_takes_no_more_does_not_hold_the_guest_up(path: Path, guest: socket.socket) -> None:
    path.parent.chmod(0o700)
    path.unlink()
    path.mkdir()
    guest.settimeout(5)
    guest.sendall(bytes(4 << 20))
    path.rmdir()
    guest.sendall(b"again\n")
    assert recorded(path, "again")


def test_a_cursor_gives_everything_once_across_the_change_of_files(
    path: Path, guest: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_PIECE", 10_000)
    sent, seen = b"".join(b"%05d\n" % number for number in range(10_000)), bytearray()
    cursor = Cursor(path)
    for start in range(0, len(sent), 3000):
        guest.sendall(sent[start : start + 3000])
        wanted = min(start + 3000, len(sent))

        def caught_up(wanted: int = wanted) -> bool:
            seen.extend(cursor.read())
            return len(seen) >= wanted

        assert Deadline(60).poll(caught_up, every=0.001)
    assert bytes(seen) == sent
    assert cursor.read() == b""


def test_following_gives_lines_as_they_come_and_ends_with_the_machine(path: Path) -> None:
    path.write_bytes(b"one\r\ntw")
    ended = threading.Event()
    lines = Console(path, ended=ended.is_set).follow()
    assert next(lines) == "one"
    with path.open("ab") as file:
        file.write(b"o\nthe last without an end\x07")
    assert next(lines) == "two"
    ended.set()
    assert list(lines) == ["the last without an end\\x07"]


def test_following_ends_in_time_and_cuts_a_line_without_end(path: Path) -> None:
    path.write_bytes(b"x" * 200_000)
    lines = list(Console(path).follow(timeout=0.2))
    assert "".join(lines) == "x" * 200_000


def test_each_search_begins_where_the_one_before_has_ended(path: Path) -> None:
    seen = Console(path)
    assert seen.expect(re.compile("login")) is None
    path.write_bytes(b"first login: \r\nhalf of a wo")
    assert seen.expect(re.compile("log(in)")) is not None
    assert seen.expect(re.compile("login")) is None
    assert seen.expect(re.compile("of a w")) is not None
    with path.open("ab") as file:
        file.write(b"rd, login\n")
    match = seen.expect(re.compile("(?s)(.*)login"))
    assert match is not None
    assert match[1] == "ord, "
    assert seen.expect(re.compile(".")) is None


def test_a_search_keeps_a_bounded_part_of_what_it_has_looked_through(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_STEP", 1000)
    seen = Console(path)
    with path.open("ab", buffering=0) as file:
        for number in range(10):
            file.write(b"%098d\n" % number + b"y" * 70_000)
            assert seen.expect(re.compile("never")) is None
        file.write(b"now\n")
    assert Deadline(60).poll(lambda: seen.expect(re.compile("now")), every=0.001)
    assert len(seen._expecter._text) <= 1000


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[   12.345678] Kernel panic - not syncing: sysrq triggered crash", "Kernel panic - not syncing: sysrq triggered crash"),
        ("debian login: [  1.0] BUG: unable to handle page fault\r", "BUG: unable to handle page fault"),
        ("[    3.141592][   T42] BUG: kernel NULL pointer dereference", "BUG: kernel NULL pointer dereference"),
        ("[  100.000001] Oops: 0002 [#1] PREEMPT SMP NOPTI", "Oops: 0002 [#1] PREEMPT SMP NOPTI"),
        ("[    3.0] general protection fault, maybe for address 0x0", "general protection fault, maybe for address 0x0"),
        ("[    3.0] kernel BUG at mm/slub.c:305!", "kernel BUG at mm/slub.c:305!"),
        ("[    3.0] Internal error: Oops: 96000004 [#1] SMP", "Internal error: Oops: 96000004 [#1] SMP"),
        ("[  243.0] INFO: task touch:812 blocked for more than 120 seconds.", "INFO: task touch:812 blocked for more than 120 seconds."),
        ("[    3.0] BUG: \x1b[31mred", "BUG: \\x1b[31mred"),
    ],
)
def test_a_kernels_own_words_about_its_troubles_count(text: str, line: str) -> None:
    assert troubles(f"before\n{text}\nafter\n".encode()) == [line]


@pytest.mark.parametrize(
    "text",
    [
        "BUG: in a program",
        "Kernel panic - not syncing: quoted from a manual",
        "app[812]: Oops: we did it again",
        "[ 12:00:01] BUG: a program's own clock",
        "[  22.1] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!",
        "[  22.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        "[  22.1] systemd[1]: BUG: this is said by a program",
        "[  22.1] usb 1-1: BUGs are nice",
    ],
)
def test_a_programs_words_and_what_a_busy_host_causes_do_not(text: str) -> None:
    assert troubles(f"before\n{text}\nafter\n".encode()) == []


HOSTILE = [
    b"ALERT!",
    b"ALERT! \n",
    b"Oops ",
    b"[ 1.0] Oops ",
    b"[ 1.0] INFO: task ",
    b"[ 1.0] INFO: task x blocked for more than 120 seconds.\n",
    b"[ 1.0] Kernel panic - not syncing: ",
    b"[ 1.0][ C1] BUG: x\r\n",
    b"[ ",
    b"[1",
    b"[1.1",
    b"\n",
    b"\x1b",
    b"\xff",
    b"\xc2\x85",
    b"(initramfs)\n",
    b"You are in emergency mode",
]


@pytest.mark.parametrize("words", HOSTILE)
def test_a_console_that_is_full_of_the_same_words_is_read_in_a_time_that_grows_with_its_length(path: Path, words: bytes) -> None:
    def seconds(size: int) -> float:
        text = (words * (size // len(words) + 1))[:size]
        began = time.process_time()
        assert len(troubles(text)) <= 20
        watch = KernelWatch(path.with_name("none"))
        watch._judge(text)
        return time.process_time() - began

    seconds(1 << 10)  # whatever only the first run costs
    assert seconds(2 << 20) < 40 * seconds(1 << 18) + 1


def test_the_end_of_a_kernel_is_noticed_among_any_number_of_its_other_troubles() -> None:
    lines = [f"[ {number}.0] BUG: number {number}\n" for number in range(1000)]
    found = troubles("".join([*lines, "[ 9999.0] Kernel panic - not syncing: at last\n", *lines]).encode())
    assert found[0] == "BUG: number 0"
    assert found[-1] == "Kernel panic - not syncing: at last"
    assert len(found) < 100


def test_a_search_looks_through_a_whole_long_console_a_while_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_WHILE", 0)
    path.write_bytes(b"\x1b\n" * (1 << 20) + b"now\n")
    seen = Console(path)
    assert seen.expect(re.compile("now")) is None
    assert Deadline(120).poll(lambda: seen.expect(re.compile("now")), every=0.001)


def test_what_is_awaited_on_the_console_is_what_the_guest_writes_and_not_what_is_made_safe_for_a_log(path: Path) -> None:
    path.write_bytes(b"-----BEGIN SSH HOST KEY\n::1 is up\n")
    seen = Console(path)
    assert seen.expect(re.compile("^-----BEGIN", re.MULTILINE))
    assert seen.expect(re.compile("^::1", re.MULTILINE))
    assert not re.search("^(---|::)", seen.text, re.MULTILINE)
