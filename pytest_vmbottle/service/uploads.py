"""Large files for a guest, by the quickest way."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from pytest_vmbottle.errors import TransferError
from pytest_vmbottle.standalone.client import Kept

__all__ = ["write_file"]

_BULK = 1 << 20
"""Bytes from which on a copy goes over a disk that is plugged in for it (see `Machine.cp`)."""
_FOLDER = 21
# A copy would go into a folder of this name.
_PREPARE = f'[ ! -d "$1" ] || exit {_FOLDER}; mkdir -p -- "$2"'
_SECONDS = 60.0


def write_file(kept: Kept, source: Path, path: str, *, mode: int | None, owner: str | None) -> int:
    """Write a file of this computer to a path in a guest, where it appears whole; return its bytes.

    Its parents are made.

    Raises:
        OSError: It cannot be written, such as to the name of a folder.
        MachineError: The machine is not running, or was lost.
    """
    size = source.stat().st_size
    # A mode by which the daemon itself could not read the file is none for a copy of it.
    if size < _BULK or owner is not None or (mode is not None and not mode & stat.S_IRUSR):
        with source.open("rb") as file:
            written: int = kept.ask({"verb": "write", "path": path, "mode": mode, "owner": owner}, [file.fileno()])
        return written
    if mode is not None:
        source.chmod(mode)
    _prepare(kept, path)
    kept.ask({"verb": "cp", "src": str(source), "dst": path, "to_guest": True})
    return size


def _prepare(kept: Kept, path: str) -> None:
    """Make the parents of a file."""
    argv = ["sh", "-c", _PREPARE, "sh", path, str(PurePosixPath(path).parent)]
    request: dict[str, Any] = {"verb": "exec", "argv": argv, "env": {}, "cwd": None, "user": "root", "timeout": _SECONDS}
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        status = kept.ask(request, [null, null, null])
    finally:
        os.close(null)
    if status == _FOLDER:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if status:
        raise TransferError("its folder cannot be made", src="the body", dst=path)
