"""Spares: machines that are cloned before they are asked for, while a test runs on another one.

A spare has woken, has run a command, so that its code is translated, and is paused: it takes memory and no processor. It is given to nobody
but who asks for its very spec and pack, with clock and randomness of that moment.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle.channels.port import GUEST_PATH, Command
from pytest_vmbottle.errors import VMBottleError
from pytest_vmbottle.host.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from pytest_vmbottle.backends.port import Start
    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["Spares"]

log = logging.getLogger(__name__)

_FIRST = Command(argv=("true",), env=(("PATH", GUEST_PATH),))
_SECONDS = 60.0
_LOOK = 0.2
"""Seconds between two looks whether somebody waits for memory."""


@attrs.define(eq=False)
class _Spare:
    """A machine that is or will be paused.

    Attributes:
        spec, start: What it is made from.
        held: What ends with it: its memory, and the machine itself.
        done: Whether the attempt to make it is over.
        machine: The machine, if it could be made.
    """

    spec: MachineSpec
    start: Start
    held: ExitStack
    done: threading.Event = attrs.field(factory=threading.Event)
    machine: Machine | None = None


class Spares:
    """Spares of one provisioner, all for the next test."""

    def __init__(self, launch: Callable[[MachineSpec, Start], AbstractContextManager[Machine]], wanted: Callable[[], bool]) -> None:
        """Make nothing yet.

        Args:
            launch: Function that starts a machine.
            wanted: Function that tells whether somebody waits for memory; then all spares are given up.
        """
        self._launch, self._wanted = launch, wanted
        self._spares: list[_Spare] = []
        self._lock = threading.Lock()
        self._unasked = threading.local()

    @property
    def is_unasked(self) -> bool:
        """Tell whether this thread is making or ending a machine that nobody has asked for."""
        return getattr(self._unasked, "now", False)

    @property
    def has_any(self) -> bool:
        """Tell whether there is a spare, or one in the making."""
        return bool(self._spares)

    def keep(self, wanted: Sequence[tuple[MachineSpec, Start]]) -> list[tuple[MachineSpec, Start]]:
        """End all spares but those that are wanted; return what is wanted and not there."""
        missing, others = list(wanted), list[_Spare]()
        for spare in self._spares:
            if (spare.spec, spare.start) in missing:
                missing.remove((spare.spec, spare.start))
            else:
                others.append(spare)
        if others:
            self.give_up(*others)
        return missing

    def prepare(self, spec: MachineSpec, start: Start, held: ExitStack) -> None:
        """Make a spare in the background; what goes wrong with it concerns nobody."""
        spare = _Spare(spec, start, held)
        with self._lock:
            self._spares.append(spare)
        threading.Thread(target=self._make_and_watch, args=(spare,), name="vmbottle-spare", daemon=True).start()

    def _make_and_watch(self, spare: _Spare) -> None:
        self._unasked.now = True
        try:
            self._make(spare)
        except Exception as error:
            log.debug("no spare of %s: %s", spare.spec.name, error)
        finally:
            spare.done.set()
        self._watch(spare)

    def _make(self, spare: _Spare) -> None:
        with ExitStack() as stack:
            machine = stack.enter_context(self._launch(spare.spec, spare.start))
            machine.lifecycle.channel.run(_FIRST, deadline=Deadline(_SECONDS))
            machine.lifecycle.pause()
            spare.held.push(stack.pop_all())
            spare.machine = machine

    def _watch(self, spare: _Spare) -> None:
        """Give the spare up when memory is wanted, as long as nobody has taken it."""
        pause = threading.Event()
        while spare in self._spares:
            if spare.machine is None or self._wanted():
                self.give_up(spare)
                return
            pause.wait(_LOOK)

    def take(self, spec: MachineSpec, start: Start) -> tuple[Machine, ExitStack] | None:
        """Return a spare that is the same as a new machine would be, running, and what ends with it; None if there is none."""
        with self._lock:
            spare = next((each for each in self._spares if each.spec == spec and each.start == start), None)
            if spare is None:
                return None
            self._spares.remove(spare)
        try:
            # It is further than a new one would be.
            spare.done.wait()
            if spare.machine is not None:
                self._wake(spare.machine)
                return spare.machine, spare.held.pop_all()
        except VMBottleError:
            pass  # it has died meanwhile
        except BaseException:  # Ctrl-C: nobody else knows of it any more
            self._end(spare)
            raise
        self._end(spare)
        return None

    @staticmethod
    def _wake(machine: Machine) -> None:
        # The launch itself came before the test, whose record begins with this.
        with machine.lifecycle.timeline.span("power", verb="launch", args=["made beforehand"]):
            machine.lifecycle.resume()
            machine.lifecycle.instance.refresh(deadline=Deadline(_SECONDS))

    def give_up(self, *spares: _Spare) -> None:
        """End spares; by default all of them."""
        with self._lock:
            gone = [spare for spare in spares or self._spares if spare in self._spares]
            self._spares = [spare for spare in self._spares if spare not in gone]
        for spare in gone:
            self._end(spare)

    def _end(self, spare: _Spare) -> None:
        spare.done.wait()
        before, self._unasked.now = self.is_unasked, True
        try:
            spare.held.close()
        finally:
            self._unasked.now = before
