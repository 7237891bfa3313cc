"""Lines between processes of one user: unix sockets with one JSON object per line, and descriptors beside them."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Line", "connect", "exchange", "listen", "peer_is_us"]

_SOCKET = "socket"
# Bytes of a message: far more than any request or answer has.
_MAX_MESSAGE = 8 << 20


class Line:
    """A connection between two processes, with one JSON object per line.

    Descriptors may come with the first object.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Take a connected unix socket."""
        self._sock = sock
        self._buffer = bytearray()
        self.descriptors: list[int] = []

    def fileno(self) -> int:
        """Return a descriptor that is readable when the other side has sent something, or is gone."""
        return self._sock.fileno()

    def send(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a message."""
        data = json.dumps(message).encode() + b"\n"
        sent = socket.send_fds(self._sock, [data], list(descriptors)) if descriptors else 0
        if sent < len(data):  # whoever has got it all may have answered and gone, and then even nothing is a broken pipe
            self._sock.sendall(data[sent:])

    def receive(self) -> dict[str, Any] | None:
        """Receive the next message; return None if the other side is gone.

        Raises:
            ValueError: The message is invalid.
        """
        while b"\n" not in self._buffer:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._sock, 1 << 16, 3)
            except ConnectionResetError:
                return None
            self.descriptors += descriptors
            if not data:
                return None
            self._buffer += data
            # A peer that never ends its message would fill the memory.
            if len(self._buffer) > _MAX_MESSAGE:
                raise ValueError("the message is incomplete")
        text, _, rest = self._buffer.partition(b"\n")
        self._buffer = bytearray(rest)
        message = json.loads(text)
        if not isinstance(message, dict):
            raise ValueError("the message is not an object")  # noqa: TRY004 - it is a value that came from outside
        return message

    @property
    def is_cut(self) -> bool:
        """Tell whether the other side is gone.

        To be asked only when no more messages are expected from it.
        """
        try:
            return self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close the connection, and the descriptors that came with it."""
        self._sock.close()
        while self.descriptors:
            os.close(self.descriptors.pop())


def exchange(line: Line, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any] | None:
    """Send a request, close the line and return the answer; None if the other side ended before it answered."""
    try:
        line.send(request, descriptors)
        return line.receive()
    except (BrokenPipeError, ConnectionResetError):
        return None
    finally:
        line.close()


def peer_is_us(sock: socket.socket) -> bool:
    """Tell whether the other end of a unix socket belongs to this user."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return bool(uid == os.geteuid())


def _address(folder: int) -> str:
    """Return the address of the socket in an open folder.

    It is short however deep the folder is, because an address holds 107 bytes only.
    """
    return f"/proc/self/fd/{folder}/{_SOCKET}"


def listen(folder: int) -> socket.socket:
    """Create a socket in an open folder, to which this user's processes can connect."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(_address(folder))
    sock.listen(64)
    return sock


def connect(folder: Path) -> Line:
    """Connect to the socket in a folder.

    Raises:
        OSError: Nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        with _opened(folder) as fd:
            sock.connect(_address(fd))
    except BaseException:
        sock.close()
        raise
    return Line(sock)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    # A link in its place is not followed.
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)
