"""Folders that are never changed: whoever uses one holds it, and it is removed when nobody does.

What replaces one stands beside it, as the next generation of its name, and the last of them counts::

    4f1d...      4f1d....2      4f1d....3

Whoever has taken one up keeps to it. What nobody holds any more is removed by who comes next.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

from pytest_vmbottle._os import is_locked, sync_dir, try_lock

__all__ = ["SNAPSHOTS", "Holds", "add", "all_in", "every", "hold", "is_held", "name_of", "remove", "remove_all", "sweep", "sweep_gone"]

SNAPSHOTS = "snapshots"
"""The folder of a machine's snapshots, in the machine's own: each is held by the machines that run from it."""
_NAME = re.compile(r"([^.]+)(?:\.([1-9][0-9]{0,8}))?")
_GONE = ".gone-"
"""How the name begins of what is just being deleted: nobody finds half of it under its own."""


def hold(folder: Path) -> int:
    """Holds a folder so that it is not removed; returns the descriptor whose closing ends the hold, as the end of the process does.

    Raises:
        FileNotFoundError: It is gone.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.path.samestat(os.fstat(fd), folder.stat()):
            return fd
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)  # removed, or moved, while we waited
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


class Holds:
    """What one user holds, each folder once, until the end of a block or until it is closed."""

    def __init__(self) -> None:
        self._held: dict[Path, int] = {}

    def take(self, *folders: Path) -> None:
        """Holds folders too.

        Raises:
            FileNotFoundError: One is gone.
        """
        for folder in folders:
            with suppress(KeyError, FileNotFoundError):
                if os.path.samestat(os.fstat(self._held[folder]), folder.stat()):
                    continue
            self.release(folder)  # another one has its name now
            self._held[folder] = hold(folder)

    def release(self, folder: Path) -> None:
        """Gives up a hold, if there is one."""
        with suppress(KeyError):
            os.close(self._held.pop(folder))

    def close(self) -> None:
        """Gives up all; may be called again."""
        for folder in list(self._held):
            self.release(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_held(folder: Path) -> bool:
    """Whether somebody holds a folder at this moment."""
    return is_locked(folder, fcntl.LOCK_EX)


def remove(folder: Path, *, aside: Path | None = None) -> bool:
    """Removes a folder that nobody holds; returns whether it is gone.

    Args:
        folder: What goes.
        aside: Where it is moved to, if it is not to be deleted.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        if not try_lock(fd):
            return False
        # Out of sight first, with the lock held: whoever waits for it sees that the name is gone.
        gone = aside or folder.with_name(f"{_GONE}{secrets.token_hex(8)}")
        with suppress(FileNotFoundError):
            folder.rename(gone)
            if aside is None:
                shutil.rmtree(gone, ignore_errors=True)
    finally:
        os.close(fd)
    return True


def remove_all(folders: Iterable[Path]) -> bool:
    """Removes folders in their order until one is held; returns whether all are gone.

    Oldest first: what counts by then is what counted before.
    """
    return all(remove(folder) for folder in folders)


def name_of(folder: Path) -> str:
    """The name whose generation a folder is."""
    return folder.name.partition(".")[0]


def every(place: Path, name: str) -> list[Path]:
    """The generations of a name that are there, oldest first."""
    return all_in(place).get(name, [])


def add(built: Path, place: Path, name: str) -> Path:
    """Makes a folder the last generation of a name, all at once; returns where it is."""
    while True:
        there = every(place, name)
        final = place / (f"{name}.{_number(there[-1]) + 1}" if there else name)
        try:
            built.rename(final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            continue  # somebody else was a moment faster
        sync_dir(place)
        return final


def sweep(place: Path) -> None:
    """Removes what other generations have replaced and nobody holds, and the rest of what was being removed."""
    sweep_gone(place)
    for generations in all_in(place).values():
        for folder in generations[:-1]:
            with suppress(OSError):
                remove(folder)


def sweep_gone(place: Path) -> None:
    """Removes what somebody was deleting who was killed over it."""
    for folder in place.glob(f"{_GONE}*"):
        shutil.rmtree(folder, ignore_errors=True)


def all_in(place: Path) -> dict[str, list[Path]]:
    """The generations of all names in a folder, oldest first."""
    found: dict[str, list[Path]] = {}
    for path in sorted(place.iterdir(), key=_number) if place.is_dir() else ():
        if (match := _NAME.fullmatch(path.name)) is not None and path.is_dir():
            found.setdefault(match[1], []).append(path)
    return found


def _number(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match[2] or 1) if match else 0
