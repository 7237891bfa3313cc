"""Holds a fault in a guest: python3 -c SCRIPT TOKEN FAULTS NAME ARGUMENT...; it prints its process id when the fault has begun.

FAULTS is the text of a program with context managers, NAME one of these. The fault ends, and with it the process that holds it, by SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

FAULTS: dict[str, Any] = {}
exec(sys.argv[2], FAULTS)  # noqa: S102 - it comes from where this program does


def hold(out: int) -> None:
    """Begin the fault, say so, and wait for the end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.setsid()
    for number in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    try:
        with FAULTS[sys.argv[3]](*sys.argv[4:]):
            os.write(out, b"began")
            os.close(out)
            signal.sigwait([signal.SIGTERM])
    except (ImportError, OSError, ValueError, SystemExit) as error:
        with contextlib.suppress(OSError):
            os.write(out, str(error).encode())
        os._exit(1)
    os._exit(0)


reader, writer = os.pipe()
holder = os.fork()
if holder == 0:
    os.close(reader)
    hold(writer)
os.close(writer)
said = b""
while said != b"began":
    piece = os.read(reader, 4096)
    if not piece:
        break
    said += piece
if said != b"began":
    sys.exit(said.decode() or "the process that held the fault was ended")
print(holder)
