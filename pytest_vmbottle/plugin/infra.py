"""The outcome INFRA: tests whose machine could not be started, so that nothing was judged.

A cause is told once in full, then in one line.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_vmbottle.errors import VMBottleError

if TYPE_CHECKING:
    import pytest

__all__ = ["PROPERTY", "RETRIES", "Infra", "cause_of", "cause_told", "note"]

PROPERTY = "vmbottle_infra"
"""Property of a test without its machine, in JUnit's XML too: the cause in one line."""
_ORIGIN = "vmbottle_origin"
RETRIES = "vmbottle_infra_retries"
"""Property of a test for whose machines extra ones were started: their number."""


def cause_of(error: BaseException | None, host: str = "") -> str:
    """Return why a test has no machine, in one line.

    Empty if the error says something else.

    Args:
        error: What the test has raised.
        host: The host that should have provided it; empty for this one.
    """
    # `infra` is set where machines are provided or reset. The same error out of a test's own call is a failure of the test.
    if not isinstance(error, VMBottleError) or not error.infra:
        return ""
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first}{f' (on {host})' if host else ''}"


def note(report: pytest.TestReport, error: BaseException | None, host: str = "") -> None:
    """Record in a report why its test has no machine.

    The record survives the way to another process.
    """
    cause = cause_of(error, host)
    if cause:
        # Attributes of a report are serialised by pytest, and so come from a worker to its controller.
        setattr(report, PROPERTY, cause)
        setattr(report, _ORIGIN, getattr(error, "origin", "") or cause)


def cause_told(report: pytest.TestReport) -> str:
    """Return the cause that `note` recorded in the report of a failure, or an empty string."""
    return str(getattr(report, PROPERTY, "")) if report.failed else ""


class Infra:
    """Tests of a run that did not get their machines."""

    def __init__(self) -> None:
        """Start with no tests."""
        self._first: dict[str, str] = {}
        self._kinds: Counter[str] = Counter()

    def take(self, report: pytest.TestReport, *, in_full: bool = False) -> None:
        """Count a report, and shorten it to one line if its cause was told before.

        Args:
            report: Any report of the run, in the process that shows it.
            in_full: Whether to count it and leave it in full.
        """
        cause = cause_told(report)
        if not cause:
            return
        # Counted by the error's type, which is before the colon.
        self._kinds[cause.partition(":")[0]] += 1
        # What kept a pack from being made may be told in other words by another worker.
        first = self._first.setdefault(getattr(report, _ORIGIN, cause), report.nodeid)
        if first != report.nodeid and not in_full:
            # A hundred tests that wait for the same pack would else print the same error a hundred times.
            report.longrepr = f"INFRA: {cause} (reported in full for {first})"
            report.sections.clear()

    def summary(self, retried: int) -> str:
        """Return a line for the end of a run, or an empty string.

        Args:
            retried: Number of machines that were tried again.
        """
        if not self._kinds and not retried:
            return ""
        count = self._kinds.total()
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(self._kinds.items()))
        without = f"{count} {'test' if count == 1 else 'tests'} without a machine, not judged{f' ({kinds})' if kinds else ''}"
        return f"INFRA: {without}; {retried} {'machine' if retried == 1 else 'machines'} tried again"
