"""Machines that are no machines but real processes: for faults that no guest is needed for.

The processes are real QEMUs whose processor never runs, or, where many are needed, `sleep`; both are started, leashed and known as QEMU's
backend does it. `pytest -p standins --vm-backend=standin` has tests get them; `STANDIN` says which: `qemu`, `sleep`, or `detached`, which
outlive who started them.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from pytest_vmbottle import testing
from pytest_vmbottle._os import Deadline, run_tool
from pytest_vmbottle.backend import Backend, Instance, Start, State
from pytest_vmbottle.backends.qemu.process import QemuProcess
from pytest_vmbottle.errors import LaunchError, MachineDied
from pytest_vmbottle.spec import MachineSpec

HERE = Path(__file__).parent


class StandIn(testing.FakeInstance):
    """A machine that is a process."""

    def __init__(self, backend: testing.FakeBackend, rundir: Path, spec: MachineSpec, process: QemuProcess) -> None:
        """Takes the process."""
        super().__init__(backend, rundir, spec=spec)
        self.process = process
        self.pid = process.pid

    @property
    def exitcode(self) -> int | None:
        """The process's own."""
        return self.process.exitcode

    def state(self) -> State:
        """What the process is doing."""
        return State.RUNNING if self.exitcode is None else State.DIED

    def alive(self) -> None:
        """Raises `MachineDied` when the process has ended."""
        if self.exitcode is not None:
            raise MachineDied(f"QEMU ended with status {self.exitcode}: {self.process.output}", exitcode=self.exitcode)

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        super().stop()


class StandInBackend(testing.FakeBackend):
    """Starts stand-ins."""

    def argv(self, rundir: Path) -> list[str]:
        """The command line, which names the folder."""
        if os.environ.get("STANDIN", "sleep") == "sleep":
            return [sys.executable, "-I", "-S", "-c", "import time; time.sleep(86400)", str(rundir)]
        qemu = shutil.which("qemu-system-x86_64") or ""
        serial = f"file,id=serial,path={rundir}/serial.log"
        return [qemu, "-S", "-nodefaults", "-display", "none", "-machine", "none", "-name", f"guest={rundir.name}", "-chardev", serial]

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:  # noqa: ARG002
        """Starts one."""
        process = QemuProcess([*self.argv(rundir), *spec.env_words], log=rundir / "qemu.log")
        return StandIn(self, rundir, spec, process)


class DetachedBackend(testing.FakeBackend):
    """Its machines are processes that nobody is the parent of; they are ended by a command."""

    def ending(self, rundir: Path) -> tuple[str, ...]:
        """The command that ends the machine with this folder."""
        return (sys.executable, str(HERE / "detached.py"), "end", str(rundir.parent.parent.parent / f"{rundir.name}.detached"))

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:  # noqa: ARG002
        """Starts one."""
        started = run_tool([sys.executable, HERE / "detached.py", "start", rundir.parent.parent.parent / f"{rundir.name}.detached"], timeout=30)
        if not started.ok:
            raise LaunchError(started.output, machine=spec.name)
        return testing.FakeInstance(self, rundir, spec=spec)


def pytest_vmbottle_make_backend(config: pytest.Config, name: str) -> Backend | None:  # noqa: ARG001
    """Makes the backend."""
    if name != "standin":
        return None
    return DetachedBackend() if os.environ.get("STANDIN") == "detached" else StandInBackend()
