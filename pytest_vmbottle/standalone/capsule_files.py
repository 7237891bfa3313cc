"""Capsules in files, for another computer.

Of a machine, the file has what is in no pack and no image of the catalog. The rest is named in its boot source, by places::

    own/NAME, own/KEY/NAME      a file that travels, perhaps one of the snapshot with the key
    pack/KEY, pack/KEY/NAME     a pack, or a file of it
    image/KEY/NAME              a file of an image

Nothing in such a file is believed: places, names, sizes, digests and the headers of disks are checked, and files are made in a folder of
their own alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import cattrs

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.errors import CatalogError, PackCorrupt, SpecError
from pytest_vmbottle.host import generations
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.host.generations import Holds
from pytest_vmbottle.images import ImageStore
from pytest_vmbottle.images.disk_format import check_again
from pytest_vmbottle.images.store import explained
from pytest_vmbottle.shown import printable
from pytest_vmbottle.standalone.capsules import Capsule
from pytest_vmbottle.standalone.client import LABEL
from pytest_vmbottle.standalone.stored import Stored
from pytest_vmbottle.travel.archive import ArchiveReader, Index, TravelCapsule, TravelFile, TravelMachine, TravelNeed, writing
from pytest_vmbottle.travel.packs import UNFIT, Exporter, Importer

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vmbottle.backends.port import Start
    from pytest_vmbottle.catalog.catalog import Catalog
    from pytest_vmbottle.catalog.packs import Pack
    from pytest_vmbottle.images import Image
    from pytest_vmbottle.travel.archive import ArchiveWriter
    from pytest_vmbottle.travel.minisign import PublicKey
    from pytest_vmbottle.travel.packs import Fingerprint

__all__ = ["CapsuleExporter", "CapsuleImporter"]

_OWN, _PACK, _IMAGE = "own", "pack", "image"
_FILE = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_KEY = r"[0-9a-f]{64}"
_OWN_PLACE = re.compile(rf"own/(?:{_KEY}/)?{_FILE}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,49}")
"""Name of a machine in a capsule, where two of one name have numbers."""
_HIGHEST = 255
"""Highest number in an address."""


@attrs.frozen(kw_only=True)
class CapsuleExporter:
    """Writer of capsules into files.

    Attributes:
        catalog: The catalog that has what they stand on.
        fingerprint: What packs depend on here.
        say: Function that is told of the progress.
    """

    catalog: Catalog
    fingerprint: Fingerprint
    say: Callable[[str], object]

    def write(self, capsule: Capsule, target: Path, *, with_packs: bool) -> None:
        """Write a capsule into a file, which is there when it is complete; only its owner can read it.

        Args:
            capsule: The capsule.
            target: The file.
            with_packs: Whether the packs and images that it stands on are in the file too; else whoever imports it must have them.

        Raises:
            CatalogError: It is damaged, or is of a backend with images of its own.
        """
        with explained(f"write {target}"), Holds() as holds, writing(target) as archive:
            known = _Known(self.catalog)
            machines = []
            for name in capsule.machines:
                self.say(f"packing the machine {printable(name)}")
                stored = capsule.stored(name)
                holds.take(stored.snapshot().path)
                machines.append(_Departing(archive, known).machine(capsule, name, stored))
            exporter = Exporter(catalog=self.catalog, fingerprint=self.fingerprint, say=self.say)
            written, images = exporter.add(archive, known.packs.values(), holds) if with_packs else ([], [])
            below = {image.key: image for image in (*known.images.values(), *images)} if with_packs else {}
            travelling = TravelCapsule(
                test=capsule.test,
                error=capsule.error,
                created=capsule.created,
                machines=tuple(machines),
                packs={key: TravelNeed(name=pack.manifest.name, seal=pack.seal) for key, pack in known.packs.items()},
                images={key: image.name for key, image in known.images.items()},
                with_images={key: exporter.add_image(archive, image, holds) for key, image in below.items()},
            )
            archive.finish(Index(packs=tuple(written), capsule=travelling))


class _Known:
    """The files of a catalog's packs and images, found by what they are and not by their names.

    Attributes:
        packs, images: Those that were asked for, by key.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.packs: dict[str, Pack] = {}
        self.images: dict[str, Image] = {}
        self._all = {pack.key: pack for pack in packs.scan(catalog.packs)[0]}
        self._files: dict[tuple[int, int], tuple[Pack | Image, str]] = {}
        for pack in self._all.values():
            for path in pack.path.iterdir():
                # A seed is a file of several packs: the first one will do.
                self._files.setdefault(_inode(path), (pack, path.name))
        for image in ImageStore(catalog.images).list():
            self._files.update({_inode(path): (image, path.name) for path in _files(image)})

    def place(self, path: Path) -> str | None:
        """Return the place of a file that is in a pack or an image."""
        found, name = self._files.get(_inode(path), (None, ""))
        if found is None:
            return None
        if isinstance(found, packs.Pack):
            self.packs[found.key] = found
            return f"{_PACK}/{found.key}/{name}"
        self.images[found.key] = found
        return f"{_IMAGE}/{found.key}/{name}"

    def pack_place(self, folder: Path) -> str | None:
        """Return the place of a pack, if the catalog has the very one."""
        wanted = packs.read(folder)
        found = self._all.get(wanted.key)
        if found is None or found.seal != wanted.seal:
            return None
        self.packs[found.key] = found
        return f"{_PACK}/{found.key}"


def _files(image: Image) -> Iterator[Path]:
    return (path for path in (image.disk, image.kernel, image.initrd) if path is not None)


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


class _Departing:
    """A machine that is being written."""

    def __init__(self, archive: ArchiveWriter, known: _Known) -> None:
        self._archive, self._known = archive, known
        self._files: dict[str, TravelFile] = {}
        self._places: dict[tuple[int, int], str] = {}

    def machine(self, capsule: Capsule, name: str, stored: Stored) -> TravelMachine:
        """Write its own files, and return what the index says of it."""
        if stored.start.image or not stored.start.disks:
            raise CatalogError(
                f"the machine {name!r} of the capsule {capsule.name} is of a backend with images of its own: only QEMU's travel"
            )
        # Sizes in place of the images that disks were made from: all that they had is in the files.
        keywords = {**stored.keywords, "disks": {disk.name: disk.size for disk in stored.start.data}}
        converter = Stored.converter(unstructure=self._place)
        facts = converter.unstructure(attrs.evolve(stored, keywords=keywords))
        address = capsule.addresses.get(name, "")
        return TravelMachine(name=name, depends=capsule.depends(name), stored=facts, files=self._files, address=address)

    def _place(self, path: Path) -> str:
        if path.is_dir():
            return self._known.pack_place(path) or self._folder(path)
        # A disk of a snapshot is one of the snapshot's files, whichever of them comes first.
        inode = _inode(path)
        return self._places.get(inode) or self._known.place(path) or self._add(path, f"{_OWN}/{self._label(path)}")

    def _label(self, path: Path) -> str:
        if re.fullmatch(_KEY, path.parent.name):
            return f"{path.parent.name}/{path.name}"
        # One that lies in its own place may have any name.
        return path.name if re.fullmatch(_FILE, path.name) and f"{_OWN}/{path.name}" not in self._files else f"file-{len(self._files)}"

    def _folder(self, folder: Path) -> str:
        for path in sorted(folder.iterdir()):
            self._add(path, f"{_OWN}/{folder.name}/{path.name}")
        return f"{_OWN}/{folder.name}"

    def _add(self, path: Path, place: str) -> str:
        if place not in self._files:
            written = self._archive.add(path, None)
            self._files[place] = attrs.evolve(written, name=place.rpartition("/")[2])
            self._places[_inode(path)] = place
        return place


@attrs.frozen(kw_only=True)
class CapsuleImporter:
    """Reader of capsules from files.

    Attributes:
        catalog: The catalog that gets them; it may be in use.
        fingerprint: What packs depend on here.
        say: Function that is told of the progress.
    """

    catalog: Catalog
    fingerprint: Fingerprint
    say: Callable[[str], object]

    def read(self, source: Path, signer: PublicKey | None = None) -> Capsule:
        """Import the capsule of a file, with the packs and images that are in it.

        Args:
            source: The file.
            signer: The key that it must be signed with, if any.

        Raises:
            CatalogError: The file is damaged or not signed with the key, fits another computer, or a pack that it stands on is missing.
                Packs that came before are there.
        """
        with explained(f"import {source}"), ArchiveReader(source, signer) as archive, Holds() as holds:
            if signer is not None:
                self.say(f"signed with the key {signer.name}: {archive.comment}")
            wanted = archive.index.capsule
            if wanted is None:
                raise CatalogError(f"{source} has no capsule: `vmbottle pack import` reads packs")
            importer = Importer(catalog=self.catalog, fingerprint=self.fingerprint, say=self.say)
            importer.check(archive)
            for key, image in wanted.with_images.items():
                importer.add_image(archive, image, {key})
            importer.add(archive, holds)
            below = _Below(self.catalog, wanted, holds)
            with self.catalog.staging() as staging:
                machines = {name: self._machine(archive, each, below, staging) for name, each in _named(wanted)}
                return Capsule.save(
                    self.catalog.root,
                    machines,
                    test=printable(wanted.test),
                    error=printable(wanted.error),
                    created=wanted.created,
                    addresses={each.name: each.address for each in wanted.machines if each.address},
                )

    def _machine(self, archive: ArchiveReader, wanted: TravelMachine, below: _Below, staging: Path) -> tuple[Stored, str]:
        self.say(f"unpacking the machine {wanted.name}")
        folder = private_dir(staging / wanted.name)
        try:
            _check_places(wanted.files)
            # Its facts first: whether it fits this computer is known before its RAM is written.
            stored = Stored.converter(structure=lambda place: _path(place, folder, wanted, below)).structure(wanted.stored, Stored)
            _check_start(stored.start, folder)
            if not LABEL.fullmatch(stored.label):
                raise ValueError("the label of its snapshot is none")
            if self.fingerprint(_spec(stored)) != wanted.depends:
                raise CatalogError(f"the machine {wanted.name!r} was made by another QEMU or accelerator, {UNFIT}")
            for place, file in wanted.files.items():
                extracted = archive.extract(file, private_dir((folder / place.removeprefix(f"{_OWN}/")).parent), None)
                # QEMU before 8.2 opens the file of a private RAM mapping for writing, which it then never does.
                extracted.chmod(0o600 if extracted.name == "ram.img" else 0o400)
            _check_content(stored.start)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, cattrs.BaseValidationError) as error:
            raise CatalogError(f"the machine {wanted.name!r} of the archive is damaged: {_reason(error)}") from error
        return stored, wanted.depends


def _named(capsule: TravelCapsule) -> Iterator[tuple[str, TravelMachine]]:
    names = [machine.name for machine in capsule.machines]
    # Each becomes the name of a folder.
    if not names or len(set(names)) != len(names) or not all(map(_NAME.fullmatch, names)):
        raise CatalogError("the capsule of the archive is damaged: its machines have no proper names")
    # The last number becomes the name of a file, and a part of a MAC address.
    numbers = [each for machine in capsule.machines for address in machine.address.split() for each in address.split(".")]
    if any(each != str(int(each)) or int(each) > _HIGHEST for each in numbers) or {"0", "255"} & set(numbers[3::4]):
        raise CatalogError("the capsule of the archive is damaged: its machines have no proper addresses")
    yield from zip(names, capsule.machines, strict=True)


class _Below:
    """The packs and images that a capsule stands on, which this catalog must have."""

    def __init__(self, catalog: Catalog, capsule: TravelCapsule, holds: Holds) -> None:
        self._packs = {key: _found_pack(catalog, key, need, holds) for key, need in capsule.packs.items()}
        there = {image.key: image for image in ImageStore(catalog.images).list()}
        self._images: dict[str, Image] = {}
        for key, name in capsule.images.items():
            if key not in there:
                raise _missing(f"the image {printable(name)}", "`vmbottle pack import`, from a file of a pack of it")
            self._images[key] = there[key]
            holds.take(there[key].disk.parent)

    def pack(self, key: str) -> Path:
        """Return the folder of a pack."""
        return self._packs[key].path

    def file(self, kind: str, key: str, name: str) -> Path:
        """Return a file of a pack or an image."""
        if kind == _PACK:
            pack = self._packs[key]
            return {each: pack.path / each for each in pack.manifest.files}[name]
        return {path.name: path for path in _files(self._images[key])}[name]


def _found_pack(catalog: Catalog, key: str, need: TravelNeed, holds: Holds) -> Pack:
    if not re.fullmatch(_KEY, key):
        raise CatalogError("the capsule of the archive is damaged: it stands on a pack without a proper key")
    label = f"the pack {key[:12]} ({printable(need.name)})"
    there = generations.every(catalog.packs, key)
    for folder in reversed(there):
        with suppress(FileNotFoundError, PackCorrupt):
            holds.take(folder)
            pack = packs.read(folder)
            if pack.seal == need.seal:
                pack.verify()
                return pack
    if there:
        raise CatalogError(
            f"the capsule needs {label} that it was made on, and the one of this key here was built anew: remove that with "
            f"`vmbottle pack rm {key[:12]}`, and import the other with `vmbottle pack import`, or export the capsule with --with-pack"
        )
    raise _missing(label, "`vmbottle pack import` or `vmbottle pack pull`")


def _missing(what: str, how: str) -> CatalogError:
    return CatalogError(f"the capsule needs {what}, which is not here: import it with {how}, or export the capsule with --with-pack")


def _check_places(files: Mapping[str, TravelFile]) -> None:
    for place, file in files.items():
        if not _OWN_PLACE.fullmatch(place) or file.name != place.rpartition("/")[2]:
            raise ValueError(f"{printable(place[:60])} is no place for a file")


def _path(place: str, folder: Path, machine: TravelMachine, below: _Below) -> Path:
    """Return the path that a place of a boot source stands for."""
    if place in machine.files:
        return folder / place.removeprefix(f"{_OWN}/")
    kind, *words = place.split("/")
    if kind == _OWN and len(words) == 1 and re.fullmatch(_KEY, words[0]):
        return folder / words[0]
    if kind == _PACK and len(words) == 1:
        return below.pack(words[0])
    if kind in (_PACK, _IMAGE) and len(words) == 2:  # noqa: PLR2004 - the key and the name
        return below.file(kind, *words)
    raise ValueError(f"{printable(place[:60])} is no place")


def _check_start(start: Start, folder: Path) -> None:
    """Check what no machine of a capsule has, and what leads somewhere else."""
    strange = start.image or start.kept or start.building or start.overlay or start.forwards
    if strange or start.saved is None or start.saved.parent != folder or not start.disks:
        raise ValueError("it is no snapshot of a machine")
    if start.firmware not in ("bios", "uefi") or "\0" in start.cmdline or any(disk.overlay is not None for disk in start.data):
        raise ValueError("it boots in no known way")
    if any(disk.format not in ("qcow2", "raw") for disk in start.images):
        raise ValueError("it has a disk of no known format")


def _check_content(start: Start) -> None:
    """Check the files: those of its snapshot and of its pack by their digests, disks by their headers."""
    for folder in (start.saved, start.ram):
        if folder is not None:
            packs.read(folder).verify()
    for disk in start.images:
        # QEMU is told the format, and gets no header that names other files of this computer. A raw disk may have any content.
        if disk.format == "qcow2":
            check_again(disk.path, "qcow2")
    for path in (start.seed, start.kernel, start.initrd):
        if path is not None and not path.is_file():
            raise ValueError(f"{path.name} is missing")


def _spec(stored: Stored) -> Any:
    keywords: Mapping[str, Any] = stored.keywords
    # A disk's name becomes the name of its file; and a file of this computer would be shown to the guest.
    if keywords.get("disks") != {disk.name: disk.size for disk in stored.start.data}:
        raise ValueError("it has other disks than its snapshot")
    try:
        return stored.spec()
    except SpecError as error:
        raise ValueError(str(error)) from error


def _reason(error: Exception) -> str:
    while isinstance(error, ExceptionGroup):  # as cattrs has them
        error = error.exceptions[0]
    return printable(str(error).partition("\n")[0][:200])
