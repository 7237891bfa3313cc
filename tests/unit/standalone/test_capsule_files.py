"""Capsules leave one catalog in a file and arrive in another: whole, checked, and only where they can be used."""

from __future__ import annotations

import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest

from pytest_vmbottle import Capsule, CatalogError, MachineSpec
from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.disks.overlay import write_overlay
from pytest_vmbottle.images import ImageStore, Traits
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.standalone.capsule_files import CapsuleExporter, CapsuleImporter
from pytest_vmbottle.standalone.capsules import all_in
from pytest_vmbottle.standalone.stored import Stored
from pytest_vmbottle.testing import FakeBackend, FakeInstance
from pytest_vmbottle.travel import archive as format_of
from pytest_vmbottle.travel.packs import Importer

MIB = 1 << 20
ADDRESSES = {"web-2": "10.77.0.12"}


def quiet(_: str) -> None:
    return None


@pytest.fixture(scope="module")
def _real_disks() -> Iterator[None]:
    """Have machines of the fake backend save disks that are some, and as QEMU's do only what their pack has not."""
    patch = pytest.MonkeyPatch()
    saves, snapshots = FakeInstance.save, FakeInstance.snapshot

    def disk(dest: Path, name: str = "disk.qcow2") -> None:
        (dest / name).unlink(missing_ok=True)
        write_overlay(dest / name, size=MIB)

    def save(self: FakeInstance, dest: Path, **options: Any) -> None:
        saves(self, dest, **options)
        disk(dest)

    def snapshot(self: FakeInstance, dest: Path, **options: Any) -> bool:
        snapshots(self, dest, **options)
        disk(dest)
        disk(dest, "disk-data.qcow2")
        return False

    patch.setattr(FakeInstance, "save", save)
    patch.setattr(FakeInstance, "snapshot", snapshot)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, _real_disks: None) -> Iterator[Catalog]:
    """Catalog with an image, its pack, and a capsule of two machines."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "disk.raw").write_bytes(random.Random(1).randbytes(510) + b"\x55\xaa" + bytes(MIB - 512))
    with closing(Catalog(folder / "catalog")) as catalog:
        ImageStore(catalog.images).add(folder / "disk.raw", name="debian-12", traits=Traits(prepared=True))
        spec = MachineSpec(source="debian-12", name="web", disks={"data": "1M"})
        with (
            closing(Provisioner(catalog, FakeBackend(), name="fake", settings=Settings())) as provisioner,
            provisioner.machine(spec) as machine,
        ):
            stored = Stored.of(machine.snapshot("failed"), provisioner.origin(spec), "failed")
            Capsule.save(
                catalog.root,
                {"web": (stored, "here"), "web-2": (stored, "here")},
                test="test_it.py::test_it",
                error="no",
                addresses=ADDRESSES,
            )
        yield catalog


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Catalog]:
    with closing(Catalog(tmp_path / "elsewhere")) as catalog:
        yield catalog


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, file: Path) -> Iterator[Catalog]:
    """Catalog with the packs of the capsule, and without the capsule."""
    with closing(Catalog(tmp_path_factory.mktemp("ready") / "catalog")) as catalog:
        arrive(catalog, file).remove()
        yield catalog


def leave(home: Catalog, target: Path, *, with_packs: bool) -> Path:
    (capsule,) = all_in(home.root)
    CapsuleExporter(catalog=home, fingerprint=lambda _: "here", say=quiet).write(capsule, target, with_packs=with_packs)
    return target


def arrive(there: Catalog, source: Path, fingerprint: str = "here") -> Capsule:
    return CapsuleImporter(catalog=there, fingerprint=lambda _: fingerprint, say=quiet).read(source)


@pytest.fixture(scope="module")
def file(home: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The capsule with what it stands on."""
    return leave(home, tmp_path_factory.mktemp("file") / "whole", with_packs=True)


@pytest.fixture(scope="module")
def alone(home: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The capsule without."""
    return leave(home, tmp_path_factory.mktemp("file") / "alone", with_packs=False)


def contents(capsule: Capsule) -> dict[str, bytes]:
    files = (path for path in capsule.path.glob("**/*") if path.is_file() and path.name != "start.json")
    return {str(path.relative_to(capsule.path)): path.read_bytes() for path in files}


def test_a_capsule_arrives_as_it_left_and_whole_where_nothing_is(home: Catalog, file: Path, elsewhere: Catalog) -> None:
    (left,) = all_in(home.root)
    came = arrive(elsewhere, file)
    assert contents(came) == contents(left)
    assert (came.name, came.test, came.error, came.created, came.machines) == (
        left.name,
        left.test,
        left.error,
        left.created,
        left.machines,
    )
    assert came.addresses == ADDRESSES
    for name in left.machines:
        assert came.stored(name).spec() == left.stored(name).spec()
        start = came.stored(name).start
        assert all(path.is_relative_to(came.path) for path in (start.seed, *(disk.path for disk in start.images)))
    assert file.stat().st_mode & 0o777 == 0o600
    assert not list(elsewhere.root.glob("run/*/*/staging-*"))
    # As often as one likes, under names of their own.
    assert arrive(elsewhere, file).name == f"{left.name}-2"


def test_a_capsule_alone_is_small_and_says_which_pack_is_missing(home: Catalog, file: Path, alone: Path, elsewhere: Catalog) -> None:
    (pack,) = packs.scan(home.packs)[0]
    # The image of 1 MiB is nearly all zeros.
    assert alone.stat().st_size < file.stat().st_size
    with pytest.raises(CatalogError, match=rf"needs the pack {pack.key[:12]} \(debian-12\).*`vmbottle pack import`.*--with-pack"):
        arrive(elsewhere, alone)
    assert not list(all_in(elsewhere.root))
    arrive(elsewhere, file).remove()
    assert arrive(elsewhere, alone).machines == ("web", "web-2")


def test_a_capsule_stands_on_the_very_pack_that_it_was_made_on(file: Path, alone: Path, elsewhere: Catalog) -> None:
    arrive(elsewhere, file)
    (pack,) = packs.scan(elsewhere.packs)[0]
    with elsewhere.staging() as staging:
        again = shutil.copytree(pack.path, staging / "again")
        (again / "state.bin").unlink()
        (again / "state.bin").write_bytes(b"another")
        (again / "pack.json").unlink()
        packs.seal(again, pack.manifest)
        shutil.rmtree(pack.path)
        elsewhere.publish(again, pack.key)
    with pytest.raises(CatalogError, match="built anew"):
        arrive(elsewhere, alone)


def test_what_is_in_no_pack_any_more_travels_with_the_capsule(
    home: Catalog, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, elsewhere: Catalog
) -> None:
    copy = tmp_path_factory.mktemp("copy") / "catalog"
    shutil.copytree(home.root, copy)
    with closing(Catalog(copy)) as catalog:
        # Written anew where it is now, since its paths are in it.
        (left,) = all_in(home.root)
        Capsule.save(copy, {name: (left.stored(name), "here") for name in left.machines}, test="test_copy.py::test_it", error="")
        shutil.rmtree(copy / "capsules" / left.name)
        shutil.rmtree(catalog.packs)
        arrive(elsewhere, leave(catalog, tmp_path / "file", with_packs=True))
    (came,) = all_in(elsewhere.root)
    assert {name: content for name, content in contents(came).items() if name != "capsule.json"} == {
        name: content for name, content in contents(left).items() if name != "capsule.json"
    }
    assert not packs.scan(elsewhere.packs)[0]


def test_a_capsule_for_another_computer_is_refused(alone: Path, ready: Catalog) -> None:
    with pytest.raises(CatalogError, match=r"'web' was made by another QEMU or accelerator.*same QEMU"):
        arrive(ready, alone, "there")
    assert not list(all_in(ready.root))


def test_every_damaged_file_of_a_capsule_is_refused(file: Path, elsewhere: Catalog, tmp_path: Path) -> None:
    whole, chance, damaged, refused = file.read_bytes(), random.Random(7), tmp_path / "damaged", 0
    for number in range(100):
        place = chance.randrange(len(whole))
        if number % 4 == 0:
            damaged.write_bytes(whole[:place])
        elif number % 4 == 1:
            damaged.write_bytes(whole[:place] + whole[place + 1 :])
        else:
            damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        try:
            arrive(elsewhere, damaged)
        except CatalogError:
            refused += 1
    assert refused == 100
    assert not list(all_in(elsewhere.root))
    assert not packs.scan(elsewhere.packs)[0]


def forged(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a file again with another index, sealed as one of ours."""
    with zipfile.ZipFile(source) as old, format_of.writing(target) as writer:
        facts = json.loads(old.read("index.json"))
        change(facts["capsule"])
        for name in old.namelist():
            writer._archive.writestr(name, json.dumps(facts) if name == "index.json" else old.read(name))
    return target


def set_at(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(facts: Any) -> None:
        for key in path[:-1]:
            facts = facts[key]
        facts[path[-1]] = value

    return change


def moved_to(place: str) -> Callable[[dict[str, Any]], None]:
    """Have a file of the first machine travel under another place, and be its seed."""

    def change(capsule: dict[str, Any]) -> None:
        machine = capsule["machines"][0]
        old = next(each for each in machine["files"] if each.endswith("state.bin"))
        machine["files"][place] = machine["files"].pop(old) | {"name": place.rpartition("/")[2]}
        machine["stored"]["start"]["seed"] = place

    return change


def disk_is_the_ram(capsule: dict[str, Any]) -> None:
    """Have the RAM of the pack, which a guest has written, be a disk."""
    machine = capsule["machines"][0]["stored"]["start"]
    machine["disks"][0] = {"path": f"{machine['ram']}/ram.img", "format": "qcow2"}


def disk_has_a_path(capsule: dict[str, Any]) -> None:
    """Have the name of a disk, of which that of its file is made, lead elsewhere."""
    stored = capsule["machines"][0]["stored"]
    stored["start"]["data"][0]["name"] = "../evil"
    stored["keywords"]["disks"] = {"../evil": MIB}


def overlay_is_there(capsule: dict[str, Any]) -> None:
    """Have the machine go on with a disk that is not its own."""
    start = capsule["machines"][0]["stored"]["start"]
    start["overlay"] = start["seed"]


FIRST = ("machines", 0)
START = (*FIRST, "stored", "start")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(set_at("machines", value=[]), id="no machine"),
        pytest.param(set_at("created", value=1e300), id="created in no year"),
        pytest.param(set_at("created", value="now"), id="created at a word"),
        pytest.param(set_at(*FIRST, "name", value="../evil"), id="machine outside"),
        pytest.param(set_at(*FIRST, "name", value="web-2"), id="machine twice"),
        pytest.param(set_at(*FIRST, "address", value="192.168.0.1"), id="address of another network"),
        pytest.param(set_at(*FIRST, "address", value="10.77.0.256"), id="no address"),
        pytest.param(set_at(*FIRST, "address", value="10.77.0.255"), id="address of all"),
        pytest.param(set_at(*FIRST, "depends", value="there"), id="for another computer"),
        pytest.param(set_at(*FIRST, "files", value={}), id="no files"),
        pytest.param(set_at(*FIRST, "stored", value={}), id="no boot source"),
        pytest.param(set_at(*FIRST, "stored", "label", value="../../evil"), id="label outside"),
        pytest.param(set_at(*FIRST, "stored", "keywords", value={"source": "debian-12", "disks": {"data": "/etc/passwd"}}), id="host file"),
        pytest.param(set_at(*FIRST, "stored", "keywords", "cpu", value="max,file=/etc/passwd"), id="cpu with options"),
        pytest.param(set_at(*START, "data", 0, "name", value="../evil"), id="disk outside"),
        pytest.param(set_at(*START, "seed", value="/etc/passwd"), id="seed of the host"),
        pytest.param(set_at(*START, "kernel", value="own/../../../etc/passwd"), id="kernel of the host"),
        pytest.param(set_at(*START, "initrd", value="image/" + "0" * 64 + "/disk.qcow2"), id="unknown image"),
        pytest.param(set_at(*START, "ram", value="pack/" + "0" * 64), id="unknown pack"),
        pytest.param(set_at(*START, "saved", value=None), id="no snapshot"),
        pytest.param(set_at(*START, "saved", value="own/" + "0" * 64), id="snapshot that is not there"),
        pytest.param(disk_has_a_path, id="disk outside, with a keyword"),
        pytest.param(overlay_is_there, id="overlay"),
        pytest.param(set_at(*START, "kept", value=True), id="kept"),
        pytest.param(set_at(*START, "building", value=True), id="building"),
        pytest.param(set_at(*START, "image", value="alpine"), id="image of a backend"),
        pytest.param(set_at(*START, "forwards", value=[[22, 22]]), id="ports of the host"),
        pytest.param(set_at(*START, "firmware", value="/etc/passwd"), id="firmware"),
        pytest.param(set_at(*START, "cmdline", value="a\0b"), id="command line that ends early"),
        pytest.param(set_at(*START, "disks", value=[]), id="no disks"),
        pytest.param(set_at(*START, "disks", 0, "format", value="vmdk"), id="format"),
        pytest.param(disk_is_the_ram, id="disk is RAM"),
    ],
)
def test_a_capsule_that_somebody_forged_is_refused_and_leaves_nothing(
    alone: Path, ready: Catalog, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    with pytest.raises(CatalogError):
        arrive(ready, forged(alone, tmp_path / "forged", change))
    assert not list(ready.root.glob("capsules/*"))
    assert not list(tmp_path.glob("**/evil*"))


@pytest.mark.parametrize("place", ["own/../evil", "own/../../evil", "/tmp/evil", "pack/" + "0" * 64 + "/evil"])
def test_no_file_of_a_capsule_gets_out_of_its_folder(alone: Path, ready: Catalog, tmp_path: Path, place: str) -> None:
    # Before anything is made of it.
    with pytest.raises(CatalogError, match="is no place for a file"):
        arrive(ready, forged(alone, tmp_path / "forged", moved_to(place)))


def test_a_disk_that_names_a_file_of_this_computer_is_refused(home: Catalog, elsewhere: Catalog, tmp_path: Path) -> None:
    (left,) = all_in(home.root)
    copy = shutil.copytree(left.stored().snapshot().path, tmp_path / left.stored().snapshot().path.name)
    disk = copy / "disk.qcow2"
    header = bytearray(disk.read_bytes())
    header[8:20] = struct.pack(">QI", 512, len(b"/etc/passwd"))
    disk.unlink()
    disk.write_bytes(header[:512] + b"/etc/passwd".ljust(512, b"\0") + header[1024:])
    (copy / "pack.json").unlink()
    packs.seal(copy, left.snapshot().manifest)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Capsule, "stored", lambda _, name=None: _with_snapshot(Stored.read(left.path / (name or "web")), copy))
        file = leave(home, tmp_path / "forged", with_packs=True)
    with pytest.raises(CatalogError, match="backing file"):
        arrive(elsewhere, file)
    assert not list(elsewhere.root.glob("capsules/*"))


def _with_snapshot(stored: Stored, folder: Path) -> Stored:
    disks = (*stored.start.disks[:-1], attrs.evolve(stored.start.disks[-1], path=folder / "disk.qcow2"))
    return attrs.evolve(stored, start=attrs.evolve(stored.start, saved=folder, disks=disks))


def test_the_kinds_of_files_are_told_apart(alone: Path, file: Path, elsewhere: Catalog, tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="`vmbottle capsule import`"):
        Importer(catalog=elsewhere, fingerprint=lambda _: "here", say=quiet).read(alone)
    with zipfile.ZipFile(file) as old, format_of.writing(tmp_path / "packs") as writer:
        facts = json.loads(old.read("index.json")) | {"capsule": None}
        writer._archive.writestr("index.json", json.dumps(facts))
    with pytest.raises(CatalogError, match="`vmbottle pack import`"):
        arrive(elsewhere, tmp_path / "packs")
