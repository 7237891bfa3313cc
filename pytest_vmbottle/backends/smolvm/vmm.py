"""Process of a smolvm machine, which is nobody's child: it outlives the command that started it.

So its end is polled for. If we die, the supervisor ends the process of a test's machine; for one without a folder, a small process does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.host.supervisor import Identity

__all__ = ["Follower", "Vmm", "is_dead", "me"]

_LEASH = read_script(__package__, "leash.sh")
_PIECE = 4 << 20
_EVERY = 0.1


def me() -> str:
    """Return the label that marks machines as ours."""
    return _label(Identity.of(os.getpid()))


def _label(process: Identity | None) -> str:
    # Eight digits of the boot's id are enough: a label is compared only with those of the same pid and start.
    return f"{process.pid}.{process.ticks}.{process.boot[:8]}" if process is not None else ""


def is_dead(owner: str) -> bool:
    """Tell whether the process that labelled a machine is certainly gone."""
    pid, _, rest = owner.partition(".")
    began, _, boot = rest.partition(".")
    # In doubt it lives: a label of another form is not ours to judge.
    if not pid.isdigit() or not began.isdigit() or not boot:
        return False
    return _label(Identity.of(int(pid))) != owner


class Vmm:
    """Process of a running machine."""

    def __init__(self, pid: int, *, leash: bool = False) -> None:
        """Take the process that has this ID now.

        Args:
            pid: ID of the process.
            leash: Whether to end it when we die: needed if no supervisor does.
        """
        self.pid = pid
        self._process = Identity.of(pid)
        self._leash: subprocess.Popen[bytes] | None = None
        if leash and self._process is not None:
            # With its start, because the number may belong to another process by the time that the leash acts.
            argv = ["/bin/sh", "-c", _LEASH, "sh", str(pid), str(self._process.ticks)]
            quiet = subprocess.DEVNULL
            self._leash = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)  # noqa: S603

    @property
    def is_running(self) -> bool:
        """Tell whether the process still runs."""
        return self._process is not None and self._process.is_running

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process still runs."""
        if self._process is not None:
            self._process.kill(number)

    def wait(self, deadline: Deadline) -> bool:
        """Wait for the end; return whether it came."""
        return bool(deadline.poll(lambda: not self.is_running, every=0.05, first=0.005))

    def kill(self) -> None:
        """Kill the process."""
        self.signal(signal.SIGKILL)
        self.wait(Deadline(10))

    def let_go(self) -> None:
        """End the process that would have ended the machine; may be called again."""
        if self._leash is not None:
            # Killed, not closed: the end of its input is the sign to kill the machine.
            self._leash.kill()
            self._leash.communicate()
            self._leash = None


class Follower:
    """Thread that appends a file's new content to a file of bounded size; the source may be truncated meanwhile."""

    def __init__(self, source: Path, target: Path) -> None:
        """Begin at the source's beginning."""
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
        """Copy the new content now."""
        with self._lock, suppress(OSError), self._source.open("rb") as source:
            status = os.fstat(source.fileno())
            # A start of the machine may begin the log anew, in the same file or in another one.
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            # A guest may print faster than this reads: of more than one piece the last part is kept.
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
        """Copy the rest and end; may be called again."""
        self._over.set()
        self._thread.join(5)
        # The thread may have ended in its pause, before the last words.
        self.catch_up()
