"""Shards: parts of a suite for several runners, so that few of them need the same pack and all take about the same time."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.plugin.collection import specs_of
from pytest_vmbottle.plugin.session import DURATIONS, SESSION

if TYPE_CHECKING:
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["Durations", "Shard", "Sharding", "Test", "shards_of", "split"]

_SLACK = 1.04
"""Factor by which a shard may exceed the average so that a pack need not be on two."""


@attrs.frozen(kw_only=True)
class Test:
    """A test, as far as shards are concerned.

    Attributes:
        nodeid: Its node id.
        unit: What must stay together: the class or module whose machine it shares, or the test itself.
        packs: Names of the packs that it needs; none for a test without a machine.
        seconds: How long it takes.
    """

    __test__ = False

    nodeid: str
    unit: str
    packs: tuple[str, ...]
    seconds: float


@attrs.define
class Shard:
    """A part of a suite.

    Attributes:
        tests: Its tests.
        seconds: The sum of their times.
    """

    tests: list[Test] = attrs.field(factory=list)
    seconds: float = 0.0

    @property
    def packs(self) -> list[str]:
        """Names of the packs that its tests need."""
        return sorted({pack for test in self.tests for pack in test.packs})

    def add(self, tests: Iterable[Test]) -> None:
        """Add tests."""
        for test in tests:
            self.tests.append(test)
            self.seconds += test.seconds


@attrs.frozen
class _Unit:
    """Tests that stay together."""

    tests: list[Test]

    @property
    def seconds(self) -> float:
        return sum(test.seconds for test in self.tests)

    @property
    def order(self) -> tuple[float, str]:
        """Longest first; by name where that is the same, so that every runner comes to the same shards."""
        return -self.seconds, self.tests[0].nodeid


def split(tests: Iterable[Test], count: int) -> list[Shard]:
    """Divide tests among shards.

    Tests of the same packs stay together where the times allow it. The result depends only on the tests, not on their order.
    """
    groups = _groups(tests)
    units = [unit for group in groups for unit in group]
    shards = [Shard() for _ in range(count)]
    best = max([sum(unit.seconds for unit in units) / count, *(unit.seconds for unit in units)], default=0.0)
    divided = []
    for group in groups:
        shard = _with_room(shards, sum(unit.seconds for unit in group), best)
        if shard is None:
            divided.append(group)
        else:
            for unit in group:
                shard.add(unit.tests)
    for group in divided:
        _divide(group, shards, best * _SLACK)
    return shards


def _with_room(shards: list[Shard], seconds: float, best: float) -> Shard | None:
    """Return the fullest shard that has room for so many seconds, so that large groups find room later; if need be with some slack."""
    for limit in (best, best * _SLACK):
        fitting = [shard for shard in shards if shard.seconds + seconds <= limit]
        if fitting:
            return max(fitting, key=lambda shard: shard.seconds)
    return None


def _groups(tests: Iterable[Test]) -> list[list[_Unit]]:
    """Return units by the packs that they need, those that take longest first."""
    by_unit: dict[tuple[tuple[str, ...], str], list[Test]] = defaultdict(list)
    for test in sorted(tests, key=lambda test: test.nodeid):
        by_unit[test.packs, test.unit].append(test)
    by_packs: dict[tuple[str, ...], list[_Unit]] = defaultdict(list)
    for (packs, _), together in by_unit.items():
        by_packs[packs].append(_Unit(together))
    groups = [sorted(units, key=lambda unit: unit.order) for _, units in sorted(by_packs.items())]
    return sorted(groups, key=lambda units: -sum(unit.seconds for unit in units))


def _divide(group: list[_Unit], shards: list[Shard], limit: float) -> None:
    """Divide a group among as few shards as have room for it."""
    left = list(group)
    for shard in sorted(shards, key=lambda shard: shard.seconds):
        over = []
        for unit in left:
            if shard.seconds + unit.seconds <= limit:
                shard.add(unit.tests)
            else:
                over.append(unit)
        left = over
    for unit in left:
        min(shards, key=lambda shard: shard.seconds).add(unit.tests)


# -- the tests of a run --------------------------------------------------------------------------------------------------------------------


@attrs.frozen
class Durations:
    """Seconds of tests in earlier runs, by their node ids or by their names in a JUnit report."""

    known: Mapping[str, float]

    @classmethod
    def of(cls, config: pytest.Config) -> Durations:
        """Read the given JUnit report, or else what pytest's cache has of earlier runs.

        Raises:
            pytest.UsageError: The report cannot be read.
        """
        given = config.stash[SESSION].options.durations
        if given:
            return cls(_junit(config.invocation_params.dir / Path(given).expanduser()))
        cache = getattr(config, "cache", None)
        found = cache.get(DURATIONS, {}) if cache is not None else {}
        return cls({str(key): float(value) for key, value in found.items()} if isinstance(found, dict) else {})

    def of_test(self, nodeid: str) -> float | None:
        """Return the seconds of a test, if they are known."""
        return self.known.get(nodeid, self.known.get(_junit_name(nodeid)))

    @property
    def usual(self) -> float:
        """Seconds that stand for those of a test about which nothing is known."""
        return sorted(self.known.values())[len(self.known) // 2] if self.known else 1.0


def _junit(path: Path) -> dict[str, float]:
    """Read how long each test took from a JUnit report, or from all reports of a folder."""
    from xml.etree import ElementTree as ET

    files = sorted(path.glob("**/*.xml")) if path.is_dir() else [path]
    found: dict[str, float] = defaultdict(float)
    for file in files:
        try:
            # A report of the project's own tests, and expat limits what entities may grow to.
            for case in ET.parse(file).getroot().iter("testcase"):  # noqa: S314
                found[f"{case.get('classname', '')}::{case.get('name', '')}"] += float(case.get("time", 0))
        except (OSError, ValueError, ET.ParseError) as error:
            raise pytest.UsageError(f"{file} is no JUnit report with the times of tests: {error}") from None
    if not found:
        raise pytest.UsageError(f"{path} has no times of tests: give a JUnit report, or a folder of such reports")
    return dict(found)


def _junit_name(nodeid: str) -> str:
    """Return how a JUnit report of pytest names a test (`classname`, `name`)."""
    head, bracket, parameters = nodeid.partition("[")
    path, *names = head.split("::")
    classname = ".".join([re.sub(r"\.py$", "", path).replace("/", "."), *names[:-1]])
    return f"{classname}::{names[-1] if names else ''}{bracket}{parameters}"


def _tests_of(items: Iterable[pytest.Item], durations: Durations) -> Iterator[Test]:
    """Yield tests with what shards have to know of them."""
    usual = durations.usual
    for item in items:
        seconds = durations.of_test(item.nodeid)
        packs: tuple[str, ...] = ()
        # What is wrong with a mark is told where the test runs.
        with suppress(SpecError, pytest.UsageError):
            packs = tuple(sorted({_pack_name(spec) for spec in specs_of(item)}))
        yield Test(nodeid=item.nodeid, unit=_unit(item), packs=packs, seconds=usual if seconds is None else seconds)


def _pack_name(spec: MachineSpec) -> str:
    """Return a name for the pack of a spec, which is the same on every computer and in every run."""
    bare = f"{spec.image}@{spec.boot_digest()[:8]}"
    return ":".join([bare, *(step.name for step in spec.steps)])


def _unit(item: pytest.Item) -> str:
    names = set(getattr(item, "fixturenames", ()))
    for fixture, kind in (("module_vm", pytest.Module), ("class_vm", pytest.Class)):
        node = item.getparent(kind)
        if fixture in names and node is not None:
            return node.nodeid
    return item.nodeid


def shards_of(items: Iterable[pytest.Item], count: int, config: pytest.Config) -> list[Shard]:
    """Divide the tests of a run among shards, as every runner does that has the same tests and durations."""
    return split(_tests_of(items, Durations.of(config)), count)


class Sharding:
    """Hook that deselects all tests but those of this run's shard."""

    def __init__(self, number: int, count: int) -> None:
        self._number, self._count = number, count

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect the tests of other shards, of those that are left when others have chosen."""
        kept = {test.nodeid for test in shards_of(items, self._count, config)[self._number - 1].tests}
        others = [item for item in items if item.nodeid not in kept]
        if others:
            config.hook.pytest_deselected(items=others)
            items[:] = [item for item in items if item.nodeid in kept]
