"""Bisection: the search itself, and the way from one point of a list of commands to the next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import pytest

from pytest_vmbottle.errors import MachineDied
from pytest_vmbottle.result import CommandTimeout, Result
from pytest_vmbottle.standalone.bisecting import (
    Attempt,
    Change,
    CommandList,
    NothingToFind,
    Trial,
    bisect,
    packages_of,
    trials,
    upgrades_of,
)

if TYPE_CHECKING:
    from pytest_vmbottle.machine.machine import Machine


class _Points:
    """Points at which the command passes before the culprit, and fails from there on."""

    def __init__(self, count: int, culprit: int) -> None:
        self.labels = tuple(map(str, range(count + 1)))
        self.culprit = culprit

    def tried(self, point: int) -> Trial:
        return Trial(point=point, passed=point < self.culprit, reason="" if point < self.culprit else "status 1")


def found(points: _Points) -> tuple[int, list[str], list[int]]:
    """The culprit, and the words and points of the trials."""
    told = list[tuple[str, Trial]]()
    culprit = bisect(points, lambda what, trial: told.append((what, trial)))
    return culprit.point, [what for what, _ in told], [trial.point for _, trial in told]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64])
def test_each_culprit_is_found_with_half_of_the_rest_in_each_trial(count: int) -> None:
    for culprit in range(1, count + 1):
        point, words, points = found(_Points(count, culprit))
        assert point == culprit
        assert words[:2] == ["the first point", "the last point"]
        assert points[:2] == [0, count]
        assert len(words) - 2 <= trials(count + 1)
        # No point is tried twice.
        assert len(set(points)) == len(points)


def test_one_of_64_takes_6_trials_and_one_of_65_a_7th() -> None:
    assert max(len(found(_Points(64, culprit))[1]) - 2 for culprit in range(1, 65)) == 6 == trials(65)
    assert max(len(found(_Points(65, culprit))[1]) - 2 for culprit in range(1, 66)) == 7 == trials(66)


@pytest.mark.parametrize(
    ("culprit", "reason", "tried"), [(0, "at the first point already, 0: status 1", 1), (99, "does not fail at the last point, after 8", 2)]
)
def test_where_there_is_nothing_to_find_no_trial_is_made(culprit: int, reason: str, tried: int) -> None:
    told = list[Trial]()
    with pytest.raises(NothingToFind, match=reason):
        bisect(_Points(8, culprit), lambda _, trial: told.append(trial))
    assert len(told) == tried


class _Machine:
    """A machine that is the commands which it has run, and dies of one, hangs in one, or breaks by one."""

    def __init__(self, breaks: str = "", *, dies: str = "", hangs: str = "") -> None:
        self.state, self.ran = tuple[str, ...](), list[str]()
        self.breaks, self.dies, self.hangs = breaks, dies, hangs

    def snapshot(self, name: str) -> tuple[str, ...]:
        assert name
        return self.state

    def restore(self, snapshot: tuple[str, ...]) -> None:
        self.state = snapshot

    def exec(self, command: Sequence[str], *, check: bool, timeout: float) -> Result:
        assert not check
        words = " ".join(command)
        if words == "works":
            # What it leaves behind must not be there in the next trial.
            assert "works" not in self.state
            self.state = (*self.state, "works")
            broken = self.breaks in self.state
            return Result(argv=tuple(command), returncode=int(broken), stdout="it said\n", stderr="no\nbroken\n" if broken else "")
        self.ran.append(command[-1])
        self.state = (*self.state, command[-1])
        if command[-1] == self.dies:
            raise MachineDied("the guest's kernel panicked\nmore", exitcode=None)
        result = Result(argv=tuple(command), returncode=int(command[-1] == "7"), stdout="", stderr="")
        if command[-1] == self.hangs:
            raise CommandTimeout(result, timeout)
        return result


def searched(machine: _Machine, lines: Iterable[object], warnings: list[str]) -> Trial:
    points = CommandList(cast("Machine", machine), tuple(map(str, lines)), Attempt(words=["works"]), warn=warnings.append)
    return bisect(points, lambda *_: None)


def test_commands_run_from_the_deepest_point_where_it_passed_and_each_trial_is_alone() -> None:
    warnings = list[str]()
    machine = _Machine("37")
    culprit = searched(machine, range(1, 65), warnings)
    assert (culprit.point, culprit.reason) == (37, "status 1: broken")
    # All for the last point, then 1 to 32, and from there on only what is new: 33 to 48, 40, 36, and from there 38 and 37.
    wanted = [*range(1, 65), *range(1, 33), *range(33, 49), *range(33, 41), *range(33, 37), 37, 38, 37]
    assert machine.ran == list(map(str, wanted))
    assert len(warnings) == 1
    assert warnings[0].startswith("command 7 of the list fails itself, and the next ones run all the same: 7: status 1")


def test_a_machine_that_dies_of_a_command_has_failed_there() -> None:
    culprit = searched(_Machine(dies="3"), range(1, 9), [])
    assert (culprit.point, culprit.reason) == (3, "the guest's kernel panicked")


def test_a_command_that_hangs_is_told_and_the_next_ones_run() -> None:
    warnings = list[str]()
    assert searched(_Machine("5", hangs="2"), range(1, 7), warnings).point == 5
    assert len(warnings) == 1
    assert "command 2 of the list" in warnings[0]
    assert "no end within 300 s" in warnings[0]


def test_packages_are_told_apart_by_what_a_guest_lists() -> None:
    class Guest:
        def exec(self, command: str, *, timeout: float) -> Result:
            del timeout
            text = "Inst" if "dist-upgrade" in command else "nginx 1.18-2\nsome words more\n\nalone\n"
            return Result(argv=(command,), returncode=0, stdout="nginx\nit's\n" if text == "Inst" else text, stderr="")

    guest = cast("Machine", Guest())
    assert packages_of(guest) == {"nginx": "1.18-2", "some": "words more"}
    # What a guest sends is a word of a command in that guest.
    assert [each.rpartition(" -- ")[2] for each in upgrades_of(guest)] == ["nginx", "'it'\"'\"'s'"]
    told = [str(Change(name="a", before=before, after=after)) for before, after in (("1", "2"), (None, "2"), ("1", None))]
    assert told == ["a 1 -> 2", "a 2 (new)", "a 1 (removed)"]
