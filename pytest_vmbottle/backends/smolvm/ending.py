"""End of a smolvm machine for good, whatever it is doing; a machine that does not exist counts as ended.

This module is also run as a program, by a Python that has nothing but its standard library: it ends machines whose owner has died.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["command"]

# As in `engine`, which cannot be imported here, since it needs attrs.
_LOCKED = "database is locked"
# Less than the supervisor gives this program (_ENDING in host/supervisor.py), so that it ends with a status of its own.
_SECONDS = 15.0
_MOMENT = 0.2


def command(program: Path, state: Path, name: str) -> tuple[str, ...]:
    """Return the command line that ends a machine; its exit status is 0 if there is no such machine any more."""
    # Isolated, as the supervisor is: it runs when nobody is there to see an error of somebody else's module.
    return (sys.executable, "-I", "-S", __file__, str(program), str(state), name)


def _code(stderr: str) -> str:
    """Return smolvm's error code: the last line is an object that has it."""
    try:
        return str(json.loads(stderr.splitlines()[-1])["error"]["code"])
    except (ValueError, IndexError, KeyError, TypeError):
        return ""


def _end(program: str, state: str, name: str) -> int:
    until = time.monotonic() + _SECONDS
    argv = [program, "machine", "delete", "-f", "--error-format", "json", "--state-dir", state, "--name", name]
    while True:
        done = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, capture_output=True)  # noqa: S603 - argv list, no shell
        said = done.stderr.decode(errors="replace")
        if not done.returncode or _code(said) == "NOT_FOUND":
            return 0
        # Others end their machines at the same time, with the same database.
        if _LOCKED not in said or time.monotonic() > until:
            return done.returncode
        time.sleep(_MOMENT)


if __name__ == "__main__":
    sys.exit(_end(*sys.argv[1:]))
