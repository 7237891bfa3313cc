"""The trace: what viewers of the Trace Event format are given."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vmbottle.report.run import read_run
from pytest_vmbottle.report.trace_event import trace_events, write_trace
from tests.unit.report.artificial import BEGAN, write_hostile, write_many, write_planted, write_test

if TYPE_CHECKING:
    from collections.abc import Callable


def _written(run: Path) -> list[dict[str, Any]]:
    write_trace(read_run(run), run / "trace.json")
    trace = json.loads((run / "trace.json").read_text())
    assert isinstance(trace, dict)
    assert trace["displayTimeUnit"] == "ms"
    events: list[dict[str, Any]] = trace["traceEvents"]
    return events


def _names(events: list[dict[str, Any]], name: str) -> dict[tuple[int, int], str]:
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["ph"] == "M" and event["name"] == name}


def test_each_test_is_a_process_and_each_lane_of_a_machine_a_thread(tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [
        {"kind": "command", "argv": ["ls"], "seconds": 0.5, "status": 0},
        {"kind": "console", "text": "hello", "machine": "db"},
    ]
    write_test(tmp_path / "a", kinds, nodeid="test_a", machines=("web", "db"))
    write_test(tmp_path / "b", kinds, nodeid="test_b", began=BEGAN + 10, outcome="passed")
    events = _written(tmp_path)

    assert sorted(_names(events, "process_name").values()) == ["test_a (failed)", "test_b (passed)"]
    assert sorted(_names(events, "thread_name").values()) == ["db: console", "db: console", "web: commands", "web: commands"]
    (command, *_) = (event for event in events if event.get("cat") == "command")
    assert (command["ph"], command["ts"], command["dur"], command["name"]) == ("X", 0, 500000, "ls (0.50 s)")
    assert command["args"]["argv"] == ["ls"]
    (line, *_) = (event for event in events if event.get("cat") == "console")
    assert (line["ph"], line["s"], line["ts"], line["name"]) == ("i", "t", 500000, "hello")


def test_metrics_are_counters_one_for_each_figure(tmp_path: Path) -> None:
    sample = {"kind": "metrics", "cpu_percent": 12.5, "rss_bytes": 1 << 30, "threads": "?", "read_bytes": float("nan")}
    write_test(tmp_path / "test", [sample])

    counters = [event for event in _written(tmp_path) if event["ph"] == "C"]
    assert {event["name"]: event["args"] for event in counters} == {
        "web cpu_percent": {"cpu_percent": 12.5},
        "web rss_bytes": {"rss_bytes": 1 << 30},
    }


def test_times_are_microseconds_since_the_first_test_and_in_order_although_tests_ran_at_the_same_time(tmp_path: Path) -> None:
    notes: list[dict[str, Any]] = [{"kind": "note", "text": str(number), "time": BEGAN + number} for number in range(20)]
    write_test(tmp_path / "a", notes)
    write_test(tmp_path / "b", [{**note, "time": note["time"] + 5.5} for note in notes], began=BEGAN + 5)
    write_test(tmp_path / "c", [{**note, "time": note["time"] + 100} for note in notes], began=BEGAN + 100, outcome="passed")
    write_test(tmp_path / "early", [{"kind": "power", "verb": "launch", "time": BEGAN - 2, "seconds": 1}])
    events = _written(tmp_path)

    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    assert (times[0], times[1], times[-1]) == (0, 2_000_000, 121_000_000)
    assert len(times) == 61


# By the document: the members that each phase must have, and those that it may have.
_ALWAYS = {"ph", "pid", "tid", "name"}
_MEMBERS = {
    "M": (_ALWAYS | {"args"}, set[str]()),
    "X": (_ALWAYS | {"ts", "dur"}, {"args", "cat"}),
    "i": (_ALWAYS | {"ts"}, {"args", "cat", "s"}),
    "C": (_ALWAYS | {"ts", "args"}, set[str]()),
}
_METADATA = {"process_name": "name", "process_sort_index": "sort_index", "thread_name": "name", "thread_sort_index": "sort_index"}


@pytest.mark.parametrize("write", [write_planted, write_hostile, lambda run: write_many(run, 300)])
def test_each_event_has_the_members_that_its_phase_has_by_the_document(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path)
    events = _written(tmp_path)
    assert {"M", "X", "i"} <= {event["ph"] for event in events} <= _MEMBERS.keys()
    for event in events:
        needed, allowed = _MEMBERS[event["ph"]]
        assert needed <= event.keys() <= needed | allowed, event
        assert (type(event["pid"]), type(event["tid"]), type(event["name"])) == (int, int, str)
        assert all(type(event[name]) in (int, float) and event[name] >= 0 for name in ("ts", "dur") if name in event)
        assert event.get("s", "t") in ("g", "p", "t")
        assert isinstance(event.get("args", {}), dict)
        if event["ph"] == "C":
            assert event["args"]
            assert all(type(figure) in (int, float) for figure in event["args"].values())
        if event["ph"] == "M":
            assert event["args"].keys() == {_METADATA[event["name"]]}


def test_each_process_and_thread_is_named_once(tmp_path: Path) -> None:
    events = _written(write_many(tmp_path / "run", 1000))
    metadata = [(event["pid"], event["tid"] if "thread" in event["name"] else 0, event["name"]) for event in events if event["ph"] == "M"]
    timed = {(event["pid"], event["tid"]) for event in events if event["ph"] in ("X", "i")}

    assert len(metadata) == len(set(metadata))
    assert {(pid, tid) for pid, tid, name in metadata if name == "thread_name"} == timed
    assert {pid for pid, _, name in metadata if name == "process_name"} == {event["pid"] for event in events}


def test_names_come_before_what_they_name(tmp_path: Path) -> None:
    events = _written(write_many(tmp_path / "run", 1000))
    named = set()
    for event in events:
        if event["ph"] == "M":
            named.add((event["pid"], event["tid"]))
        assert (event["pid"], event["tid"]) in named


def test_spans_of_a_thread_do_not_overlap_since_viewers_would_nest_them(tmp_path: Path) -> None:
    events = _written(write_many(tmp_path / "run", 1000))
    threads: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            threads.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert all(one[1] <= two[0] + 1 for spans in threads.values() for one, two in pairwise(spans))
    assert any(name.endswith("commands 2") for name in _names(events, "thread_name").values())


def test_hostile_texts_are_visible_strings_and_numbers_are_finite(tmp_path: Path) -> None:
    write_hostile(tmp_path)
    write_trace(read_run(tmp_path), tmp_path / "trace.json")
    text = (tmp_path / "trace.json").read_text()

    assert text.isascii()
    for event in json.loads(text, parse_constant=pytest.fail)["traceEvents"]:
        shown = json.dumps(event, ensure_ascii=False)
        assert shown.replace("\\n", "").isprintable(), ascii(shown)
        assert len(shown) < 200_000


def test_planted_failures_and_no_tests_at_all_give_a_trace(tmp_path: Path) -> None:
    assert len(_written(write_planted(tmp_path / "run"))) > 50
    assert list(trace_events([])) == []
    write_trace([], tmp_path / "none.json")
    assert json.loads((tmp_path / "none.json").read_text())["traceEvents"] == []
