"""Sampling of all machines of a process for their timelines."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.machine.metrics import Meter

if TYPE_CHECKING:
    from pytest_vmbottle.machine.machine import Machine

__all__ = ["Sampler"]

# Seconds: docs/timeline.md promises that lines of the console are noted at most a second late.
_EVERY = 1.0


class Sampler:
    """Thread that records resources and console lines of machines once a second, as long as there are any."""

    def __init__(self) -> None:
        """Start no thread yet."""
        self._clear()

    def _clear(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._machines: dict[Machine, Meter | None] = {}
        self._stop = threading.Event()

    @contextmanager
    def following(self, machine: Machine) -> Iterator[None]:
        """Sample a machine for the length of a block."""
        if self._pid != os.getpid():
            # A forked child has no thread, the machines are its parent's, and a lock that is held stays so.
            self._clear()
        with self._lock:
            # The first machine starts the thread and the last one ends it, so a process without machines has none. Each thread has an event
            # of its own: the thread before may not have seen its end yet.
            if not self._machines:
                self._stop = threading.Event()
                threading.Thread(target=self._run, args=(self._stop,), name="vmbottle-sampler", daemon=True).start()
            self._machines[machine] = None
        try:
            yield
        finally:
            # A child that was forked within the block leaves it too, and the lock and the table are not its own.
            if self._pid == os.getpid():
                with self._lock:
                    self._machines.pop(machine, None)
                    if not self._machines:
                        self._stop.set()
            # The files only: later events open them again.
            machine.lifecycle.timeline.close()

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(_EVERY):
            # Under the lock, so that no machine is sampled after its block.
            with self._lock:
                for machine in self._machines:
                    self._sample(machine)

    def _sample(self, machine: Machine) -> None:
        timeline = machine.lifecycle.timeline
        # The console first, and even if the machine is off: its last lines are those that explain why.
        timeline.look()
        with suppress(MachineError, OSError):  # it is off
            machine.lifecycle.bound_capture()
            machine.lifecycle.bound_logs()
            pid, meter = machine.lifecycle.pid, self._machines[machine]
            # Another process starts from zero.
            if meter is None or meter.pid != pid:
                # The guest is never asked here, since each answer costs an emulated guest 50 ms of its processor.
                meter = self._machines[machine] = Meter(pid, lambda _: b"")
            sample = meter.host()
            if sample is not None:
                figures = attrs.asdict(sample, filter=lambda field, _: field.name not in ("time", "guest"))
                timeline.note("metrics", **{name: round(value, 1) for name, value in figures.items() if value is not None})
