"""This terminal is given back as it was, whatever happens while a guest has it."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# A guest's terminal that is the far end of a socket, and a main thread that gives it this terminal.
_PROGRAM = """
import signal, socket, sys
from pytest_vmbottle.machine.terminal import attach

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so do its children

class Far:
    status = {status}
    def __init__(self, sock): self.sock = sock
    def fileno(self): return self.sock.fileno()
    def receive(self): {receive}
    def send(self, data): self.sock.sendall(data)
    def resize(self, columns, lines): self.sock.sendall(b"size %d %d;" % (columns, lines))
    def close(self): self.sock.close()

class Channel:
    def terminal(self, *, user, kind, size, deadline, command=None):
        far = Far(socket.socket(fileno={fd}))
        far.send(b"%s on %s;" % (user.encode(), kind.encode()))
        return far

print("came out:", repr(attach(Channel(), user="root")))
"""


class Stage:
    """A process before a terminal of its own, with the guest's end of it in our hands."""

    def __init__(self, receive: str = "return self.sock.recv(4096)", status: str = "0") -> None:
        self.end, self.terminal = pty.openpty()
        self.guest, far = socket.socketpair()
        self.guest.settimeout(30)
        self.before = termios.tcgetattr(self.terminal)
        program = textwrap.dedent(_PROGRAM).format(fd=far.fileno(), receive=receive, status=status)
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), self.terminal)
        env = {**os.environ, "TERM": "vt100", "PYTHONPATH": str(ROOT), "PYTHON_COLORS": "0"}
        self.process = subprocess.Popen(  # type: ignore[call-overload]
            [sys.executable, "-c", program], env=env, pass_fds=[far.fileno()], start_new_session=True, **streams
        )
        far.close()

    def told(self, expected: bytes) -> None:
        """Read the guest's input until it has the expected bytes."""
        got = b""
        while expected not in got:
            chunk = self.guest.recv(4096)
            assert chunk, f"{expected!r} was not said, but {got!r}"
            got += chunk

    def raw(self) -> None:
        """Returns when keys are passed on as they are pressed."""
        self.told(b"root on vt100;")
        seen = b""
        while b"Ctrl-]" not in seen:
            seen += os.read(self.end, 4096)
        assert not termios.tcgetattr(self.terminal)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def closing_words(self) -> str:
        """Return the rest of the process's output; the terminal is as it was."""
        self.process.wait(30)
        assert termios.tcgetattr(self.terminal) == self.before
        os.write(self.terminal, b"<end>")
        seen = b""
        while not seen.endswith(b"<end>"):
            seen += os.read(self.end, 4096)
        return seen.decode()


@pytest.fixture
def stages() -> Iterator[list[Stage]]:
    made: list[Stage] = []
    yield made
    for stage in made:
        stage.process.kill()
        stage.process.wait()
        stage.guest.close()
        os.close(stage.end)
        os.close(stage.terminal)


def test_keys_and_what_is_printed_go_through_unchanged_until_the_program_ends(stages: list[Stage]) -> None:
    stages.append(stage := Stage(status="3"))
    stage.raw()
    os.write(stage.end, b"\x03\x04\x1a\x7f\xc3\xa9\r")
    stage.told(b"\x03\x04\x1a\x7f\xc3\xa9\r")
    stage.guest.sendall(b"printed\r\n")
    stage.guest.close()

    words = stage.closing_words()
    assert "printed\r\n" in words
    assert "came out: 3" in words


def test_the_guest_is_told_of_a_new_size(stages: list[Stage]) -> None:
    stages.append(stage := Stage())
    stage.raw()
    termios.tcsetwinsize(stage.end, (50, 120))
    stage.told(b"size 120 50;")


def test_one_key_leaves_and_what_the_guest_switched_on_is_switched_off(stages: list[Stage]) -> None:
    stages.append(stage := Stage())
    stage.raw()
    stage.guest.sendall(b"\x1b[31m\x1b[?25l\x1b[?2004h")
    os.write(stage.end, b"ignored\x1d")

    words = stage.closing_words()
    assert "came out: None" in words
    assert words.index("\x1b[?25h") > words.find("\x1b[?25l")
    assert "\x1b[0m" in words
    assert "\x1b[?2004l" in words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_in_order(stages: list[Stage], number: signal.Signals) -> None:
    stages.append(stage := Stage())
    stage.raw()
    stage.process.send_signal(number)

    assert "KeyboardInterrupt" in stage.closing_words()


def test_an_error_gives_the_terminal_back(stages: list[Stage]) -> None:
    stages.append(stage := Stage(receive="raise RuntimeError('broken')"))
    stage.raw()
    stage.guest.sendall(b"x")

    assert "RuntimeError: broken" in stage.closing_words()


def test_a_lost_connection_is_an_error(stages: list[Stage]) -> None:
    stages.append(stage := Stage(status="None"))
    stage.raw()
    stage.guest.close()

    assert "MachineDied: " in stage.closing_words()
