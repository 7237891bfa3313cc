"""Which errors keep a test from its machine, and how their reports are told."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pytest_vmbottle import CommandFailed, MachineError, Result, VMBottleError
from pytest_vmbottle.plugin.infra import Infra, cause_of


def _report(nodeid: str, *, cause: str = "MachineError: no machine", outcome: str = "failed") -> pytest.TestReport:
    # With what a report brings from another process.
    extra: dict[str, Any] = {"outcome": outcome, "vmbottle_infra": cause}
    return pytest.TestReport(nodeid, ("", 0, ""), {}, longrepr="all of it", when="setup", sections=[("stdout", "x")], **extra)


def _infra(message: str) -> MachineError:
    error = MachineError(message)
    error.infra = True
    return error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (_infra("it does not start\nand more"), "MachineError: it does not start"),
        (_infra(""), "MachineError: "),
        (MachineError("lost in a test"), ""),
        (CommandFailed(Result(argv=("false",), returncode=1, stdout="", stderr="", duration=0)), ""),
        (ValueError("anything"), ""),
        (None, ""),
    ],
)
def test_only_what_kept_a_test_from_its_machine_is_a_cause(error: VMBottleError | None, cause: str) -> None:
    assert cause_of(error) == cause


def test_the_first_report_of_a_cause_stays_whole_and_others_become_one_line() -> None:
    infra = Infra()
    reports = [_report("a"), _report("b"), _report("c", cause="CatalogError: full"), _report("a")]
    for report in reports:
        infra.take(report)

    assert [report.longrepr == "all of it" for report in reports] == [True, False, True, True]
    assert re.match(r"INFRA: MachineError: no machine .* a\)$", str(reports[1].longrepr))
    assert [len(report.sections) for report in reports] == [1, 0, 1, 1]
    assert re.search(r"^INFRA: 4 tests .*1 CatalogError, 3 MachineError.* 2 machines ", infra.summary(2))


def test_a_report_that_is_shown_in_full_is_only_counted() -> None:
    infra, report = Infra(), _report("b")
    infra.take(_report("a"), in_full=True)
    infra.take(report, in_full=True)

    assert report.longrepr == "all of it"
    assert infra.summary(0).startswith("INFRA: 2 tests")


@pytest.mark.parametrize(("cause", "outcome"), [("", "failed"), ("MachineError: x", "rerun"), ("MachineError: x", "passed")])
def test_other_reports_are_left_alone(cause: str, outcome: str) -> None:
    infra, report = Infra(), _report("a", cause=cause, outcome=outcome)
    infra.take(report)

    assert report.longrepr == "all of it"
    assert infra.summary(0) == ""
    assert re.search(r"^INFRA: 0 tests .* 1 machine ", infra.summary(1))
