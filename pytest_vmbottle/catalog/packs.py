"""Packs: their files, manifests and checks of integrity."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import attrs
import cattrs

from pytest_vmbottle.errors import CatalogError, PackCorrupt
from pytest_vmbottle.host import generations, records
from pytest_vmbottle.host.digests import digest, sparse_digest
from pytest_vmbottle.host.files import size_on_disk

__all__ = ["FORMAT", "Manifest", "Pack", "check_parent", "children_first", "find", "prunable", "read", "scan", "seal", "sizes"]

FORMAT = 1
"""Version of the manifest.

Packs of another version are not read, and their keys differ.
"""

_MANIFEST = "pack.json"


@attrs.frozen(kw_only=True)
class Manifest:
    """Content of `pack.json`.

    Attributes:
        format: `FORMAT` of the version that wrote it.
        key: The digest of everything the pack depends on.
        kind: `"template"` or `"disk"`.
        name: The name of its content, for people.
        parent: The key of the pack below it, or None if it stands on the image.
        parent_seal: The `Pack.seal` of that pack when this one was made.
        image: The sha256 of the image at the bottom.
        backend: The backend that made it, with version and accelerator.
        memory: Bytes of RAM of its machine.
        disk_size: Bytes of the disk that its machine sees.
        disks: Bytes of each disk beside that one, by name.
        created: The time when it was made, in seconds since 1970.
        files: The digest of each file (see `sparse_digest`).
        check: The value of `body()` when it was written, by which a damaged manifest is noticed.
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
    disks: Mapping[str, int] = attrs.field(factory=dict)
    created: float = attrs.field(factory=time.time)
    files: Mapping[str, str] = attrs.field(factory=dict)
    check: str = ""

    def body(self) -> str:
        """Return a digest of everything in the manifest but `check`."""
        return digest(cattrs.unstructure(attrs.evolve(self, check="")))


@attrs.frozen(kw_only=True)
class Pack:
    """A published pack: a folder that is never changed."""

    path: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        """The pack's name in the catalog."""
        return self.manifest.key

    @property
    def seal(self) -> str:
        """A digest of the content.

        A pack made again by the same recipe has the same key and another seal.
        """
        return digest(dict(self.manifest.files))

    @property
    def size(self) -> int:
        """Bytes on disk; holes do not count."""
        return size_on_disk(self.path)

    @property
    def used(self) -> float:
        """The time of its last use or of its making, in seconds since 1970; 0 if it is gone."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0

    def note_use(self) -> None:
        """Mark the pack as used now, because the least recently used one is pruned first."""
        with suppress(OSError):
            # The modification time of the folder, because access times are off on many hosts (noatime).
            os.utime(self.path)

    def stamp(self) -> tuple[tuple[str, int, int, int], ...]:
        """Return sizes, times and inodes of its files, to notice changes without reading them.

        Raises:
            PackCorrupt: A file is missing.
        """
        try:
            status = {name: (self.path / name).lstat() for name in sorted(self.manifest.files)}
        except OSError as error:
            raise PackCorrupt(f"the pack {self.key[:12]} ({self.manifest.name}) lacks {Path(error.filename).name}") from error
        return tuple((name, each.st_size, each.st_mtime_ns, each.st_ino) for name, each in status.items())

    def verify(self) -> None:
        """Read all its files and compare them with the manifest.

        Raises:
            PackCorrupt: A file differs, is missing, or does not belong there; the message names the first one.
        """
        label = f"the pack {self.key[:12]} ({self.manifest.name})"
        # Extra files count as damage: the presence of a file, such as the RAM's, decides how a clone is started.
        found = {path.name for path in self.path.iterdir()} - {_MANIFEST}
        for name in sorted(found ^ set(self.manifest.files)):
            raise PackCorrupt(f"{label} {'has a file that does not belong there' if name in found else 'lacks a file'}: {name}")
        for name, expected in self.manifest.files.items():
            path = self.path / name
            # What a symbolic link leads to could change after this look at it.
            if path.is_symlink() or not path.is_file() or sparse_digest(path) != expected:
                raise PackCorrupt(f"{label} is damaged: {name} does not match the manifest")


def read(path: Path) -> Pack:
    """Read the pack in a folder.

    Raises:
        FileNotFoundError: There is no pack.
        PackCorrupt: Its manifest cannot be read.
    """
    try:
        manifest, facts = records.read_as(path / _MANIFEST, lambda facts: (cattrs.structure(facts, Manifest), facts))
    except FileNotFoundError:
        if path.is_dir():
            raise PackCorrupt(f"the pack {path.name[:12]} has no {_MANIFEST}") from None
        raise
    except (OSError, records.Damaged) as error:
        raise PackCorrupt(f"the manifest of the pack {path.name[:12]} cannot be read: {error}") from error
    # Compared both ways, so that a member which this version ignores is noticed too.
    if manifest.check != manifest.body() or cattrs.unstructure(manifest) != facts:
        raise PackCorrupt(f"the manifest of the pack {path.name[:12]} is damaged: it was changed after it was written")
    if manifest.format != FORMAT or manifest.key != generations.name_of(path):
        raise PackCorrupt(f"the pack {path.name[:12]} was made by another version, or has another pack's name")
    return Pack(path=path, manifest=manifest)


def scan(folder: Path) -> tuple[tuple[Pack, ...], Mapping[str, PackCorrupt]]:
    """Return all published packs, oldest first, and the errors of those with an unreadable manifest, by name."""
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
    """Return the folders of all packs, damaged or not; the last one of each key."""
    return [there[-1] for there in generations.all_in(folder).values()]


def find(folder: Path, prefix: str) -> Path:
    """Return the folder of the only pack whose key begins with `prefix`.

    The pack may be damaged.

    Raises:
        CatalogError: There is no such pack, or more than one.
    """
    found = sorted(path for path in _latest(folder) if prefix and path.name.startswith(prefix))
    if not found:
        raise CatalogError(f"there is no pack whose key begins with {prefix!r}: `vmbottle pack ls` lists the packs")
    if len(found) > 1:
        raise CatalogError(
            f"{prefix!r} is the beginning of {len(found)} keys, so give more characters: {', '.join(path.name[:12] for path in found)}"
        )
    return found[0]


def check_parent(pack: Pack) -> None:
    """Check that the pack below is the one that a pack was made on.

    The files of neither are read.

    Raises:
        PackCorrupt: The pack below it is gone, damaged, or was made again.
    """
    if pack.manifest.parent is None:
        return
    try:
        there = generations.every(pack.path.parent, pack.manifest.parent)
        # The seal and not the key: a pack made again has the same key, but a disk with other blocks.
        same = bool(there) and read(there[-1]).seal == pack.manifest.parent_seal
    except (FileNotFoundError, PackCorrupt):
        same = False
    if not same:
        raise PackCorrupt(f"the pack {pack.key[:12]} ({pack.manifest.name}) needs a pack that is gone or was built again")


def children_first(chosen: Iterable[Pack]) -> list[Pack]:
    """Sort packs so that each comes before the pack below it."""
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
    """Return the size on disk of packs, by key.

    Packs that are gone meanwhile are left out.
    """
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
    """Choose the packs to remove, the least recently used first.

    Packs that are held, and those below a pack that stays, are not chosen.

    Args:
        everything: The packs to choose from.
        held: Function that tells whether somebody uses a pack.
        made_before: Remove packs made before this time, in seconds since 1970.
        used_before: Remove packs last used before this time.
        keep_size: Remove packs until the others take at most so many bytes on disk. Without any of the three, all removable packs are
            chosen.
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
        # One at a time: each removal may free the pack below it, and makes the rest smaller.
        chosen = next((pack for pack in free if due(pack)), None)
        if chosen is None:
            return gone
        gone.append(left.pop(chosen.key))
        taken.pop(chosen.key, None)


def seal(folder: Path, manifest: Manifest) -> None:
    """Make the files of a pack read-only and write its manifest, with the digest of each file."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = sparse_digest(path)
        # QEMU before 8.2 opens the file of a private RAM mapping for writing, which it then never does; only root could with 0400.
        path.chmod(0o600 if path.name == "ram.img" else 0o400)
    complete = attrs.evolve(manifest, files=files)
    # Two steps, because the digest is of everything else in the manifest.
    complete = attrs.evolve(complete, check=complete.body())
    # Version 0 has no checksum of its own, which `check` is already.
    records.write(folder / _MANIFEST, cattrs.unstructure(complete), version=0, mode=0o400)
