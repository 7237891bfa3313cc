"""A project's files, as an archive for other hosts."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from typing import IO

__all__ = ["write_archive"]

_LEFT_OUT = frozenset({".git", ".hg", ".svn", ".tox", ".nox", ".mypy_cache", ".ruff_cache", "__pycache__", "node_modules"})
"""Names of folders that tests do not need, and that are large or of this host."""


def write_archive(root: Path, stream: IO[bytes], *, without: Collection[Path]) -> int:
    """Write the files of a project as a tar archive, below its folder's name, and return the number of bytes in them.

    Folders of version control and of caches are left out, and virtual environments.

    Args:
        root: The project's folder.
        stream: What is written to.
        without: More folders that are left out.

    Raises:
        OSError: A file cannot be read, or the stream not be written.
    """
    size = 0
    with tarfile.open(fileobj=stream, mode="w|") as archive:
        archive.add(root, root.name, recursive=False)
        for path in _files(root, without):
            member = archive.gettarinfo(path, str(Path(root.name, path.relative_to(root))))
            # A socket, which nobody could use there.
            if member is None:
                continue
            if not member.isreg():
                archive.addfile(member)
                continue
            with path.open("rb") as file:
                # Of the file that is open: it may have been replaced since.
                member.size = os.fstat(file.fileno()).st_size
                archive.addfile(member, file)
            size += member.size
    return size


def _files(folder: Path, without: Collection[Path]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        is_folder = path.is_dir() and not path.is_symlink()
        if is_folder and (path.name in _LEFT_OUT or path in without or (path / "pyvenv.cfg").is_file()):
            continue
        yield path
        if is_folder:
            yield from _files(path, without)
