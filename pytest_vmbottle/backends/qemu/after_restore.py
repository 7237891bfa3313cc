"""Steps after a restore: set the guest's clock, reseed its random numbers, and prove that it was restored and not rebooted.

A small process in the guest is frozen with it, blocked on a serial port of its own. It is the first thing that runs again. Nothing needs
to be started for it, so all of this costs one round trip: starting any program is dearer in a guest whose translation cache is empty.

Reasons for each part: CLOCK_REALTIME continues from the moment of the save. Clones start with equal random pools, and neither a write to
/dev/urandom nor new input makes Linux use it before the next reseed, up to a minute later (drivers/char/random.c): RNDRESEEDCRNG does. The
vmgenid device does it too, but Debian's cloud kernels are built without its driver.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable

from pytest_vmbottle.backends.port import CannotSave
from pytest_vmbottle.channels.port import GUEST_PATH, Channel, Command
from pytest_vmbottle.errors import MachineError, Unsupported
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script

__all__ = ["AfterRestore"]

_SCRIPT = read_script(__package__, "after_restore.py")


class AfterRestore:
    """Host end of the connection to the after-restore process in a guest."""

    def __init__(self, sock: socket.socket, is_there: Callable[[], bool]) -> None:
        """Take the connected socket of its port, and a function that tells whether the process has the port open."""
        self._sock, self._is_there = sock, is_there
        self._is_silent = False

    def freeze(self, channel: Channel, *, deadline: Deadline) -> str:
        """Ready the guest for being saved; return the secret that identifies it.

        Raises:
            CannotSave: The guest has no Python, or its port does not work.
        """
        # In a guest that was restored it runs already, and Python takes long to start.
        if not self._is_there():
            self._start(channel, deadline)
        nonce = secrets.token_hex(16)
        if self._ask(f"keep {nonce}", deadline) != "kept":
            raise CannotSave("the guest's after-restore process does not answer on its port")
        return nonce

    @staticmethod
    def _start(channel: Channel, deadline: Deadline) -> None:
        # The program is the input, so nothing is written to the guest's disk.
        script = Command(argv=("python3", "-"), env=(("PATH", GUEST_PATH),), input=_SCRIPT.encode())
        done = channel.run(script, deadline=deadline)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip()[-500:]
            raise CannotSave(f"python3 does not run in the guest, and a restored guest needs it to set its clock: {reason}")

    def wake(self, nonce: str, *, deadline: Deadline) -> None:
        """Set the restored guest's clock and randomness, and verify its identity.

        Raises:
            MachineError: It does not answer, or is another guest.
        """
        # The time is read as late as possible: whatever passes before the guest sets it, its clock is behind.
        answer = self._ask(f"wake {time.time_ns()} {secrets.token_hex(64)}", deadline)
        # A guest that booted instead of being restored has no nonce, and another guest has another one.
        if answer != nonce:
            raise MachineError("the restored guest does not answer" if answer is None else "the restored guest is not the saved one")

    def do(self, program: str, *, deadline: Deadline) -> str:
        """Have the process run a program, and return what that leaves as `answer`.

        Raises:
            Unsupported: The guest was booted, or is another kind than those with such a process.
            MachineError: It does not answer.
        """
        if self._is_silent or not self._is_there():
            raise Unsupported("there is no after-restore process in this guest")
        answer = self._ask(f"do {program.encode().hex()}", deadline)
        if answer is None:
            # What it says later would be taken for another answer.
            self._is_silent = True
            raise MachineError("the guest's after-restore process does not answer")
        return answer

    def _ask(self, line: str, deadline: Deadline) -> str | None:
        received = b""
        try:
            # Never 0, which would make the socket non-blocking.
            self._sock.settimeout(max(0.001, deadline.remaining))
            self._sock.sendall(line.encode() + b"\n")
            # A guest that was restored may be hostile: what it sends is bounded, and compared, never used.
            while not received.endswith(b"\n") and len(received) < 256:  # noqa: PLR2004 - far more than a nonce
                self._sock.settimeout(max(0.001, deadline.remaining))
                chunk = self._sock.recv(256)
                if not chunk:
                    return None
                received += chunk
        except OSError:
            return None
        return received.decode("ascii", "replace").strip()

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
