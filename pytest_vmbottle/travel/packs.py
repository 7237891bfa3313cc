"""Export of packs with what they stand on, and import into a catalog that may be in use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import cattrs

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.packs import Manifest, Pack
from pytest_vmbottle.errors import CatalogError, PackCorrupt, VMBottleError
from pytest_vmbottle.host import records
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.host.generations import Holds
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.images import ImageStore
from pytest_vmbottle.images.disk_format import inspect, opened
from pytest_vmbottle.images.store import INITRD, KERNEL, check_name, explained
from pytest_vmbottle.shown import printable
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.travel.archive import ArchiveReader, ArchiveWriter, Index, TravelFile, TravelImage, TravelPack, writing

if TYPE_CHECKING:
    from pytest_vmbottle.images import Image
    from pytest_vmbottle.travel.minisign import PublicKey

__all__ = ["UNFIT", "Exporter", "Fingerprint", "Importer", "image_of"]

Fingerprint = Callable[[MachineSpec], str]
"""Function that returns what a pack for machines of a spec depends on, on this computer."""

_SAY = Callable[[str], object]
_SPEC, _RECORD = "spec.json", "pack.json"
_IMAGE_FILES = {"disk.qcow2", "disk.raw", KERNEL, INITRD}
_KEY = re.compile(r"[0-9a-f]{64}")
UNFIT = (
    "and cannot be restored here: it needs the same QEMU and accelerator, and with KVM the same processor and kernel of the host "
    "(of its processor only the maker, where cpu= is a level such as 'x86-64-v2'); "
    "`vmbottle doctor` tells those of this computer"
)
"""End of the sentence about what was made elsewhere."""


@attrs.frozen(kw_only=True)
class Exporter:
    """Writer of packs into files.

    Attributes:
        catalog: The catalog that has the packs.
        fingerprint: What packs depend on here.
        say: Function that is told of the progress.
    """

    catalog: Catalog
    fingerprint: Fingerprint
    say: _SAY

    def write(self, pack: Pack, target: Path, *, parents: bool) -> None:
        """Write a pack into a file, which is there when it is complete.

        Args:
            pack: The pack.
            target: The file.
            parents: Whether the packs below it and the image are in the file too; else whoever imports it must have them.

        Raises:
            CatalogError: A pack below it, or the image, is gone or damaged.
        """
        with explained(f"write {target}"), Holds() as holds, writing(target) as archive:
            chain = self._chain(pack, holds)
            bases = (None, *chain)
            written = [self._written(archive, each, base) for each, base in zip(chain, bases, strict=False) if parents or each is chain[-1]]
            image = self.add_image(archive, self._image_below(pack), holds) if parents else None
            archive.finish(Index(packs=tuple(written), image=image))

    def add(self, archive: ArchiveWriter, several: Iterable[Pack], holds: Holds) -> tuple[list[TravelPack], list[Image]]:
        """Add packs and those below them to an archive, each once; return them, lowest first, and the images below them.

        Raises:
            CatalogError: A pack or an image is gone or damaged.
        """
        written: dict[str, TravelPack] = {}
        images: dict[str, Image] = {}
        for pack in several:
            chain = self._chain(pack, holds)
            for each, base in zip(chain, (None, *chain), strict=False):
                if each.key not in written:
                    written[each.key] = self._written(archive, each, base)
            image = self._image_below(pack)
            images[image.key] = image
        return list(written.values()), list(images.values())

    def write_image(self, image: Image, target: Path) -> None:
        """Write an image into a file, which is there when it is complete.

        Raises:
            CatalogError: The image is gone or damaged.
        """
        with explained(f"write {target}"), Holds() as holds, writing(target) as archive:
            archive.finish(Index(image=self.add_image(archive, image, holds)))

    def _chain(self, pack: Pack, holds: Holds) -> list[Pack]:
        """Return the packs from the lowest one up to a pack, held."""
        chain = [pack]
        holds.take(pack.path)
        while (parent := chain[0].manifest.parent) is not None:
            packs.check_parent(chain[0])
            below = packs.read(self.catalog.pack(parent))
            holds.take(below.path)
            chain.insert(0, below)
        return chain

    def _written(self, archive: ArchiveWriter, pack: Pack, base: Pack | None) -> TravelPack:
        self.say(f"packing {pack.manifest.name}, {format_size(pack.size)}")
        pack.verify()
        files = tuple(archive.add(pack.path / name, _same_file(base, name)) for name in sorted(pack.manifest.files))
        return TravelPack(manifest=cattrs.unstructure(pack.manifest), depends=self.fingerprint(_spec(pack.path)), files=files)

    def _image_below(self, pack: Pack) -> Image:
        image = image_of(self.catalog, pack.manifest)
        if image is None:
            raise CatalogError(f"the image of the pack {pack.key[:12]} ({pack.manifest.name}) is not among the images: --without-parents")
        return image

    def add_image(self, archive: ArchiveWriter, image: Image, holds: Holds) -> TravelImage:
        """Add an image to an archive, and return what the index says of it."""
        holds.take(image.disk.parent)
        self.say(f"packing the image {image.name}")
        files = tuple(archive.add(path, None) for path in (image.disk, image.kernel, image.initrd) if path is not None)
        return TravelImage(
            name=image.name, arch=image.arch, cmdline=image.cmdline, description=image.description, traits=image.traits, files=files
        )


@attrs.frozen(kw_only=True)
class Importer:
    """Reader of packs from files.

    Attributes:
        catalog: The catalog that gets the packs; it may be in use.
        fingerprint: What packs depend on here.
        say: Function that is told of the progress.
    """

    catalog: Catalog
    fingerprint: Fingerprint
    say: _SAY

    def read(self, source: Path, signer: PublicKey | None = None) -> list[Pack]:
        """Import the packs of a file, with the image below them if it is there; return those that are new, lowest first.

        Args:
            source: The file.
            signer: The key that it must be signed with, if any.

        Raises:
            CatalogError: The file is damaged or not signed with the key, a pack fits another computer, or what it stands on is missing.
                What came before it is there.
        """
        with explained(f"import {source}"), ArchiveReader(source, signer) as archive, Holds() as holds:
            if signer is not None:
                self.say(f"signed with the key {signer.name}: {archive.comment}")
            if not archive.index.packs:
                hint = ": `vmbottle capsule import` reads the capsule in it" if archive.index.capsule is not None else ""
                raise CatalogError(f"{source} has no packs{hint}")
            self.check(archive)
            if archive.index.image is not None:
                self.add_image(archive, archive.index.image, {_manifest(each).image for each in archive.index.packs})
            return self.add(archive, holds)

    def check(self, archive: ArchiveReader) -> None:
        """Look whether the packs of an open archive fit this computer, which is known before images and RAM are unpacked.

        Raises:
            CatalogError: A pack fits another computer, is damaged, or what it stands on is missing.
        """
        with self.catalog.staging() as staging:
            for each in archive.index.packs:
                manifest = _manifest(each)
                folder = private_dir(staging / manifest.key)
                below = staging / str(manifest.parent) / _SPEC
                base = below if below.exists() else _same_file(self._parent(manifest), _SPEC)
                for file in (file for file in each.files if file.name == _SPEC):
                    archive.extract(file, folder, base)
                if self.fingerprint(_spec(folder)) != each.depends:
                    raise CatalogError(f"{_label(manifest)} was made by {printable(manifest.backend)}, {UNFIT}")

    def add(self, archive: ArchiveReader, holds: Holds) -> list[Pack]:
        """Import the packs of an open archive that has been checked, and hold them; return those that are new, lowest first.

        Raises:
            CatalogError: As for `read`.
        """
        wanted = [(_manifest(each), each) for each in archive.index.packs]
        new = []
        for manifest, each in wanted:
            if not self._is_there(manifest):
                new.append(self._add(archive, manifest, each))
            # So that what stands on it finds it, whoever prunes meanwhile.
            holds.take(self.catalog.pack(manifest.key))
        return new

    def _is_there(self, manifest: Manifest) -> bool:
        try:
            there = dict(packs.read(self.catalog.pack(manifest.key)).manifest.files) == dict(manifest.files)
        except (FileNotFoundError, PackCorrupt):
            return False
        if there:
            self.say(f"{_label(manifest)} is there already")
        return there

    def _add(self, archive: ArchiveReader, manifest: Manifest, wanted: TravelPack) -> Pack:
        if {file.name for file in wanted.files} != manifest.files.keys() or _RECORD in manifest.files:
            raise CatalogError(f"{_label(manifest)}: the archive has other files than its manifest")
        parent = self._parent(manifest)
        if image_of(self.catalog, manifest) is None:
            raise CatalogError(f"{_label(manifest)} needs its image, which is not here: import an archive that has it")
        with self.catalog.staging() as staging:
            folder = staging / manifest.key
            folder.mkdir(mode=0o700)
            self.say(f"unpacking {manifest.name}")
            for file in wanted.files:
                _extract(archive, file, folder, parent)
            records.write(folder / _RECORD, cattrs.unstructure(manifest), version=0, mode=0o400)
            packs.read(folder).verify()
            return packs.read(self.catalog.publish(folder, manifest.key))

    def _parent(self, manifest: Manifest) -> Pack | None:
        """Return the pack below, which must be the very one that a pack was made on."""
        if manifest.parent is None:
            return None
        with suppress(FileNotFoundError, PackCorrupt):
            found = packs.read(self.catalog.pack(manifest.parent))
            if found.seal == manifest.parent_seal:
                return found
        raise CatalogError(f"{_label(manifest)} needs the pack {manifest.parent[:12]} that it was made on: import an archive that has it")

    def read_image(self, source: Path, *, name: str) -> Image:
        """Import the image of a file under a name.

        Raises:
            CatalogError: The file is damaged or has no image, or another image has the name.
        """
        with explained(f"import {source}"), ArchiveReader(source) as archive:
            if archive.index.image is None:
                raise CatalogError(f"{source} has no image")
            return self._unpack(archive, archive.index.image, name)

    def add_image(self, archive: ArchiveReader, wanted: TravelImage, needed: set[str]) -> None:
        """Import an image of an open archive, unless one that is needed is here.

        Args:
            archive: The archive.
            wanted: The image.
            needed: The keys of images, or the digests of their disks, of which it must have one.

        Raises:
            CatalogError: It is another image, or is damaged.
        """
        store = ImageStore(self.catalog.images)
        if any(needed & {image.key, image.sha256} for image in store.list()):
            return
        name = wanted.name if wanted.name not in store.names() else f"{wanted.name}-{min(needed)[:6]}"
        image = self._unpack(archive, wanted, name)
        if not needed & {image.key, image.sha256}:
            raise CatalogError(f"the image {wanted.name!r} of the archive is not the one of its packs")

    def _unpack(self, archive: ArchiveReader, wanted: TravelImage, name: str) -> Image:
        # Before anything is made of it: a name becomes the name of a file.
        check_name(name)
        if not {file.name for file in wanted.files} <= _IMAGE_FILES:
            raise CatalogError(f"the image {wanted.name!r} of the archive has files that no image has")
        self.say(f"unpacking the image {name}")
        store = ImageStore(self.catalog.images)
        with store.staging() as folder:
            for file in wanted.files:
                archive.extract(file, folder, None)
            return store.publish(
                folder, name=name, arch=wanted.arch, cmdline=wanted.cmdline, description=wanted.description, traits=wanted.traits
            )


def _label(manifest: Manifest) -> str:
    return f"the pack {manifest.key[:12]} ({printable(manifest.name)})"


def image_of(catalog: Catalog, manifest: Manifest) -> Image | None:
    """Return the image that a pack stands on, if a catalog has it."""
    return next((image for image in ImageStore(catalog.images).list() if manifest.image in (image.key, image.sha256)), None)


def _spec(folder: Path) -> MachineSpec:
    try:
        spec = MachineSpec(**records.read(folder / _SPEC))
    except (OSError, ValueError, TypeError, VMBottleError) as error:
        raise PackCorrupt(f"the pack {folder.name[:12]} does not say what its machine is like: {error}") from error
    # A pack has its disks in itself. A file of this computer would be shown to the guest.
    if any(isinstance(source, Path) for _, source in spec.disks):
        raise PackCorrupt(f"the pack {folder.name[:12]} names files that are not in it, for the disks of its machine")
    return spec


def _same_file(base: Pack | None, name: str) -> Path | None:
    return base.path / name if base is not None and name in base.manifest.files else None


def _manifest(pack: TravelPack) -> Manifest:
    with suppress(ValueError, TypeError, KeyError, AttributeError, cattrs.BaseValidationError):
        manifest = cattrs.structure(pack.manifest, Manifest)
        # A key becomes the name of a folder.
        if manifest.check == manifest.body() and _KEY.fullmatch(manifest.key):
            return manifest
    raise CatalogError("the archive has a pack whose manifest is damaged")


def _extract(archive: ArchiveReader, file: TravelFile, folder: Path, parent: Pack | None) -> None:
    path = archive.extract(file, folder, _same_file(parent, file.name))
    if path.suffix == ".qcow2":
        # A disk's header could name other files of this computer.
        with opened(path) as disk:
            inspect(disk, path)
    # QEMU before 8.2 opens the file of a private RAM mapping for writing, which it then never does (see `packs.seal`).
    path.chmod(0o600 if file.name == "ram.img" else 0o400)
