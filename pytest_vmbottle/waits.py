"""Waiting for what happens in a guest: one deadline, an end at once when it can no longer happen, and a message that says what was seen."""

from __future__ import annotations

import math
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

import attrs

from pytest_vmbottle import guestlog
from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backend import Watching
from pytest_vmbottle.console import Console
from pytest_vmbottle.errors import CommandTimeout, MachineError, MachineTimeout
from pytest_vmbottle.guestpath import GuestPath
from pytest_vmbottle.result import Result, printable

__all__ = ["Wait"]

_T = TypeVar("_T")
_LEAST = 5.0
"""Seconds that a question of ours to the guest may take, also where less is left."""
_EXPLAINED = 20.0
"""Seconds that the guest has to tell what may explain a wait in vain: without KVM, to list its units takes it several."""
_EVERY = 0.25
_NO_PROGRAM = 127
_LISTEN, _CONNECTED = "0A", ("01", "08")  # TCP_LISTEN, TCP_ESTABLISHED and TCP_CLOSE_WAIT in /proc/net/tcp
_TABLES = "cat /proc/net/tcp /proc/net/tcp6 2>/dev/null || true"
_PROPERTIES = "LoadState,ActiveState,SubState,Job,Result"


class _Unanswered(Exception):
    """The guest did not answer a question in time."""

    def __init__(self, message: str, result: Result | None) -> None:
        super().__init__(message)
        self.result = result


@attrs.frozen(kw_only=True)
class Wait:
    """One wait on a machine.

    Attributes:
        machine: The machine's name.
        console: Its console.
        alive: Raises if the machine is gone.
        run: Runs a command by a deadline, whatever its status.
        deadline: When to give up.
        age: Tells how many seconds ago the machine was cloned or booted.
    """

    machine: str
    console: Console
    alive: Callable[[], None]
    run: Callable[[str | Sequence[str], Deadline], Result]
    deadline: Deadline
    age: Callable[[], float] = lambda: math.inf

    def until(
        self,
        check: Callable[[], _T | None],
        what: str,
        *,
        every: float = _EVERY,
        last: Callable[[], str] = str,
        more: Callable[[], str] = str,
    ) -> _T:
        """Calls a function until it returns something true, and returns that.

        Args:
            check: What to call.
            what: What is awaited, for the message.
            every: Seconds between two calls, at most.
            last: Gives the last answer, for the message.
            more: Gives what else may explain it, asked for at the end.

        Raises:
            MachineTimeout: It did not by the deadline.
            MachineDied: The machine is gone.
        """
        __tracebackhide__ = True
        late: list[_Unanswered] = []

        def look() -> _T | None:
            answer: _T | None = None
            try:
                answer = check()
                late.clear()
            except _Unanswered as error:
                late[:] = [error]
            if not answer:
                self.alive()
            return answer

        answer = self.deadline.poll(look, every=every, first=0.02)
        if answer:
            return answer
        seen = last().strip()
        message = f"waited {self.deadline.seconds:g} s for {what}" + "".join(f"; {error}" for error in late)
        message += (f"; the last answer was\n{seen}" if seen else "") + more()
        raise MachineTimeout(message, machine=self.machine, console_tail=self.console.tail(20))

    def _ask(self, command: str | Sequence[str], *, least: float = _LEAST) -> Result:
        """Asks the guest. That it is too slow to answer is no answer yet, and not the end of the wait."""
        limit = Deadline(max(least, self.deadline.remaining))
        try:
            return self.run(command, limit)
        except (CommandTimeout, MachineTimeout) as error:
            said = error.result if isinstance(error, CommandTimeout) else None
            raise _Unanswered(f"the guest did not answer within {limit.seconds:.3g} s", said) from error

    def _troubles(self) -> str:
        """The units that failed or were restarted since the machine was cloned, which may be why; nothing where that cannot be known."""
        with suppress(_Unanswered, MachineError):
            units = guestlog.troubled(self._ask(guestlog.UNITS, least=_EXPLAINED).stdout, self.age())
            if units:
                journals = self._ask(["sh", "-c", guestlog.JOURNALS, "sh", *(unit.name for unit in units)], least=_EXPLAINED).stdout
                listed = "\n".join(map(str, units))
                return f"\n--- units that failed or were restarted meanwhile ---\n{listed}\n{guestlog.shortened(journals)}"
        return ""

    def command(self, command: str | Sequence[str], *, every: float) -> Result:
        """Until a command succeeds."""
        answers: list[Result] = []

        def succeeds() -> Result | None:
            if not (answers and self.deadline.expired):  # the last attempt may have taken all the time there was
                try:
                    answers[:] = [self._ask(command, least=1.0)]
                except _Unanswered as error:
                    if error.result is None:
                        raise
                    answers[:] = [error.result]
            return answers[0] if answers[0].ok else None

        return self.until(succeeds, f"{command!r} to succeed", every=every, last=lambda: answers[-1].describe() if answers else "")

    def condition(self, check: Callable[[], _T | None], *, every: float) -> _T:
        """Until a function returns something true."""
        name = getattr(check, "__name__", "<lambda>").replace("<lambda>", "the condition")
        answers: list[object] = []

        def asked() -> _T | None:
            answer = check()
            answers[:] = [answer]
            return answer

        return self.until(asked, f"{name} to come true", every=every, last=lambda: printable(repr(answers[-1]))[:1000] if answers else "")

    def unit(self, unit: str) -> None:
        """Until a systemd unit is active."""
        state: dict[str, str] = {}

        def active() -> bool:
            shown = self._ask(["systemctl", "show", "-p", _PROPERTIES, "--", unit])
            if shown.returncode == _NO_PROGRAM:
                raise MachineError(f"there is no systemd in the guest, whose unit {unit} could become active", machine=self.machine)
            state.clear()
            state.update({key: printable(value) for key, _, value in (line.partition("=") for line in shown.stdout.splitlines())})
            hopeless = state.get("ActiveState") == "failed" or (state.get("ActiveState") == "inactive" and not state.get("Job"))
            if hopeless or state.get("LoadState") == "not-found":
                raise self._hopeless(unit, state)
            return state.get("ActiveState") == "active"

        self.until(active, f"the unit {unit} to be active", last=lambda: _listed(state))

    def _hopeless(self, unit: str, state: Mapping[str, str]) -> MachineError:
        journal = ""
        with suppress(_Unanswered):
            journal = self._ask(["journalctl", "--no-pager", "-n", "20", "-u", unit]).stdout
        return MachineError(
            f"the unit {unit} will not become active: {_listed(state)}\n --- its journal ---\n{journal}", machine=self.machine
        )

    def port(self, port: int) -> None:
        """Until something in the guest listens on a TCP port."""
        listening: set[int] = set()

        def open_() -> bool:
            listening.clear()
            listening.update(row.port for row in self._sockets() if row.state == _LISTEN)
            return port in listening

        self.until(open_, f"something to listen on port {port}", last=lambda: _ports(listening), more=self._troubles)

    def forwarded_port(self, port: int, address: tuple[str, int]) -> None:
        """Until a connection from the host to a TCP port of the guest is taken there."""
        what = f"a connection by {address[0]}:{address[1]} to the guest's port {port}"
        listening: set[int] = set()

        def reached() -> bool:
            # QEMU takes every connection, and drops it again if the guest refuses: only the guest knows which it has.
            with suppress(OSError), socket.create_connection(address, timeout=_LEAST):
                rows = self._sockets()
                listening.clear()
                listening.update(row.port for row in rows if row.state == _LISTEN)
                return any(row.port == port and row.state in _CONNECTED and not row.is_local for row in rows)
            return False

        self.until(reached, what, last=lambda: _ports(listening), more=self._troubles)

    def _sockets(self) -> list[_Row]:
        lines = (line.split() for line in self._ask(_TABLES).stdout.splitlines())
        return [_Row(row[1], row[2], row[3]) for row in lines if len(row) > 3 and row[0] != "sl"]  # noqa: PLR2004 - columns

    def file(self, path: GuestPath) -> GuestPath:
        """Until a file or folder exists."""
        self.until(lambda: self._ask(["test", "-e", str(path)]).ok, f"{path} to exist")
        return path

    def output(self, pattern: str | re.Pattern[str]) -> re.Match[str]:
        """Until the console has said something."""
        wanted = re.compile(re.escape(pattern)) if isinstance(pattern, str) else pattern
        what = f"{wanted.pattern if wanted is pattern else pattern!r} on the console"
        return self.until(lambda: self.console.expect(wanted), what, every=0.1, more=self._troubles)

    def shutdown(self, instance: Watching) -> None:
        """Until the guest has powered off."""

        def off() -> bool:
            return instance.exitcode == 0

        self.until(off, "the guest to power off", every=0.1)


@attrs.frozen
class _Row:
    """A socket in /proc/net/tcp."""

    local: str
    remote: str
    state: str

    @property
    def port(self) -> int:
        return int(self.local.rpartition(":")[2], 16)

    @property
    def is_local(self) -> bool:
        """Whether both ends are in the guest."""
        return self.local.rpartition(":")[0] == self.remote.rpartition(":")[0]


def _ports(listening: set[int]) -> str:
    return "ports that are listened on: " + (", ".join(map(str, sorted(listening))) or "none")


def _listed(state: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in state.items())
