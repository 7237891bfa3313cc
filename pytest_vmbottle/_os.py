"""Time limits, sizes, atomic files and short-lived processes: what every other module asks of the operating system."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import attrs

from pytest_vmbottle.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "Deadline",
    "Ended",
    "Reminder",
    "atomic_file",
    "copy_sparse",
    "format_size",
    "is_locked",
    "parse_size",
    "private_dir",
    "run_tool",
    "size_on_disk",
    "sparse_digest",
    "sync_dir",
    "try_lock",
]

_T = TypeVar("_T")
_LAST_WORDS = 2.0
"""Seconds in which the output of a killed process is read to its end."""
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(value: int | str) -> int:
    """Turns ``"512M"``, ``"2G"``, ``"1.5GiB"`` or a number of bytes into bytes; units are powers of 1024.

    >>> parse_size("512M")
    536870912
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise SpecError(f"{value!r} is not a size: write bytes or a string such as '512M' or '2G'")
    if isinstance(value, int):
        size = value
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:I?B)?\s*", value.upper())
        if match is None:
            raise SpecError(f"{value!r} is not a size: write bytes or a string such as '512M' or '2G'")
        size = int(float(match[1]) * _UNITS[match[2]])
    if size <= 0:
        raise SpecError(f"{value!r} is not a size: it must be larger than 0")
    return size


def format_size(size: int) -> str:
    """Writes a number of bytes for people.

    >>> format_size(1536 << 20)
    '1.5 GiB'
    """
    power = min((size.bit_length() - 1) // 10, 4) if size else 0
    amount = size / (1 << 10 * power)
    digits = 1 if power and amount < 10 else 0  # noqa: PLR2004 - two figures are enough
    return f"{amount:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


@attrs.frozen
class Deadline:
    """A point on the monotonic clock, handed down to whatever must be done before it.

    Attributes:
        seconds: How long it was when it was set.
        at: The moment it runs out, on `time.monotonic`.
    """

    seconds: float
    at: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "at", time.monotonic() + self.seconds)

    @property
    def remaining(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self.at - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether the moment has passed."""
        return time.monotonic() >= self.at

    def poll(self, check: Callable[[], _T | None], *, every: float = 0.1, first: float | None = None) -> _T | None:
        """Calls `check` until it returns something true; returns that, or None at the end.

        The pause grows from `first` (default: `every`) by half each time, up to `every`. The check is always called at least once, and once
        more at the deadline.
        """
        pause = every if first is None else first
        while True:
            last = self.expired
            answer = check()
            if answer:
                return answer
            if last:
                return None
            time.sleep(min(pause, self.remaining))
            pause = min(every, pause * 1.5)


@attrs.define
class Reminder:
    """Says when somebody who waits is to be told so: after 2 s or as given, and again when it has been twice as long, or a minute more."""

    _began: float = attrs.field(factory=time.monotonic, init=False)
    _next: float = 2.0

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._began

    def due(self) -> bool:
        """Whether it is time; if so, the next time is later."""
        if self.elapsed < self._next:
            return False
        self._next = self.elapsed + min(self.elapsed, 60.0)
        return True


def try_lock(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Takes a lock on an open file or folder, unless others keep us from it: whether it is ours now."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(folder: Path, kind: int) -> bool:
    """Whether others keep us from a lock on a folder at this moment; false if there is no such folder.

    Args:
        folder: The folder.
        kind: The lock that would be taken: `fcntl.LOCK_SH`, from which only an exclusive one keeps, or `fcntl.LOCK_EX`.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return not try_lock(fd, kind)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: Path, *, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """Opens a temporary sibling for writing that takes the name `path` only when the block ends well.

    Readers see the old content or the new one, whole, even after a crash: the data is synced before the rename, the folder after it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def sync_dir(path: Path) -> None:
    """Makes the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def private_dir(path: Path) -> Path:
    """Makes a folder, and its parents, that only this user can enter; returns it."""
    if not path.is_dir():
        if path.parent != path:
            private_dir(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
    return path


_BLOCK = 1 << 16
_ZEROS = bytes(_BLOCK)
_MANY_ZEROS = memoryview(bytes(1 << 20))


def copy_sparse(source: int, target: int) -> None:
    """Copies one open file into another, empty one, and leaves holes where there are holes or zeros.

    Args:
        source: File descriptor to read; its position is moved.
        target: File descriptor of an empty file; it gets the same length.
    """
    length = os.fstat(source).st_size
    os.ftruncate(target, length)
    for offset, block in _blocks(source, length):
        os.pwrite(target, block, offset)


def _blocks(fd: int, length: int) -> Iterator[tuple[int, bytes]]:
    """The aligned blocks of an open file that are not all zeros, with their offsets."""
    start = 0
    while start < length:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        end = os.lseek(fd, data, os.SEEK_HOLE)
        start = data // _BLOCK * _BLOCK
        while start < end:
            block = os.pread(fd, _BLOCK, start)
            if block != _ZEROS[: len(block)]:
                yield start, block
            start += _BLOCK


def content_digest(fd: int, tell: Callable[[int, int], object] = lambda _done, _size: None, *, algorithm: str = "sha256") -> str:
    """The digest of all of an open file's content, as sha256sum and the like say it; holes count as zeros without being read.

    Args:
        fd: File descriptor to read.
        tell: Takes now and then how many bytes are done, and of how many.
        algorithm: As hashlib names it.
    """
    value, done, size = hashlib.new(algorithm), 0, os.fstat(fd).st_size
    for offset, block in chain(_blocks(fd, size), [(size, b"")]):
        while done < offset:
            zeros = _MANY_ZEROS[: offset - done]
            value.update(zeros)
            done += len(zeros)
            tell(done, size)
        value.update(block)
        done += len(block)
        tell(done, size)
    return value.hexdigest()


def sparse_digest(path: Path) -> str:
    """The sha256 of a file's blocks of 64 KiB that are not all zeros, each with its offset, and of the file's length.

    Equal contents give equal digests wherever the holes are, and holes cost no time: a machine's RAM is mostly that.
    """
    value = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size
        for offset, block in _blocks(file.fileno(), length):
            value.update(offset.to_bytes(8))
            value.update(block)
    value.update(length.to_bytes(8))
    return value.hexdigest()


def size_on_disk(path: Path) -> int:
    """Bytes that a file, or all files below a folder, take in blocks: holes do not count."""
    if path.is_dir() and not path.is_symlink():
        return sum(size_on_disk(child) for child in path.iterdir())
    return path.lstat().st_blocks * 512


@attrs.frozen(kw_only=True)
class Ended:
    """A host command that has ended: its argv, status (negative for a signal, None if killed at the deadline) and output."""

    argv: tuple[str, ...]
    returncode: int | None
    output: str

    @property
    def ok(self) -> bool:
        """Whether it ended with status 0."""
        return self.returncode == 0


def run_tool(argv: Sequence[str | Path], *, timeout: float, env: dict[str, str] | None = None) -> Ended:
    """Runs a host command without a shell, in bounded time, and returns how it ended: never raises for its status.

    Raises:
        FileNotFoundError: There is no such program.
    """
    words = tuple(str(word) for word in argv)
    process = subprocess.Popen(  # noqa: S603 - argv list, no shell
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        start_new_session=True,  # so that what it starts can be killed with it, and keeps nobody waiting for the end of its output
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return Ended(argv=words, returncode=None, output=_kill_group(process))
    except BaseException:
        _kill_group(process)
        raise
    return Ended(argv=words, returncode=process.returncode, output=output)


def _kill_group(process: subprocess.Popen[str]) -> str:
    """Kills a process with all that it has started, and returns what it printed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        return process.communicate(timeout=_LAST_WORDS)[0]
    except subprocess.TimeoutExpired as error:  # something has left the group and holds the other end
        if process.stdout is not None:
            process.stdout.close()
        process.wait()
        return (error.output or b"").decode(errors="replace")
