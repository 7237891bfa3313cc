"""Machines that are made before they are asked for, with a backend that runs nothing."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest

from pytest_vmbottle import Layer, Machine, MachineSpec
from pytest_vmbottle.backends.port import State
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.memory_budget import Budget
from pytest_vmbottle.channels.port import Command, Finished
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.images import ImageStore, Traits
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.testing import FakeBackend
from tests.conftest import Rounds

IMAGE = "debian-12"


def _prepare(vm: Machine) -> None:
    vm.exec(["true"])


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(510) + b"\x55\xaa" + bytes((1 << 20) - 512))
    with closing(Catalog(tmp_path / "catalog")) as catalog:
        ImageStore(catalog.images).add(disk, name=IMAGE, traits=Traits(prepared=True))
        yield catalog


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def ended() -> list[str]:
    """Ids of the machines whose remains belong to a test."""
    return []


@pytest.fixture
def make(catalog: Catalog, backend: FakeBackend, ended: list[str], request: pytest.FixtureRequest) -> Callable[..., Provisioner]:
    def make(**settings: Any) -> Provisioner:
        known = attrs.evolve(Settings(spares=2, ended=lambda remains: ended.append(remains.id)), **settings)
        made = Provisioner(catalog, backend, name="fake", settings=known)
        request.addfinalizer(made.close)
        return made

    return make


def _settle() -> None:
    """Wait until all spares are made."""
    for thread in threading.enumerate():
        if thread.name == "vmbottle-spare":
            # It goes on to watch, as long as its spare is there.
            thread.join(0.1)


def test_a_spare_is_given_to_who_asks_for_the_same_machine_and_runs(make: Callable[..., Provisioner], backend: FakeBackend) -> None:
    provisioner, spec = make(), MachineSpec(source=IMAGE)
    with provisioner.machine(spec):
        provisioner.expect([spec])
        _settle()
    launched = len(backend.launched)
    with provisioner.machine(spec) as machine:
        assert (machine.spec, machine.state) == (spec, State.RUNNING)
        assert machine.exec(["echo", "it"]).stdout == "echo it"
        events = [event for event in machine.lifecycle.timeline.events() if event["kind"] == "power"]
        assert [event["args"] for event in events] == [
            ["from the pack " + (machine.lifecycle.boot_source.saved or Path()).name[:12]],
            ["made beforehand"],
        ]
    assert (len(backend.launched), provisioner.tally.spares, provisioner.tally.spared) == (launched, 1, 1)


def test_nothing_is_built_for_a_machine_that_may_not_be_asked_for(make: Callable[..., Provisioner], backend: FakeBackend) -> None:
    provisioner, spec = make(), MachineSpec(source=IMAGE)
    provisioner.expect([spec])
    with provisioner.machine(spec):
        launched = len(backend.launched)
        layer = Layer(source=IMAGE, function=_prepare, keywords={}, name="prepared")
        for other in (spec.but(memory="2G"), spec.but(fresh="boot"), MachineSpec(source=layer)):
            provisioner.expect([other])
        _settle()
    assert len(backend.launched) == launched
    assert provisioner.tally.spares == 0


def test_spares_for_others_and_those_that_nobody_asks_for_are_ended_and_belong_to_no_test(
    make: Callable[..., Provisioner], backend: FakeBackend, ended: list[str]
) -> None:
    provisioner, spec = make(), MachineSpec(source=IMAGE)
    other = spec.but(name="other")
    with provisioner.machine(spec):
        provisioner.expect([spec, other])
        provisioner.expect([other])
        _settle()
        assert (provisioner.tally.spares, backend.stopped) == (2, 2)  # one of them built the pack
    provisioner.close()
    assert backend.stopped == len(backend.launched) == 4
    assert len(ended) == 2


def test_a_spare_is_not_made_where_memory_is_short_and_goes_when_somebody_waits_for_it(
    make: Callable[..., Provisioner], backend: FakeBackend, catalog: Catalog
) -> None:
    provisioner, spec = make(memory_budget=5 << 29), MachineSpec(source=IMAGE, memory="1G")
    with provisioner.machine(spec):
        provisioner.expect([spec, spec])
        _settle()
        assert provisioner.tally.spares == 1
        stopped = backend.stopped
        with Budget(catalog.budget, limit=5 << 29).reserve(1 << 30, name="other", deadline=Deadline(20), waiting=lambda _: None):
            assert backend.stopped == stopped + 1
        # The same process too: its own machine comes first.
        provisioner.expect([spec])
        _settle()
        with provisioner.machine(spec.but(name="second")):
            assert backend.stopped == stopped + 2


def test_a_spare_that_died_or_could_not_be_made_costs_nobody_his_machine(make: Callable[..., Provisioner], backend: FakeBackend) -> None:
    provisioner, spec, started = make(), MachineSpec(source=IMAGE), list[Machine]()

    def refusing(command: Command) -> Finished:
        if command.argv == ("true",):
            backend.broken = ""
            raise OSError("it died")
        return Finished(returncode=0, stdout=b"", stderr=b"")

    with provisioner.machine(spec):
        backend.broken = "there is no room"
        provisioner.expect([spec])
        _settle()
        backend.broken = ""
        with provisioner.machine(spec) as machine:
            started.append(machine)
        backend.handler = refusing
        provisioner.expect([spec])
        _settle()
        with provisioner.machine(spec) as machine:
            started.append(machine)
    assert len(started) == 2
    assert provisioner.tally.spared == 0
    assert backend.stopped == len(backend.launched)


def test_nobody_ever_gets_another_machine_than_he_asked_for(make: Callable[..., Provisioner], backend: FakeBackend, rounds: Rounds) -> None:
    """In tests in a random order, with what was announced for the next one right or wrong."""
    provisioner, chance = make(), random.Random(20)
    specs = [MachineSpec(source=IMAGE, name=name, env={"IT": name}, memory=memory) for name in ("a", "b", "c") for memory in ("1G", "2G")]
    following = chance.choice(specs)
    for _ in (tries := rounds("spares", 60)):
        spec = following if chance.random() < 0.8 else chance.choice(specs)
        with provisioner.machine(spec) as machine:
            following = chance.choice(specs)
            provisioner.expect(chance.sample(specs, chance.randint(0, 2)) if chance.random() < 0.2 else [following])
            assert (machine.spec, machine.name, machine.state) == (spec, spec.name, State.RUNNING)
            assert machine.lifecycle.boot_source == backend.launched[-1] or machine.lifecycle.boot_source in backend.launched
    assert provisioner.tally.spared > len(tries) // 2
    provisioner.close()
    assert backend.stopped == len(backend.launched)
