"""Bisection: the layer, the package upgrade or the command after which something fails, found with clones.

Points are numbered from 0, where the command passes, to the last one, where it fails. Each trial leaves half of what is between them.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import attrs

from pytest_vmbottle.errors import MachineError, VMBottleError
from pytest_vmbottle.result import CommandTimeout

if TYPE_CHECKING:
    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.result import Result

__all__ = [
    "Attempt",
    "Change",
    "CommandList",
    "Layers",
    "NothingToFind",
    "Points",
    "Trial",
    "bisect",
    "packages_of",
    "trials",
    "upgrades_of",
]

_SECONDS = 300.0
_PACKAGES = """
if command -v dpkg-query >/dev/null; then dpkg-query -W -f '${Package} ${Version}\\n'
elif command -v rpm >/dev/null; then rpm -qa --qf '%{NAME} %{VERSION}-%{RELEASE}\\n'
elif command -v apk >/dev/null; then apk list -I 2>/dev/null | sed 's/^\\(.*\\)-\\([^-]*-r[0-9]*\\) .*/\\1 \\2/'
fi
"""
_UPGRADES = "apt-get -q -s dist-upgrade | sed -n 's/^Inst \\([^ ]*\\).*/\\1/p'"
_UPGRADE = "DEBIAN_FRONTEND=noninteractive apt-get -q -y install --only-upgrade -- {package}"


class NothingToFind(VMBottleError):
    """The command fails at the first point already, or does not fail at the last one."""


@attrs.frozen(kw_only=True)
class Trial:
    """A trial of the command at a point.

    Attributes:
        point: The point.
        passed: Whether the command ended with status 0.
        reason: The reason why it did not, on one line; empty if it did.
        seconds: Seconds that the trial took, with the way to the point.
    """

    point: int
    passed: bool
    reason: str = ""
    seconds: float = 0.0


class Points(Protocol):
    """States of a machine in a row, in each of which a command can be tried."""

    @property
    def labels(self) -> Sequence[str]:
        """Names of the points for people: of what leads to each."""

    def tried(self, point: int) -> Trial:
        """Try the command at a point."""


def trials(points: int) -> int:
    """Return the most trials that it takes to bisect so many points, beside the first one and the last one."""
    return max(0, points - 2).bit_length()


def bisect(points: Points, report: Callable[[str, Trial], object]) -> Trial:
    """Find the first point at which the command fails, and return its trial.

    Args:
        points: The points.
        report: Function that is told of each trial, with a word about it.

    Raises:
        NothingToFind: The command fails at the first point, or passes at the last one.
    """
    last = len(points.labels) - 1
    passes = points.tried(0)
    report("the first point", passes)
    if not passes.passed:
        raise NothingToFind(f"the command fails at the first point already, {points.labels[0]}: {passes.reason}")
    fails = points.tried(last) if last else passes
    report("the last point", fails)
    if fails.passed:
        raise NothingToFind(f"the command does not fail at the last point, after {points.labels[last]}: there is nothing to find")
    number = 0
    while fails.point - passes.point > 1:
        number += 1
        found = points.tried((passes.point + fails.point) // 2)
        report(f"trial {number}", found)
        passes, fails = (found, fails) if found.passed else (passes, found)
    return fails


@attrs.frozen(kw_only=True)
class Attempt:
    """The command, and how it is tried in a machine.

    Attributes:
        words: The command and its arguments.
        timeout: Seconds after which it counts as failed.
    """

    words: Sequence[str]
    timeout: float = _SECONDS

    def trial(self, point: int, machine: Machine, began: float) -> Trial:
        """Run the command in a machine at a point; a machine that dies of it fails it."""
        try:
            reason = _reason(machine.exec(list(self.words), check=False, timeout=self.timeout))
        except CommandTimeout:
            reason = f"no end within {self.timeout:g} s"
        except MachineError as error:
            reason = _first_line(str(error))
        return Trial(point=point, passed=not reason, reason=reason, seconds=time.monotonic() - began)


def _reason(result: Result) -> str:
    if result.ok:
        return ""
    lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
    return f"status {result.returncode}" + (f": {lines[-1].strip()[:200]}" if lines else "")


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:200]


@attrs.frozen(kw_only=True)
class Layers:
    """Points of a lineage: packs, each on the one before, each tried in a clone of its own.

    Attributes:
        labels: The names of the packs, lowest first.
        clones: Functions that start a clone of each for a block.
        attempt: The command.
    """

    labels: Sequence[str]
    clones: Sequence[Callable[[], AbstractContextManager[Machine]]]
    attempt: Attempt

    def tried(self, point: int) -> Trial:
        """Try the command in a clone of a pack."""
        began = time.monotonic()
        with self.clones[point]() as machine:
            return self.attempt.trial(point, machine, began)

    def changes(self, point: int) -> list[Change]:
        """Return the packages that differ between a point and the one before it."""
        found = []
        for each in (point - 1, point):
            with self.clones[each]() as machine:
                found.append(packages_of(machine))
        before, after = found
        names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        return [Change(name=name, before=before.get(name), after=after.get(name)) for name in names]


@attrs.frozen(kw_only=True)
class Change:
    """A package that differs between two points.

    Attributes:
        name: Its name.
        before, after: Its versions; None where it is not installed.
    """

    name: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        """Tell it in words."""
        if self.before is None:
            return f"{self.name} {self.after} (new)"
        return f"{self.name} {self.before} -> {self.after}" if self.after is not None else f"{self.name} {self.before} (removed)"


class CommandList:
    """Points of a list of commands: each is the state after one more of them, reached from the deepest one where the command passed."""

    def __init__(self, machine: Machine, lines: Sequence[str], attempt: Attempt, *, warn: Callable[[str], object]) -> None:
        """Take a machine in the state before the first command.

        Args:
            machine: The machine; it is restored to one point after another.
            lines: The commands, for `sh -c`.
            attempt: The command that passes and fails.
            warn: Function that is told of commands of the list that fail themselves.
        """
        self.labels = ("the state before the first of them", *lines)
        self._machine, self._lines, self._attempt, self._warn = machine, lines, attempt, warn
        self._deepest, self._snapshot = 0, machine.snapshot("before the first command")
        self._warned: set[int] = set()

    def tried(self, point: int) -> Trial:
        """Run the commands up to a point, and try the command there."""
        began = time.monotonic()
        # Always, since each trial may have left something.
        self._machine.restore(self._snapshot)
        try:
            for number in range(self._deepest + 1, point + 1):
                self._run(number)
            # Before the trial, which is no part of the list.
            here = self._machine.snapshot(f"after {point} commands") if point > self._deepest else self._snapshot
        except MachineError as error:
            return Trial(point=point, passed=False, reason=_first_line(str(error)), seconds=time.monotonic() - began)
        found = self._attempt.trial(point, self._machine, began)
        if found.passed:
            self._deepest, self._snapshot = point, here
        return found

    def _run(self, number: int) -> None:
        line = self._lines[number - 1]
        try:
            reason = _reason(self._machine.exec(["sh", "-c", line], check=False, timeout=self._attempt.timeout))
        except CommandTimeout:
            reason = f"no end within {self._attempt.timeout:g} s"
        if reason and number not in self._warned:
            self._warned.add(number)
            self._warn(f"command {number} of the list fails itself, and the next ones run all the same: {line}: {reason}")


def packages_of(machine: Machine) -> Mapping[str, str]:
    """Return the versions of the packages in a guest, by name; none if it has no package manager that is known."""
    pairs = (line.split(maxsplit=1) for line in machine.exec(_PACKAGES, timeout=_SECONDS).stdout.splitlines())
    return dict(pair for pair in pairs if len(pair) == 2)  # noqa: PLR2004 - a name and a version


def upgrades_of(machine: Machine) -> Iterator[str]:
    """Yield the command for each upgrade of a package that a Debian or Ubuntu guest offers, in the order in which apt would do them."""
    for package in machine.exec(_UPGRADES, timeout=_SECONDS).stdout.split():
        yield _UPGRADE.format(package=shlex.quote(package))
