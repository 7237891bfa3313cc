"""Events as all reports see them: sorted, with a lane each, and with numbers that can be computed with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import attrs

from pytest_vmbottle.report.run import TestArtifacts

__all__ = ["LANES", "Event", "Rows", "as_text", "events_of", "has_failed", "lane_of", "number", "stands_out", "start_of"]

Event: TypeAlias = Mapping[str, Any]

LANES = ("phases", "commands", "files", "waits", "machine", "notes", "console")
"""Lanes of one machine, from top to bottom. Metrics have none: they are curves."""
_LANE_OF = {
    "phase": "phases",
    **dict.fromkeys(("command", "spawn", "exit"), "commands"),
    **dict.fromkeys(("file", "copy", "search"), "files"),
    **dict.fromkeys(("wait", "answer"), "waits"),
    **dict.fromkeys(("power", "snapshot", "network", "screen", "fault", "disk"), "machine"),
    "console": "console",
}
_MOST = 1e15
"""Numbers up to this size are exact as floats, which JavaScript has no others than."""
# Lines by which the kernel and systemd tell that something is wrong. A reader looks for these first among thousands of lines.
_ALARMS = re.compile(
    r"kernel panic|\bOops\b|\bBUG:|out of memory|oom-kill|blocked for more than|soft lockup|segfault|I/O error|no space left"
    r"|failed to start|failed with result|start request repeated too quickly|entered failed state|Traceback \(most recent",
    re.IGNORECASE,
)
_SEARCHED = 1 << 10
"""Characters of a console's line in which an alarm is looked for."""


def number(value: object) -> float | None:
    """Return a value if it is a finite number of sane size, else None: JSON files may have NaN, and integers of any length."""
    # `bool` is a subclass of `int`.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # NaN compares with nothing, so it fails here too.
    return value if -_MOST < value < _MOST else None


def as_text(value: object) -> str:
    """Return the text of a field; empty if it is none."""
    return value if isinstance(value, str) else ""


def events_of(test: TestArtifacts) -> list[dict[str, Any]]:
    """Return the events of a test that have a time, in the order of their times; none if it has no file of them."""
    try:
        events = [event for event in test.events() if number(event["time"]) is not None]
    except OSError:  # a test without machines, or an incomplete copy of a folder
        return []
    # Sorted here too, because the file may have been edited.
    return sorted(events, key=lambda event: event["time"])


def start_of(test: TestArtifacts, events: list[dict[str, Any]]) -> float:
    """Return the time from which the times of a test's events are counted: its start, or its first event if that is unknown."""
    # A folder of artifacts may be a copy, or made by another program: nothing in it is taken for granted.
    began = number(test.began) or 0.0
    return float(began or (events[0]["time"] if events else 0.0))


def lane_of(event: Event) -> str:
    """Return the lane of an event. Unknown kinds are notes."""
    return _LANE_OF.get(as_text(event.get("kind")), "notes")


def has_failed(event: Event) -> bool:
    """Tell whether what an event is about went wrong: it has an error, or a status other than 0."""
    failed_phase = event.get("kind") == "phase" and event.get("state") == "failed"
    return bool(event.get("error")) or failed_phase or bool(number(event.get("status")))


def stands_out(event: Event) -> bool:
    """Tell whether a reader who looks for the cause of a failure should see an event first."""
    if has_failed(event):
        return event.get("kind") != "phase"  # that the test failed is known
    return event.get("kind") in ("console", "infra") and _ALARMS.search(as_text(event.get("text"))[:_SEARCHED]) is not None


@attrs.define
class Rows:
    """Rows of one lane, for events that overlap: several threads of a test may use a machine at once."""

    _ends: list[float] = attrs.field(factory=list)

    def place(self, start: float, seconds: float) -> int:
        """Return the first row that is free at a time, and occupy it. Starts must not go back."""
        # The lowest free row, so that a lane is as high as the most events at a time.
        row = next((row for row, end in enumerate(self._ends) if end <= start), len(self._ends))
        # A slice, which also appends where there is no such row yet.
        self._ends[row : row + 1] = [start + seconds]
        return row
