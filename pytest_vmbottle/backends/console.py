"""Serial console of a machine: recorded from its first instant into files of bounded size, read, searched and followed."""

from __future__ import annotations

import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.shown import printable, tail, visible

__all__ = ["Console", "ConsoleInput", "Cursor", "Recorder"]

_PIECE = 4 << 20
"""Bytes of each of a console's two files: when the newer is full, it replaces the older."""
_LINE = 64 << 10
"""Bytes after which a line counts as ended although it is not."""
_PAUSE = 0.05
_SHOWN = 1 << 19
"""Most characters that the text of a console has."""
_STEP = 1 << 17
"""Bytes searched at a time, and about as many kept from before: no match is longer."""
_WHILE = 0.25
"""Seconds after which a search leaves the rest to the next one, so that the caller can check its deadline."""


def _older(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


class Recorder:
    """Thread that writes a console's output into its files until the other end closes.

    QEMU could write a file itself, but would let the guest fill the disk with it.
    """

    def __init__(self, sock: socket.socket, path: Path) -> None:
        """Start to read from a connected socket."""
        self._sock, self._path = sock, path
        # For this user alone: a console may show what a test types or a program prints, passwords too.
        path.touch(mode=0o600)
        self._thread = threading.Thread(target=self._record, name="vmbottle-console", daemon=True)
        self._thread.start()

    def _record(self) -> None:
        with suppress(OSError):  # the socket was closed
            # Read whatever becomes of the data: a socket that is full would hold up the guest's kernel at its next message.
            while data := self._sock.recv(1 << 16):
                with suppress(OSError):  # a full disk must not hold the guest up
                    self._write(data)

    def _write(self, data: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(data)
            full = file.tell() >= _PIECE
        if full:
            # Renamed, because cursors know their file by its inode.
            self._path.replace(_older(self._path))
            self._path.touch(mode=0o600)

    def finish(self, seconds: float = 1.0) -> None:
        """Wait until the last output of an ended machine is written."""
        self._thread.join(seconds)

    def close(self) -> None:
        """End the recording; may be called again."""
        with suppress(OSError):
            # Shut down first: `close` alone would not wake the thread out of `recv`.
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(1)
        self._sock.close()


class ConsoleInput:
    """Input of a serial console, at the other end of which nobody may read; safe to use from several threads."""

    def __init__(self, sock: socket.socket) -> None:
        """Take the connected socket that a `Recorder` reads from."""
        self._sock = sock
        # The words of two threads must not be mixed.
        self._lock = threading.Lock()

    def write(self, data: bytes, deadline: Deadline) -> None:
        """Write all data.

        Raises:
            TimeoutError: The guest did not read so much by the deadline.
            OSError: The other end is closed.
        """
        writable = select.poll()
        writable.register(self._sock, select.POLLOUT)
        rest = memoryview(data)
        with self._lock:
            while rest:
                # Never without a limit: a guest reads from its serial port as it likes.
                if not writable.poll(deadline.remaining * 1000):
                    raise TimeoutError(f"the guest has left {len(rest)} of {len(data)} bytes unread")
                with suppress(BlockingIOError):
                    rest = rest[self._sock.send(rest, socket.MSG_DONTWAIT) :]


class Cursor:
    """Read position in a console's files; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Begin at the oldest output that is kept."""
        self._path = path
        self._file, self._offset = 0, 0
        self._lock = threading.Lock()

    def read(self) -> bytes:
        """Return the output since the last call, or its last part if not all of it is kept."""
        with self._lock, suppress(FileNotFoundError), self._path.open("rb") as file:
            missed = b""
            status = os.fstat(file.fileno())
            # A new file of the same name was begun, or the same one was truncated: the rest is in the older one.
            if status.st_ino != self._file or status.st_size < self._offset:
                missed, self._file, self._offset = self._rest(), status.st_ino, 0
            file.seek(self._offset)
            new = file.read()
            self._offset += len(new)
            return missed + new
        return b""

    def _rest(self) -> bytes:
        """Return the unread part of the older file."""
        with suppress(FileNotFoundError), _older(self._path).open("rb") as file:
            # Another inode: this is the first read, or two files were begun since the last one, and the unread rest of the oldest is gone.
            if os.fstat(file.fileno()).st_ino == self._file:
                file.seek(self._offset)
            return file.read()
        return b""


class Console:
    """Serial console of a machine, recorded from its first instant; control characters are neutralised.

    Example:
        >>> vm.console.tail(1)  # doctest: +SKIP
        'debian login: root'
    """

    def __init__(self, path: Path, *, ended: Callable[[], bool] = lambda: False) -> None:
        """Take the file of the recording, and a function that tells whether the output has ended."""
        self._path = path
        self._ended = ended
        self._expecter = _Expecter(path)

    @property
    def ended(self) -> bool:
        """Tell whether the output has ended."""
        return self._ended()

    def until(self, ended: Callable[[], bool]) -> Console:
        """Return the same console from its beginning, with another notion of its end, for a machine that may restart."""
        return Console(self._path, ended=ended)

    @property
    def path(self) -> Path:
        """Path of the raw recording; older output is in a second file with the suffix `.1`."""
        return self._path

    @property
    def text(self) -> str:
        """The output so far; of a very talkative console the last 512 KiB."""
        return printable(Cursor(self._path).read()[-_SHOWN:].decode("utf-8", "replace"), _SHOWN)

    def tail(self, lines: int = 20) -> str:
        """Return the last lines."""
        return "\n".join(self.text.splitlines()[-lines:])

    def follow(self, *, timeout: float | None = None) -> Iterator[str]:
        """Yield the lines of the console without their ends, old and new, until the machine ends.

        Args:
            timeout: Seconds after which the iteration stops; by default it goes on.

        Example:
            >>> for line in vm.console.follow(timeout=10):  # doctest: +SKIP
            ...     print(line)
        """
        until = None if timeout is None else time.monotonic() + timeout
        cursor, rest = Cursor(self._path), b""
        while True:
            last = self._ended() or (until is not None and time.monotonic() >= until)  # asked before it is read for the last time
            new = cursor.read()
            *lines, rest = (rest + new).split(b"\n")
            for line in [*lines, rest] if (last or len(rest) > _LINE) and rest else lines:
                yield _shown(line)
            if last:
                return
            # It was just yielded as a line of its own.
            rest = b"" if len(rest) > _LINE else rest
            if not new:
                time.sleep(_PAUSE)

    def expect(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Return the next match if there is one yet; each search begins where the last match ended."""
        return self._expecter.search(pattern)

    def skip(self) -> None:
        """Have the next search begin at what the console says from now on."""
        self._expecter.skip()

    def __repr__(self) -> str:
        return f"<Console {tail(self.text, 10)!r}>"


def _shown(line: bytes) -> str:
    return printable(line.removesuffix(b"\r").decode("utf-8", "replace"))


class _Expecter:
    """Search for one pattern after another: each search begins where the last match ended."""

    def __init__(self, path: Path) -> None:
        """Begin at the beginning."""
        self._cursor = Cursor(path)
        self._unread = b""  # what the console has said and no search has reached
        self._raw = b""  # the line that has no end yet
        self._text = ""  # the lines before it, with control characters made visible
        self._from = 0  # where in both the next search begins

    def search(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Return the next match if a short search finds it; each match is found once."""
        self._unread += self._cursor.read()
        until = time.monotonic() + _WHILE
        while (match := self._search(pattern)) is None and self._unread and time.monotonic() < until:
            pass
        return match

    def skip(self) -> None:
        """Drop everything that the console has said so far."""
        self._cursor.read()
        self._unread, self._raw, self._text, self._from = b"", b"", "", 0

    def _search(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Read one step and search."""
        # In steps, because a pattern of the test's own may take long on text that a guest has chosen.
        new, self._unread = self._unread[:_STEP], self._unread[_STEP:]
        lines, newline, self._raw = (self._raw + new).rpartition(b"\n")
        # A line without an end is passed on in pieces, or a guest could have us hold it in memory for ever.
        if len(self._raw) > _LINE:
            lines, newline, self._raw = lines + newline + self._raw, b"", b""
        self._text += _visible(lines + newline)
        # A pattern may match a prompt, which has no newline: the unfinished line is searched too, but not consumed.
        match = pattern.search(self._text + _visible(self._raw.removesuffix(b"\r")), self._from)
        if match:
            self._from = match.end()
        # A match may end in the unfinished line, which stays raw: `_from` then points into it, and the text before is done with.
        drop = min(self._from, len(self._text)) if match else max(0, len(self._text) - _STEP)
        self._text, self._from = self._text[drop:], max(0, self._from - drop)
        return match


def _visible(raw: bytes) -> str:
    return visible(raw.decode("utf-8", "replace"))
