"""Catalogs with packs, without a machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType

import attrs
import pytest

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.packs import Manifest, Pack
from pytest_vmbottle.disks.overlay import write_overlay
from pytest_vmbottle.host import records
from pytest_vmbottle.images import ImageStore
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.travel.packs import Exporter

MIB = 1 << 20


def quiet(_: str) -> None:
    return None


def catalog(folder: Path) -> Catalog:
    folder.mkdir(mode=0o700)
    return Catalog(folder)


def publish(
    home: Catalog,
    name: str,
    ram: list[tuple[int, bytes]],
    image: str,
    parent: Pack | None = None,
    *,
    disks: Mapping[str, str] = MappingProxyType({}),
) -> Pack:
    with home.staging() as staging:
        folder = staging / "pack"
        folder.mkdir()
        with (folder / "ram.img").open("wb") as file:
            file.truncate(16 * MIB)
            for offset, data in ram:
                os.pwrite(file.fileno(), data, offset)
        (folder / "state.bin").write_bytes(os.urandom(1000))
        with (folder / "ram.img").open("rb") as nothing:
            write_overlay(folder / "disk.qcow2", size=64 * MIB, block=512, blocks={}, data=nothing)
        records.write(folder / "spec.json", MachineSpec(source="debian-12", name=name, disks=disks).plain_keywords())
        manifest = Manifest(
            key=("ab" if parent is None else "ef" if disks else "cd") * 32,
            kind="template",
            name=name,
            parent=parent.key if parent else None,
            parent_seal=parent.seal if parent else "",
            image=image,
            backend="qemu 7.2 tcg",
            memory=16 * MIB,
            disk_size=64 * MIB,
        )
        packs.seal(folder, manifest)
        return packs.read(home.publish(folder, manifest.key))


@attrs.frozen
class Home:
    """A catalog with an image, a pack of it, and a layer's pack on that."""

    catalog: Catalog
    image: str
    base: Pack
    layer: Pack

    def export(self, target: Path, *, pack: Pack | None = None, parents: bool = True) -> Path:
        exporter = Exporter(catalog=self.catalog, fingerprint=lambda _: "a computer", say=quiet)
        exporter.write(pack or self.layer, target, parents=parents)
        return target


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("home")
    with closing(catalog(folder / "catalog")) as made:
        disk = folder / "disk.raw"
        disk.write_bytes(os.urandom(300_000).ljust(510 + MIB, b"\0") + b"\x55\xaa" + bytes(MIB - 512))
        data = bytearray(disk.read_bytes())
        data[510:512] = b"\x55\xaa"
        disk.write_bytes(data)
        image = ImageStore(made.images).add(disk, name="debian-12")
        ram = [(0, os.urandom(5 * MIB)), (9 * MIB, b"kernel")]
        base = publish(made, "debian-12", ram, image.key)
        yield Home(made, image.key, base, publish(made, "web", [*ram, (MIB, b"a server"), (12 * MIB, b"its memory")], image.key, base))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Catalog]:
    with closing(catalog(tmp_path / "elsewhere")) as made:
        yield made
