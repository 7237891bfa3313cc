"""A QEMU process: started so that it cannot outlive us, watched, and ended for certain."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backends.qemu.qmp import in_background

__all__ = ["QemuProcess", "connect", "listen"]


@cache
def _leash() -> tuple[str, ...]:
    """A prefix that has the kernel kill the process when the thread that started it ends; it survives the exec that follows."""
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()


class QemuProcess:
    """A running QEMU; what it prints goes to a file, never into a pipe that could fill up."""

    def __init__(self, argv: Sequence[str], *, log: Path, fds: Sequence[int] = ()) -> None:
        """Starts it; `fds` are the descriptors that the command line refers to."""
        self.argv = tuple(argv)
        self._log = log

        def spawn() -> subprocess.Popen[bytes]:
            with log.open("wb") as output:
                return subprocess.Popen(  # noqa: S603 - argv list, no shell
                    [*_leash(), *argv],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=fds,
                    start_new_session=True,
                    cwd="/",
                )

        self._popen = in_background(spawn)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def exitcode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._popen.poll()

    @property
    def output(self) -> str:
        """What it has printed."""
        try:
            return self._log.read_text(errors="replace")[-4000:]
        except FileNotFoundError:
            return ""

    def wait(self, deadline: Deadline) -> int | None:
        """Its exit status, or None if it has not ended by the deadline."""
        try:
            return self._popen.wait(deadline.remaining)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Ends it at once; may be called again."""
        self._popen.kill()
        self._popen.wait()


def _short(folder: int, name: str) -> str:
    # The address of a unix socket has at most 107 bytes, a folder's path may have more.
    return f"/proc/self/fd/{folder}/{name}"


def listen(path: Path) -> socket.socket:
    """A listening unix socket at a path of any length."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(_short(folder, path.name))
        sock.listen(2)
        return sock
    finally:
        os.close(folder)


def connect(path: Path) -> socket.socket:
    """A connection to a unix socket at a path of any length."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(_short(folder, path.name))
        return sock
    finally:
        os.close(folder)
