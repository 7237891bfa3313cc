"""`vmbottle report`: what failed in a run, for terminals and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pytest_vmbottle.cli import main
from pytest_vmbottle.report.run import MARK

EVENTS = [
    {"time": 101.0, "machine": "vm", "kind": "command", "argv": ["true"], "status": 0, "seconds": 0.1},
    {"time": 102.0, "machine": "vm", "kind": "command", "argv": ["curl", "\x1b[31m"], "status": 7, "stderr": "refused\n", "seconds": 0.2},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / MARK).write_text("run")
    for name, outcome in (("one", "failed"), ("two", "passed")):
        (tmp_path / name).mkdir()
        facts = {
            "nodeid": f"test_it.py::test_{name}",
            "outcome": outcome,
            "error": "assert 1 == 2",
            "began": 100.0,
            "machines": {"vm": "vm"},
        }
        (tmp_path / name / "test.json").write_text(json.dumps(facts))
        (tmp_path / name / "timeline.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    return tmp_path


def test_failed_tests_are_told_with_what_came_before(folder: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(folder)])

    assert result.exit_code == 0
    assert "test_it.py::test_one" in result.stdout
    assert "test_two" not in result.stdout
    assert "refused" in result.stdout
    assert "\x1b" not in result.stdout
    assert str(folder / "one") in result.stdout


def test_programs_get_json(folder: Path) -> None:
    (test,) = json.loads(CliRunner().invoke(main, ["report", str(folder), "--json", "--events", "1"]).stdout)

    assert (test["nodeid"], test["error"]) == ("test_it.py::test_one", "assert 1 == 2")
    assert [event["seconds"] for event in test["events"]] == [2.0]


@pytest.mark.parametrize("name", [".", "missing"])
def test_a_folder_without_artifacts_is_an_error_in_words(tmp_path: Path, name: str) -> None:
    result = CliRunner().invoke(main, ["report", str(tmp_path / name)])

    assert result.exit_code == 1
    assert "--vm-output" in result.stderr
    assert "Traceback" not in result.output
