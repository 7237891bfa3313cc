"""The wall clock of a guest, set by a test."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_vmbottle.machine.fault import CLOCK_FAULTS, Fault, guest_fault

if TYPE_CHECKING:
    from pytest_vmbottle.machine.lifecycle import Lifecycle

__all__ = ["Clock", "clock_jump"]


def clock_jump(lifecycle: Lifecycle, seconds: float) -> Fault:
    """Return the fault of a clock that is set forward, or back, by seconds; at the end it is right again."""
    return guest_fault(lifecycle, "clock", CLOCK_FAULTS, "jump", seconds, jump=seconds)


class Clock:
    """The wall clock of a guest. What is done to it is done at once, and undone at the end of a `with` block, or by `stop`."""

    def __init__(self, lifecycle: Lifecycle, now: Callable[[], float]) -> None:
        """Take the machine, and a function that asks for the guest's time."""
        self._lifecycle, self._now = lifecycle, now

    def set(self, when: dt.datetime) -> Fault:
        """Set the clock; what time it is there without a zone is UTC.

        Example:
            >>> with vm.clock.set(dt.datetime(2038, 1, 19)):
            ...     vm.exec("date -u +%F").stdout.strip()
            '2038-01-19'
        """
        aware = when if when.tzinfo is not None else when.replace(tzinfo=dt.UTC)
        return clock_jump(self._lifecycle, aware.timestamp() - self._now()).start()

    def advance(self, **span: float) -> Fault:
        """Set the clock forward, or back, by a step; timers that are due in between run once, or not at all.

        Args:
            span: As for `datetime.timedelta`: `days=`, `hours=`, ...

        Example:
            >>> with vm.clock.advance(days=400):
            ...     vm.exec("date +%s").stdout > str(time.time() + 399 * 86400)
            True
        """
        return clock_jump(self._lifecycle, dt.timedelta(**span).total_seconds()).start()

    def fast_forward(self, **span: float) -> Fault:
        """Set the clock forward from timer to timer of systemd and job to job of cron: each runs as often as it would, and in order.

        It waits until what was started has ended, 10 s at most; for what a timer has started and took longer it does not wait again. Each
        step takes about half a second in an emulated guest, and Debian's cron has an hourly job.

        Args:
            span: As for `datetime.timedelta`: `days=`, `hours=`, ...

        Raises:
            ValueError: The span is not above 0.

        Example:
            >>> _ = vm.exec("systemd-run --on-calendar=daily --unit=mine sh -c 'date +%F >> /srv/days'")
            >>> with vm.clock.fast_forward(days=3):
            ...     len(set(vm.path("/srv/days").read_text().split()))
            3
        """
        seconds = dt.timedelta(**span).total_seconds()
        if seconds <= 0:
            raise ValueError(f"fast_forward({span}): takes a time above 0")
        return guest_fault(self._lifecycle, "clock.fast_forward", CLOCK_FAULTS, "forward", seconds, seconds=seconds).start()
