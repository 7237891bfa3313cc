"""Waits for conditions in a guest.

Each has one deadline, ends at once when the condition can no longer come true, and reports the last state in its error.
"""

from __future__ import annotations

import math
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import attrs

from pytest_vmbottle.backends.console import Console
from pytest_vmbottle.backends.port import Instance
from pytest_vmbottle.errors import MachineError, MachineTimeout
from pytest_vmbottle.guest.path import GuestPath
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.machine import guestlog, sockets, units
from pytest_vmbottle.machine.screen_text import tty_text
from pytest_vmbottle.machine.units import UnitState
from pytest_vmbottle.result import CommandTimeout, Result, printable

__all__ = ["Wait"]

_T = TypeVar("_T")
_LEAST = 5.0
"""Seconds that a question to the guest may take, even if less is left."""
_EXPLAINED = 20.0
"""Seconds for collecting what may explain a failed wait: without KVM a guest takes several to list its units."""
# Seconds between two questions: each of them is a process in the guest.
_EVERY = 0.25
_NO_PROGRAM = 127


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
        alive: Function that raises if the machine is gone.
        run: Function that runs a command by a deadline and does not check its status.
        deadline: The deadline of the wait.
        age: Function that returns the seconds since the machine was cloned or booted.
        record: Function that is given each answer that differs from the one before.
    """

    machine: str
    console: Console
    alive: Callable[[], None]
    run: Callable[[str | Sequence[str], Deadline], Result]
    deadline: Deadline
    age: Callable[[], float] = lambda: math.inf
    record: Callable[[str], None] = lambda _: None

    def until(
        self,
        check: Callable[[], _T | None],
        what: str,
        *,
        every: float = _EVERY,
        last: Callable[[], str] = str,
        more: Callable[[], str] = str,
    ) -> _T:
        """Call a function until it returns something true, and return that.

        Args:
            check: The function to call.
            what: The condition in words, for the message.
            every: Seconds between two calls, at most.
            last: Function that returns the last answer, for the message.
            more: Function that returns what else may explain the failure; called once, at the end.

        Raises:
            MachineTimeout: It returned nothing true by the deadline.
            MachineDied: The machine is gone.
        """
        late: list[_Unanswered] = []
        recorded: list[str] = []

        def record(seen: str) -> None:
            if recorded != [seen]:
                recorded[:] = [seen]
                self.record(seen)

        def look() -> _T | None:
            answer: _T | None = None
            try:
                answer = check()
                late.clear()
            except _Unanswered as error:
                late[:] = [error]
            record(str(late[0]) if late else last().strip())
            # Only if it is not true yet: what has come true counts, even if the machine is gone since.
            if not answer:
                self.alive()
            return answer

        # The first pauses are short: what is waited for is often there at once.
        answer = self.deadline.poll(look, every=every, first=0.02)
        if answer:
            return answer
        # The last answer is told even if the guest did not answer again: it is the best that is known.
        seen = last().strip()
        message = f"waited {self.deadline.seconds:g} s for {what}" + "".join(f"; {error}" for error in late)
        message += (f"; the last answer was\n{seen}" if seen else "") + more()
        raise MachineTimeout(message, machine=self.machine, console_tail=self.console.tail(20))

    def _ask(self, command: str | Sequence[str], *, least: float = _LEAST) -> Result:
        """Ask the guest; raise `_Unanswered` if it is too slow.

        A slow answer is no answer yet, and does not end the wait.
        """
        # A question at the very end gets a few seconds all the same. Else the last one would always fail for lack of time, and hide the
        # answer.
        limit = Deadline(max(least, self.deadline.remaining))
        try:
            return self.run(command, limit)
        except (CommandTimeout, MachineTimeout) as error:
            said = error.result if isinstance(error, CommandTimeout) else None
            raise _Unanswered(f"the guest did not answer within {limit.seconds:.3g} s", said) from error

    def _troubles(self) -> str:
        """Describe the units that failed or were restarted since the machine was cloned.

        They may explain a failed wait; empty if they cannot be listed.
        """
        with suppress(_Unanswered, MachineError):
            # By the age of the process: what failed earlier belongs to the pack, and was there in each of its clones.
            units = guestlog.troubled(self._ask(guestlog.UNITS, least=_EXPLAINED).stdout, self.age())
            if units:
                journals = self._ask(["sh", "-c", guestlog.JOURNALS, "sh", *(unit.name for unit in units)], least=_EXPLAINED).stdout
                listed = "\n".join(map(str, units))
                return f"\n--- units that failed or were restarted meanwhile ---\n{listed}\n{guestlog.shortened(journals)}"
        return ""

    def command(self, command: str | Sequence[str], *, every: float) -> Result:
        """Wait until a command succeeds, and return its result."""
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
        """Wait until a function returns something true, and return that."""
        # A partial and a callable object have no name.
        name = getattr(check, "__name__", "<lambda>").replace("<lambda>", "the condition")
        answers: list[object] = []

        def asked() -> _T | None:
            answer = check()
            answers[:] = [answer]
            return answer

        return self.until(asked, f"{name} to become true", every=every, last=lambda: printable(repr(answers[-1]))[:1000] if answers else "")

    def unit(self, unit: str, *, of_user: bool = False, finished: bool = False) -> None:
        """Wait until a systemd unit is active, or until it has run and is over."""
        # The last state, and the last one in which the unit was there.
        last: list[UnitState] = []
        loaded: list[UnitState] = []

        def reached() -> bool:
            state = self._unit_state(unit, of_user=of_user)
            last[:] = [state]
            if state.is_loaded:
                loaded[:] = [state]
            # A transient unit is forgotten when it is over, unless it failed.
            if (state.has_finished or (loaded and state.is_missing)) if finished else state.is_active:
                return True
            # A unit that is inactive without a job will not start by itself, so waiting longer cannot help.
            if state.is_hopeless:
                raise self._hopeless(unit, state, of_user=of_user, finished=finished)
            return False

        # Unlike the other waits this one explains nothing more: a unit that failed has ended it already, with its journal.
        what = f"the unit {unit} to {'have run and be over' if finished else 'be active'}"
        self.until(reached, what, last=lambda: str(last[-1]) if last else "")

    def _unit_state(self, unit: str, *, of_user: bool) -> UnitState:
        shown = self._ask(units.show(unit, of_user=of_user))
        # Without systemctl no wait can succeed. A unit that is not there is told by its state, not by the status.
        if shown.returncode == _NO_PROGRAM:
            raise MachineError(f"the unit {unit} cannot become active: the guest has no systemd", machine=self.machine)
        if of_user and shown.returncode == units.NO_USER:
            raise MachineError(f"the unit {unit} cannot become active: {printable(shown.stderr.strip())}", machine=self.machine)
        return UnitState.of(shown)

    def _hopeless(self, unit: str, state: UnitState, *, of_user: bool, finished: bool) -> MachineError:
        journal = ""
        with suppress(_Unanswered):
            journal = self._ask(units.journal(unit, of_user=of_user)).stdout
        message = f"the unit {unit} will not {'run' if finished else 'become active'}: {state}"
        if finished and state.is_missing:
            message += "; a transient unit is forgotten when it is over: start it by systemd-run with --wait or --remain-after-exit"
        return MachineError(f"{message}\n --- its journal ---\n{journal}", machine=self.machine)

    def port(self, port: int, *, closed: bool = False) -> None:
        """Wait until something in the guest listens on a TCP port, or until nothing does any more."""
        listening: set[int] = set()

        def reached() -> bool:
            listening.clear()
            listening.update(row.port for row in self._sockets() if row.is_listening)
            return (port in listening) is not closed

        what = f"{'nothing' if closed else 'something'} to listen on port {port}"
        self.until(reached, what, last=lambda: sockets.listeners(listening), more=str if closed else self._troubles)

    def port_of(self, address: str, port: int, *, closed: bool = False) -> None:
        """Wait until the guest can connect to a TCP port of an address, or until it no longer can."""
        answers: list[str] = []

        def reached() -> bool:
            tried = self._ask(["sh", "-c", sockets.CONNECT, "sh", address, str(port)])
            if tried.returncode == sockets.NO_CLIENT:
                raise MachineError(f"cannot connect to {address} from the guest: {tried.stderr.strip()}", machine=self.machine)
            answers[:] = [printable(tried.stderr.strip()) or ("it was reached" if tried.ok else "it was not reached")]
            return tried.ok is not closed

        what = f"the guest to reach port {port} of {address}{' no more' if closed else ''}"
        self.until(reached, what, last=lambda: "".join(answers), more=str if closed else self._troubles)

    def forwarded_port(self, port: int, address: tuple[str, int]) -> None:
        """Wait until the guest accepts a connection from the host to a TCP port."""
        what = f"a connection by {address[0]}:{address[1]} to the guest's port {port}"
        listening: set[int] = set()

        def reached() -> bool:
            # QEMU takes every connection, and drops it again if the guest refuses: only the guest knows which it has.
            # The connection stays open while the guest is asked. A row of it is the proof; one that is local to the guest is somebody
            # else's.
            with suppress(OSError), socket.create_connection(address, timeout=_LEAST):
                rows = self._sockets()
                listening.clear()
                listening.update(row.port for row in rows if row.is_listening)
                return any(row.port == port and row.is_connected and not row.is_local for row in rows)
            return False

        self.until(reached, what, last=lambda: sockets.listeners(listening), more=self._troubles)

    def _sockets(self) -> list[sockets.TcpSocket]:
        return sockets.tcp_sockets(self._ask(sockets.TABLES).stdout)

    def socket(self, path: str) -> None:
        """Wait until something in the guest listens on a unix socket."""
        there: list[str] = []

        def reached() -> bool:
            asked = self._ask(["sh", "-c", sockets.UNIX, "sh", path])
            there[:] = ["unix sockets with a listener:\n" + printable(asked.stdout)]
            return asked.ok

        self.until(reached, f"something to listen on {path}", last=lambda: "".join(there), more=self._troubles)

    def file(self, path: GuestPath) -> GuestPath:
        """Wait until a file or folder exists."""
        # By the spec's user: a file in a folder that this user may not enter does not exist for the test either.
        self.until(lambda: self._ask(["test", "-e", str(path)]).ok, f"{path} to exist")
        return path

    def output(self, pattern: str | re.Pattern[str]) -> re.Match[str]:
        """Wait until the console's output matches a pattern."""
        # A string is literal text: consoles are full of brackets and dots.
        wanted = re.compile(re.escape(pattern)) if isinstance(pattern, str) else pattern
        what = f"{wanted.pattern if wanted is pattern else pattern!r} on the console"
        # More often than the others, because reading a file on the host costs the guest nothing.
        return self.until(lambda: self.console.expect(wanted), what, every=0.1, more=self._troubles)

    def tty(self, number: int, pattern: str | re.Pattern[str]) -> re.Match[str]:
        """Wait until a virtual terminal shows text that matches a pattern."""
        return self._text(pattern, lambda: tty_text(number, self._ask), f"on the virtual terminal {number}")

    def screen(self, read: Callable[[Deadline], str], pattern: str | re.Pattern[str]) -> re.Match[str]:
        """Wait until the screen, which a function reads by a deadline, shows text that matches a pattern."""
        # A last look at the very end gets a few seconds, as a question to the guest does.
        return self._text(pattern, lambda: read(Deadline(max(_LEAST, self.deadline.remaining))), "on the screen")

    def _text(self, pattern: str | re.Pattern[str], read: Callable[[], str], where: str) -> re.Match[str]:
        wanted = re.compile(re.escape(pattern)) if isinstance(pattern, str) else pattern
        seen: list[str] = []

        def found() -> re.Match[str] | None:
            seen[:] = [read()]
            return wanted.search(seen[0])

        what = f"{wanted.pattern if wanted is pattern else pattern!r} {where}"
        return self.until(found, what, last=lambda: printable("".join(seen)), more=self._troubles)

    def shutdown(self, instance: Instance) -> None:
        """Wait until the guest has powered off."""

        def off() -> bool:
            # Any other end raises in `alive`, which `until` calls after each look.
            return instance.exitcode == 0

        self.until(off, "the guest to power off", every=0.1)
