"""Files for a QEMU that we, as root, run as an unprivileged user."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["PassedFds"]


class PassedFds:
    """Open files passed to a QEMU that may not open them itself.

    They stay ours, in folders that only we can enter.

    Attributes:
        fds: The descriptors that QEMU has to inherit.
        argv: The arguments that name them to QEMU.
    """

    def __init__(self) -> None:
        """Start without files."""
        self.fds: list[int] = []
        self.argv: tuple[str, ...] = ()

    def disk(self, path: Path, *, writable: bool = False) -> Path:
        """Open a disk file; return the name by which QEMU's block layer gets it, in the same mode."""
        fd = self._open(path, os.O_RDWR if writable else os.O_RDONLY)
        # The number of the set is the descriptor's, which is unique in this process.
        self.argv = (*self.argv, "-add-fd", f"fd={fd},set={fd}")
        return Path(f"/dev/fdset/{fd}")

    def file(self, path: Path) -> Path:
        """Open a file that anybody may read; return the name by which QEMU opens it.

        QEMU could not reach its path.
        """
        # No set of descriptors here: what loads a kernel opens plain paths only. Through /proc the file is opened anew, which needs
        # the right to read it.
        return Path(f"/proc/self/fd/{self._open(path, os.O_RDONLY)}")

    def _open(self, path: Path, mode: int) -> int:
        self.fds.append(os.open(path, mode | os.O_CLOEXEC))
        return self.fds[-1]

    def close(self) -> None:
        """Close our copies of the descriptors."""
        while self.fds:
            os.close(self.fds.pop())
