"""Immutable folders with leases: a user holds a folder, and it is removed when nobody holds it.

A replacement stands beside it, as the next generation of its name; the last generation counts::

    4f1d...      4f1d....2      4f1d....3

A user keeps to the generation that it holds. The next user removes old generations that nobody holds.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

from pytest_vmbottle.host.files import sync_dir
from pytest_vmbottle.host.locks import lock, tried

__all__ = ["SNAPSHOTS", "Holds", "add", "all_in", "every", "name_of", "remove", "remove_all", "sweep", "sweep_gone"]

SNAPSHOTS = "snapshots"
"""Name of the folder of a machine's snapshots, inside the machine's own: the machines that run from a snapshot hold it."""
_NAME = re.compile(r"([^.]+)(?:\.([1-9][0-9]{0,8}))?")
_GONE = ".gone-"
"""Prefix of a folder's name while it is deleted, so that nobody finds half of it under its own name."""


class Holds:
    """Leases of one user, each folder once, until the end of a block or until closed."""

    def __init__(self) -> None:
        self._held: dict[Path, int] = {}

    def take(self, *folders: Path) -> None:
        """Hold more folders.

        Raises:
            FileNotFoundError: A folder is gone.
        """
        for folder in folders:
            with suppress(KeyError, FileNotFoundError):
                # Compared by inode: the name may refer to a new folder, and the hold would be of one that is gone.
                if os.path.samestat(os.fstat(self._held[folder]), folder.stat()):
                    continue
            self.release(folder)  # another one has its name now
            self._held[folder] = lock(folder, shared=True)

    def release(self, folder: Path) -> None:
        """Release a folder, if it is held."""
        with suppress(KeyError):
            os.close(self._held.pop(folder))

    def close(self) -> None:
        """Release all folders; may be called again."""
        for folder in list(self._held):
            self.release(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove(folder: Path, *, aside: Path | None = None) -> bool:
    """Remove a folder that nobody holds; return whether it is gone.

    Args:
        folder: The folder to remove.
        aside: Path to move it to instead of deleting it.
    """
    gone = aside or folder.with_name(f"{_GONE}{secrets.token_hex(8)}")
    with suppress(FileNotFoundError), tried(folder) as is_ours:
        # A user holds it. If it is gone, somebody else has just removed it, which is as good.
        if not is_ours:
            return not os.path.lexists(folder)
        folder.rename(gone)  # out of sight first, with the lock held: whoever waits for it sees that the name is gone
        if aside is None:
            shutil.rmtree(gone, ignore_errors=True)
    return True


def remove_all(folders: Iterable[Path]) -> bool:
    """Remove folders in order until one is held; return whether all are gone.

    Oldest first, so that the generation that counts stays the same until it goes itself.
    """
    # `all` stops at the first one that is not gone.
    return all(remove(folder) for folder in folders)


def name_of(folder: Path) -> str:
    """Return the name whose generation a folder is."""
    return folder.name.partition(".")[0]


def every(place: Path, name: str) -> list[Path]:
    """Return the existing generations of a name, oldest first."""
    return all_in(place).get(name, [])


def add(built: Path, place: Path, name: str) -> Path:
    """Make a folder the last generation of a name, atomically; return its path."""
    while True:
        there = every(place, name)
        final = place / (f"{name}.{_number(there[-1]) + 1}" if there else name)
        try:
            # A rename never replaces a folder that is not empty, so of two processes one takes the next number.
            built.rename(final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            continue  # somebody else was a moment faster
        sync_dir(place)
        return final


def sweep(place: Path) -> None:
    """Remove replaced generations that nobody holds, and half-deleted folders."""
    sweep_gone(place)
    for generations in all_in(place).values():
        # Never the last one, which is what the name stands for.
        for folder in generations[:-1]:
            # What cannot be removed costs room only, and the next sweep tries it again.
            with suppress(OSError):
                remove(folder)


def sweep_gone(place: Path) -> None:
    """Remove half-deleted folders of killed processes."""
    for folder in place.glob(f"{_GONE}*"):
        shutil.rmtree(folder, ignore_errors=True)


def all_in(place: Path) -> dict[str, list[Path]]:
    """Return the generations of all names in a folder, oldest first."""
    found: dict[str, list[Path]] = {}
    for path in sorted(place.iterdir(), key=_number) if place.is_dir() else ():
        if (match := _NAME.fullmatch(path.name)) is not None and path.is_dir():
            found.setdefault(match[1], []).append(path)
    return found


def _number(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    # The first generation bears no number and counts as 1, so its successor is 2. Other folders come first, and are left out.
    return int(match[2] or 1) if match else 0
