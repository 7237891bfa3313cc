"""Log of lines in two files of bounded size: when the newer is full, it replaces the older."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["Ring"]


class Ring:
    """The last lines that were appended, `limit` bytes of them at most and half of that at least."""

    def __init__(self, path: Path, limit: int) -> None:
        """Take the file's path; it is created with the first line."""
        self._path, self._half = path, limit // 2
        self._file, self._size = -1, 0

    @property
    def _older(self) -> Path:
        return self._path.with_name(f"{self._path.name}.1")

    def append(self, line: bytes) -> None:
        """Write a line that has its end; a line longer than half of the limit is left out.

        Raises:
            OSError: It cannot be written.
        """
        if len(line) > self._half:
            return
        # Renamed and not truncated: a reader that has the older file open reads it to its end.
        if self._size + len(line) > self._half:
            self.close()
            self._path.replace(self._older)
        if self._file < 0:
            # O_APPEND, so that each line is written as one piece at the end.
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            # The file may be there already: it was closed, and is opened again.
            self._size = os.fstat(self._file).st_size
        os.write(self._file, line)
        self._size += len(line)

    def lines(self) -> Iterator[bytes]:
        """Yield the lines that are kept, the oldest first."""
        for path in (self._older, self._path):
            with suppress(FileNotFoundError), path.open("rb") as file:
                yield from file

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._file >= 0:
            os.close(self._file)
            self._file, self._size = -1, 0
