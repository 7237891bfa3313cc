"""Packs: what is in the folder of one, and how it is told that it is still what was published."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import cattrs

from pytest_vmbottle import generations, records
from pytest_vmbottle._os import atomic_file, size_on_disk, sparse_digest
from pytest_vmbottle.backend import Start
from pytest_vmbottle.errors import CatalogError, PackCorrupt, SpecError
from pytest_vmbottle.spec import BOOT, MachineSpec, digest

__all__ = ["FORMAT", "Manifest", "Pack", "Snapshot", "check_parent", "children_first", "find", "prunable", "read", "scan", "seal", "sizes"]

FORMAT = 1
"""Version of the manifest: packs of another are not read, and their keys differ."""

_MANIFEST = "pack.json"


@attrs.frozen(kw_only=True)
class Manifest:
    """What `pack.json` says.

    Attributes:
        format: `FORMAT` of the version that wrote it.
        key: The digest of everything the pack depends on.
        kind: `"template"` or `"disk"`.
        name: What people call what is in it.
        parent: The key of the pack beneath it, or None if it stands on the image.
        parent_seal: The `Pack.seal` of that very pack.
        image: The sha256 of the image at the bottom.
        backend: Who made it, with which version and accelerator.
        memory: Bytes of RAM of its machine.
        disk_size: Bytes of the disk its machine sees.
        created: Seconds since 1970.
        files: The digest of each file (see `sparse_digest`).
        check: `body()` when it was written: a manifest that says something else was damaged.
    """

    format: int = FORMAT
    key: str
    kind: str
    name: str
    parent: str | None
    parent_seal: str = ""
    image: str
    backend: str
    memory: int
    disk_size: int
    created: float = attrs.field(factory=time.time)
    files: Mapping[str, str] = attrs.field(factory=dict)
    check: str = ""

    def body(self) -> str:
        """A digest of all that it says but `check`."""
        return digest(cattrs.unstructure(attrs.evolve(self, check="")))


@attrs.frozen(kw_only=True)
class Pack:
    """A published pack: a folder that is never changed."""

    path: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        """Its name in the catalog."""
        return self.manifest.key

    @property
    def seal(self) -> str:
        """A digest of its content: a pack made again by the same recipe has the same key and another seal."""
        return digest(dict(self.manifest.files))

    @property
    def size(self) -> int:
        """Bytes on disk; holes do not count."""
        return size_on_disk(self.path)

    @property
    def used(self) -> float:
        """When a run last took it up, or it was made, in seconds since 1970; 0 if it is gone."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0

    def note_use(self) -> None:
        """Notes that it is used now: what has not been used for longest is pruned first."""
        with suppress(OSError):
            os.utime(self.path)

    def stamp(self) -> tuple[tuple[str, int, int, int], ...]:
        """Sizes, times and inodes of its files: what tells without reading them that nobody has touched them.

        Raises:
            PackCorrupt: One is missing.
        """
        try:
            status = {name: (self.path / name).lstat() for name in sorted(self.manifest.files)}
        except OSError as error:
            raise PackCorrupt(f"the pack {self.key[:12]} ({self.manifest.name}) lacks {Path(error.filename).name}") from error
        return tuple((name, each.st_size, each.st_mtime_ns, each.st_ino) for name, each in status.items())

    def verify(self) -> None:
        """Reads all its files and compares them with the manifest.

        Raises:
            PackCorrupt: Naming the first file that differs, is missing, or does not belong there.
        """
        label = f"the pack {self.key[:12]} ({self.manifest.name})"
        found = {path.name for path in self.path.iterdir()} - {_MANIFEST}
        for name in sorted(found ^ set(self.manifest.files)):
            raise PackCorrupt(f"{label} {'has a file that does not belong there' if name in found else 'lacks a file'}: {name}")
        for name, expected in self.manifest.files.items():
            path = self.path / name
            if path.is_symlink() or not path.is_file() or sparse_digest(path) != expected:
                raise PackCorrupt(f"{label} is damaged: {name} is not what was published")


@attrs.frozen(kw_only=True)
class Snapshot(Pack):
    """A pack made of a machine in the middle of a test; it is in that machine's folder, and gone with it and all that run from it.

    Attributes:
        spec: What the machine is.
        start: How one like it is started from this.
    """

    spec: MachineSpec = attrs.field(repr=False)
    start: Start = attrs.field(repr=False)

    def of(self, **keywords: Any) -> MachineSpec:
        """What a machine started from this is: as the one it was made of, but for what does not matter to what has booted.

        Raises:
            CatalogError: The snapshot is gone.
            SpecError: A keyword makes no sense, or decides what a guest boots with.
        """
        self.check()
        spec = attrs.evolve(self.spec, **{"env": dict(self.spec.env), "files": dict(self.spec.files), **keywords})
        self.check_fits(spec)
        return spec

    def check_fits(self, spec: MachineSpec) -> None:
        """Sees that a machine is one that this can be restored as.

        Raises:
            SpecError: It is another one.
        """
        if spec.boot_digest() != self.spec.boot_digest():
            differs = ", ".join(sorted(key for key in BOOT if getattr(spec, key) != getattr(self.spec, key)))
            raise SpecError(f"the snapshot {self.manifest.name!r} is of a machine with another {differs} than {spec.name}")

    def check(self) -> None:
        """Sees that it is still there, with all that it stands on.

        Raises:
            CatalogError: It is gone.
        """
        if not all(path.exists() for path in (self.path, self.start.seed, *(disk.path for disk in self.start.disks))):
            raise CatalogError(f"the snapshot {self.manifest.name!r} is gone: it lives as long as the machine that it was made of")


def read(path: Path) -> Pack:
    """The pack in a folder.

    Raises:
        FileNotFoundError: There is none.
        PackCorrupt: Its manifest cannot be read.
    """
    try:
        facts = records.load(path / _MANIFEST)
        manifest = cattrs.structure(facts, Manifest)
    except FileNotFoundError:
        if path.is_dir():
            raise PackCorrupt(f"the pack {path.name[:12]} has no {_MANIFEST}") from None
        raise
    except (OSError, ValueError, TypeError, RecursionError, cattrs.BaseValidationError) as error:
        raise PackCorrupt(f"the manifest of the pack {path.name[:12]} cannot be read: {type(error).__name__}") from error
    if manifest.check != manifest.body() or cattrs.unstructure(manifest) != facts:
        raise PackCorrupt(f"the manifest of the pack {path.name[:12]} is damaged: it is not what was published")
    if manifest.format != FORMAT or manifest.key != generations.name_of(path):
        raise PackCorrupt(f"the pack {path.name[:12]} was made by another version, or has another's name")
    return Pack(path=path, manifest=manifest)


def scan(folder: Path) -> tuple[tuple[Pack, ...], Mapping[str, PackCorrupt]]:
    """All packs in the folder of published ones, oldest first; and by their names those whose manifest cannot be read."""
    found: list[Pack] = []
    damaged: dict[str, PackCorrupt] = {}
    for path in _latest(folder):
        try:
            found.append(read(path))
        except PackCorrupt as error:
            damaged[generations.name_of(path)] = error
        except (FileNotFoundError, NotADirectoryError):
            continue  # removed a moment ago, or no pack at all
    return tuple(sorted(found, key=lambda pack: (pack.manifest.created, pack.key))), dict(sorted(damaged.items()))


def _latest(folder: Path) -> list[Path]:
    """The folders of all packs, damaged or not; of each key the last one."""
    return [there[-1] for there in generations.all_in(folder).values()]


def find(folder: Path, prefix: str) -> Path:
    """The folder of the one pack, damaged or not, whose key begins like this.

    Raises:
        CatalogError: There is none, or more than one.
    """
    found = sorted(path for path in _latest(folder) if prefix and path.name.startswith(prefix))
    if not found:
        raise CatalogError(f"there is no pack whose key begins with {prefix!r}: `vmbottle pack ls` shows those that are there")
    if len(found) > 1:
        raise CatalogError(
            f"{prefix!r} is the beginning of {len(found)} keys, give more of it: {', '.join(path.name[:12] for path in found)}"
        )
    return found[0]


def check_parent(pack: Pack) -> None:
    """Compares what a pack stands on with what it was made on, without reading the files of either.

    Raises:
        PackCorrupt: The pack beneath it is gone, damaged, or was made again.
    """
    if pack.manifest.parent is None:
        return
    try:
        there = generations.every(pack.path.parent, pack.manifest.parent)
        same = bool(there) and read(there[-1]).seal == pack.manifest.parent_seal
    except (FileNotFoundError, PackCorrupt):
        same = False
    if not same:
        raise PackCorrupt(f"the pack {pack.key[:12]} ({pack.manifest.name}) stands on a pack that is gone or was made again")


def children_first(chosen: Iterable[Pack]) -> list[Pack]:
    """Packs in an order in which none is removed before those that stand on it."""
    left = {pack.key: pack for pack in chosen}
    ordered: list[Pack] = []
    while left:
        bases = {pack.manifest.parent for pack in left.values()}
        # Keys are digests of their parents' keys, so there is no circle but in a forged manifest.
        top = left.keys() - bases or left.keys()
        ordered += [pack for key, pack in left.items() if key in top]
        left = {key: pack for key, pack in left.items() if key not in top}
    return ordered


def sizes(packs: Iterable[Pack]) -> dict[str, int]:
    """By their keys, what packs take on disk; without those that are gone meanwhile."""
    found = {}
    for pack in packs:
        with suppress(FileNotFoundError):
            found[pack.key] = pack.size
    return found


def prunable(
    everything: Sequence[Pack],
    *,
    held: Callable[[Pack], bool],
    made_before: float | None = None,
    used_before: float | None = None,
    keep_size: int | None = None,
) -> list[Pack]:
    """Which packs to remove, the least recently used first, and none that is held or that one which stays stands on.

    Args:
        everything: All packs.
        held: Whether somebody uses a pack.
        made_before: Those made before this moment go, in seconds since 1970.
        used_before: Those that were last used before this moment go.
        keep_size: The least recently used go until those that are left take at most so many bytes on disk. Without any of the three, all
            that can go do.
    """
    taken, used = sizes(everything), {pack.key: pack.used for pack in everything}
    left = {pack.key: pack for pack in everything if not held(pack)}
    stays = [pack for pack in everything if pack.key not in left]
    gone: list[Pack] = []

    def due(pack: Pack) -> bool:
        if made_before is None and used_before is None and keep_size is None:
            return True
        too_old = made_before is not None and pack.manifest.created < made_before
        unused = used_before is not None and used[pack.key] < used_before
        return too_old or unused or (keep_size is not None and sum(taken.values()) > keep_size)

    while True:
        bases = {pack.manifest.parent for pack in (*stays, *left.values())}
        free = sorted((pack for pack in left.values() if pack.key not in bases), key=lambda pack: (used[pack.key], pack.manifest.created))
        chosen = next((pack for pack in free if due(pack)), None)
        if chosen is None:
            return gone
        gone.append(left.pop(chosen.key))
        taken.pop(chosen.key, None)


def seal(folder: Path, manifest: Manifest) -> None:
    """Takes away the right to write and adds the manifest, with the digest of each file."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = sparse_digest(path)
        # QEMU before 8.2 opens the file of a private RAM mapping for writing, which it then never does; only root could with 0400.
        path.chmod(0o600 if path.name == "ram.img" else 0o400)
    complete = attrs.evolve(manifest, files=files)
    complete = attrs.evolve(complete, check=complete.body())
    with atomic_file(folder / _MANIFEST, mode=0o400) as file:
        file.write(json.dumps(cattrs.unstructure(complete), indent=1).encode())
