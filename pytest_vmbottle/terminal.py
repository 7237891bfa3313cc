"""This terminal, joined to one in a guest: for looking around in a machine by hand."""

from __future__ import annotations

import os
import selectors
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn, TextIO

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.errors import MachineDied, MachineError

if TYPE_CHECKING:
    from pytest_vmbottle.backend import Terminal, Terminals

__all__ = ["LEAVE", "attach"]

LEAVE = b"\x1d"
"""Ctrl-], as in telnet: leaves the guest's terminal even if nothing there answers."""
_WELCOME = b"A shell in the guest: Ctrl-D ends it, Ctrl-] leaves it.\r\n"
_PACE = 0.1
"""Seconds in which a new size of the window is noticed. A signal would tell at once, but only the main thread can take signals."""
# What programs in the guest may have switched on here: colours, no cursor, the mouse, marked pastes.
_SOBER = b"\x1b[0m\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l"


def attach(
    channel: Terminals, *, user: str = "root", stdin: TextIO | None = None, stdout: TextIO | None = None, seconds: float = 30
) -> int | None:
    """Gives this terminal to a shell in the guest until that ends, and has it back as it was, whatever happens.

    What is typed goes to the guest, Ctrl-C and Ctrl-D too, and so does the size of the window. Ctrl-] leaves.

    Args:
        channel: What the guest is reached by.
        user: Whose shell it is.
        stdin: The terminal to read from; `sys.stdin` by default.
        stdout: The terminal to write to; `sys.stdout` by default.
        seconds: How long the guest may take to start the shell.

    Returns:
        The shell's status, -N for signal N; None if it was left.

    Raises:
        MachineError: There is no terminal here.
        MachineDied: The connection was lost.
    """
    source, sink = _descriptor(stdin or sys.stdin), _descriptor(stdout or sys.stdout)
    kind, size = os.environ.get("TERM", "") or "dumb", _size(sink)
    with closing(channel.terminal(user=user, kind=kind, size=size, deadline=Deadline(seconds))) as session:
        with _raw(source, sink):
            _write(sink, _WELCOME)
            if not _join(session, source, sink, size):
                return None
        status = session.status
    if status is None:
        raise MachineDied("the connection to the guest's terminal was lost")
    return status


def _descriptor(stream: TextIO) -> int:
    with suppress(OSError, ValueError, AttributeError):
        if os.isatty(stream.fileno()):
            return stream.fileno()
    raise MachineError("a shell takes a terminal, and there is none here: run it in one, and a test with `pytest -s` and without `-n`")


def _size(sink: int) -> tuple[int, int]:
    columns, lines = os.get_terminal_size(sink)
    return columns or 80, lines or 24  # a terminal that was not told its size has none


def _write(sink: int, data: bytes) -> None:
    while data:
        data = data[os.write(sink, data) :]


@contextmanager
def _raw(source: int, sink: int) -> Iterator[None]:
    """Has every key passed on as it is pressed for the length of a block."""
    before = termios.tcgetattr(source)
    with _unwinding():
        try:
            tty.setraw(source)
            yield
        finally:
            with suppress(termios.error, OSError):  # the window may be closed
                _write(sink, _SOBER)
                termios.tcsetattr(source, termios.TCSADRAIN, before)


@contextmanager
def _unwinding() -> Iterator[None]:
    """Makes signals that would end this process on the spot end it as Ctrl-C does."""

    def leave(_number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    deadly = [number for number in (signal.SIGTERM, signal.SIGHUP) if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in deadly:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in deadly:
            signal.signal(number, signal.SIG_DFL)


def _join(session: Terminal, source: int, sink: int, size: tuple[int, int]) -> bool:
    """Passes on both ways until the guest's program ends; false if the user left it before."""
    with selectors.DefaultSelector() as ready:
        ready.register(source, selectors.EVENT_READ)
        ready.register(session, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select(_PACE):
                if key.fileobj is session:
                    if not (data := session.receive()):
                        return True
                    _write(sink, data)
                elif not _type(session, source):
                    return False
            if size != _size(sink):
                size = _size(sink)
                session.resize(*size)


def _type(session: Terminal, source: int) -> bool:
    """Passes on what was typed; false if it was the wish to leave, or the window was closed."""
    try:
        typed = os.read(source, 4096)
    except OSError:
        return False
    if not typed or LEAVE in typed:
        return False
    session.send(typed)
    return True
