"""A terminal in the guest of a machine without pytest: the client's end, and the daemon's."""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Self

from pytest_vmbottle.channels.port import Terminal
from pytest_vmbottle.standalone.line import Line

__all__ = ["RemoteTerminal", "serve"]

_CHUNK = 1 << 16
_LAST_WORDS = 5.0
"""Seconds that a program's status may come after the end of its output."""


class RemoteTerminal(Terminal):
    """A terminal whose bytes go through a daemon."""

    def __init__(self, line: Line, sock: socket.socket, checked: Callable[[Mapping[str, Any]], Any]) -> None:
        """Take the line of the request, and the socket for the bytes."""
        self._line, self._sock, self._checked = line, sock, checked

    @classmethod
    def open(cls, line: Line, request: Mapping[str, Any], *, checked: Callable[[Mapping[str, Any]], Any]) -> Self:
        """Send a request for a terminal, and return it when the guest has opened it.

        Args:
            line: A line to a daemon, which the terminal closes.
            request: The request, as `requests` reads it.
            checked: Function that returns the answer in a message, or raises its error.

        Raises:
            MachineError: The guest cannot be reached.
        """
        ours, its = socket.socketpair()
        try:
            with its:
                line.send(request, [its.fileno()])
            first = line.receive() or {"error": "MachineError", "message": "the machine ended before it had opened a terminal"}
            checked(first)
        except BaseException:
            ours.close()
            line.close()
            raise
        return cls(line, ours, checked)

    def fileno(self) -> int:
        """Return a descriptor that is readable when `receive` has output."""
        return self._sock.fileno()

    def receive(self) -> bytes:
        """Return new output; nothing at its end."""
        with suppress(ConnectionResetError):
            return self._sock.recv(_CHUNK)
        return b""

    def send(self, data: bytes) -> None:
        """Type into the terminal, if it is still there."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._sock.sendall(data)

    def resize(self, columns: int, lines: int) -> None:
        """Tell the guest the size of the window."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._line.send({"size": [columns, lines]})

    @property
    def status(self) -> int | None:
        """The program's status, -N for signal N, or None if it is not known."""
        with suppress(OSError, ValueError):
            message = self._line.receive()
            return None if message is None else self._checked(message)
        return None

    def close(self) -> None:
        """Hang up the terminal; may be called again."""
        self._sock.close()
        self._line.close()


def serve(session: Terminal, line: Line) -> int | None:
    """Pass bytes between a terminal and the descriptor that came with the line, until either ends; return the program's status."""
    with socket.socket(fileno=os.dup(line.descriptors[0])) as sock, selectors.DefaultSelector() as ready:
        for each in (session, sock, line):
            ready.register(each, selectors.EVENT_READ)
        while True:
            found = {key.fileobj for key, _ in ready.select()}
            if line in found and not _resized(session, line):
                return None
            if sock in found and not _typed(session, sock):
                return None
            if session in found:
                data = session.receive()
                if not data:
                    return session.status
                try:
                    sock.sendall(data)
                except OSError:  # the client is gone
                    return None


def _resized(session: Terminal, line: Line) -> bool:
    message = line.receive()
    if message is None:
        return False
    columns, lines = message["size"]
    session.resize(int(columns), int(lines))
    return True


def _typed(session: Terminal, sock: socket.socket) -> bool:
    with suppress(OSError):
        if data := sock.recv(_CHUNK):
            session.send(data)
            return True
    return False
