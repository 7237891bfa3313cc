"""Deadlines and reminders on the monotonic clock."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, TypeVar

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FOREVER", "Deadline", "Reminder"]

FOREVER = math.inf
"""Seconds of a deadline that never expires."""

_T = TypeVar("_T")


@attrs.frozen
class Deadline:
    """A point on the monotonic clock, passed down to everything that must be done before it.

    Attributes:
        seconds: The time-out in seconds that it was made with.
        at: The time at which it expires, on `time.monotonic`.
    """

    seconds: float
    at: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        # Monotonic, because the wall clock of a host may be set while something waits. `self.at = ...` would fail: the class is frozen.
        object.__setattr__(self, "at", time.monotonic() + self.seconds)

    @property
    def remaining(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self.at - time.monotonic())

    @property
    def expired(self) -> bool:
        """Tell whether the time has passed."""
        return time.monotonic() >= self.at

    def poll(self, check: Callable[[], _T | None], *, every: float = 0.1, first: float | None = None) -> _T | None:
        """Call `check` until it returns something true, and return that; return None at the end.

        The pause grows from `first` (default: `every`) by half each time, up to `every`. The check is always called at least once, and once
        more at the deadline.
        """
        pause = every if first is None else first
        while True:
            # Read before the check, so that the check runs once more after the last pause.
            last = self.expired
            answer = check()
            if answer:
                return answer
            if last:
                return None
            time.sleep(min(pause, self.remaining))
            pause = min(every, pause * 1.5)


@attrs.define
class Reminder:
    """Timer for messages to a user who waits.

    They are due after 2 s (or as given), and then when the wait is twice as long, or a minute longer.
    """

    _began: float = attrs.field(factory=time.monotonic, init=False)
    _next: float = 2.0

    @property
    def elapsed(self) -> float:
        """Seconds since the timer was made."""
        return time.monotonic() - self._began

    def due(self) -> bool:
        """Tell whether a message is due; if so, set the time of the next one."""
        if self.elapsed < self._next:
            return False
        self._next = self.elapsed + min(self.elapsed, 60.0)
        return True
