"""Interactive guest shell on this terminal."""

from __future__ import annotations

import os
import selectors
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from pytest_vmbottle.errors import MachineDied, MachineError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.signals import Interruption

if TYPE_CHECKING:
    from pytest_vmbottle.channels.port import Channel, Terminal

__all__ = ["LEAVE", "attach", "attach_to"]

LEAVE = b"\x1d"
"""Ctrl-], as in telnet: leave the guest's terminal even if the guest does not answer."""
_WELCOME = b"A shell in the guest: Ctrl-D ends it, Ctrl-] leaves it.\r\n"
_PACE = 0.1
"""Seconds between two checks of the window's size; SIGWINCH would be quicker, but only the main thread can handle signals."""
# What programs in the guest may have switched on here: colours, no cursor, the mouse, marked pastes.
_SOBER = b"\x1b[0m\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l"


def attach(
    channel: Channel, *, user: str = "root", stdin: TextIO | None = None, stdout: TextIO | None = None, seconds: float = 30
) -> int | None:
    """Connect this terminal to a user's login shell in the guest (see `attach_to`).

    Args:
        channel: The channel to the guest.
        user: The user whose login shell is started.
        stdin: The terminal to read from; `sys.stdin` by default.
        stdout: The terminal to write to; `sys.stdout` by default.
        seconds: Seconds within which the guest must start the shell.

    Returns:
        The shell's status, -N for signal N; None if the user left it.

    Raises:
        MachineError: There is no terminal here.
        MachineDied: The connection was lost.
    """

    def opened(kind: str, size: tuple[int, int]) -> Terminal:
        return channel.terminal(user=user, kind=kind, size=size, deadline=Deadline(seconds))

    return attach_to(opened, stdin=stdin, stdout=stdout)


def attach_to(
    opened: Callable[[str, tuple[int, int]], Terminal], *, stdin: TextIO | None = None, stdout: TextIO | None = None, welcome: bool = True
) -> int | None:
    """Connect this terminal to one in the guest.

    Return when its program ends or the user leaves it. The terminal's settings are restored in any case.

    Every key goes to the guest, Ctrl-C and Ctrl-D too, and so does the size of the window. Ctrl-] leaves the program.

    Args:
        opened: Function that opens the guest's terminal, given its kind and its size.
        stdin: The terminal to read from; `sys.stdin` by default.
        stdout: The terminal to write to; `sys.stdout` by default.
        welcome: Whether to say how to leave.

    Returns:
        The program's status, -N for signal N; None if the user left it.

    Raises:
        MachineError: There is no terminal here.
        MachineDied: The connection was lost.
    """
    source, sink = _descriptor(stdin or sys.stdin), _descriptor(stdout or sys.stdout)
    # The guest's programs write for this terminal, so it gets the kind of it and not a guess.
    kind, size = os.environ.get("TERM", "") or "dumb", _size(sink)
    # The session is opened before the terminal is raw: an error of the login is printed on one that works.
    with closing(opened(kind, size)) as session:
        with _raw(source, sink):
            if welcome:
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
    raise MachineError(
        "a shell needs a terminal, and there is none here: run it in a terminal; run a test with `pytest -s` and without `-n`"
    )


def _size(sink: int) -> tuple[int, int]:
    columns, lines = os.get_terminal_size(sink)
    return columns or 80, lines or 24  # a terminal that was not told its size has none


def _write(sink: int, data: bytes) -> None:
    while data:
        data = data[os.write(sink, data) :]


@contextmanager
def _raw(source: int, sink: int) -> Iterator[None]:
    """Put the terminal into raw mode for a block."""
    before = termios.tcgetattr(source)
    # A signal such as SIGTERM would end the process and leave the terminal raw: as an exception it runs the `finally`.
    with Interruption():
        try:
            # Raw: Ctrl-C, Ctrl-Z and Ctrl-D are bytes for the guest, and not signals of this terminal.
            tty.setraw(source)
            yield
        finally:
            with suppress(termios.error, OSError):  # the window may be closed
                # A program that was left in the guest cannot clean up here any more.
                _write(sink, _SOBER)
                # Drained and not flushed: keys that were typed for the shell here are not lost.
                termios.tcsetattr(source, termios.TCSADRAIN, before)


def _join(session: Terminal, source: int, sink: int, size: tuple[int, int]) -> bool:
    """Copy data both ways until the guest's shell ends.

    Return false if the user left it before.
    """
    with selectors.DefaultSelector() as ready:
        ready.register(source, selectors.EVENT_READ)
        # One loop for both directions: a thread that is blocked in reading a terminal cannot be ended.
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
    """Send what was typed; return false if the user leaves or the window was closed."""
    try:
        typed = os.read(source, 4096)
    except OSError:
        return False
    # Anywhere in what was read: keys that are typed fast, or pasted, come in one piece.
    if not typed or LEAVE in typed:
        return False
    session.send(typed)
    return True
