"""Real machines. Every test that ends its machines itself is followed by a look for what it left behind."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import termios
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from pytest_vmbottle import Machine
from pytest_vmbottle.host.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_vmbottle.catalog.catalog import Catalog


def qemus(folder: Path) -> list[int]:
    """The QEMU processes of this user whose command line names a folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        words = process.info["cmdline"] or []
        if words and "qemu-system" in words[0] and str(folder) in " ".join(words):
            found.append(process.info["pid"])
    return found


@pytest.fixture
def machines_of() -> object:
    """A function that finds the QEMU processes that use a folder."""
    return qemus


@pytest.fixture(autouse=True)
def _nothing_is_left(vm_catalog: Catalog) -> Iterator[None]:
    run = vm_catalog.root / "run"
    before = {path.name for path in run.glob(f"{os.getpid()}-*/*")}
    yield
    shared = {path.name for path in run.glob(f"{os.getpid()}-*/*")} - before
    assert not {name for name in shared if not name.startswith("vm-")}, "a folder of a build or of a named machine was left behind"


@pytest.fixture
def inner(pytester: pytest.Pytester, vm_catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Pytest runs inside the test, which know nothing of this one but its catalog."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(vm_catalog.root))
    return pytester


@pytest.fixture(params=["agent", pytest.param("ssh", marks=pytest.mark.guests)])
def either(request: pytest.FixtureRequest, session_vm: Machine) -> Machine:
    """The session's machine, spoken to over one channel and then over the other."""
    instance = session_vm.lifecycle.instance
    channel = instance.channel(deadline=Deadline(120), bulk=request.param == "ssh")
    return Machine(instance, session_vm.spec, id=session_vm.id, backend="qemu", channel=channel)


class Person:
    """Sits before a terminal: the far end of a pty."""

    def __init__(self) -> None:
        self.end, self.terminal = pty.openpty()
        self.resize(100, 30)
        self.seen = ""

    def resize(self, columns: int, lines: int) -> None:
        termios.tcsetwinsize(self.end, (lines, columns))

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def sees(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Waits for something to be on the screen, and forgets what was before it."""
        deadline = Deadline(seconds)
        while not (match := re.search(pattern, self.seen)):
            assert select.select([self.end], [], [], deadline.remaining)[0], f"{pattern!r} was not seen, but {self.seen!r}"
            self.seen += os.read(self.end, 4096).decode(errors="replace")
        self.seen = self.seen[match.end() :]
        return match

    def watches(self, process: subprocess.Popen[bytes], seconds: float = 60) -> int | None:
        """Reads on, as terminals do, until a process has ended; returns its status."""
        deadline = Deadline(seconds)
        while process.poll() is None and not deadline.expired:
            if select.select([self.end], [], [], 0.1)[0]:
                os.read(self.end, 4096)
        return process.returncode

    def close(self) -> None:
        for descriptor in (self.end, self.terminal):
            os.close(descriptor)


@pytest.fixture
def person() -> Iterator[Person]:
    with closing(Person()) as person:
        yield person
