"""A content-addressed, read-only store of named images.

Below the store's folder::

    sha256/<digest of the disk>/    disk.qcow2 or disk.raw, vmlinuz, initrd.img, image.json (the sha256 of every file)
    sha256/<the same digest>.2/     the same disk with another kernel or other traits
    names/<name>.json               the folder that a name refers to
    seen/<digest of a path>.json    the digest of a disk that is used in place, and its file's status
"""

from __future__ import annotations

import difflib
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

from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host import generations, records
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.digest_cache import remembered_digest
from pytest_vmbottle.host.digests import content_digest, digest
from pytest_vmbottle.host.files import copy_sparse, private_dir
from pytest_vmbottle.host.locks import is_locked, locked
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.images.disk_format import DiskFormat, check_whole, inspect, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
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
    "copy_in",
    "default_firmware",
    "explained",
    "unknown_image",
]

Firmware = Literal["bios", "uefi"]
Readiness = Literal["cloud-init", "channel"]

KERNEL, INITRD = "vmlinuz", "initrd.img"
NO_CLOUD_INIT = "cloud-init=disabled"
"""Word of the kernel's command line that disables cloud-init: see its documentation, "How to disable cloud-init"."""
_RECORD = "image.json"
_FRESH = 60  # seconds in which a new folder may not be claimed yet
_EVERY = 1.0
"""Seconds between two lines about progress."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FOLDER = re.compile(r"[0-9a-f]{64}(\.[1-9][0-9]{0,8})?")


def _typed(kind: type) -> Any:
    return attrs.field(validator=attrs.validators.instance_of(kind))


def _matching(pattern: re.Pattern[str]) -> Any:
    return attrs.field(validator=attrs.validators.matches_re(pattern))


def default_firmware(arch: str) -> Firmware:
    """Return the default firmware of an architecture: only x86 has a BIOS."""
    return "bios" if arch == "x86_64" else "uefi"


@attrs.frozen(kw_only=True)
class Traits:
    """Properties of a disk's system that the disk itself does not tell.

    Attributes:
        firmware: The firmware that boots the disk if there is no kernel beside it.
        user: The image's own login name; empty if unknown.
        readiness: The condition for a booted guest to be ready: cloud-init has ended, or a channel answers.
        prepared: Whether one of our recipes built it, so that it has the guest agent and Python.
    """

    firmware: Firmware = attrs.field(default="bios", validator=attrs.validators.in_(("bios", "uefi")))
    user: str = attrs.field(default="", validator=attrs.validators.matches_re(r"([A-Za-z_][A-Za-z0-9_.-]{0,31})?"))
    readiness: Readiness = attrs.field(default="cloud-init", validator=attrs.validators.in_(("cloud-init", "channel")))
    prepared: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))

    @property
    def traits(self) -> Traits:
        """The traits alone, without the other attributes of a subclass."""
        return Traits(**{field.name: getattr(self, field.name) for field in attrs.fields(Traits)})


@attrs.frozen(kw_only=True)
class Image(Traits):
    """A base OS disk, and what boots it; its `Traits` too.

    Attributes:
        name: The name it was looked up by.
        sha256: The digest of the disk, by which it is stored.
        key: A digest of all that a guest boots from, kernel and its command line included: what is made from the image is keyed by it.
        disk: The disk, read-only unless it is used in place.
        format: The disk's format, `"qcow2"` or `"raw"`.
        virtual_size: The bytes a guest sees.
        arch: The architecture, as `uname -m` names it.
        kernel, initrd: For a direct boot; None where the firmware boots the disk.
        cmdline: The kernel's command line; empty without a kernel.
        created: Time of adding it, in ISO 8601.
        description: A few words about it.
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

    def boot_words(self, *, cloud_init: bool) -> str:
        """Return the kernel's command line.

        With `cloud_init` the word that disables cloud-init is left out.
        """
        words = self.cmdline.split(" ")
        return " ".join(word for word in words if not (cloud_init and word == NO_CLOUD_INIT))


def _entries(value: object) -> dict[str, _Entry]:
    # Each name becomes a path below the image's folder, so no others are taken from a record.
    if not isinstance(value, dict) or not value.keys() <= {"disk.qcow2", "disk.raw", KERNEL, INITRD}:
        raise TypeError("it does not list an image's files")
    return {name: _Entry(**entry) for name, entry in value.items()}


@attrs.frozen(kw_only=True)
class _Entry:
    sha256: str = _matching(_SHA256)
    size: int = _typed(int)


@attrs.frozen(kw_only=True)
class _Manifest(Traits):
    """Content of an `image.json`; older ones have no traits."""

    format: DiskFormat = attrs.field(validator=attrs.validators.in_(("qcow2", "raw")))
    virtual_size: int = _typed(int)
    arch: str = _typed(str)
    cmdline: str = _typed(str)
    created: str = _typed(str)
    description: str = _typed(str)
    files: dict[str, _Entry] = attrs.field(converter=_entries)

    @classmethod
    def read(cls, folder: Path) -> _Manifest:
        """Return the record of the image in a folder."""
        found = records.read_as(folder / _RECORD, lambda facts: cls(**facts))
        if found.disk not in found.files:
            raise records.Damaged(f"it lacks {found.disk!r}")
        return found

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
    """Return a digest of everything that a guest boots from.

    The firmware counts only if it boots the disk and is not the original default, so that old keys stay valid.
    """
    return digest("image", digests, kind, arch, cmdline, *([] if KERNEL in digests or firmware == "bios" else [firmware]))


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn an `OSError` into a `CatalogError` with a sentence."""
    try:
        yield
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise CatalogError(f"cannot {what}: {error.strerror or error}{where}") from error


def abandoned(folder: Path) -> bool:
    """Tell whether a folder is ours and not held: its process was killed."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    # Folders in /tmp are judged too, where other users can make folders and links of any name.
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    # Young folders are left alone: a process makes its folder a moment before it locks it.
    return ours and time.time() - status.st_ctime >= _FRESH and not is_locked(folder)


class ImageStore:
    """The store of named images.

    Files are added under the digest of the disk, and removed, but never changed.

    An image that a process holds stays until it is released, even without a name.
    """

    def __init__(self, root: Path) -> None:
        """Take the store's folder, which is made when the first image is added."""
        self.root = root.absolute()
        self._blobs = self.root / "sha256"
        self._names = self.root / "names"

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted; those of damaged images too."""
        return tuple(sorted(path.stem for path in self._names.glob("*.json") if _NAME.fullmatch(path.stem)))

    def list(self) -> tuple[Image, ...]:
        """Return all images.

        Raises:
            CatalogError: An image is damaged. To get the others, call `get` for each of `names()`.
        """
        return tuple(image for name in self.names() if (image := self.get(name)))

    def get(self, name: str) -> Image | None:
        """Return the image of this name, or None.

        Only the files' sizes are checked: `verify` reads them.

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
        """Copy a disk into the store.

        Args:
            file: A qcow2 or raw disk.
            name: The image's name.
            sha256: The digest that the file must have.
            kernel: The kernel for a direct boot, with `initrd` and `cmdline`; otherwise the firmware boots the disk.
            arch: The architecture of its system; by default the host's.
            description: A few words for people.
            traits: Properties of its system; by default, the architecture's usual firmware boots it.
            replace: Whether to take the name from another image.
            progress: Function that gets a line about the progress of the digest, once a second.

        Raises:
            CatalogError: The file is not a disk image or has another digest, or the name is taken. Nothing was added.
        """
        check_name(name)
        _check_boot(kernel, initrd, cmdline)
        wanted = _check_digest(sha256)
        with explained(f"add {file} to the images"), self.staging() as folder:
            with opened(file) as source:
                # Before the copy, which may take gigabytes. `publish` inspects the copy once more.
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
        """Remove a name, and its files unless another name or a process needs them.

        Raises:
            CatalogError: There is no such name.
        """
        if name not in self.names():
            raise unknown_image(name, self.names())
        with explained(f"remove the image {name!r}"), self._exclusive():
            # The name first: an image without a name is swept later, a name without an image is damage.
            (self._names / f"{name}.json").unlink(missing_ok=True)
            self._sweep()

    def quarantine(self, name: str, aside: Callable[[Path], object]) -> None:
        """Move a damaged image out of the way, its record and its files.

        Args:
            name: The image's name.
            aside: Function that moves a path away.
        """
        with explained(f"quarantine the image {name!r}"), self._exclusive():
            try:
                # Judged again under the lock: another process may have mended it meanwhile.
                self.get(name)
            except CatalogError:
                named = self._names / f"{name}.json"
                address = _address_or_none(named)
                # The name first, as in `remove`.
                for path in (named, *([self._blobs / address] if address else [])):
                    if os.path.lexists(path):
                        aside(path)

    def verify(self, name: str, *, progress: Callable[[str], None] | None = None) -> None:
        """Read all of an image's files and compare their digests.

        Args:
            name: The image's name.
            progress: Function that gets a line about the progress, once a second.

        Raises:
            CatalogError: There is no such image, or a file differs from what was stored; the message names the file.
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
        """Describe a disk that stays at its place.

        Its digest is remembered until the file's status changes.

        Args:
            path: A qcow2 or raw disk.
            arch, traits: As for `add`.
            progress: Function that gets a line about the progress of reading it, once a second.

        Raises:
            CatalogError: It does not exist, or is not a disk image.
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
            # Resolved, because a symbolic link may soon lead elsewhere.
            disk=path.resolve(),
            format=kind,
            virtual_size=size,
            arch=arch,
            **attrs.asdict(traits),
        )

    def _digest_of(self, file: BufferedReader, path: Path, progress: Callable[[str], None] | None) -> str:
        def read() -> str:
            check_whole(file, path)
            return content_digest(file.fileno(), _each_second(progress, f"reading {path.name}"))

        return remembered_digest(file, path, self.root / "seen", read)

    def _read(self, name: str) -> tuple[_Manifest, Path] | None:
        """Read the record of an image; return it with its folder."""
        if not _NAME.fullmatch(name):
            return None
        try:
            address = _address(self._names / f"{name}.json")
        except FileNotFoundError:
            return None
        except (OSError, records.Damaged) as error:
            raise _damaged(name, f"{self._names / f'{name}.json'} cannot be read: {error}") from None
        folder = self._blobs / address
        try:
            manifest = _Manifest.read(folder)
        except (OSError, records.Damaged) as error:
            raise _damaged(name, f"{folder / _RECORD} cannot be read: {error}") from None
        if manifest.sha256 != generations.name_of(folder):
            raise _damaged(name, f"{folder / _RECORD} describes another disk")
        for part, entry in manifest.files.items():
            _check_size(name, folder / part, entry.size)
        return manifest, folder

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield a folder for `publish`, on the store's file system.

        It is removed at the end unless it was published.
        """
        private_dir(self.root)
        # The dot keeps it apart from stored images: `generations` knows no name that begins with one.
        folder = private_dir(self._blobs) / f".new-{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        try:
            with locked(folder, shared=True):  # which says that it is being worked in
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
        """Publish the files of a folder from `staging` under a name, atomically.

        Args:
            folder: A folder with `disk.qcow2` or `disk.raw`, and perhaps `vmlinuz` and `initrd.img`, all synced to the disk.
            name, sha256, arch, cmdline, description, traits, replace, progress: As for `add`.

        Raises:
            CatalogError: The disk has another digest, or the name is taken.
        """
        arch = arch or host_arch()
        traits = traits or Traits(firmware=default_firmware(arch))
        manifest = _describe(folder, arch, traits, cmdline=cmdline, description=description, progress=progress)
        if sha256 not in (None, manifest.sha256):
            raise CatalogError(f"{name!r} was not added: the sha256 of its disk is {manifest.sha256}, not {sha256}")
        records.write(folder / _RECORD, attrs.asdict(manifest))
        # Read-only like the files: an image is never changed.
        (folder / _RECORD).chmod(0o444)
        private_dir(self._names)
        # Only now, because digests take long and everybody else would wait for the lock.
        with self._exclusive():
            self._check_free(name, manifest.sha256, replace=replace)
            return self._place(folder, manifest, name, replace=replace)

    def _check_free(self, name: str, sha256: str, *, replace: bool) -> None:
        named = self._names / f"{name}.json"
        # The same disk under the same name is no conflict, whatever else changes.
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
        # The record last: a name that is there refers to a folder that is complete.
        records.write(self._names / f"{name}.json", {"sha256": manifest.sha256, **where})
        self._sweep()
        return manifest.image(name, final)

    def _check_alone(self, name: str, folders: Sequence[str], *, replace: bool) -> None:
        """Refuse a disk that is stored under another name with other boot properties.

        Two names for one disk that boots in two ways are a mistake.
        """
        names = [other for other in self.names() if _address_or_none(self._names / f"{other}.json") in folders]
        if names and not (replace and names == [name]):
            raise CatalogError(
                f"this disk is already stored as {' and '.join(names)}, with another kernel, command line, architecture, firmware or user, "
                f"or damaged: remove that first with `vmbottle image rm {' '.join(names)}`"
            )

    def sweep(self) -> None:
        """Remove images that have no name and that nobody holds."""
        if self._names.is_dir():
            # Tidying up is no reason for a run to fail, for example if the store cannot be written.
            with suppress(OSError), self._exclusive():
                self._sweep()

    def _sweep(self) -> None:
        """Delete images without a name and unfinished ones.

        Folders that are being filled or held are left alone.
        """
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

    def _exclusive(self) -> AbstractContextManager[None]:
        """Lock the store's folder for a moment.

        So nobody sweeps an image between the steps of placing and naming it.
        """
        return locked(self.root)


def unknown_image(name: str, names: Iterable[str]) -> CatalogError:
    """Return the error for a name that does not exist."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    there = f"The images are: {', '.join(known)}" if known else "There are no images yet: `vmbottle image build debian-12` makes one"
    return CatalogError(f"there is no image named {name!r}.{hint} {there}")


def _damaged(name: str, detail: str) -> CatalogError:
    return CatalogError(f"the image {name!r} is damaged: {detail}. Remove it with `vmbottle image rm {name}`, then build or add it again")


def check_name(name: str) -> None:
    """Refuse a name that is unfit for a file or for a word of a command line."""
    if not _NAME.fullmatch(name):
        raise CatalogError(f"{name!r} cannot name an image: use letters, digits, '.', '_' and '-', a letter or digit first, 100 at most")


def _check_boot(kernel: Path | None, initrd: Path | None, cmdline: str) -> None:
    if kernel is None and (initrd is not None or cmdline):
        raise CatalogError("an initrd or a command line needs a kernel: give the kernel too")
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
        # A symbolic link is not followed, because what it leads to may change.
        status = path.lstat()
    except OSError as error:
        raise _damaged(name, f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        raise _damaged(name, f"{path} has {status.st_size} bytes, not {size}")


def _address(path: Path) -> str:
    """Return the name of the folder that a name's record refers to."""
    address = records.read_as(path, lambda facts: str(facts.get("folder", facts["sha256"])))
    if not _FOLDER.fullmatch(address):
        raise records.Damaged("it holds no sha256")
    return address


def _address_or_none(path: Path) -> str | None:
    try:
        return _address(path)
    except (OSError, records.Damaged):
        return None


def _alike(folder: Path, manifest: _Manifest) -> _Manifest | None:
    """Return the record in a folder if its files exist and its key and traits are the same."""
    with suppress(OSError, records.Damaged, CatalogError):
        stored = _Manifest.read(folder)
        for part, entry in stored.files.items():
            _check_size("", folder / part, entry.size)
        if (stored.key, stored.traits) == (manifest.key, manifest.traits):
            return stored
    return None


def _describe(  # noqa: PLR0913 - an image has many parts
    folder: Path, arch: str, traits: Traits, *, cmdline: str, description: str, progress: Callable[[str], None] | None
) -> _Manifest:
    """Make the record of the files in a folder.

    The copies are read, because the originals may have changed meanwhile.
    """
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
    """Copy an open file durably, and keep its holes."""
    with target.open("xb") as copy:
        copy_sparse(source.fileno(), copy.fileno())
        os.fsync(copy.fileno())


def _sha256(path: Path, progress: Callable[[str], None] | None = None) -> str:
    with path.open("rb") as file:
        return content_digest(file.fileno(), _each_second(progress, "reading"))


def _each_second(progress: Callable[[str], None] | None, what: str) -> Callable[[int, int], None]:
    """Return a function that reports a digest's progress in words, once a second."""
    told = time.monotonic()

    def tell(done: int, size: int) -> None:
        nonlocal told
        if progress is not None and done < size and time.monotonic() - told >= _EVERY:
            told = time.monotonic()
            progress(f"{what}: {100 * done // size} % of {format_size(size)}")

    return tell
