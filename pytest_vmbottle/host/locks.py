"""Locks between processes, by the kernel (flock): each ends with its last descriptor, however its holder ends.

`FileLock` is a file that serves only as a lock, and uses filelock. The other functions lock the protected file or folder itself, which
filelock cannot do. They are needed where

* users of a folder share its lock, and its remover takes it alone: filelock has no shared locks;
* trying the lock proves that its holder lives: filelock would make a missing file again;
* a child inherits the descriptor, and with it the lock, as supervisors and daemons do: filelock closes its own in a forked child.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host.deadline import Deadline

__all__ = ["FileLock", "is_locked", "lock", "locked", "new", "tried", "try_lock"]


class FileLock:
    """Lock file for one thread of one process at a time. It is made if need be, and never removed."""

    def __init__(self, path: Path) -> None:
        """Take the path; nothing is locked yet, and the file's folder must exist."""
        # Here and not above: only those who look at a folder's lock, as `machine ls` does, need not wait for its import.
        import filelock

        self._path, self._before = path, _inode(path)
        self._lock = filelock.FileLock(path, mode=0o600, poll_interval=0.01)

    def acquire(self, deadline: Deadline) -> bool:
        """Take the lock; return false if others had it until the deadline.

        After a failure it may be called again.

        Raises:
            CatalogError: The file cannot be opened or locked.
        """
        try:
            # An attempt may have got the file and then waited in vain for the holder of a removed one: it goes on from there.
            if not self._lock.is_locked:
                self._lock.acquire(timeout=deadline.remaining)
        except TimeoutError:  # filelock.Timeout
            return False
        except OSError as error:
            raise CatalogError(f"the lock {self._path} cannot be taken: {error.strerror}") from error
        # A new file: somebody may hold one that was removed under him.
        return _inode(self._path) == self._before or bool(deadline.poll(lambda: not _is_held_without_name(self._path)))

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._lock.release()


def lock(path: Path, *, shared: bool = False) -> int:
    """Lock a file or folder once others allow it; return the descriptor whose closing ends the lock.

    Args:
        path: The file or folder.
        shared: Whether others may share the lock.

    Raises:
        FileNotFoundError: It is not there, or was removed or replaced meanwhile.
    """
    fd = _take(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    if fd is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return fd


def try_lock(path: Path, *, shared: bool = False, create: bool = False, deadline: Deadline | None = None) -> int | None:
    """Lock a file or folder by a deadline; return the descriptor, or None.

    None means that others held it, or removed or replaced it just then.

    A symbolic link is not followed, because a lock is often tried in order to remove what is there.

    Args:
        path: The file or folder.
        shared: Whether others may share the lock.
        create: Whether to make a missing file.
        deadline: Deadline of the attempt; at once by default.

    Raises:
        FileNotFoundError: It is not there.
    """
    # Polled and not waited for: flock(2) itself has no time-out.
    kind = fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    flags = os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    # In a tuple, which is true whatever is in it: where standard input is closed, the descriptor may be 0.
    taken = (deadline or Deadline(0)).poll(lambda: None if (fd := _take(path, kind, flags)) is None else (fd,), every=0.05, first=0.001)
    return taken and taken[0]


def new(path: Path) -> int:
    """Make a locked file; return the descriptor.

    Raises:
        FileExistsError: There is one already.
    """
    while True:
        fd = _take(path, fcntl.LOCK_EX, os.O_CREAT | os.O_EXCL)
        if fd is not None:
            return fd  # else somebody took it for a dead process's and removed it before it was locked


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold `lock` for the length of a block."""
    fd = lock(path, shared=shared)
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def tried(path: Path, *, shared: bool = False, deadline: Deadline | None = None) -> Iterator[bool]:
    """Try `try_lock` and hold it for the length of a block, which gets whether it succeeded."""
    fd = try_lock(path, shared=shared, deadline=deadline)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            os.close(fd)


def is_locked(path: Path, *, shared: bool = False) -> bool:
    """Tell whether `try_lock` would fail now because of others; false if there is no such file or folder."""
    try:
        with tried(path, shared=shared) as is_ours:
            # Not ours may also mean that it was removed just then: then nobody holds it.
            return not is_ours and os.path.lexists(path)
    except OSError:
        return False


def _take(path: Path, kind: int, flags: int = 0) -> int | None:
    """Return the descriptor of a locked file or folder that still has its name; None on failure."""
    # Not blocking concerns a pipe in its place, which would otherwise keep us waiting for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(fd, kind)
        # Between opening and locking the file may have been removed or replaced: then the lock is worth nothing.
        if os.path.samestat(os.fstat(fd), path.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    # Ctrl-C may end a wait for the lock, and the descriptor must not outlive it.
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except OSError:
        return None


def _is_held_without_name(path: Path) -> bool:
    """Tell whether a process of this user has a removed file of this name open.

    Programs that tidy up /tmp remove files in use.
    """
    return any(f"{path} (deleted)" in _open_files(process) for process in Path("/proc").glob("[0-9]*"))


def _open_files(process: Path) -> Iterator[str]:
    """Yield the names of a process's open files from /proc; none if it has ended or is another user's."""
    with suppress(OSError):
        for link in (process / "fd").iterdir():
            with suppress(OSError):
                yield os.readlink(link)  # noqa: PTH115 - Path would take the end for a suffix
