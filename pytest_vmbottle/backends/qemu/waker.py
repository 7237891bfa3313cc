"""Waking a restored guest: its clock set, its random numbers reseeded, and the proof that it was restored and not rebooted.

A small process in the guest is frozen with it, blocked on a serial port of its own. It is the first thing that runs again. Nothing needs
to be started for it, so all of this costs one round trip: starting any program is dearer in a guest whose translation cache is empty.

Why each part is there: CLOCK_REALTIME continues from the moment of the save. Clones start with equal random pools, and neither a write to
/dev/urandom nor new input makes Linux use it before the next reseed, up to a minute later (drivers/char/random.c): RNDRESEEDCRNG does. The
vmgenid device does it too, but Debian's cloud kernels are built without its driver.
"""

from __future__ import annotations

import secrets
import socket
import time

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backend import GUEST_PATH, Channel, Command, Unwakeable
from pytest_vmbottle.errors import MachineError

__all__ = ["Waker"]

_SCRIPT = r"""
import fcntl, os, struct, sys, time
lock = os.open("/run/vmbottle-waker.lock", os.O_RDWR | os.O_CREAT, 0o600)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:  # it runs already, in a guest that was restored to be built on
    sys.exit()
port = os.open("/dev/virtio-ports/org.vmbottle.waker", os.O_RDWR)
if os.fork():
    os._exit(0)
os.setsid()
null = os.open(os.devnull, os.O_RDWR)
for fd in 0, 1, 2:
    os.dup2(null, fd)
with open("/proc/self/comm", "w") as comm:
    comm.write("vmbottle-waker")
random = os.open("/dev/urandom", os.O_RDWR)
nonce, buffer = b"", b""
def wake(clock, entropy):
    seed = bytes.fromhex(entropy.decode())
    fcntl.ioctl(random, 0x40085203, struct.pack("ii", 8 * len(seed), len(seed)) + seed)  # RNDADDENTROPY
    fcntl.ioctl(random, 0x5207)  # RNDRESEEDCRNG
    time.clock_settime_ns(time.CLOCK_REALTIME, int(clock))
    return nonce
while True:
    data = os.read(port, 4096)
    if not data:  # nobody is connected on the host
        time.sleep(0.01)
        continue
    *lines, buffer = (buffer + data).split(b"\n")
    for line in lines:
        verb, *words = line.split()
        if verb == b"keep":
            nonce, = words
            for rehearsal in 1, 2, 3:  # its code and data are in memory when it is needed
                wake(str(time.time_ns()).encode(), b"00" * 32)
            answer = b"kept"
        else:
            answer = wake(*words)
        os.write(port, answer + b"\n")
"""


class Waker:
    """The host's end of the conversation with the waking process."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes the connected socket of its port."""
        self._sock = sock

    def freeze(self, channel: Channel, *, deadline: Deadline) -> str:
        """Readies the guest for being saved; returns the secret by which it is known again.

        Raises:
            Unwakeable: The guest has no Python, or its port does not work.
        """
        script = Command(argv=("python3", "-"), env=(("PATH", GUEST_PATH),), input=_SCRIPT.encode())
        done = channel.run(script, deadline=deadline)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip()[-500:]
            raise Unwakeable(f"the guest cannot run the Python that wakes it after a restore: {reason}")
        nonce = secrets.token_hex(16)
        if self._ask(f"keep {nonce}", deadline) != "kept":
            raise Unwakeable("the process that wakes a restored guest does not answer on its port")
        return nonce

    def wake(self, nonce: str, *, deadline: Deadline) -> None:
        """Gives the restored guest the time and fresh randomness, and makes sure that it is the one that was saved.

        Raises:
            MachineError: It stays silent, or is another.
        """
        answer = self._ask(f"wake {time.time_ns()} {secrets.token_hex(64)}", deadline)
        if answer != nonce:
            raise MachineError("the restored guest stays silent" if answer is None else "the restored guest is not the one that was saved")

    def _ask(self, line: str, deadline: Deadline) -> str | None:
        received = b""
        try:
            self._sock.settimeout(max(0.001, deadline.remaining))
            self._sock.sendall(line.encode() + b"\n")
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
        """Closes the line."""
        self._sock.close()
