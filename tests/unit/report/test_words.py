"""Failures in words, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_vmbottle.report.run import TestArtifacts, read_run
from pytest_vmbottle.report.words import as_json, describe, describe_event, one_line
from tests.unit.report.artificial import HOSTILE, PLANTED, write_hostile, write_many, write_planted, write_test


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (
            {"kind": "command", "argv": ["id", "-u"], "user": "app", "cwd": "/srv", "status": 0, "seconds": 0.25},
            "id -u as app in /srv (0.25 s)",
        ),
        ({"kind": "command", "argv": "a | b", "status": 3, "stderr": "x\nbad\n"}, "a | b: status 3: bad"),
        ({"kind": "spawn", "argv": ["sleep", "9"], "user": "root"}, "sleep 9 in the background"),
        ({"kind": "exit", "argv": ["sleep", "9"], "status": 0}, "end of sleep 9: status 0"),
        ({"kind": "file", "verb": "write_text", "path": "/etc/x", "args": ["<3 bytes>"]}, "write_text /etc/x <3 bytes>"),
        ({"kind": "power", "verb": "reboot", "args": [], "seconds": 4.0}, "reboot (4.00 s)"),
        (
            {"kind": "wait", "verb": "wait_for_port", "args": ["80"], "error": "WaitTimeout: no\nport"},
            "wait_for_port 80: WaitTimeout: no\\nport",
        ),
        ({"kind": "metrics", "cpu_percent": 12.4, "rss_bytes": 512 << 20, "threads": 8}, "CPU 12 %, memory 512 MiB, 8 threads"),
        ({"kind": "phase", "phase": "setup", "state": "began"}, "setup began"),
        ({"kind": "console", "text": "\tA line\r\n"}, "    A line"),
        ({"kind": "of the future", "text": "hello"}, "hello"),
        ({}, ""),
    ],
)
def test_an_event_is_one_line_of_words(event: dict[str, Any], words: str) -> None:
    assert describe_event(event) == words


def test_words_of_a_guest_stay_on_their_line_and_are_neutralised() -> None:
    for text in HOSTILE:
        for kind, field in (("console", "text"), ("command", "argv"), ("file", "path"), ("wait", "error")):
            words = describe_event({"kind": kind, field: text})
            assert words.isprintable(), ascii(words)
            assert "##vso" not in words
    assert len(one_line("\x00" * 10_000_000)) < 2000
    assert one_line("begin" + "x" * 1000 + "end")[:5] == "begin"
    assert one_line("begin" + "x" * 1000 + "end")[-3:] == "end"


def test_each_planted_failure_is_described_with_its_cause(tmp_path: Path) -> None:
    paragraphs = describe(read_run(write_planted(tmp_path / "run"))).split("\n\n")

    assert len(paragraphs) == len(PLANTED)
    for planted in PLANTED:
        (paragraph,) = (each for each in paragraphs if f"::test_{planted.name} " in each)
        head, error, machines, *_ = paragraph.splitlines()
        assert head == f"tests/test_shop.py::test_{planted.name} failed in call"
        assert error == f"  {planted.error}"
        assert machines == "  machines: web"
        assert planted.cause in paragraph
        assert "    web/console.txt\n" in paragraph


def test_the_events_just_before_the_failure_are_told_and_those_after_it_are_not(tmp_path: Path) -> None:
    after = [{"kind": "command", "argv": ["too", "late"], "status": 1}]
    failed = {"kind": "phase", "phase": "call", "state": "failed"}
    write_test(
        tmp_path / "test", [*({"kind": "note", "text": f"note {number}"} for number in range(30)), {"kind": "metrics"}, failed, *after]
    )
    tests = read_run(tmp_path)

    lines = describe(tests).splitlines()
    assert "  the last 10 events before the failure, in seconds since the test's start:" in lines
    assert [line.split()[-1] for line in lines if " note " in line] == [str(number) for number in range(20, 30)]
    assert "         2.900  web  note  note 29" in lines
    assert "late" not in describe(tests, before=1000)
    assert "the last 1 event before" in describe(tests, before=1)
    assert "no events of machines" in describe(tests, before=0)


def test_what_a_kernel_says_long_before_the_failure_is_told_too(tmp_path: Path) -> None:
    alarm = {"kind": "console", "text": "Out of memory: Killed process 733 (importer)"}
    write_test(tmp_path / "test", [alarm, *({"kind": "note", "text": f"note {number}"} for number in range(30))])
    tests = read_run(tmp_path)

    before, _, after = describe(tests).partition("the last 10 events")
    assert before.endswith("  what stands out before them:\n         0.000  web  console  Out of memory: Killed process 733 (importer)\n  ")
    assert "Out of memory" not in after
    assert describe(tests, before=100).count("Out of memory") == 1
    assert [event["what"] for event in as_json(tests)[0]["earlier"]] == ["Out of memory: Killed process 733 (importer)"]


def test_a_program_gets_the_same_facts(tmp_path: Path) -> None:
    tests = read_run(write_planted(tmp_path / "run"))

    failures = json.loads(json.dumps(as_json(tests, before=1)))
    assert len(failures) == len(PLANTED)
    (disk,) = (each for each in failures if "full_disk" in each["nodeid"])
    assert disk["phase"] == "call"
    assert disk["machines"] == ["web"]
    assert disk["files"] == ["test.json", "timeline.jsonl", "web/console.txt", "web/journal.txt"]
    (event,) = disk["events"]
    assert (event["machine"], event["kind"], event["failed"], event["seconds"]) == ("web", "command", True, 0.3)
    assert "No space left on device" in event["what"]


def test_hostile_texts_and_numbers_can_be_described(tmp_path: Path) -> None:
    tests = read_run(write_hostile(tmp_path / "run"))

    words = describe(tests, before=1000)
    assert all(line.isprintable() for line in words.splitlines()), ascii(words)
    assert len(words) < 200_000
    json.dumps(as_json(tests, before=1000), allow_nan=False)


def test_a_run_without_failures_and_a_test_without_events_are_described(tmp_path: Path) -> None:
    assert describe([]) == "No test failed."
    assert describe([TestArtifacts(folder=tmp_path, nodeid="t", outcome="passed")]) == "No test failed."
    bare = describe([TestArtifacts(folder=tmp_path, nodeid="test_bare")])
    assert bare == f"test_bare failed in call\n  machines: none\n  no events of machines\n  files: {tmp_path}"


def test_many_files_are_counted(tmp_path: Path) -> None:
    folder = write_test(tmp_path / "test", [])
    for number in range(100):
        (folder / "web" / "outputs" / f"{number:06}-stdout.txt").touch()
    assert describe(read_run(tmp_path)).endswith("\n    and 64 more")


def test_a_long_test_is_described_as_briefly_as_a_short_one(tmp_path: Path) -> None:
    words = describe(read_run(write_many(tmp_path / "run", 1000)))
    assert len(words.splitlines()) < 30
    assert "No space left on device" in words
