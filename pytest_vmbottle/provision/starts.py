"""What machines start from: the chain of disks from a pack down to its image, and the seed and the keys of the first boot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle._os import atomic_file, format_size
from pytest_vmbottle.backend import Disk, Keys, PackKind, Start
from pytest_vmbottle.channels.ssh import new_keys
from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.seed import write_seed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_vmbottle.images import Image
    from pytest_vmbottle.packs import Pack
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["cold_start", "start"]


def start(spec: MachineSpec, image: Image, pack: Pack, beneath: Callable[[str], Pack], *, building: bool = False) -> Start:
    """How a machine starts from a pack; `beneath` gives the packs it stands on."""
    if image.is_own:
        return Start.own(saved=pack.path, building=building)
    disks = [Disk(path=pack.path / "disk.qcow2")]
    base = pack
    while base.manifest.parent is not None:
        base = beneath(base.manifest.parent)
        disks.append(Disk(path=base.path / "disk.qcow2"))
    return Start(
        disks=(Disk(path=image.disk, format=image.format), *reversed(disks)),
        disk_size=pack.manifest.disk_size,
        kernel=image.kernel,
        initrd=image.initrd,
        cmdline=image.boot_words(cloud_init=spec.user_data is not None),
        firmware=image.firmware,
        seed=base.path / "seed.iso",
        keys=_read_keys(base.path / "keys.json"),
        saved=None if pack.manifest.kind == PackKind.DISK else pack.path,
        building=building,
    )


def cold_start(spec: MachineSpec, image: Image, folder: Path, *, building: bool = False) -> Start:
    """How a machine starts from an image, with a seed and keys that are made for it in a folder.

    Raises:
        SpecError: Its disk is to be smaller than the image.
    """
    if image.is_own:
        return Start.own(image=image.own, building=building)
    keys = new_keys()
    write_seed(folder / "seed.iso", hostname=spec.name, keys=keys, user_data=spec.user_data)
    _write_keys(folder / "keys.json", keys)
    return Start(
        disks=(Disk(path=image.disk, format=image.format),),
        disk_size=_disk_size(spec, image),
        kernel=image.kernel,
        initrd=image.initrd,
        cmdline=image.boot_words(cloud_init=spec.user_data is not None),
        firmware=image.firmware,
        seed=folder / "seed.iso",
        keys=keys,
    )


def _disk_size(spec: MachineSpec, image: Image) -> int:
    if spec.disk is not None and spec.disk < image.virtual_size:
        raise SpecError(f"disk={format_size(spec.disk)} is less than the image {image.name} needs: {format_size(image.virtual_size)}")
    return spec.disk or image.virtual_size


def _write_keys(path: Path, keys: Keys) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(attrs.asdict(keys)).encode())


def _read_keys(path: Path) -> Keys:
    return Keys(**json.loads(path.read_bytes()))
