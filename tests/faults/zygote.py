"""Forks processes that have all imported already: hundreds of them can be killed in the time that a few take to start.

Each line on standard input asks for one, in JSON: `run` with the arguments of a pytest run, or `steps` to have a machine provided and
ended, and to be killed at the beginning of one step. The answer is a line with its process id; its end is a line with that and its status.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.spec import MachineSpec

standins = importlib.import_module("standins")
importlib.import_module("pytest_vmbottle.plugin")
WATCHED = ("fcntl.flock", "open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree", "subprocess.Popen")


def run(order: dict[str, Any]) -> int:
    """A pytest run."""
    os.chdir(order["folder"])
    options = ["-s", "-p", "pytest_vmbottle.plugin", "-p", "standins", "-p", "no:cacheprovider", "-o", "vm_defaults=memory='16M'"]
    return int(pytest.main([*options, "--rootdir", order["folder"], *order["run"]]))


def steps(order: dict[str, Any]) -> int:
    """A machine's life; kills itself before the step with this number, and tells how many there were if it comes to its end."""
    count, fatal, phase = 0, int(order["steps"]), order.get("phase", "")

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        if event in WATCHED and counting.is_set() and (event != "open" or order["root"] in str(args[0])):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    counting = threading.Event()
    sys.addaudithook(hook)
    if phase != "end":
        counting.set()
    provisioner = Provisioner(Catalog(Path(order["root"])), standins.StandIns(), name="standin", settings=Settings())
    with provisioner.machine(MachineSpec(source="debian-12", memory="16M")):
        if phase == "create":
            counting.clear()
        else:
            counting.set()
    counting.clear()
    provisioner.close()
    Path(order["count"]).write_text(str(count))
    return 0


def tell(**message: int) -> None:
    """Says something, in a line."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Forks until nobody asks for more."""

    def reap() -> None:
        while True:
            try:
                pid, status = os.wait()
            except ChildProcessError:
                ended.wait(0.002)
                continue
            tell(ended=pid, status=os.waitstatus_to_exitcode(status))

    ended = threading.Event()
    threading.Thread(target=reap, daemon=True).start()
    quiet = os.open(os.devnull, os.O_RDWR)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for fd in (0, 1, 2) if not os.environ.get("LOUD") else (0, 1):
                os.dup2(quiet, fd)
            os.environ.update(order.get("env", {}))
            status = 1
            try:
                status = run(order) if "run" in order else steps(order)
            finally:
                os._exit(status)
        tell(began=pid)


if __name__ == "__main__":
    main()
