"""Machines without a guest, for faults that no guest is needed for: real QEMUs whose processor never runs, which start in no time.

They are started, leashed and known as the machines of QEMU's backend are. `pytest -p standins --vm-backend=standin` has tests get them,
`--vm-backend=detached` those that outlive who started them. The machine's `env` may say more: `ARGS` are more words for the command line.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from pytest_vmbottle import testing
from pytest_vmbottle.backends.port import Backend, Instance, Start, State
from pytest_vmbottle.backends.qemu.process import QemuProcess
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.errors import LaunchError, MachineDied
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.spec import MachineSpec

_DETACHED = """
import os, signal, sys, time
pidfile = sys.argv[1]
if os.fork() == 0:
    os.setsid()
    with open(pidfile, "w") as file:
        file.write(str(os.getpid()))
    os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", "import time; time.sleep(86400)", pidfile], {})
"""
_END = """
import os, signal, sys
try:
    os.kill(int(open(sys.argv[1]).read()), signal.SIGKILL)
    os.unlink(sys.argv[1])
except FileNotFoundError:
    pass
"""


class StandIn(testing.FakeInstance):
    """A machine that is a process."""

    def __init__(self, backend: testing.FakeBackend, rundir: Path, spec: MachineSpec, process: QemuProcess) -> None:
        """Takes the process."""
        self.process = process
        super().__init__(backend, rundir, spec=spec)
        self.pid = process.pid

    @property
    def exitcode(self) -> int | None:
        """The process's own."""
        return self.process.exitcode

    def state(self) -> State:
        """Return the state of the process."""
        return State.RUNNING if self.exitcode is None else State.DIED

    def alive(self) -> None:
        """Raises `MachineDied` when the process has ended."""
        if self.exitcode is not None:
            raise MachineDied(f"QEMU ended with status {self.exitcode}: {self.process.output}", exitcode=self.exitcode)

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        super().stop()


class StandIns(testing.FakeBackend):
    """Starts QEMUs that never run anything."""

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:  # noqa: ARG002
        """Starts one."""
        more = dict(spec.env).get("ARGS", "").split()
        words = ["-S", "-nodefaults", "-display", "none", "-name", f"guest={rundir.name}", *(more or ["-machine", "none"])]
        ours, its = socket.socketpair()
        with its, ours:
            monitor = ["-chardev", f"socket,id=qmp,fd={its.fileno()}", "-mon", "chardev=qmp,mode=control"] if more else []
            argv = [shutil.which("qemu-system-x86_64") or "", *words, *monitor, "-D", str(rundir / "qemu.debug")]
            process = QemuProcess(argv, log=rundir / "qemu.log", fds=(its.fileno(),))
            its.close()
            if more:
                self._greet(ours, process, spec)
        return StandIn(self, rundir, spec, process)

    def _greet(self, sock: socket.socket, process: QemuProcess, spec: MachineSpec) -> None:
        """Waits for it to be there."""
        try:
            with closing(Qmp(sock, deadline=Deadline(30))):
                pass
        except QmpFailed as error:
            status = process.wait(Deadline(30))
            process.kill()
            raise LaunchError("QEMU ended", argv=process.argv, exitcode=status, output=process.output, machine=spec.name) from error


class DetachedStandIn(testing.FakeInstance):
    """A machine that goes on by itself; nothing but its command ends it."""

    def stop(self) -> None:
        """Runs the command."""
        assert isinstance(self._backend, DetachedStandIns)
        subprocess.run(self._backend.ending(self._log.parent), check=True)
        super().stop()


class DetachedStandIns(testing.FakeBackend):
    """Starts processes that are nobody's children, and carry no mark."""

    def ending(self, rundir: Path) -> tuple[str, ...]:
        """The command that ends the machine with this folder."""
        return (sys.executable, "-I", "-S", "-c", _END, str(self._pidfile(rundir)))

    def _pidfile(self, rundir: Path) -> Path:
        return rundir.parents[2] / f"{rundir.name}.detached"

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:  # noqa: ARG002
        """Starts one."""
        pidfile = self._pidfile(rundir)
        subprocess.run([sys.executable, "-I", "-S", "-c", _DETACHED, pidfile], check=True)
        deadline.poll(lambda: pidfile.exists() and pidfile.read_text(), every=0.01)
        instance = DetachedStandIn(self, rundir, spec=spec)
        instance.pid = int(pidfile.read_text())
        return instance


def pytest_vmbottle_make_backend(config: pytest.Config, name: str) -> Backend | None:  # noqa: ARG001
    """Makes the backends of stand-ins."""
    kinds: dict[str, type[testing.FakeBackend]] = {"standin": StandIns, "detached": DetachedStandIns}
    return kinds[name]() if name in kinds else None
