"""A machine's serial console: recorded from its first instant into files of bounded size, read, searched and followed."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from pytest_vmbottle.shown import printable, tail, visible

__all__ = ["Console", "Cursor", "Recorder", "kernel_trouble"]

_PIECE = 4 << 20
"""Bytes of one of the two files that a console is kept in: when the newer is full, it takes the place of the older."""
_LINE = 64 << 10
"""Bytes after which a line is taken for ended although it is not."""
_PAUSE = 0.05
_SHOWN = 1 << 19
"""Characters of a console that its text has at most."""
_TROUBLES, _WORDS = 16, 1000
"""Troubles that are told of what came at once, and characters of each."""
_STEP = 1 << 17
"""Bytes that are searched at a time, and about what is kept of those before them: no match is longer."""
_WHILE = 0.25
"""Seconds after which a search leaves the rest to the next one, so that who waits sees whether time is up."""
# What the kernel prints begins with its clock, a user's own words on the console do not. Lockups and stalls are left out: a busy host, or
# a machine that was paused, is enough for the kernel to see one. Each match takes the rest of its line: what begins like one again and
# again would else be read as often as that.
_TROUBLE = re.compile(
    rb"\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ((?:Kernel panic - not syncing|BUG: |Oops: |general protection fault|kernel BUG at "
    rb"|Internal error: |Unable to handle kernel |double fault: |(?P<oops>Oops\b)|(?P<hung>INFO: task ))[^\r\n]*)"
)
_PANIC = re.compile(rb"\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? (Kernel panic - not syncing[^\r\n]*)")
_OOPS = re.compile(rb" \[#\d")


def kernel_trouble(text: bytes) -> list[str]:
    """The lines of a console by which a kernel says that it panicked, met a bug of its own, or that a task hangs; of many the first."""
    found = islice(filter(_is_trouble, _TROUBLE.finditer(text)), _TROUBLES)
    lines = dict.fromkeys(match[1] for match in (*found, *islice(_PANIC.finditer(text), 1)))
    return [printable(line[:_WORDS].decode("utf-8", "replace")) for line in lines]


def _is_trouble(match: re.Match[bytes]) -> bool:
    """Whether what begins like a trouble goes on like one."""
    if match["oops"]:
        return _OOPS.search(match[1]) is not None
    return not match["hung"] or b" blocked for more than " in match[1]


def _older(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


class Recorder:
    """Writes what a console says into its files, in a thread of its own, until the other end is closed.

    QEMU could write a file itself, but would let the guest fill the disk with it.
    """

    def __init__(self, sock: socket.socket, path: Path) -> None:
        """Starts to read from a connected socket."""
        self._sock, self._path = sock, path
        path.touch(mode=0o600)
        self._thread = threading.Thread(target=self._record, name="vmbottle-console", daemon=True)
        self._thread.start()

    def _record(self) -> None:
        with suppress(OSError):  # the socket was closed
            while data := self._sock.recv(1 << 16):
                with suppress(OSError):  # a full disk must not hold the guest up
                    self._write(data)

    def _write(self, data: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(data)
            full = file.tell() >= _PIECE
        if full:
            self._path.replace(_older(self._path))
            self._path.touch(mode=0o600)

    def finish(self, seconds: float = 1.0) -> None:
        """Waits until all is written that a machine which has ended had said."""
        self._thread.join(seconds)

    def close(self) -> None:
        """Ends it; may be called again."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(1)
        self._sock.close()


class Cursor:
    """A place in a console's files; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Begins at what is kept of the beginning."""
        self._path = path
        self._file, self._offset = 0, 0
        self._lock = threading.Lock()

    def read(self) -> bytes:
        """What the console has said since the last time; if that is more than is kept, its last part."""
        with self._lock, suppress(FileNotFoundError), self._path.open("rb") as file:
            missed = b""
            status = os.fstat(file.fileno())
            if status.st_ino != self._file or status.st_size < self._offset:
                missed, self._file, self._offset = self._rest(), status.st_ino, 0
            file.seek(self._offset)
            new = file.read()
            self._offset += len(new)
            return missed + new
        return b""

    def _rest(self) -> bytes:
        """What was not read of the older file."""
        with suppress(FileNotFoundError), _older(self._path).open("rb") as file:
            if os.fstat(file.fileno()).st_ino == self._file:
                file.seek(self._offset)
            return file.read()
        return b""


class Console:
    """The serial console of a machine, recorded from its first instant; control characters are neutralised.

    Example:
        >>> vm.console.tail(1)  # doctest: +SKIP
        'debian login: root'
    """

    def __init__(self, path: Path, *, ended: Callable[[], bool] = lambda: False) -> None:
        """Takes the file that it is recorded in, and what says that nothing more will come."""
        self._path = path
        self._ended = ended
        self._expecter = _Expecter(path)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._ended()

    def until(self, ended: Callable[[], bool]) -> Console:
        """The same one from its beginning, for who knows another end: a machine that may be started again."""
        return Console(self._path, ended=ended)

    @property
    def path(self) -> Path:
        """The file that it is recorded in, raw; what came before that is in another beside it, with `.1` at its end."""
        return self._path

    @property
    def text(self) -> str:
        """What the console has said so far; of a very talkative one the last 512 KiB."""
        return printable(Cursor(self._path).read()[-_SHOWN:].decode("utf-8", "replace"), _SHOWN)

    def tail(self, lines: int = 20) -> str:
        """The last lines of it."""
        return "\n".join(self.text.splitlines()[-lines:])

    def follow(self, *, timeout: float | None = None) -> Iterator[str]:
        """Gives the lines of the console, without their ends: those that are there, then each as it comes, until the machine ends.

        Args:
            timeout: Seconds after which it stops; by default it does not.

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
            rest = b"" if len(rest) > _LINE else rest
            if not new:
                time.sleep(_PAUSE)

    def expect(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The next place that matches, if it is found yet; each search begins where what was found last ended."""
        return self._expecter.search(pattern)

    def __repr__(self) -> str:
        return f"<Console {tail(self.text, 10)!r}>"


def _shown(line: bytes) -> str:
    return printable(line.removesuffix(b"\r").decode("utf-8", "replace"))


class _Expecter:
    """Looks for one thing after another in what a console says: each search begins where what was found last ended."""

    def __init__(self, path: Path) -> None:
        """Begins at the beginning."""
        self._cursor = Cursor(path)
        self._unread = b""  # what the console has said and no search has reached
        self._raw = b""  # the line that has no end yet
        self._text = ""  # the lines before it, with control characters made visible
        self._from = 0  # where in both the next search begins

    def search(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The next place that matches, if it is found in a moment; it will not be found again."""
        self._unread += self._cursor.read()
        until = time.monotonic() + _WHILE
        while (match := self._search(pattern)) is None and self._unread and time.monotonic() < until:
            pass
        return match

    def _search(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Reads one step on, and searches."""
        new, self._unread = self._unread[:_STEP], self._unread[_STEP:]
        lines, newline, self._raw = (self._raw + new).rpartition(b"\n")
        if len(self._raw) > _LINE:
            lines, newline, self._raw = lines + newline + self._raw, b"", b""
        self._text += _visible(lines + newline)
        match = pattern.search(self._text + _visible(self._raw.removesuffix(b"\r")), self._from)
        if match:
            self._from = match.end()
        drop = min(self._from, len(self._text)) if match else max(0, len(self._text) - _STEP)
        self._text, self._from = self._text[drop:], max(0, self._from - drop)
        return match


def _visible(raw: bytes) -> str:
    return visible(raw.decode("utf-8", "replace"))
