"""A content-addressed, read-only store of named images.

Below the store's folder::

    sha256/<digest of the disk>/    disk.qcow2 or disk.raw, vmlinuz, initrd.img, image.json (the sha256 of every file)
    sha256/<the same digest>.2/     the same disk with another kernel, or of which something else is known
    names/<name>.json               the folder a name stands for
    seen/<digest of a path>.json    the digest of a disk that is used in place, and what its file looked like then
"""

from __future__ import annotations

import difflib
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from pytest_vmbottle import generations, records
from pytest_vmbottle._os import content_digest, copy_sparse, format_size, private_dir
from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.images.disk import DiskFormat, check_whole, inspect, opened
from pytest_vmbottle.spec import digest, host_arch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from io import BufferedReader

__all__ = [
    "INITRD",
    "KERNEL",
    "NO_CLOUD_INIT",
    "Firmware",
    "Image",
    "ImageStore",
    "Readiness",
    "Traits",
    "abandoned",
    "check_name",
    "claimed",
    "copy_in",
    "default_firmware",
    "explained",
    "unknown_image",
]

Firmware = Literal["bios", "uefi"]
Readiness = Literal["cloud-init", "channel"]

KERNEL, INITRD = "vmlinuz", "initrd.img"
NO_CLOUD_INIT = "cloud-init=disabled"
"""Word of the kernel's command line that keeps cloud-init from running: see its documentation, "How to disable cloud-init"."""
_RECORD = "image.json"
_FRESH = 60  # seconds in which a new folder may not be claimed yet
_EVERY = 1.0
"""Seconds between two lines about how far something is."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FOLDER = re.compile(r"[0-9a-f]{64}(\.[1-9][0-9]{0,8})?")


def _typed(kind: type) -> Any:
    return attrs.field(validator=attrs.validators.instance_of(kind))


def _matching(pattern: re.Pattern[str]) -> Any:
    return attrs.field(validator=attrs.validators.matches_re(pattern))


def default_firmware(arch: str) -> Firmware:
    """What boots a disk on an architecture unless it is said: only x86 has a BIOS."""
    return "bios" if arch == "x86_64" else "uefi"


@attrs.frozen(kw_only=True)
class Traits:
    """What is known of a system on a disk that the disk itself does not tell.

    Attributes:
        firmware: How the disk boots when there is no kernel beside it.
        user: The image's own name to log in by; empty if unknown.
        readiness: When a booted guest is ready: when cloud-init has ended, or as soon as a channel answers.
        prepared: Whether one of our recipes built it, so that the guest agent and Python are in it.
    """

    firmware: Firmware = attrs.field(default="bios", validator=attrs.validators.in_(("bios", "uefi")))
    user: str = attrs.field(default="", validator=attrs.validators.matches_re(r"([A-Za-z_][A-Za-z0-9_.-]{0,31})?"))
    readiness: Readiness = attrs.field(default="cloud-init", validator=attrs.validators.in_(("cloud-init", "channel")))
    prepared: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))

    @property
    def traits(self) -> Traits:
        """These alone, of whatever has them."""
        return Traits(**{field.name: getattr(self, field.name) for field in attrs.fields(Traits)})


@attrs.frozen(kw_only=True)
class Image(Traits):
    """A base OS disk, and what boots it; its `Traits` too.

    Attributes:
        name: The name it was looked up by.
        sha256: The digest of the disk, by which it is stored.
        key: A digest of all that a guest boots from, kernel and its command line included: what is made from the image is keyed by it.
        disk: The disk, read-only unless it is used in place.
        format: How it is written.
        virtual_size: The bytes a guest sees.
        arch: The architecture, as `uname -m` names it.
        kernel, initrd: For a direct boot; None where the firmware boots the disk.
        cmdline: The kernel's command line; empty without a kernel.
        created: When it was added, in ISO 8601.
        description: What it is, in a few words.
        is_own: Whether it is the backend's own, and no disk of the catalog.
        own: By what the backend knows it.
        quick: Whether machines start from it as quickly as from a pack of it.
    """

    name: str
    sha256: str
    key: str
    disk: Path
    format: DiskFormat
    virtual_size: int
    arch: str
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    created: str = ""
    description: str = ""
    is_own: bool = False
    own: str = ""
    quick: bool = False

    def boot_words(self, *, cloud_init: bool) -> str:
        """The kernel's command line; without the word that disables cloud-init where there is something for it to do."""
        words = self.cmdline.split(" ")
        return " ".join(word for word in words if not (cloud_init and word == NO_CLOUD_INIT))


def _entries(value: object) -> dict[str, _Entry]:
    if not isinstance(value, dict) or not value.keys() <= {"disk.qcow2", "disk.raw", KERNEL, INITRD}:
        raise TypeError("it does not list an image's files")
    return {name: _Entry(**entry) for name, entry in value.items()}


@attrs.frozen(kw_only=True)
class _Entry:
    sha256: str = _matching(_SHA256)
    size: int = _typed(int)


@attrs.frozen(kw_only=True)
class _Manifest(Traits):
    """The content of an `image.json`; older ones have no traits."""

    format: DiskFormat = attrs.field(validator=attrs.validators.in_(("qcow2", "raw")))
    virtual_size: int = _typed(int)
    arch: str = _typed(str)
    cmdline: str = _typed(str)
    created: str = _typed(str)
    description: str = _typed(str)
    files: dict[str, _Entry] = attrs.field(converter=_entries)

    @property
    def disk(self) -> str:
        return f"disk.{self.format}"

    @property
    def sha256(self) -> str:
        return self.files[self.disk].sha256

    @property
    def key(self) -> str:
        digests = {name: entry.sha256 for name, entry in self.files.items()}
        return _key(digests, self.format, self.arch, self.cmdline, self.firmware)

    def image(self, name: str, folder: Path) -> Image:
        paths = {part: folder / part if part in self.files else None for part in (KERNEL, INITRD)}
        return Image(
            name=name,
            sha256=self.sha256,
            key=self.key,
            disk=folder / self.disk,
            format=self.format,
            virtual_size=self.virtual_size,
            arch=self.arch,
            kernel=paths[KERNEL],
            initrd=paths[INITRD],
            cmdline=self.cmdline,
            created=self.created,
            description=self.description,
            **attrs.asdict(self.traits),
        )


def _key(digests: Mapping[str, str], kind: DiskFormat, arch: str, cmdline: str, firmware: Firmware) -> str:
    """A digest of what a guest boots from; the firmware counts where it boots the disk and is not the one it always was."""
    return digest("image", digests, kind, arch, cmdline, *([] if KERNEL in digests or firmware == "bios" else [firmware]))


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what the operating system says into a sentence."""
    try:
        yield
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise CatalogError(f"cannot {what}: {error.strerror or error}{where}") from error


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Marks a folder as being worked in for as long as this process lives."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def abandoned(folder: Path) -> bool:
    """Whether a folder is ours and whoever worked in it is gone, killed in the middle."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or time.time() - status.st_ctime < _FRESH:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(fd)


class ImageStore:
    """The images that have names here. Nothing in it is ever changed: files are added under the digest of the disk, and removed.

    What somebody holds stays, with or without a name, until nobody does.
    """

    def __init__(self, root: Path) -> None:
        """Takes the store's folder, which is made when the first image is added."""
        self.root = root.absolute()
        self._blobs = self.root / "sha256"
        self._names = self.root / "names"

    def names(self) -> tuple[str, ...]:
        """The names, sorted; of damaged images too."""
        return tuple(sorted(path.stem for path in self._names.glob("*.json") if _NAME.fullmatch(path.stem)))

    def list(self) -> tuple[Image, ...]:
        """All images.

        Raises:
            CatalogError: One is damaged. To see the others, ask for each of `names()` with `get`.
        """
        return tuple(image for name in self.names() if (image := self.get(name)))

    def get(self, name: str) -> Image | None:
        """The image of this name, or None. Only the files' sizes are checked: `verify` reads them.

        Raises:
            CatalogError: Its record or files are damaged; the message says what to do.
        """
        found = self._read(name)
        return found[0].image(name, found[1]) if found else None

    def add(  # noqa: PLR0913 - an image has many parts
        self,
        file: Path,
        *,
        name: str,
        sha256: str | None = None,
        kernel: Path | None = None,
        initrd: Path | None = None,
        cmdline: str = "",
        arch: str | None = None,
        description: str = "",
        traits: Traits | None = None,
        replace: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> Image:
        """Copies a disk into the store.

        Args:
            file: A qcow2 or raw disk.
            name: What it is to be called.
            sha256: The digest the file must have.
            kernel: For a direct boot, with `initrd` and the kernel's `cmdline`; else the firmware boots the disk.
            arch: The architecture of what is on it; the host's if not given.
            description: What it is, in a few words.
            traits: What else is known of it; if not given, that the architecture's usual firmware boots it.
            replace: Whether the name may be taken from another image.
            progress: Takes a line about how far the digest is, once a second.

        Raises:
            CatalogError: The file is not a disk image or has another digest, or the name is taken. Nothing was added.
        """
        check_name(name)
        _check_boot(kernel, initrd, cmdline)
        wanted = _check_digest(sha256)
        with explained(f"add {file} to the images"), self.staging() as folder:
            with opened(file) as source:
                kind, _ = inspect(source, file)
                check_whole(source, file)
                copy_in(source, folder / f"disk.{kind}")
            for part, target in ((kernel, KERNEL), (initrd, INITRD)):
                if part is not None:
                    with opened(part) as source:
                        copy_in(source, folder / target)
            return self.publish(
                folder,
                name=name,
                sha256=wanted,
                arch=arch,
                cmdline=cmdline,
                description=description,
                traits=traits,
                replace=replace,
                progress=progress,
            )

    def remove(self, name: str) -> None:
        """Removes a name, and the files that no name stands for any more and nobody holds.

        Raises:
            CatalogError: There is no such name.
        """
        if name not in self.names():
            raise unknown_image(name, self.names())
        with explained(f"remove the image {name!r}"), self._exclusive():
            (self._names / f"{name}.json").unlink(missing_ok=True)
            self._sweep()

    def put_aside(self, name: str, aside: Callable[[Path], object]) -> None:
        """Has an image moved out of the way, its record and the files that it stands for, if it is damaged.

        Args:
            name: Its name.
            aside: Takes a path and moves what is there.
        """
        with explained(f"put the image {name!r} aside"), self._exclusive():
            try:
                self.get(name)
            except CatalogError:
                named = self._names / f"{name}.json"
                address = _address_or_none(named)
                for path in (named, *([self._blobs / address] if address else [])):
                    if os.path.lexists(path):
                        aside(path)

    def verify(self, name: str, *, progress: Callable[[str], None] | None = None) -> None:
        """Reads all of an image's files and compares their digests.

        Args:
            name: The image.
            progress: Gets a line about how far it is, once a second.

        Raises:
            CatalogError: There is no such image, or a file is not what was stored; the message names the file.
        """
        with explained(f"verify the image {name!r}"):
            found = self._read(name)
            if found is None:
                raise unknown_image(name, self.names())
            manifest, folder = found
            for part, entry in manifest.files.items():
                actual = _sha256(folder / part, progress)
                if actual != entry.sha256:
                    raise _damaged(name, f"{folder / part} has the sha256 {actual}, not {entry.sha256}")

    def import_path(
        self, path: Path, *, arch: str | None = None, traits: Traits | None = None, progress: Callable[[str], None] | None = None
    ) -> Image:
        """Describes a disk that stays where it is; its digest is remembered for as long as the file looks the same.

        Args:
            path: A qcow2 or raw disk.
            arch, traits: As for `add`.
            progress: Gets a line about how far it is read, once a second.

        Raises:
            CatalogError: It is not there, or is not a disk image.
        """
        with explained(f"use {path} as an image"), opened(path) as file:
            kind, size = inspect(file, path)
            found = self._digest_of(file, path.resolve(), progress)
        arch = arch or host_arch()
        traits = traits or Traits(firmware=default_firmware(arch))
        return Image(
            name=str(path),
            sha256=found,
            key=_key({f"disk.{kind}": found}, kind, arch, "", traits.firmware),
            disk=path.resolve(),
            format=kind,
            virtual_size=size,
            arch=arch,
            **attrs.asdict(traits),
        )

    def _digest_of(self, file: BufferedReader, path: Path, progress: Callable[[str], None] | None) -> str:
        short_cut = self.root / "seen" / f"{digest(str(path))}.json"
        looks = _looks(file)
        with suppress(OSError, ValueError, TypeError, KeyError):
            seen = records.read(short_cut)
            if seen["looks"] == looks and _SHA256.fullmatch(seen["sha256"]):
                return str(seen["sha256"])
        check_whole(file, path)
        found = content_digest(file.fileno(), _each_second(progress, f"reading {path.name}"))
        if _looks(file) != looks:
            raise CatalogError(f"{path} was changed while it was read: use it when nothing writes to it any more")
        with suppress(OSError):  # only a short cut: a store that cannot be written to costs time, nothing else
            private_dir(short_cut.parent)
            records.write(short_cut, {"path": str(path), "looks": looks, "sha256": found})
        return found

    def _read(self, name: str) -> tuple[_Manifest, Path] | None:
        """The record of an image and its folder."""
        if not _NAME.fullmatch(name):
            return None
        try:
            address = _address(self._names / f"{name}.json")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise _damaged(name, f"{self._names / f'{name}.json'} cannot be read: {error}") from None
        folder = self._blobs / address
        try:
            manifest = _Manifest(**records.read(folder / _RECORD))
            matches = manifest.sha256 == generations.name_of(folder)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise _damaged(name, f"{folder / _RECORD} cannot be read: {error}") from None
        if not matches:
            raise _damaged(name, f"{folder / _RECORD} describes another disk")
        for part, entry in manifest.files.items():
            _check_size(name, folder / part, entry.size)
        return manifest, folder

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Makes a folder for `publish`, on the store's file system, that is gone at the end unless it was published."""
        private_dir(self.root)
        folder = private_dir(self._blobs) / f".new-{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        try:
            with claimed(folder):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(  # noqa: PLR0913 - an image has many parts
        self,
        folder: Path,
        *,
        name: str,
        sha256: str | None = None,
        arch: str | None = None,
        cmdline: str = "",
        description: str = "",
        traits: Traits | None = None,
        replace: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> Image:
        """Gives the files in a folder from `staging` their place and their name: both or neither.

        Args:
            folder: Has `disk.qcow2` or `disk.raw`, and perhaps `vmlinuz` and `initrd.img`; all on disk already.
            name, sha256, arch, cmdline, description, traits, replace, progress: As for `add`.

        Raises:
            CatalogError: The disk has another digest, or the name is taken.
        """
        arch = arch or host_arch()
        traits = traits or Traits(firmware=default_firmware(arch))
        manifest = _describe(folder, arch, traits, cmdline=cmdline, description=description, progress=progress)
        if sha256 not in (None, manifest.sha256):
            raise CatalogError(f"{name!r} was not added: the sha256 of its disk is {manifest.sha256}, and {sha256} was demanded")
        records.write(folder / _RECORD, attrs.asdict(manifest))
        (folder / _RECORD).chmod(0o444)
        private_dir(self._names)
        with self._exclusive():
            self._check_free(name, manifest.sha256, replace=replace)
            return self._place(folder, manifest, name, replace=replace)

    def _check_free(self, name: str, sha256: str, *, replace: bool) -> None:
        named = self._names / f"{name}.json"
        if named.exists() and not replace and (_address_or_none(named) or "").partition(".")[0] != sha256:
            raise CatalogError(f"there is another image named {name!r}: remove it with `vmbottle image rm {name}`, or choose another name")

    def _place(self, folder: Path, manifest: _Manifest, name: str, *, replace: bool) -> Image:
        there = generations.every(self._blobs, manifest.sha256)
        stored = next(((each, found) for each in there if (found := _alike(each, manifest)) is not None), None)
        if stored is None:
            self._check_alone(name, [each.name for each in there], replace=replace)
            stored = generations.add(folder, self._blobs, manifest.sha256), manifest
        final, manifest = stored
        where = {} if final.name == manifest.sha256 else {"folder": final.name}
        records.write(self._names / f"{name}.json", {"sha256": manifest.sha256, **where})
        self._sweep()
        return manifest.image(name, final)

    def _check_alone(self, name: str, folders: Sequence[str], *, replace: bool) -> None:
        """Refuses a disk that others know otherwise: two names for one disk that boots in two ways are a mistake."""
        names = [other for other in self.names() if _address_or_none(self._names / f"{other}.json") in folders]
        if names and not (replace and names == [name]):
            raise CatalogError(
                f"this disk is stored already as {' and '.join(names)}, with another kernel, command line, architecture, firmware or user, "
                f"or damaged: remove that first with `vmbottle image rm {' '.join(names)}`"
            )

    def sweep(self) -> None:
        """Removes what no name stands for and nobody holds any more."""
        if self._names.is_dir():
            with suppress(OSError), self._exclusive():
                self._sweep()

    def _sweep(self) -> None:
        """Deletes what no name stands for, and what was never finished; what is being filled or held is left alone."""
        for folder in self._blobs.glob(".new-*"):
            if abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
        named = {_address_or_none(self._names / f"{name}.json") for name in self.names()}
        if None in named:  # a damaged record may stand for any of them
            return
        for there in generations.all_in(self._blobs).values():
            for folder in there:
                if folder.name not in named:
                    generations.remove(folder)
        generations.sweep_gone(self._blobs)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Holds the store's folder locked for a moment: between an image's place and its name nobody else tidies up."""
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def unknown_image(name: str, names: Iterable[str]) -> CatalogError:
    """The error for a name that stands for nothing."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    there = f"The images are: {', '.join(known)}" if known else "There are no images yet: `vmbottle image build debian-12` makes one"
    return CatalogError(f"there is no image named {name!r}.{hint} {there}")


def _damaged(name: str, detail: str) -> CatalogError:
    return CatalogError(f"the image {name!r} is damaged: {detail}. Remove it with `vmbottle image rm {name}`, then build or add it again")


def check_name(name: str) -> None:
    """Refuses what cannot name an image: names are files, and words of a command line."""
    if not _NAME.fullmatch(name):
        raise CatalogError(f"{name!r} cannot name an image: use letters, digits, '.', '_' and '-', a letter or digit first, 100 at most")


def _check_boot(kernel: Path | None, initrd: Path | None, cmdline: str) -> None:
    if kernel is None and (initrd is not None or cmdline):
        raise CatalogError("an initrd or a command line is of no use without a kernel: give the kernel too")
    if kernel is not None and not cmdline:
        raise CatalogError("a kernel needs a command line that says where its root is, for example 'root=/dev/vda1 rw console=ttyS0'")


def _check_digest(sha256: str | None) -> str | None:
    if sha256 is None:
        return None
    wanted = sha256.strip().lower().removeprefix("sha256:")
    if not _SHA256.fullmatch(wanted):
        raise CatalogError(f"{sha256!r} is not a sha256: it has 64 hexadecimal digits")
    return wanted


def _check_size(name: str, path: Path, size: int) -> None:
    try:
        status = path.lstat()
    except OSError as error:
        raise _damaged(name, f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        raise _damaged(name, f"{path} has {status.st_size} bytes, not {size}")


def _address(path: Path) -> str:
    """The folder that a name's record speaks of."""
    facts = records.read(path)
    address = facts.get("folder", facts["sha256"])
    if not _FOLDER.fullmatch(address):
        raise ValueError("it holds no sha256")
    return str(address)


def _address_or_none(path: Path) -> str | None:
    try:
        return _address(path)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _alike(folder: Path, manifest: _Manifest) -> _Manifest | None:
    """The record in a folder, if its files are there, boot in the same way as the other one's, and the same is known of them."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError, CatalogError):
        stored = _Manifest(**records.read(folder / _RECORD))
        for part, entry in stored.files.items():
            _check_size("", folder / part, entry.size)
        if (stored.key, stored.traits) == (manifest.key, manifest.traits):
            return stored
    return None


def _describe(  # noqa: PLR0913 - an image has many parts
    folder: Path, arch: str, traits: Traits, *, cmdline: str, description: str, progress: Callable[[str], None] | None
) -> _Manifest:
    """Makes the record of the files in a folder, as they are there: what they were copied from may have changed meanwhile."""
    disk = next(folder.glob("disk.*"))
    with disk.open("rb") as file:
        kind, size = inspect(file, disk)
    if disk.suffix != f".{kind}":
        raise CatalogError("the disk was changed while it was copied: add it again when nothing writes to it any more")
    files = {}
    for path in folder.iterdir():
        path.chmod(0o444)
        files[path.name] = {"sha256": _sha256(path, progress), "size": path.stat().st_size}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return _Manifest(
        format=kind,
        virtual_size=size,
        arch=arch,
        cmdline=cmdline,
        created=created,
        description=description,
        files=files,
        **attrs.asdict(traits),
    )


def copy_in(source: BufferedReader, target: Path) -> None:
    """Copies an open file, holes as holes, to stay."""
    with target.open("xb") as copy:
        copy_sparse(source.fileno(), copy.fileno())
        os.fsync(copy.fileno())


def _sha256(path: Path, progress: Callable[[str], None] | None = None) -> str:
    with path.open("rb") as file:
        return content_digest(file.fileno(), _each_second(progress, "reading"))


def _each_second(progress: Callable[[str], None] | None, what: str) -> Callable[[int, int], None]:
    """What tells in words how far a digest is, once a second."""
    told = time.monotonic()

    def tell(done: int, size: int) -> None:
        nonlocal told
        if progress is not None and done < size and time.monotonic() - told >= _EVERY:
            told = time.monotonic()
            progress(f"{what}: {100 * done // size} % of {format_size(size)}")

    return tell


def _looks(file: BufferedReader) -> list[int]:
    status = os.fstat(file.fileno())
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
