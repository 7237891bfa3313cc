"""Writing guest trees into host folders, by directory descriptors.

No symbolic link on the host is followed, whoever made it.

A guest may send a symbolic link in one copy and a folder of the same name in the next. So each name is looked up once, when it is opened,
and never again by its path.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["destination", "scratch", "settle"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def destination(target: Path, name: str | None) -> Iterator[tuple[Path, int, str]]:
    """Open the folder of a copy's destination.

    Yields the folder's path, its descriptor and the name in it. Without a name the target is the destination itself.

    Raises:
        FileNotFoundError: The folder does not exist.
        NotADirectoryError: The target is a symbolic link to a folder.
    """
    if target.is_symlink() and target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "Is a symbolic link, and copies do not follow it: name its target", str(target))
    within = name is not None and target.is_dir()
    # `.` and `..` are no names that something could be moved to.
    target = target if within or target.name not in ("", "..") else target.resolve()
    folder = target if within else target.parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory (on the host)", str(folder))
    # The folder above the target may be a symbolic link, because the user named it.
    opened = os.open(folder, _FOLDER if within else _FOLDER & ~os.O_NOFOLLOW)
    try:
        yield folder, opened, name if name is not None and within else target.name
    finally:
        os.close(opened)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Create a private folder within another one, and remove it with all its content at the end.

    The content may be of any depth and have any modes.
    """
    path = Path(tempfile.mkdtemp(prefix=".vmbottle-", dir=folder))
    try:
        yield path
    finally:
        opened = os.open(path, _FOLDER)
        try:
            _empty(opened)
        finally:
            os.close(opened)
        path.rmdir()


def _empty(top: int) -> None:
    """Empty a folder.

    Subfolders are moved up before they are emptied, so that any depth needs no recursion and few descriptors.
    """
    left = _folders(top)
    while left:
        name = left.pop()
        with _opened(name, top) as folder:
            for child in _folders(folder):
                # A random name cannot collide with another entry of the top folder.
                above = secrets.token_hex(16)
                os.rename(child, above, src_dir_fd=folder, dst_dir_fd=top)
                left.append(above)
        os.rmdir(name, dir_fd=top)


def _folders(folder: int) -> list[str]:
    """Make the subfolders of a folder accessible and return their names; remove everything else."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                # A guest's folder may have a mode that keeps even its owner out.
                os.chmod(entry.name, 0o700, dir_fd=folder)
                found.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=folder)
    return found


def settle(arrived: Path, folder: int, name: str) -> None:
    """Move a file or tree into an open folder.

    Nobody else may use the tree meanwhile. An existing folder is merged into, file by file.

    Raises:
        OSError: Something of another type is in the way, such as a symbolic link in place of a folder.
    """
    merged: list[tuple[tuple[str, ...], int]] = []
    left: list[tuple[str, ...]] = []

    def place(parts: tuple[str, ...], source: int, target: int) -> None:
        old, new = (arrived.name, *parts)[-1], (name, *parts)[-1]
        # A folder that exists is filled and not replaced, because it may hold other files.
        if _is_folder(old, source) and _is_folder(new, target):
            merged.append((parts, _mode(old, source)))
            left.append(parts)
            # So that it can be read and emptied, whatever mode the guest's folder has.
            os.chmod(old, 0o700, dir_fd=source)
        else:
            _rename(old, source, new, target)

    with _opened(str(arrived.parent)) as above:
        place((), above, folder)
        while left:
            parts = left.pop()
            # From the top each time and by descriptors: no component can be swapped for a symbolic link on the way.
            with _walked(above, (arrived.name, *parts)) as source, _walked(folder, (name, *parts)) as target:
                for child in os.listdir(source):  # noqa: PTH208 - by descriptor
                    place((*parts, child), source, target)
    # Last and from the bottom up, because these modes may forbid to write to the folders, or to enter them.
    for parts, mode in reversed(merged):
        with _walked(folder, (name, *parts)) as there:
            os.fchmod(there, mode)


def _rename(old: str, source: int, new: str, target: int) -> None:
    if not _is_folder(old, source):
        os.rename(old, new, src_dir_fd=source, dst_dir_fd=target)
        return
    mode = _mode(old, source)  # a folder that its owner may not write cannot be moved, because its parent changes
    os.chmod(old, 0o700, dir_fd=source)
    with _opened(old, source) as moved:
        os.rename(old, new, src_dir_fd=source, dst_dir_fd=target)
        os.fchmod(moved, mode)


@contextmanager
def _opened(name: str, folder: int | None = None) -> Iterator[int]:
    fd = os.open(name, _FOLDER, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _walked(top: int, parts: tuple[str, ...]) -> Iterator[int]:
    """Open a folder below another one, passing through folders only."""
    at = os.dup(top)
    try:
        for part in parts:
            below = os.open(part, _FOLDER, dir_fd=at)
            os.close(at)
            at = below
        yield at
    finally:
        os.close(at)


def _mode(name: str, folder: int) -> int:
    return stat.S_IMODE(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def _is_folder(name: str, folder: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
