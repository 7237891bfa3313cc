"""Boot sources that stay: second names of files, and facts beside them."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from pytest_vmbottle import MachineSpec
from pytest_vmbottle.backends.port import Disk, Start
from pytest_vmbottle.channels.port import Keys
from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.host import records
from pytest_vmbottle.provision.origins import KeptOrigin
from pytest_vmbottle.standalone.stored import Stored

ORIGIN = KeptOrigin(name="debian-12", sha256="12", key="34", prepared=True, awaits_boot=False, is_quick=False)
KEYS = Keys(user_private="a", user_public="b", host_private="c", host_public="d")


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """A snapshot on an image, with files in three folders."""
    image, saved = tmp_path / "image", tmp_path / "snapshot" / "5f5f"
    for folder, names in ((image, ("disk.raw", "vmlinuz", "initrd.img", "seed.iso")), (saved, ("disk.qcow2", "state.bin"))):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text(name)
    start = Start(
        disks=(Disk(path=image / "disk.raw", format="raw"), Disk(path=saved / "disk.qcow2")),
        disk_size=1 << 30,
        kernel=image / "vmlinuz",
        initrd=image / "initrd.img",
        cmdline="quiet",
        seed=image / "seed.iso",
        keys=KEYS,
        saved=saved,
        forwards=((80, 4711),),
    )
    spec = MachineSpec(source="debian-12", name="web", cpus=2, env={"LANG": "C"}, packages=["nginx"], ports=[80])
    return Stored(start=start, origin=ORIGIN, keywords=spec.plain_keywords(), label="clean")


def test_a_boot_source_lives_on_when_what_it_was_made_of_is_gone(tmp_path: Path, stored: Stored) -> None:
    written = stored.write(tmp_path / "kept" / "clean")
    for folder in ("image", "snapshot"):
        for path in sorted((tmp_path / folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    found = Stored.read(tmp_path / "kept" / "clean")

    assert found == written
    assert [disk.path.read_text() for disk in found.start.disks] == ["disk.raw", "disk.qcow2"]
    assert [disk.format for disk in found.start.disks] == ["raw", "qcow2"]
    assert found.start.saved is not None
    assert (found.start.saved / "state.bin").read_text() == "state.bin"
    assert [path.read_text() for path in (found.start.kernel, found.start.initrd, found.start.seed) if path] == [
        "vmlinuz",
        "initrd.img",
        "seed.iso",
    ]
    assert (found.start.keys, found.start.forwards, found.origin) == (KEYS, (), ORIGIN)


def test_its_spec_is_that_of_its_machine_without_what_is_on_the_disk_already(stored: Stored) -> None:
    spec = stored.spec(name="db")

    assert (spec.name, spec.cpus, dict(spec.env), spec.ports, spec.packages) == ("db", 2, {"LANG": "C"}, (80,), ())
    with pytest.raises(SpecError):
        stored.spec(memory="much")


def test_a_boot_source_takes_the_place_of_one_in_the_same_folder(tmp_path: Path, stored: Stored) -> None:
    folder = tmp_path / "kept" / "clean"
    stored.write(folder)
    attrs.evolve(stored, label="later").write(folder)

    assert Stored.read(folder).label == "later"
    assert [path.name for path in folder.parent.iterdir()] == ["clean"]


def test_one_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, stored: Stored) -> None:
    folder = tmp_path / "kept" / "clean"
    stored.write(folder)
    assert stored.start.saved is not None
    gone = attrs.evolve(stored, start=attrs.evolve(stored.start, saved=tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError):
        gone.write(folder)

    assert Stored.read(folder).label == "clean"
    assert [path.name for path in folder.parent.iterdir()] == ["clean"]


def test_a_disk_in_another_place_that_takes_no_second_name_stays_where_it_is(
    tmp_path: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = attrs.evolve(stored, start=attrs.evolve(stored.start, saved=None, disks=stored.start.disks[:1]))

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    assert plain.write(tmp_path / "kept").start.disks == plain.start.disks


def test_facts_that_were_changed_are_damaged(tmp_path: Path, stored: Stored) -> None:
    stored.write(tmp_path / "kept")
    facts = tmp_path / "kept" / "start.json"
    facts.write_text(facts.read_text().replace("quiet", "single"))
    with pytest.raises(records.Damaged):
        Stored.read(tmp_path / "kept")
