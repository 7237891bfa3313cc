"""Boot sources that stay: the own disk of a machine that is off, and its snapshots.

Each is a folder with second names (hard links) of all files that a machine starts from. They cost no room, and what is removed elsewhere is
not missed: an image, a pack, or the machine that a snapshot was made of.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from cattrs.preconf.json import make_converter

from pytest_vmbottle.backends.port import DataDisk, Disk, Start
from pytest_vmbottle.catalog import packs
from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host import records
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.machine.snapshot import Snapshot
from pytest_vmbottle.provision.origins import KeptOrigin
from pytest_vmbottle.spec import MachineSpec

if TYPE_CHECKING:
    from cattrs import Converter

    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.provision.origins import Origin

__all__ = ["FACTS", "Stored"]

FACTS = "start.json"
"""File that makes a folder a boot source; it is written last."""
_OVERLAY = "own.qcow2"


def _make_converter(unstructure: Callable[[Path], str], structure: Callable[[str], Path]) -> Converter:
    converter = make_converter()
    # By both names: of a field's type, and of a value's.
    for kind in (Path, type(Path())):
        converter.register_unstructure_hook(kind, unstructure)
    converter.register_structure_hook(Path, lambda value, _: structure(value))
    return converter


_converter = _make_converter(str, Path)


@attrs.frozen(kw_only=True)
class Stored:
    """A boot source with everything that its machine was made of.

    Attributes:
        start: The boot source.
        origin: The image at its bottom.
        keywords: The keywords of its spec, as JSON has them; packages, files and commands are on its disk already.
        label: Its name, for a snapshot.
        created: The time when it was made, in seconds since 1970.
    """

    start: Start
    origin: KeptOrigin
    keywords: Mapping[str, Any]
    label: str = ""
    created: float = attrs.field(factory=time.time)

    @classmethod
    def disk_of(cls, machine: Machine, origin: Origin) -> Stored | None:
        """Return the boot source for a running machine's own disk; None if its backend has no file of it."""
        overlay = machine.lifecycle.instance.overlay
        if overlay is None:
            return None
        source = machine.lifecycle.boot_source
        # All of them are in one folder, each under its own name.
        data = tuple(attrs.evolve(disk, overlay=overlay.with_name(disk.file)) for disk in source.data)
        start = attrs.evolve(source, saved=None, ram=None, kept=True, overlay=overlay, data=data, building=False)
        return cls(start=start, origin=KeptOrigin.of(origin), keywords=machine.spec.plain_keywords())

    @classmethod
    def of(cls, snapshot: Snapshot, origin: Origin, label: str) -> Stored:
        """Return the boot source of a snapshot."""
        return cls(start=snapshot.start, origin=KeptOrigin.of(origin), keywords=snapshot.spec.plain_keywords(), label=label)

    @staticmethod
    def converter(*, unstructure: Callable[[Path], str] = str, structure: Callable[[str], Path] = Path) -> Converter:
        """Return a converter between boot sources and values of JSON, which has something else in place of paths."""
        return _make_converter(unstructure, structure)

    def spec(self, **keywords: Any) -> MachineSpec:
        """Return the spec of a machine that starts from this, with other values for some keywords.

        Raises:
            SpecError: A value is invalid.
        """
        return MachineSpec(**{**self.keywords, **keywords})

    def snapshot(self) -> Snapshot:
        """Return the snapshot that this is, for `Machine.restore`.

        Raises:
            CatalogError: Its files are damaged.
        """
        if self.start.saved is None:
            raise CatalogError(f"{self.label or 'the disk'} is no snapshot")
        return Snapshot(path=self.start.saved, manifest=packs.read(self.start.saved).manifest, spec=self.spec(), start=self.start)

    def write(self, folder: Path) -> Stored:
        """Write the boot source into a folder, which takes the place of one that is there; return it as it is there.

        Raises:
            OSError: It cannot be written; the old one is there.
        """
        new, old = (private_dir(folder.parent) / f".{folder.name}.{word}" for word in ("new", "old"))
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        try:
            # The paths are those in the final folder, so the facts need not change when it gets its name.
            stored = attrs.evolve(self, start=_linked(self.start, private_dir(new), folder))
            records.write(new / FACTS, _converter.unstructure(stored))
            # Moved aside and not removed, so that this costs no more than two names if the process ends in between.
            with suppress(FileNotFoundError):
                folder.rename(old)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return stored

    @classmethod
    def read(cls, folder: Path) -> Stored:
        """Read the boot source in a folder.

        Raises:
            FileNotFoundError: There is none.
            Damaged: Its facts are damaged.
        """
        return records.read_as(folder / FACTS, lambda facts: _converter.structure(facts, cls))


def _linked(start: Start, here: Path, final: Path) -> Start:
    """Link the files of a boot source into a folder, and return it with their paths in the final folder."""

    def link(path: Path, *names: str) -> Path:
        into = here.joinpath(*names)
        try:
            os.link(path, into)
        except OSError:
            # On another file system, or another user's file: a disk that is used in its own place, which stays there.
            return path
        return final.joinpath(*names)

    def linked_saved(folder: Path) -> Path:
        private_dir(here / folder.name)
        for path in folder.iterdir():
            os.link(path, here / folder.name / path.name)
        return final / folder.name

    def linked_disk(disk: Disk, name: str) -> Disk:
        # A snapshot's own disk is linked with the snapshot.
        in_saved = disk.path.parent == start.saved
        path = final / disk.path.parent.name / disk.path.name if in_saved else link(disk.path, f"{name}{disk.path.suffix}")
        return attrs.evolve(disk, path=path)

    def linked_data(disk: DataDisk) -> DataDisk:
        return attrs.evolve(
            disk,
            disks=tuple(linked_disk(each, f"{disk.name}-{number}") for number, each in enumerate(disk.disks)),
            overlay=link(disk.overlay, disk.file) if disk.overlay is not None else None,
        )

    saved = linked_saved(start.saved) if start.saved is not None else None
    return attrs.evolve(
        start,
        saved=saved,
        ram=linked_saved(start.ram) if start.ram is not None else None,
        disks=tuple(linked_disk(disk, f"disk-{number}") for number, disk in enumerate(start.disks)),
        data=tuple(map(linked_data, start.data)),
        overlay=link(start.overlay, _OVERLAY) if start.overlay is not None else None,
        kernel=link(start.kernel, start.kernel.name) if start.kernel is not None else None,
        initrd=link(start.initrd, start.initrd.name) if start.initrd is not None else None,
        # Backends with images of their own have none.
        seed=link(start.seed, "seed.iso") if start.seed.is_file() else start.seed,
        forwards=(),
    )
