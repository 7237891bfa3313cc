"""Files that a client uploads, staged on this computer: a guest gets all of them or none."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pytest_vmbottle.errors import SpecError

if TYPE_CHECKING:
    from pytest_vmbottle.service.schema import UploadedFile

__all__ = ["fill", "mode_of", "spooled", "staging"]

_FILE, _FOLDER = 0o644, 0o755
_MOST_LEVELS = 64


def mode_of(mode: int | str | None) -> int | None:
    """Return permission bits as a number."""
    return int(mode, 8) if isinstance(mode, str) else mode


@contextmanager
def staging() -> Iterator[Path]:
    """Make a temporary folder for the length of a block."""
    with tempfile.TemporaryDirectory(prefix="vmbottle-upload-") as name:
        folder = Path(name)
        folder.chmod(_FOLDER)
        yield folder


def fill(folder: Path, files: Sequence[UploadedFile]) -> int:
    """Write files into an empty folder, and return the number of their bytes.

    Raises:
        SpecError: A path leads out of the folder, two files have one path, or a content is no base64.
    """
    paths = [_relative(file.path) for file in files]
    # All are checked before the first is written.
    contents = [_content(file) for file in files]
    for path, data, file in zip(paths, contents, files, strict=True):
        _write(folder, path, data, mode_of(file.mode))
    return sum(map(len, contents))


def _relative(path: str) -> PurePosixPath:
    parts = path.split("/")
    # By its parts as they were given: PurePosixPath leaves out `.` and empty ones.
    if path.startswith("/") or "\0" in path or not set(parts).isdisjoint({"", ".", ".."}) or len(parts) > _MOST_LEVELS:
        raise SpecError(f"path={path!r}: takes a path below dest_path, without '.', '..' and empty parts")
    return PurePosixPath(path)


def _content(file: UploadedFile) -> bytes:
    if file.text is not None:
        return file.text.encode()
    try:
        return base64.b64decode(file.content_b64 or "", validate=True)
    except ValueError as error:  # of its characters, or its padding
        raise SpecError(f"path={file.path!r}: content_b64 is no base64: {error}") from None


def _write(folder: Path, path: PurePosixPath, data: bytes, mode: int | None) -> None:
    target = folder
    try:
        for part in path.parts[:-1]:
            target /= part
            if not target.is_dir():
                target.mkdir()
                # The umask of the service is not the guest's.
                target.chmod(_FOLDER)
        target /= path.name
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except (FileExistsError, NotADirectoryError):
        raise SpecError(f"path={str(path)!r}: there is another file of this path, or of one of its folders") from None
    except OSError as error:
        raise SpecError(f"path={str(path)!r}: {error.strerror}") from None
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    target.chmod(_FILE if mode is None else mode)


@asynccontextmanager
async def spooled(body: AsyncIterator[bytes]) -> AsyncIterator[Path]:
    """Hold a body in a temporary file for the length of a block, which begins when all of it is there.

    A client that is slow, or hangs up in the middle, is nothing that the guest notices.
    """
    with staging() as folder:
        path = folder / "body"
        with path.open("wb", buffering=0) as file:
            async for data in body:
                file.write(data)
        path.chmod(_FILE)
        yield path
