"""Digests of files, remembered in a folder so that a large file is read once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host import records
from pytest_vmbottle.host.digests import content_digest, digest
from pytest_vmbottle.host.files import private_dir

__all__ = ["file_digest", "remembered_digest"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


def remembered_digest(file: IO[bytes], path: Path, memory: Path, read: Callable[[], str]) -> str:
    """Return the sha256 of an open file, remembered until its inode, size or times change.

    Args:
        file: Descriptor of the file.
        path: Name under which it is remembered.
        memory: Folder of the remembered digests, made if need be. If it cannot be written, the file is read each time.
        read: Function that computes the digest if none is remembered.

    Raises:
        CatalogError: The file was changed while it was read.
    """
    # A path has slashes and may be longer than a file's name can be, so the note is named by its digest.
    note, looks = memory / f"{digest(str(path))}.json", _looks(file)

    def known(facts: Mapping[str, Any]) -> str:
        if facts["looks"] != looks or not _SHA256.fullmatch(facts["sha256"]):
            raise ValueError("it is of another file")
        return str(facts["sha256"])

    with suppress(OSError, records.Damaged):
        return records.read_as(note, known)
    found = read()
    # Of a file that changed under the reader the digest is of no content that it ever had, and would be remembered.
    if _looks(file) != looks:
        raise CatalogError(f"{path} was changed while it was read: use it after the last write to it")
    with suppress(OSError):
        # A folder that cannot be written costs time only.
        records.write(private_dir(memory) / note.name, {"path": str(path), "looks": looks, "sha256": found})
    return found


def file_digest(path: Path, memory: Path) -> str:
    """Return the sha256 of a file, remembered in a folder as `remembered_digest` does."""
    with path.open("rb") as file:
        return remembered_digest(file, path, memory, lambda: content_digest(file.fileno()))


def _looks(file: IO[bytes]) -> list[int]:
    status = os.fstat(file.fileno())
    # Also the change time, which nobody can set back, unlike the modification time.
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
