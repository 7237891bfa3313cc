"""Faults of a process in a guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.machine.fault import FAULTS, Fault, guest_fault, note, run_in_guest

if TYPE_CHECKING:
    from pytest_vmbottle.machine.lifecycle import Lifecycle

__all__ = ["ProcessFaults"]

_KILL, _OOM = read_script(__package__, "process_kill.sh"), read_script(__package__, "process_oom.sh")


class ProcessFaults:
    """Faults of a unit or a process in a guest."""

    def __init__(self, lifecycle: Lifecycle, target: str | int) -> None:
        """Take the machine, and the target."""
        self._lifecycle, self._target = lifecycle, target

    def pause(self) -> Fault:
        """Stop the processes (SIGSTOP); they go on at the end."""
        return guest_fault(self._lifecycle, "process.pause", FAULTS, "pause", self._target, target=self._target)

    def kill(self, sig: str = "KILL") -> None:
        """Send the processes a signal now.

        Raises:
            MachineError: There are no such processes.
        """
        self._now("process.kill", _KILL, sig)

    def oom(self) -> None:
        """Have the guest's OOM killer end one of the processes now, and return when it has.

        Raises:
            MachineError: There are no such processes.
        """
        self._now("process.oom", _OOM)

    def _now(self, name: str, script: str, *words: str) -> None:
        note(self._lifecycle, name, "began", {"target": self._target})
        run_in_guest(self._lifecycle, ("/bin/sh", "-c", script, "sh", str(self._target), *words), "do this to its processes")
