"""Capsules: written whole or not at all, read with distrust, and removed when nobody runs from them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pytest_vmbottle import Capsule, CatalogError, MachineSpec, SpecError
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.host.generations import Holds
from pytest_vmbottle.images import ImageStore, Traits
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.standalone.capsules import all_in
from pytest_vmbottle.standalone.stored import Stored
from pytest_vmbottle.testing import FakeBackend


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(510) + b"\x55\xaa" + bytes((1 << 20) - 512))
    with closing(Catalog(tmp_path / "catalog")) as catalog:
        ImageStore(catalog.images).add(disk, name="debian-12", traits=Traits(prepared=True))
        yield catalog


@pytest.fixture
def stored(catalog: Catalog) -> Iterator[Stored]:
    """Boot source of a snapshot of a running machine."""
    spec = MachineSpec(source="debian-12", name="web")
    with (
        closing(Provisioner(catalog, FakeBackend(), name="fake", settings=Settings())) as provisioner,
        provisioner.machine(spec) as machine,
    ):
        yield Stored.of(machine.snapshot("failed"), provisioner.origin(spec), "failed")


@pytest.fixture
def capsule(catalog: Catalog, stored: Stored) -> Capsule:
    return Capsule.save(catalog.root, {"web": (stored, "here"), "db": (stored, "here")}, test="tests/test_it.py::test_it[a/b]", error="no")


def test_a_capsule_says_what_it_is_of_and_has_its_machines(catalog: Catalog, capsule: Capsule, stored: Stored) -> None:
    again = Capsule(str(capsule.path))
    assert (again.name, again.test, again.error, again.machines) == ("b", "tests/test_it.py::test_it[a/b]", "no", ("web", "db"))
    assert again.snapshot().spec.name == "web"
    assert again.stored("db").keywords == stored.keywords
    assert again.path.stat().st_mode & 0o077 == 0
    assert [each.name for each in all_in(catalog.root)] == ["b"]
    with pytest.raises(SpecError, match="no machine 'cache'"):
        again.stored("cache")
    again.check_fits("here")
    with pytest.raises(CatalogError, match="cannot be restored here"):
        again.check_fits("elsewhere")


def test_two_failures_of_one_test_have_a_capsule_each_and_what_fails_half_way_leaves_none(catalog: Catalog, stored: Stored) -> None:
    names = [Capsule.save(catalog.root, {"web": (stored, "")}, test="test_a.py::test_it", error="").name for _ in range(3)]
    assert names == ["test_a-py-test_it", "test_a-py-test_it-2", "test_a-py-test_it-3"]
    gone = Stored.of(stored.snapshot(), stored.origin, "failed")
    (stored.start.saved or Path()).rename(catalog.root / "elsewhere")
    with pytest.raises(OSError, match="No such file"):
        Capsule.save(catalog.root, {"web": (gone, "")}, test="test_b.py::test_it", error="")
    assert sorted(path.name for path in (catalog.root / "capsules").iterdir()) == sorted(names)


def test_a_capsule_outlives_the_packs_and_the_machine_that_it_was_made_of(catalog: Catalog, stored: Stored, capsule: Capsule) -> None:
    for path in (stored.start.saved, catalog.root / "packs"):
        assert path is not None
        path.rename(catalog.root / f"gone-{path.name}")
    assert capsule.snapshot().start.disks[-1].path.exists()


def test_every_damaged_capsule_is_refused(capsule: Capsule) -> None:
    chance = random.Random(5)
    files = sorted(path for path in capsule.path.glob("**/*") if path.is_file() and ("web" in path.parts or path.name == "capsule.json"))
    checked = [path for path in files if path.name in ("capsule.json", "start.json", "pack.json", "state.bin")]
    refused = 0
    for number in range(100):
        path = checked[number % len(checked)]
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.unlink()
        if number % 5:
            path.write_bytes(damaged)
        try:
            Capsule(capsule.path).stored("web")
        except CatalogError:
            refused += 1
        path.unlink(missing_ok=True)
        path.write_bytes(content)
    assert refused == 100
    Capsule(capsule.path).stored("web")


def test_a_capsule_that_a_machine_runs_from_is_not_removed(catalog: Catalog, capsule: Capsule) -> None:
    with Holds() as holds:
        holds.take(capsule.snapshot().path)
        with pytest.raises(CatalogError, match="runs from"):
            capsule.remove()
        assert capsule.path.exists()
    capsule.remove()
    assert not list(all_in(catalog.root))
    with pytest.raises(CatalogError, match="there is no capsule"):
        Capsule(capsule.path)
