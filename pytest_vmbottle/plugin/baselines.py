"""Baselines of `vm_benchmark`: how many instructions a test's work took when it was first measured."""

from __future__ import annotations

import json
from statistics import median_low
from typing import TYPE_CHECKING, Any

import attrs

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.host.files import atomic_file
from pytest_vmbottle.host.locks import locked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pytest_vmbottle.machine.machine import Machine

__all__ = ["Baselines", "Benchmark"]

_MODE = 0o644  # part of the project, and nobody's secret
_ROUNDS = 3
_LIMIT = 0.3
"""Percent: ten times the spread of equal work."""


class Baselines:
    """A file of instruction counts: by the work's name, and by what emulates the processor.

    Several processes may write to it.
    """

    def __init__(self, file: Path, *, renew: bool) -> None:
        """Take the file, which need not exist.

        Args:
            file: A JSON file.
            renew: Whether counts replace those in the file.
        """
        self.file, self._renew = file, renew

    def baseline(self, name: str, emulator: str, count: int) -> int | None:
        """Return the count that is stored for a work; store this one and return None if there is none, or it is to be replaced.

        Raises:
            SpecError: The file is no file of baselines.
        """
        with locked(self.file.parent):
            known = self._read()
            counts = known.setdefault(name, {})
            stored = counts.get(emulator)
            if stored is not None and not self._renew:
                return int(stored)
            counts[emulator] = count
            with atomic_file(self.file, mode=_MODE) as file:
                file.write((json.dumps(known, indent=1, sort_keys=True) + "\n").encode())
        return None

    def _read(self) -> dict[str, dict[str, int]]:
        try:
            text = self.file.read_text()
        except FileNotFoundError:
            return {}
        try:
            known = json.loads(text)
        except (ValueError, RecursionError):
            known = None
        if not isinstance(known, dict) or not all(map(_are_counts, known.values())):
            raise SpecError(f"{self.file} is no file of baselines: mend it, or remove it to have it made again")
        return known


def _are_counts(value: object) -> bool:
    return isinstance(value, dict) and all(type(count) is int and count > 0 for count in value.values())


@attrs.frozen(kw_only=True)
class Benchmark:
    """Measurement of a test's work, by the instructions that it takes.

    Attributes:
        baselines: The stored counts.
        test: The id of the test.
        emulator_of: Function that returns what emulates a machine's processor, with its version.
        say: Function that is told of new baselines.
    """

    baselines: Baselines
    test: str
    emulator_of: Callable[[Machine], str]
    say: Callable[[str], object]
    _seen: set[str] = attrs.field(init=False, factory=set)

    def __call__(
        self,
        vm: Machine,
        work: str | Sequence[str] | Callable[[], object],
        *,
        limit: float = _LIMIT,
        rounds: int = _ROUNDS,
        name: str = "",
        **keywords: Any,
    ) -> int:
        """Count the instructions of a work, and compare them with its baseline; without one, the count becomes it.

        The work is done once more beforehand, so that what it reads is in the guest's memory. The count in the middle is compared: now and
        then one is less or more than the others, by what the guest does at that moment.

        Args:
            vm: A machine with `cpu_clock="instructions"`.
            work: A command for `vm.exec`, or a function without arguments that runs commands.
            limit: Percent by which the count may be above the baseline.
            rounds: How often the work is measured.
            name: A name for it, if the test has several.
            keywords: Those of `vm.exec`, for a command.

        Returns:
            The count.

        Raises:
            AssertionError: There are more instructions than allowed.
            CommandFailed: The command failed.
            MachineError: The machine does not count.
            ValueError: `limit` or `rounds` is out of range, a function is given keywords, or the test has two works of one name.
        """
        if limit < 0 or rounds < 1:
            raise ValueError(f"limit={limit!r}, rounds={rounds!r}: takes a percentage, and how often the work is measured")
        if callable(work) and keywords:
            raise ValueError(f"{', '.join(keywords)}: is for a command; write it where the function calls vm.exec")
        if name in self._seen:
            raise ValueError(f"this test has measured {name or 'a work without a name'} already: give each a name=")
        self._seen.add(name)
        do: Callable[[], object] = work if callable(work) else lambda: vm.exec(work, **keywords)
        count = median_low(_counts(vm, do, rounds + 1)[1:])
        key = f"{self.test} {name}".strip()
        baseline = self.baselines.baseline(key, self.emulator_of(vm), count)
        if baseline is None:
            self.say(f"{key}: {count:,} instructions are its baseline now, in {self.baselines.file.name}")
        elif count > baseline * (1 + limit / 100):
            raise AssertionError(
                f"{count:,} instructions, {(count / baseline - 1):.2%} more than the {baseline:,} in {self.baselines.file.name}; "
                f"the limit is {limit} %. If that is as it should be: --vm-new-baselines"
            )
        return count


def _counts(vm: Machine, do: Callable[[], object], rounds: int) -> list[int]:
    counts = []
    for _ in range(rounds):
        with vm.count_instructions() as count:
            do()
        counts.append(count.total)
    return counts
