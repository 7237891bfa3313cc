"""The process that runs a machine of smolvm's, which is nobody's child: it outlives the command that started it.

So its death is looked for. The supervisor ends it when we die, if it is a test's; where it has no folder, a small process does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.supervisor import Identity

__all__ = ["Follower", "Vmm", "is_dead", "me"]

# $1 the process, $2 when it began, in the kernel's ticks since it was booted: never another one with the same number.
_LEASH = r"""
read -r _
began=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20)
[ "$began" = "$2" ] && kill -KILL "$1"
"""
_PIECE = 4 << 20
_EVERY = 0.1


def me() -> str:
    """This process, as a label of the machines that it owns."""
    return _label(Identity.of(os.getpid()))


def _label(process: Identity | None) -> str:
    return f"{process.pid}.{process.ticks}.{process.boot[:8]}" if process is not None else ""


def is_dead(owner: str) -> bool:
    """Whether the process that labelled a machine is certainly gone."""
    pid, _, rest = owner.partition(".")
    began, _, boot = rest.partition(".")
    if not pid.isdigit() or not began.isdigit() or not boot:
        return False
    return _label(Identity.of(int(pid))) != owner


class Vmm:
    """The process of a running machine."""

    def __init__(self, pid: int, *, leash: bool = False) -> None:
        """Takes the process that has this number now.

        Args:
            pid: Its number.
            leash: Whether to tie its life to ours: where no supervisor does.
        """
        self.pid = pid
        self._process = Identity.of(pid)
        self._leash: subprocess.Popen[bytes] | None = None
        if leash and self._process is not None:
            argv = ["/bin/sh", "-c", _LEASH, "sh", str(pid), str(self._process.ticks)]
            quiet = subprocess.DEVNULL
            self._leash = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)  # noqa: S603

    @property
    def is_running(self) -> bool:
        """Whether it is still there."""
        return self._process is not None and self._process.is_running

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal, if it is still there."""
        if self.is_running:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, deadline: Deadline) -> bool:
        """Waits for its end; whether it came."""
        return bool(deadline.poll(lambda: not self.is_running, every=0.05, first=0.005))

    def kill(self) -> None:
        """Ends it at once."""
        self.signal(signal.SIGKILL)
        self.wait(Deadline(10))

    def let_go(self) -> None:
        """Ends the process that would have ended it; may be called again."""
        if self._leash is not None:
            self._leash.kill()
            self._leash.communicate()
            self._leash = None


class Follower:
    """Appends what a file gets to another one of bounded size, in a thread of its own; the file may be begun anew meanwhile."""

    def __init__(self, source: Path, target: Path) -> None:
        """Begins at the source's beginning."""
        self._source, self._target = source, target
        self._offset, self._inode = 0, -1
        self._over = threading.Event()
        self._lock = threading.Lock()
        target.touch(mode=0o600)
        self._thread = threading.Thread(target=self._follow, name="vmbottle-console", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._over.wait(_EVERY):
            self.catch_up()

    def catch_up(self) -> None:
        """Copies what is new at this moment."""
        with self._lock, suppress(OSError), self._source.open("rb") as source:
            status = os.fstat(source.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            source.seek(max(self._offset, status.st_size - _PIECE))
            new = source.read(_PIECE)
            self._offset = source.tell()
            if new:
                self._write(new)

    def _write(self, data: bytes) -> None:
        with self._target.open("ab") as file:
            file.write(data)
            full = file.tell() >= _PIECE
        if full:
            self._target.replace(self._target.with_name(f"{self._target.name}.1"))
            self._target.touch(mode=0o600)

    def close(self) -> None:
        """Copies the rest and ends; may be called again."""
        self._over.set()
        self._thread.join(5)
        self.catch_up()
