"""Packs leave one catalog and arrive in another: whole, checked, and only where they can be used."""

from __future__ import annotations

import errno
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.packs import Pack
from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.images import ImageStore
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.travel import archive as format_of
from pytest_vmbottle.travel import packs as travel
from pytest_vmbottle.travel.archive import ArchiveReader
from pytest_vmbottle.travel.packs import Exporter, Importer
from tests.unit.travel.conftest import MIB, Home, publish, quiet


@pytest.fixture(scope="module")
def file(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return home.export(tmp_path_factory.mktemp("file") / "web.vmpack")


def arrive(there: Catalog, source: Path, fingerprint: str = "a computer") -> list[Pack]:
    return Importer(catalog=there, fingerprint=lambda _: fingerprint, say=quiet).read(source)


def test_packs_and_their_image_arrive_as_they_left(home: Home, file: Path, elsewhere: Catalog) -> None:
    base, layer = arrive(elsewhere, file)
    for left, came in ((home.base, base), (home.layer, layer)):
        came.verify()
        assert came.manifest == left.manifest
        assert {path.name: path.stat().st_mode for path in came.path.iterdir()} == {
            path.name: path.stat().st_mode for path in left.path.iterdir()
        }
    packs.check_parent(layer)
    (image,) = ImageStore(elsewhere.images).list()
    assert (image.name, image.key) == ("debian-12", home.image)
    assert arrive(elsewhere, file) == []


def test_a_layer_alone_is_small_and_arrives_where_its_parent_is(home: Home, file: Path, elsewhere: Catalog, tmp_path: Path) -> None:
    alone = home.export(tmp_path / "alone", parents=False)
    assert alone.stat().st_size < file.stat().st_size / 50
    with pytest.raises(CatalogError, match=home.base.key[:12]):
        arrive(elsewhere, alone)
    assert not list(elsewhere.packs.glob("*"))
    arrive(elsewhere, home.export(tmp_path / "base", pack=home.base))
    (layer,) = arrive(elsewhere, alone)
    layer.verify()


def test_equal_packs_give_equal_files(home: Home, file: Path, tmp_path: Path) -> None:
    assert home.export(tmp_path / "again").read_bytes() == file.read_bytes()


def test_a_pack_for_another_computer_is_refused_with_what_it_needs(file: Path, elsewhere: Catalog) -> None:
    with pytest.raises(CatalogError, match=r"qemu 7\.2 tcg.*processor"):
        arrive(elsewhere, file, "another computer")
    assert not elsewhere.packs.exists()
    assert not elsewhere.images.exists()


def test_200_damaged_files_are_refused_and_leave_nothing(file: Path, elsewhere: Catalog, tmp_path: Path) -> None:
    whole, chance, damaged = file.read_bytes(), random.Random(4711), tmp_path / "damaged"
    for number in range(200):
        place = chance.randrange(len(whole))
        if number % 4 == 0:
            damaged.write_bytes(whole[:place])
        elif number % 4 == 1:
            damaged.write_bytes(whole[:place] + whole[place + 1 :])
        else:
            damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(CatalogError):
            arrive(elsewhere, damaged)
    assert not list(elsewhere.packs.glob("*"))
    assert not ImageStore(elsewhere.images).list()


def forged(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write an archive again with another index, sealed as one of ours."""
    with zipfile.ZipFile(source) as old, format_of.writing(target) as writer:
        facts = json.loads(old.read("index.json"))
        change(facts)
        for name in old.namelist():
            data = json.dumps(facts) if name == "index.json" else old.read(name)
            writer._archive.writestr(name, data)
    return target


def set_at(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(facts: Any) -> None:
        for key in path[:-1]:
            facts = facts[key]
        facts[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_at("format", value=2),
        set_at("packs", value=[]),
        set_at("packs", value=None),
        set_at("packs", 0, "files", 0, "name", value="../../evil"),
        set_at("packs", 0, "files", 0, "name", value="pack.json"),
        set_at("packs", 0, "files", 0, "size", value=-1),
        set_at("packs", 0, "files", 0, "size", value=1 << 60),
        set_at("packs", 0, "files", 0, "size", value="1"),
        set_at("packs", 0, "files", 1, "pieces", 0, "number", value=1 << 40),
        set_at("packs", 0, "files", 1, "pieces", 0, "number", value=-1),
        set_at("packs", 0, "files", 1, "pieces", 0, "blocks", value=0),
        set_at("packs", 0, "files", 1, "pieces", 0, "blob", value="../index.json"),
        set_at("packs", 0, "files", 1, "pieces", value=[]),
        set_at("packs", 0, "files", value=[]),
        set_at("packs", 0, "manifest", "key", value="../../../evil"),
        set_at("packs", 0, "manifest", "name", value="another"),
        set_at("packs", 0, "manifest", value={}),
        set_at("packs", 0, "depends", value=5),
        set_at("image", "name", value="../evil"),
        set_at("image", "files", 0, "name", value="evil"),
        set_at("image", "traits", value={"firmware": "none"}),
        set_at("image", value=None),
    ],
)
def test_an_archive_that_somebody_forged_is_refused_and_writes_nothing(
    file: Path, elsewhere: Catalog, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    with pytest.raises(CatalogError):
        arrive(elsewhere, forged(file, tmp_path / "forged", change))
    assert not list(elsewhere.packs.glob("*"))
    assert not list(tmp_path.rglob("*evil*"))


def test_what_is_no_archive_is_told(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="no archive of packs"):
        ArchiveReader(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CatalogError, match="no archive of packs"):
        ArchiveReader(tmp_path / "text")


def test_a_name_that_another_image_has_is_left_to_it(home: Home, file: Path, elsewhere: Catalog, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(510) + b"\x55\xaa" + os.urandom(MIB - 512))
    ImageStore(elsewhere.images).add(other, name="debian-12")
    arrive(elsewhere, file)
    assert {image.name: image.key == home.image for image in ImageStore(elsewhere.images).list()} == {
        "debian-12": False,
        f"debian-12-{home.image[:6]}": True,
    }


def test_a_disk_that_is_full_is_told_with_what_was_tried(
    home: Home, file: Path, elsewhere: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(CatalogError, match=rf"import .*{file.name}.*No space"):
        arrive(elsewhere, file)
    assert not list(elsewhere.packs.glob("*"))
    monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
    with pytest.raises(CatalogError, match=r"write .*target.*No space"):
        home.export(tmp_path / "target")
    assert not list(tmp_path.glob("*target*"))


def test_nothing_is_left_of_an_export_that_fails(home: Home, tmp_path: Path) -> None:
    def fail(_: MachineSpec) -> str:
        raise CatalogError("no QEMU here")

    with pytest.raises(CatalogError, match="no QEMU"):
        Exporter(catalog=home.catalog, fingerprint=fail, say=quiet).write(home.layer, tmp_path / "file", parents=True)
    assert not list(tmp_path.iterdir())


def test_a_pack_that_names_a_file_of_this_computer_as_a_disk_is_refused(
    home: Home, elsewhere: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its guest would read the file."""
    secret = tmp_path / "secret.raw"
    pack = publish(home.catalog, "web", [], home.image, home.base, disks={"data": str(secret)})
    with pytest.raises(CatalogError, match="names files"):
        home.export(tmp_path / "hostile", pack=pack)
    with monkeypatch.context() as forging:
        forging.setattr(travel, "_spec", lambda _: MachineSpec(source="debian-12"))
        hostile = home.export(tmp_path / "hostile", pack=pack)
    with pytest.raises(CatalogError, match="names files"):
        arrive(elsewhere, hostile)
    assert not elsewhere.packs.exists()
