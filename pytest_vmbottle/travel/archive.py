"""The file that packs travel in: a zip archive of compressed pieces, and an index that says what they belong to.

::

    index.json      the packs, lowest first, the image, the capsule, and the pieces of their files
    pieces/SHA256   a compressed piece (see `pieces`), by the digest of what is in the file
    (the comment)   the sha256 of all before it, so that no bit of the file changes unnoticed

Equal pieces are there once. Nothing in it is believed: whoever reads it checks names, sizes and digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import attrs
import cattrs

from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host.files import atomic_file
from pytest_vmbottle.images import Traits
from pytest_vmbottle.travel.pieces import LARGEST_BLOB, Piece, join, split

if TYPE_CHECKING:
    from pytest_vmbottle.travel.minisign import PublicKey

__all__ = [
    "ArchiveReader",
    "ArchiveWriter",
    "Index",
    "TravelCapsule",
    "TravelFile",
    "TravelImage",
    "TravelMachine",
    "TravelNeed",
    "TravelPack",
    "writing",
]

_FORMAT = 1
_SEAL = 64
"""Digits of the digest at the end."""
_INDEX, _PIECES = "index.json", "pieces/"
_LARGEST_INDEX = 64 << 20
_LARGEST_FILE = 1 << 42
_LATEST = 1e11
"""Latest time of a capsule, in seconds since 1970, which a calendar still has."""
_FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_SPOILED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, NotImplementedError, RuntimeError, ValueError, OSError)
"""Errors of reading a damaged zip archive."""

_ADDRESS = r"(10\.7[78]\.[0-9]{1,3}\.[0-9]{1,3})?"
"""Addresses of private LANs (see `Lan` and `SharedLan`)."""

_size = [attrs.validators.instance_of(int), attrs.validators.ge(0), attrs.validators.le(_LARGEST_FILE)]
_time = attrs.validators.and_(attrs.validators.instance_of(float), attrs.validators.ge(0.0), attrs.validators.le(_LATEST))
_text = attrs.validators.instance_of(str)


@attrs.frozen(kw_only=True)
class TravelFile:
    """A file of a pack or of an image, in pieces."""

    name: str = attrs.field(validator=attrs.validators.matches_re(_FILE_NAME))
    size: int = attrs.field(validator=_size)
    pieces: tuple[Piece, ...]


@attrs.frozen(kw_only=True)
class TravelPack:
    """A pack.

    Attributes:
        manifest: The facts of its `pack.json`.
        depends: What the computer that restores it must have in common with the one that made it (see `Backend.fingerprint`).
        files: Its files, without `pack.json`.
    """

    manifest: Mapping[str, Any]
    depends: str = attrs.field(validator=_text)
    files: tuple[TravelFile, ...]


@attrs.frozen(kw_only=True)
class TravelImage:
    """The image below the packs.

    Attributes:
        name: Its name where it comes from.
        arch, cmdline, description, traits: As for `ImageStore.publish`.
        files: Its disk, and perhaps its kernel.
    """

    name: str = attrs.field(validator=_text)
    arch: str = attrs.field(validator=_text)
    cmdline: str = attrs.field(validator=_text)
    description: str = attrs.field(validator=_text)
    traits: Traits
    files: tuple[TravelFile, ...]


@attrs.frozen(kw_only=True)
class TravelNeed:
    """A pack that a capsule stands on.

    Attributes:
        name: Its name, for people.
        seal: Its `Pack.seal`.
    """

    name: str = attrs.field(validator=_text)
    seal: str = attrs.field(validator=_text)


@attrs.frozen(kw_only=True)
class TravelMachine:
    """A machine of a capsule.

    Attributes:
        name: Its name in the capsule.
        depends: As for `TravelPack`.
        stored: Its boot source, with places instead of paths.
        files: The files that are in no pack and no image, by their places.
        address: Its address on a private LAN; empty if it was on none.
    """

    name: str = attrs.field(validator=_text)
    depends: str = attrs.field(validator=_text)
    stored: Mapping[str, Any]
    files: Mapping[str, TravelFile]
    address: str = attrs.field(default="", validator=attrs.validators.matches_re(_ADDRESS))


@attrs.frozen(kw_only=True)
class TravelCapsule:
    """A capsule.

    Attributes:
        test, error, created: As of `Capsule`.
        machines: Its machines, the test's own first.
        packs: The packs that it stands on, by key.
        images: The names of the images that it stands on, by key.
        with_images: Those of them that are in the file, by key.
    """

    test: str = attrs.field(validator=_text)
    error: str = attrs.field(validator=_text)
    created: float = attrs.field(validator=_time)
    machines: tuple[TravelMachine, ...]
    packs: Mapping[str, TravelNeed]
    images: Mapping[str, str]
    with_images: Mapping[str, TravelImage]


@attrs.frozen(kw_only=True)
class Index:
    """Content of `index.json`."""

    format: int = _FORMAT
    packs: tuple[TravelPack, ...] = ()
    image: TravelImage | None = None
    capsule: TravelCapsule | None = None


class ArchiveWriter:
    """An archive that is being written."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        """Take the open archive."""
        self._archive = archive
        self._there: set[str] = set()

    def add(self, path: Path, base: Path | None) -> TravelFile:
        """Add a file, and return what the index says of it.

        Args:
            path: The file.
            base: A similar file that is in the archive, or that the reader has.
        """
        pieces = []
        for piece, blob in split(path, base):
            pieces.append(piece)
            if piece.blob not in self._there:
                self._there.add(piece.blob)
                self._archive.writestr(_entry(f"{_PIECES}{piece.blob}"), blob)
        return TravelFile(name=path.name, size=path.stat().st_size, pieces=tuple(pieces))

    def finish(self, index: Index) -> None:
        """Write the index."""
        self._archive.writestr(_entry(_INDEX), json.dumps(cattrs.unstructure(index), separators=(",", ":")))


def _entry(name: str) -> zipfile.ZipInfo:
    # Always of the same time, so that equal packs give equal archives.
    return zipfile.ZipInfo(name)


@contextmanager
def writing(path: Path) -> Iterator[ArchiveWriter]:
    """Write an archive, which is there when the block has succeeded."""
    with atomic_file(path) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = b"0" * _SEAL
            yield ArchiveWriter(archive)
        file.flush()
        # It is open for writing only, and has another name yet.
        with Path(f"/proc/self/fd/{file.fileno()}").open("rb") as again:
            sealed = _seal(again)
        file.seek(-_SEAL, os.SEEK_END)
        file.write(sealed.encode())


def _seal(file: BinaryIO) -> str:
    """Return the digest of a file but for its own digest at the end."""
    value, left = hashlib.sha256(), file.seek(0, os.SEEK_END) - _SEAL
    file.seek(0)
    while left > 0 and (chunk := file.read(min(left, 1 << 20))):
        value.update(chunk)
        left -= len(chunk)
    return value.hexdigest()


class ArchiveReader:
    """An archive that somebody gave us; a context manager.

    Attributes:
        index: What is in it.
        comment: The trusted comment of its signature, if that was checked.
    """

    def __init__(self, path: Path, signer: PublicKey | None = None) -> None:
        """Open it, and read the index.

        Args:
            path: The file.
            signer: The key that it must be signed with, if any; before anything else is read.

        Raises:
            CatalogError: It cannot be read, is no archive of packs, or is not signed with the key.
        """
        self._path = path
        with ExitStack() as opened:
            try:
                # Opened once, so that what is read is what was signed, whatever its name stands for by then.
                file = opened.enter_context(path.open("rb"))
                self.comment = signer.check(file, path) if signer is not None else ""
                self._archive = opened.enter_context(zipfile.ZipFile(file))
                if self._archive.comment != _seal(file).encode():
                    raise zipfile.BadZipFile("its content is not what was written")
            except _SPOILED as error:
                reason = getattr(error, "strerror", None) or error
                raise CatalogError(f"{path} is no archive of packs, or is damaged: {reason}") from error
            self.index = self._index()
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def extract(self, file: TravelFile, folder: Path, base: Path | None) -> Path:
        """Write a file into a folder, and return its path.

        Raises:
            CatalogError: The archive is damaged.
        """
        path = folder / file.name
        join(path, file.size, list(file.pieces), fetch=lambda blob: self._read(f"{_PIECES}{blob}", LARGEST_BLOB), base=base)
        return path

    def _index(self) -> Index:
        text = self._read(_INDEX, _LARGEST_INDEX)
        try:
            facts = json.loads(text)
            if isinstance(facts, dict) and facts.get("format") != _FORMAT:
                raise CatalogError(f"{self._path} was written by another version of this program: export it again")
            return cattrs.structure(facts, Index)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, cattrs.BaseValidationError) as error:
            raise CatalogError(f"{self._path}: its index is damaged") from error

    def _read(self, name: str, most: int) -> bytes:
        try:
            with self._archive.open(name) as file:
                data = file.read(most + 1)
        except _SPOILED as error:
            raise CatalogError(f"{self._path} is damaged, or is no archive of packs: {name[:60]}: {error}") from error
        if len(data) > most:
            raise CatalogError(f"{self._path} is damaged: {name[:60]} is too large")
        return data
