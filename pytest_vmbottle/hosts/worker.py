"""A worker's program on the host: an interpreter in the project's copy, which does not outlive the connection to its controller.

Usage: python -m pytest_vmbottle.hosts.worker FOLDER ARGUMENT... (of the interpreter). The folder is one of `holder`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from pytest_vmbottle.catalog.location import default_root

__all__ = ["ORDER", "main"]

ORDER = "order.json"
"""File in the folder of a run with what its workers are started with."""
_HUNG_UP = select.POLLHUP | select.POLLRDHUP | select.POLLERR
_ENDING = 1.0
"""Seconds in which an interpreter ends by itself when its controller has gone."""
_CLEANING = 6.0
"""Seconds in which an interrupted one ends its machines."""


def main(arguments: list[str]) -> int:
    """Run an interpreter to its end, and return its status."""
    folder = Path(arguments[0])
    order = json.loads((folder / ORDER).read_text())
    catalog = os.environ.get("VMBOTTLE_CATALOG", "") or str(default_root())
    environment = {**os.environ, **order["environment"], "VMBOTTLE_CATALOG": catalog}
    interpreter = subprocess.Popen(  # noqa: S603 - argv list, no shell
        [sys.executable, *arguments[1:]], cwd=order["directory"], env=environment
    )
    try:
        return _watched(interpreter)
    finally:
        interpreter.kill()
        interpreter.wait()


def _watched(interpreter: subprocess.Popen[bytes]) -> int:
    """Wait for an interpreter; end it if nobody writes to it any more."""
    ended = os.pidfd_open(interpreter.pid)
    watch = select.poll()
    watch.register(ended, select.POLLIN)
    # Asked for its end only: the interpreter reads what comes.
    watch.register(0, select.POLLRDHUP)
    if any(descriptor == 0 and event & _HUNG_UP for descriptor, event in watch.poll()):
        watch.unregister(0)
        # execnet sees it as well, but then waits for 15 s. Interrupted, the worker ends its machines; after a kill their supervisor does.
        if not watch.poll(_ENDING * 1000):
            interpreter.send_signal(signal.SIGINT)
            watch.poll(_CLEANING * 1000)
        interpreter.kill()
    return interpreter.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
