"""Atomic writes, private folders, and files with holes."""

from __future__ import annotations

import os
import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BLOCK", "atomic_file", "blocks", "copy_sparse", "descriptor", "private_dir", "read_or_empty", "size_on_disk", "sync_dir"]


@contextmanager
def atomic_file(path: Path, *, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """Open a temporary sibling for writing; it takes the name `path` only if the block succeeds.

    Readers see the old content or the new one, whole, even after a crash: the data is synced before the rename, the folder after it.
    """
    # In the same folder, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            # Before the rename, or a crash could leave the new name with no content.
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def sync_dir(path: Path) -> None:
    """Sync a folder, which makes its names durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def private_dir(path: Path) -> Path:
    """Make a folder and its parents for this user only; return it."""
    if not path.is_dir():
        if path.parent != path:
            # Parents first, one by one: `mkdir(parents=True)` would give them the default mode, open to others.
            private_dir(path.parent)
        # Several workers of one run come here at the same time, and the first one has made it.
        path.mkdir(mode=0o700, exist_ok=True)
    return path


def read_or_empty(path: Path) -> str:
    """Return the text of a system file; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# Part of a format: `sparse_digest` hashes blocks of this size, and packs carry its digests. Another size would make all of them damaged.
BLOCK = 1 << 16
_ZEROS = bytes(BLOCK)


def copy_sparse(source: int, target: int) -> None:
    """Copy one open file into an empty one, with holes instead of zeros.

    Args:
        source: File descriptor to read; its position is moved.
        target: File descriptor of an empty file; it gets the same length.
    """
    length = os.fstat(source).st_size
    os.ftruncate(target, length)
    for offset, block in blocks(source, length):
        os.pwrite(target, block, offset)


def blocks(fd: int, length: int) -> Iterator[tuple[int, bytes]]:
    """Yield the aligned blocks of an open file that are not all zeros, with their offsets."""
    start = 0
    while start < length:
        try:
            # Holes are found by the file system, without reading them: the RAM of a machine is mostly holes.
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        # Never fails: the end of a file counts as a hole (lseek(2)).
        end = os.lseek(fd, data, os.SEEK_HOLE)
        # Aligned down, so that equal content gives equal blocks whatever the file system's own block size is.
        start = data // BLOCK * BLOCK
        while start < end:
            block = os.pread(fd, BLOCK, start)
            if block != _ZEROS[: len(block)]:
                yield start, block
            start += BLOCK


def size_on_disk(path: Path) -> int:
    """Return the bytes on disk of a file or folder: holes do not count."""
    if path.is_dir() and not path.is_symlink():
        return sum(size_on_disk(child) for child in path.iterdir())
    # The unit is 512 bytes on every file system, whatever its own block size is (stat(2)).
    return path.lstat().st_blocks * 512


@contextmanager
def descriptor(path: Path, flags: int) -> Iterator[int]:
    """Open a file for the length of a block, but no symbolic link; a new file is private."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
