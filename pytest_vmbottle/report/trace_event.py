"""Events of a run in the Trace Event format, which ui.perfetto.dev and chrome://tracing open.

Each test is a process, and each lane of a machine a thread. The format is described at
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from pytest_vmbottle.host.files import atomic_file
from pytest_vmbottle.report.events import LANES, Event, Rows, as_text, events_of, lane_of, number, start_of
from pytest_vmbottle.report.run import TestArtifacts
from pytest_vmbottle.report.words import describe_event, one_line
from pytest_vmbottle.shown import printable

__all__ = ["trace_events", "write_trace"]

_FIGURES = ("cpu_percent", "rss_bytes", "threads", "read_bytes", "write_bytes")
_DEEPEST = 8
"""Levels of lists and objects in an event's arguments."""

_TEXT, _MOST = 1 << 14, 1000
"""Characters of a text, and elements of a list."""

_Timed: TypeAlias = tuple[float, dict[str, Any]]
"""An event of the trace, and the time by which it is sorted."""


def write_trace(tests: Sequence[TestArtifacts], path: Path) -> None:
    """Write the events of tests into a file, which appears whole."""
    with atomic_file(path, mode=0o644) as file:
        # Written piece by piece, since the events of a run may be more than memory holds.
        file.write(b'{"displayTimeUnit":"ms","traceEvents":[')
        separator = b"\n"
        for event in trace_events(tests):
            file.write(separator + json.dumps(event, separators=(",", ":"), allow_nan=False).encode())
            separator = b",\n"
        file.write(b"\n]}\n")


def trace_events(tests: Sequence[TestArtifacts]) -> Iterator[dict[str, Any]]:
    """Yield the events of tests in the order of their times, in microseconds since the start of the first test.

    The name of a process or thread comes before its events, without a time.
    """
    waiting = sorted((_first_time(test), pid) for pid, test in enumerate(tests, 1))
    zero = waiting[0][0] if waiting else 0.0
    # The earliest last, where `pop` takes it without moving the others.
    waiting.reverse()
    running: list[_Running] = []
    # Each test is read when its first event is next: only tests that ran at the same time are in memory at the same time.
    while waiting or running:
        # Read as soon as it may have the next event, so that the order of times holds over tests.
        if waiting and (not running or _microseconds(waiting[-1][0] - zero) <= running[0].time):
            pid = waiting.pop()[1]
            rest = _test_events(tests[pid - 1], pid, zero)
        else:
            test = heapq.heappop(running)
            yield test.event
            pid, rest = test.pid, test.rest
        with suppress(StopIteration):
            heapq.heappush(running, _Running(*next(rest), pid, rest))


@attrs.frozen(order=True)
class _Running:
    """A test whose events are being read: the next one, and the rest."""

    # A heap compares the times and then the numbers of the processes, which all differ: never the events, which do not compare.
    time: float
    event: dict[str, Any] = attrs.field(order=False)
    pid: int
    rest: Iterator[_Timed] = attrs.field(order=False)


def _first_time(test: TestArtifacts) -> float:
    first: list[dict[str, Any]] = []
    with suppress(OSError):  # a test without machines
        first = [event for event in itertools.islice(test.events(), 1) if number(event["time"]) is not None]
    return min([start_of(test, first), *(float(event["time"]) for event in first)])


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _test_events(test: TestArtifacts, pid: int, zero: float) -> Iterator[_Timed]:
    """Yield the events of one test, with the names of its process and threads."""
    names = {"process_name": {"name": f"{one_line(test.nodeid)} ({one_line(test.outcome)})"}, "process_sort_index": {"sort_index": pid}}
    for name, args in names.items():
        # "M" is metadata, which has no time.
        yield 0.0, {"ph": "M", "pid": pid, "tid": 0, "name": name, "args": args}
    threads = _Threads(pid)
    for event in events_of(test):
        # Files are sorted; an edited one must not bring times before zero.
        at = max(0.0, _microseconds(event["time"] - zero))
        named, made = threads.made_of(event)
        yield from ((at, each) for each in [*named, *({**each, "ts": at} for each in made)])


@attrs.define
class _Threads:
    """Threads of one test's process: one for each lane of a machine, and more where events overlap, since those of a thread must nest."""

    _pid: int
    _rows: dict[tuple[str, str], Rows] = attrs.field(factory=dict)
    _tids: dict[tuple[str, str, int], int] = attrs.field(factory=dict)

    def made_of(self, event: Event) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the names of threads that are new, and what the trace has of an event, all without times."""
        machine = one_line(as_text(event.get("machine")))
        if event.get("kind") == "metrics":
            figures = {name: figure for name in _FIGURES if (figure := number(event.get(name))) is not None}
            # A counter for each figure, because a counter's figures are stacked on one scale.
            counters = [{"ph": "C", "name": f"{machine} {name}", "args": {name: figure}} for name, figure in figures.items()]
            return [], [{"pid": self._pid, "tid": 0, **counter} for counter in counters]
        lane, seconds = lane_of(event), number(event.get("seconds"))
        row = self._rows.setdefault((machine, lane), Rows()).place(event["time"], seconds) if seconds is not None else 0
        known = len(self._tids)
        # From 1: thread 0 has the counters.
        tid = self._tids.setdefault((machine, lane, row), known + 1)
        # An instant of its thread, or "X": a complete event with its duration.
        shape = {"ph": "i", "s": "t"} if seconds is None else {"ph": "X", "dur": max(0.0, _microseconds(seconds))}
        made = {"name": describe_event(event), "cat": one_line(as_text(event.get("kind"))), **shape, "args": _shown(event)}
        names = self._names(machine, lane, row, tid) if len(self._tids) > known else []
        return names, [{"pid": self._pid, "tid": tid, **made}]

    def _names(self, machine: str, lane: str, row: int, tid: int) -> list[dict[str, Any]]:
        # Room for ten lanes of a hundred rows in each machine: viewers sort threads by this number.
        place = [*dict.fromkeys(name for name, _, _ in self._tids)].index(machine) * 1000 + LANES.index(lane) * 100 + row
        args = {"thread_name": {"name": f"{machine}: {lane}{f' {row + 1}' if row else ''}"}, "thread_sort_index": {"sort_index": place}}
        return [{"ph": "M", "pid": self._pid, "tid": tid, "name": name, "args": each} for name, each in args.items()]


def _shown(value: Any, deepest: int = _DEEPEST) -> Any:
    """Return a value of an event with texts that are safe to show, and without numbers that JSON does not have."""
    if isinstance(value, str):
        return printable(value, _TEXT)
    if isinstance(value, Mapping) and deepest:
        return {printable(str(key), _TEXT): _shown(each, deepest - 1) for key, each in value.items()}
    if isinstance(value, list) and deepest:
        return [_shown(each, deepest - 1) for each in value[:_MOST]]
    if value is None or isinstance(value, bool) or number(value) is not None:
        return value
    return printable(repr(value)[:_TEXT])
