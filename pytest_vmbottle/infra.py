"""The outcome INFRA: tests whose machine could not be provided, so that nothing was judged. Told once in full, then in one line."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_vmbottle.errors import VMBottleError

if TYPE_CHECKING:
    import pytest

__all__ = ["PROPERTY", "RETRIES", "Infra", "cause_of", "cause_told", "note"]

PROPERTY = "vmbottle_infra"
"""The property, in JUnit's XML too, of a test without its machine: the cause in one line."""
_ORIGIN = "vmbottle_origin"
RETRIES = "vmbottle_infra_retries"
"""The property of a test for whose machines more than one had to be started: how many more."""


def cause_of(error: BaseException | None) -> str:
    """Why a test has no machine, in one line; empty if that is not what an error says."""
    if not isinstance(error, VMBottleError) or not error.infra:
        return ""
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first}"


def note(report: pytest.TestReport, error: BaseException | None) -> None:
    """Has a report say why its test has no machine, also in a process that it is sent to."""
    cause = cause_of(error)
    if cause:
        setattr(report, PROPERTY, cause)
        setattr(report, _ORIGIN, getattr(error, "origin", "") or cause)


def cause_told(report: pytest.TestReport) -> str:
    """The cause that a report of a failure has, also in a process that it was sent to; else empty."""
    return str(getattr(report, PROPERTY, "")) if report.failed else ""


class Infra:
    """The tests of a whole run that did not get their machines."""

    def __init__(self) -> None:
        """Knows of none."""
        self._first: dict[str, str] = {}
        self._kinds: Counter[str] = Counter()

    def take(self, report: pytest.TestReport, *, in_full: bool = False) -> None:
        """Counts a report, and cuts it down to one line if its cause was told before.

        Args:
            report: Any report of the run, in the process that shows it.
            in_full: Whether to count only.
        """
        cause = cause_told(report)
        if not cause:
            return
        self._kinds[cause.partition(":")[0]] += 1
        # What kept a pack from being made may be told in other words by another worker.
        first = self._first.setdefault(getattr(report, _ORIGIN, cause), report.nodeid)
        if first != report.nodeid and not in_full:
            report.longrepr = f"INFRA: {cause} (told in full for {first})"
            report.sections.clear()

    def summary(self, retried: int) -> str:
        """One line for the end of a run; empty if there is nothing to say.

        Args:
            retried: How many machines were tried again.
        """
        if not self._kinds and not retried:
            return ""
        count = self._kinds.total()
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(self._kinds.items()))
        without = f"{count} {'test' if count == 1 else 'tests'} without a machine, not judged{f' ({kinds})' if kinds else ''}"
        return f"INFRA: {without}; {retried} {'machine' if retried == 1 else 'machines'} tried again"
