"""One fault of a machine, from its beginning to its end, and the way to those that a process in the guest holds."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

from pytest_vmbottle.backends.port import Instance
from pytest_vmbottle.channels.port import GUEST_PATH, Command
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script

if TYPE_CHECKING:
    from types import TracebackType

    from pytest_vmbottle.machine.lifecycle import Lifecycle

__all__ = ["CLOCK_FAULTS", "FAULTS", "Fault", "fault", "guest_fault", "note", "run_in_guest"]

FAULTS, CLOCK_FAULTS = read_script(__package__, "faults.py"), read_script(__package__, "clock_faults.py")
"""Programs with the faults that a process in the guest holds: those of the wall clock, and all others."""
_HOLD, _END = read_script(__package__, "hold.py"), read_script(__package__, "fault_end.sh")
_PATIENCE = 3600.0
"""Seconds for a guest to begin a fault: to fill a disk, or to go from timer to timer."""


class Fault:
    """A fault, for the length of a `with` block, or from `start` to `stop`.

    It also ends with its machine, when that is restored, rebooted or off.
    """

    def __init__(
        self, lifecycle: Lifecycle, name: str, told: dict[str, object], begin: Callable[[Instance], AbstractContextManager[object]]
    ) -> None:
        """Describe a fault; nothing happens yet.

        Args:
            lifecycle: The machine.
            name: Its name.
            told: Its arguments, for the timeline.
            begin: Function that returns the fault of the machine's present instance.
        """
        self._lifecycle, self._name, self._told, self._begin = lifecycle, name, told, begin
        self._under_way = ExitStack()
        self._is_on = False

    def start(self) -> Self:
        """Begin.

        Raises:
            MachineError: The machine cannot have this fault now, or is off.
            Unsupported: Its backend cannot do this.
            RuntimeError: It has begun already.
        """
        if self._is_on:
            raise RuntimeError(f"the fault {self._name} has begun already")
        self._under_way.enter_context(self._begin(self._lifecycle.instance))
        self._is_on = True
        self._note("began")
        return self

    def stop(self) -> None:
        """End it; may be called again."""
        if self._is_on:
            self._is_on = False
            try:
                self._under_way.close()
            finally:
                self._note("ended")

    def _note(self, state: str) -> None:
        note(self._lifecycle, self._name, state, self._told)

    def __enter__(self) -> Self:
        return self if self._is_on else self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Fault {self._name} {self._told}, {'on' if self._is_on else 'off'}>"


def fault(lifecycle: Lifecycle, name: str, begin: Callable[[Instance], AbstractContextManager[object]], /, **told: object) -> Fault:
    """Return a fault, which has not begun.

    Args:
        lifecycle: The machine.
        name: Its name.
        begin: Function that returns the fault of the machine's present instance.
        told: Its arguments, for the timeline; those that are None are left out.
    """
    return Fault(lifecycle, name, {key: value for key, value in told.items() if value is not None}, begin)


def guest_fault(lifecycle: Lifecycle, name: str, program: str, verb: str, /, *words: object, **told: object) -> Fault:
    """Return a fault that a process in the guest holds.

    Args:
        lifecycle: The machine.
        name: Its name.
        program: `FAULTS` or `CLOCK_FAULTS`.
        verb: The name of a function there.
        words: What that is called with.
        told: Its arguments, for the timeline.
    """
    return fault(lifecycle, name, lambda instance: _held(instance, lifecycle, program, verb, *map(str, words)), **told)


def note(lifecycle: Lifecycle, name: str, state: str, told: Mapping[str, object]) -> None:
    """Record that a fault began or ended."""
    lifecycle.timeline.note("fault", verb=name, args=[f"{key}={value}" for key, value in told.items()], state=state)


@contextmanager
def _held(instance: Instance, lifecycle: Lifecycle, program: str, verb: str, *words: str) -> Iterator[None]:
    """Have a process in the guest hold a fault for the length of a block."""
    token = f"vmbottle-fault-{secrets.token_hex(8)}"
    said = run_in_guest(lifecycle, ("python3", "-c", _HOLD, token, program, verb, *words), f"begin the fault {verb}")
    try:
        yield
    finally:
        if lifecycle.runs_on(instance):
            run_in_guest(lifecycle, ("/bin/sh", "-c", _END, "sh", said.strip(), token), f"end the fault {verb}")


def run_in_guest(lifecycle: Lifecycle, argv: tuple[str, ...], what: str) -> str:
    """Run a command of ours as root, and return what it printed.

    Raises:
        MachineError: It failed; the message says that the guest could not do `what`, and why.
    """
    ended = lifecycle.channel.run(Command(argv=argv, env=(("PATH", GUEST_PATH),)), deadline=Deadline(_PATIENCE))
    if ended.returncode != 0:
        reason = "it has no Python 3" if ended.returncode == 127 else ended.stderr.decode(errors="replace").strip()  # noqa: PLR2004 - not found
        raise MachineError(f"the guest could not {what}: {reason or f'status {ended.returncode}'}")
    return ended.stdout.decode()
