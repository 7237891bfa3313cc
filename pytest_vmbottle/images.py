"""Named base images: a content-addressed, read-only store of disks, and the recipes that build them.

Below the store's folder::

    sha256/<digest of the disk>/    disk.qcow2 or disk.raw, vmlinuz, initrd.img, image.json (the sha256 of every file)
    names/<name>.json               the digest a name stands for
    seen/<digest of a path>.json    the digest of a disk that is used in place, and what its file looked like then

A disk comes from anywhere, and a qcow2 can name host files and servers that QEMU would open in its user's name. So its header
is read here, strictly, before any tool of QEMU sees it. Format: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import io
import json
import os
import pwd
import re
import secrets
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import tarfile
import tempfile
import time
from collections import deque
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import attrs

from pytest_vmbottle._os import Deadline, atomic_file, copy_sparse, format_size, private_dir, sync_dir
from pytest_vmbottle.errors import BackendUnavailable, CatalogError
from pytest_vmbottle.spec import digest, host_arch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = ["RECIPES", "Image", "ImageStore", "Recipe", "build", "can_build", "disk_format"]

DiskFormat = Literal["qcow2", "raw"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KERNEL, _INITRD, _RECORD = "vmlinuz", "initrd.img", "image.json"

# --- what a disk is --------------------------------------------------------------------------------------------------

_QCOW2_MAGIC = b"QFI\xfb"
_QCOW2 = struct.Struct(">4sIQIIQIIQQIIQ")
_QCOW2_V3 = struct.Struct(">QQQII")
_COMPRESSION_AT = _QCOW2.size + _QCOW2_V3.size
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN_FEATURES = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2
# QEMU's own limits: a larger table is an attack on memory, not a disk.
_MAX_L1 = 32 << 20
_MAX_REFCOUNT_TABLE = 8 << 20
_MAX_DISK = 16 << 40
_MIN_DISK = 1 << 20
_SECTOR = 512

# How a file begins that is no disk, though people try: a download still packed, another hypervisor's format.
_LOOKALIKES = (
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"\xfd7zXZ\0", "an xz archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"KDMV", "a VMDK: convert it first with `qemu-img convert -O qcow2`"),
    (b"vhdxfile", "a VHDX: convert it first with `qemu-img convert -O qcow2`"),
    (b"<<< ", "a VDI: convert it first with `qemu-img convert -O qcow2`"),
)
# What a raw disk has somewhere near its start: (offset, bytes).
_SIGNATURES = (
    (510, b"\x55\xaa"),  # a partition table (MBR, and the one that protects a GPT)
    (1024 + 56, b"\x53\xef"),  # ext2, ext3, ext4
    (0, b"XFSB"),
    (0, b"hsqs"),  # squashfs
    (1024, b"\x10\x20\xf5\xf2"),  # f2fs
    (0x10040, b"_BHRfS_M"),  # btrfs
)
_HEAD = 0x10048


def disk_format(head: bytes, size: int) -> tuple[DiskFormat, int]:
    """Tells from its first bytes whether a file is a disk image that is safe to give to QEMU.

    Args:
        head: The file's first 65,608 bytes, or all of it if it is shorter.
        size: The file's length in bytes.

    Returns:
        The format, and how many bytes the guest will see.

    Raises:
        CatalogError: It is not a disk image, or one that refers to anything outside itself.
    """
    if head.startswith(_QCOW2_MAGIC):
        return "qcow2", _qcow2_size(head, size)
    for magic, what in _LOOKALIKES:
        if head.startswith(magic):
            raise CatalogError(f"is not a disk image but {what}")
    if size < _MIN_DISK or size % _SECTOR or not any(head.startswith(magic, at) for at, magic in _SIGNATURES):
        raise CatalogError("is not a disk image: it is no qcow2, and has neither a partition table nor a file system that a raw disk begins with")
    if size > _MAX_DISK:
        raise CatalogError(f"is not a disk image: {format_size(size)} is more than a disk can have")
    return "raw", size


def _qcow2_size(head: bytes, file_size: int) -> int:
    if len(head) < _QCOW2.size:
        raise CatalogError("is not a disk image: its qcow2 header is cut off")
    (_, version, backing_at, backing_len, cluster_bits, size, crypt, l1_len, l1_at, refs_at, refs_len, snapshots, _) = _QCOW2.unpack_from(head)
    if version not in (2, 3):
        raise CatalogError(f"is a qcow of version {version}: only 2 and 3 are known; make a new one with `qemu-img convert -O qcow2`")
    if backing_at or backing_len:
        raise CatalogError("refers to a backing file: make it whole with `qemu-img convert -O qcow2`")
    if crypt:
        raise CatalogError("is encrypted: decrypt it with `qemu-img convert -O qcow2`")
    if snapshots:
        raise CatalogError("has internal snapshots: make a plain copy with `qemu-img convert -O qcow2`")
    if not 0 < size <= _MAX_DISK:
        raise CatalogError(f"is not a disk image: its qcow2 header claims a disk of {size} bytes")
    _need(9 <= cluster_bits <= 21, f"clusters of 2^{cluster_bits} bytes")  # noqa: PLR2004 - QEMU's own limits
    extended = version == 3 and _check_features(head, cluster_bits)  # noqa: PLR2004 - the version with feature bits
    cluster = 1 << cluster_bits
    per_table = cluster // (16 if extended else 8)
    _need(-(-size // (cluster * per_table)) <= l1_len <= _MAX_L1 // 8, f"an L1 table of {l1_len} entries for {size} bytes")
    _need(_inside(l1_at, l1_len * 8, cluster, file_size), "an L1 table outside the file")
    _need(0 < refs_len * cluster <= _MAX_REFCOUNT_TABLE, f"a refcount table of {refs_len} clusters")
    _need(_inside(refs_at, refs_len * cluster, cluster, file_size), "a refcount table outside the file")
    return size


def _check_features(head: bytes, cluster_bits: int) -> bool:
    """Refuses what a version 3 header may turn on, except for another compression and extended L2 entries: whether it has these."""
    if len(head) < _COMPRESSION_AT:
        raise CatalogError("is not a disk image: its qcow2 header is cut off")
    features, _, extras, refcount_order, length = _QCOW2_V3.unpack_from(head, _QCOW2.size)
    if features & _DATA_FILE:
        raise CatalogError("keeps its data in another file: make it whole with `qemu-img convert -O qcow2`")
    if features & (_DIRTY | _CORRUPT):
        raise CatalogError("was not closed properly or is marked corrupt: repair it with `qemu-img check -r all`")
    if features & ~_KNOWN_FEATURES:
        raise CatalogError(f"needs qcow2 features that are not known here ({features:#x}): make a plain copy with `qemu-img convert -O qcow2`")
    if extras:
        raise CatalogError("has bitmaps or other extras: make a plain copy with `qemu-img convert -O qcow2`")
    _need(_COMPRESSION_AT <= length <= 1 << cluster_bits and length % 8 == 0, f"a header of {length} bytes")
    _need(refcount_order <= 6, f"refcounts of 2^{refcount_order} bits")  # noqa: PLR2004 - the format's limit
    if features & _COMPRESSION:
        known = length > _COMPRESSION_AT and head[_COMPRESSION_AT : _COMPRESSION_AT + 1] == b"\x01"
        _need(known, "an unknown compression")
    extended = bool(features & _EXTENDED_L2)
    _need(not extended or cluster_bits >= 14, "extended L2 entries in clusters that are too small")  # noqa: PLR2004 - the format's limit
    return extended


def _need(holds: bool, otherwise: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise CatalogError(f"is not a disk image: its qcow2 header claims {otherwise}")


def _inside(at: int, length: int, cluster: int, file_size: int) -> bool:
    return at >= cluster and at % cluster == 0 and at + length <= file_size


def _inspect(file: BinaryIO, path: Path) -> tuple[DiskFormat, int]:
    try:
        return disk_format(os.pread(file.fileno(), _HEAD, 0), os.fstat(file.fileno()).st_size)
    except CatalogError as error:
        raise CatalogError(f"{path} {error}") from None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that someone named; a folder, pipe or device is refused, not waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") if stat.S_ISREG(os.fstat(fd).st_mode) else _refused(fd, path) as file:
        yield file


def _refused(fd: int, path: Path) -> BinaryIO:
    os.close(fd)
    raise CatalogError(f"{path} is not a disk image: it is not even a file")


# --- the store -------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Image:
    """A base OS disk, and what boots it.

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


def _typed(kind: type) -> Any:  # noqa: ANN401 - attrs.field is typed by what it stands for
    return attrs.field(validator=attrs.validators.instance_of(kind))


def _matching(pattern: re.Pattern[str]) -> Any:  # noqa: ANN401 - as above
    return attrs.field(validator=attrs.validators.matches_re(pattern))


def _entries(value: object) -> dict[str, _Entry]:
    if not isinstance(value, dict) or not value.keys() <= {"disk.qcow2", "disk.raw", _KERNEL, _INITRD}:
        raise TypeError("it does not list an image's files")
    return {name: _Entry(**entry) for name, entry in value.items()}


@attrs.frozen(kw_only=True)
class _Entry:
    sha256: str = _matching(_SHA256)
    size: int = _typed(int)


@attrs.frozen(kw_only=True)
class _Manifest:
    """The content of an `image.json`."""

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
        return digest("image", {name: entry.sha256 for name, entry in self.files.items()}, self.format, self.arch, self.cmdline)

    def image(self, name: str, folder: Path) -> Image:
        paths = {part: folder / part if part in self.files else None for part in (_KERNEL, _INITRD)}
        return Image(
            name=name,
            sha256=self.sha256,
            key=self.key,
            disk=folder / self.disk,
            format=self.format,
            virtual_size=self.virtual_size,
            arch=self.arch,
            kernel=paths[_KERNEL],
            initrd=paths[_INITRD],
            cmdline=self.cmdline,
            created=self.created,
            description=self.description,
        )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns what the operating system says into a sentence."""
    try:
        yield
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise CatalogError(f"cannot {what}: {error.strerror or error}{where}") from error


class ImageStore:
    """The images that have names here. Nothing in it is ever changed: files are added under the digest of the disk, and removed."""

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
        replace: bool = False,
    ) -> Image:
        """Copies a disk into the store.

        Args:
            file: A qcow2 or raw disk.
            name: What it is to be called.
            sha256: The digest the file must have.
            kernel: For a direct boot, with `initrd` and the kernel's `cmdline`; else the firmware boots the disk.
            arch: The architecture of what is on it; the host's if not given.
            replace: Whether the name may be taken from another image.

        Raises:
            CatalogError: The file is not a disk image or has another digest, or the name is taken. Nothing was added.
        """
        _check_name(name)
        _check_boot(kernel, initrd, cmdline)
        wanted = _check_digest(sha256)
        with _explained(f"add {file} to the images"), self._staging() as folder:
            with _opened(file) as source:
                kind, _ = _inspect(source, file)
                _copy(source, folder / f"disk.{kind}")
            for part, target in ((kernel, _KERNEL), (initrd, _INITRD)):
                if part is not None:
                    with _opened(part) as source:
                        _copy(source, folder / target)
            manifest = _describe(folder, kind, arch=arch or host_arch(), cmdline=cmdline, description=description, origin=file)
            if wanted not in (None, manifest.sha256):
                raise CatalogError(f"{file} is not what was asked for: its sha256 is {manifest.sha256}, and {wanted} was demanded")
            return self._publish(folder, manifest, name, replace=replace)

    def remove(self, name: str) -> None:
        """Removes a name, and the files that no name stands for any more.

        Raises:
            CatalogError: There is no such name.
        """
        if name not in self.names():
            raise unknown_image(name, self.names())
        with _explained(f"remove the image {name!r}"), self._exclusive():
            (self._names / f"{name}.json").unlink(missing_ok=True)
            self._sweep()

    def verify(self, name: str) -> None:
        """Reads all of an image's files and compares their digests.

        Raises:
            CatalogError: There is no such image, or a file is not what was stored; the message names the file.
        """
        with _explained(f"verify the image {name!r}"):
            found = self._read(name)
            if found is None:
                raise unknown_image(name, self.names())
            manifest, folder = found
            for part, entry in manifest.files.items():
                actual = _sha256(folder / part)
                if actual != entry.sha256:
                    raise _damaged(name, f"{folder / part} has the sha256 {actual}, not {entry.sha256}")

    def import_path(self, path: Path) -> Image:
        """Describes a disk that stays where it is; its digest is remembered for as long as the file looks the same.

        Raises:
            CatalogError: It is not there, or is not a disk image.
        """
        with _explained(f"use {path} as an image"), _opened(path) as file:
            kind, size = _inspect(file, path)
            found = self._digest_of(file, path.resolve())
        key = digest("image", {f"disk.{kind}": found}, kind, host_arch(), "")
        return Image(name=str(path), sha256=found, key=key, disk=path.resolve(), format=kind, virtual_size=size, arch=host_arch())

    def _digest_of(self, file: BinaryIO, path: Path) -> str:
        record = self.root / "seen" / f"{digest(str(path))}.json"
        looks = _looks(file)
        with suppress(OSError, ValueError, TypeError, KeyError):
            seen = json.loads(record.read_bytes())
            if seen["looks"] == looks and _SHA256.fullmatch(seen["sha256"]):
                return str(seen["sha256"])
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if _looks(file) != looks:
            raise CatalogError(f"{path} was changed while it was read: use it when nothing writes to it any more")
        with suppress(OSError):  # only a short cut: a store that cannot be written to costs time, nothing else
            private_dir(record.parent)
            _write_json(record, {"path": str(path), "looks": looks, "sha256": found})
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
            manifest = _Manifest(**json.loads((folder / _RECORD).read_bytes()))
            matches = manifest.sha256 == address
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise _damaged(name, f"{folder / _RECORD} cannot be read: {error}") from None
        if not matches:
            raise _damaged(name, f"{folder / _RECORD} describes another disk")
        for part, entry in manifest.files.items():
            _check_size(name, folder / part, entry.size)
        return manifest, folder

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        """A new folder beside the others that is gone at the end unless it was published."""
        folder = private_dir(self._blobs) / f".new-{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, folder: Path, manifest: _Manifest, name: str, *, replace: bool) -> Image:
        """Gives a staged image its place and its name, both or neither."""
        _write_json(folder / _RECORD, attrs.asdict(manifest), mode=0o444)
        final = self._blobs / manifest.sha256
        private_dir(self._names)
        with self._exclusive():
            old = _address_or_none(self._names / f"{name}.json")
            if old not in (None, manifest.sha256) and not replace:
                raise CatalogError(f"there is another image named {name!r}: remove it with `vmbottle image rm {name}`, or choose another name")
            if final.exists():
                manifest = self._same(final, manifest)
            else:
                folder.rename(final)
                sync_dir(self._blobs)
            _write_json(self._names / f"{name}.json", {"sha256": manifest.sha256})
            if old not in (None, manifest.sha256):
                self._sweep()
        return manifest.image(name, final)

    def _same(self, folder: Path, manifest: _Manifest) -> _Manifest:
        """The record of a disk that is stored already, if it boots in the same way."""
        try:
            stored = _Manifest(**json.loads((folder / _RECORD).read_bytes()))
            if stored.key == manifest.key:
                return stored
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass
        names = [name for name in self.names() if _address_or_none(self._names / f"{name}.json") == folder.name]
        raise CatalogError(
            f"this disk is stored already as {' and '.join(names) or 'an image without a name'}, with another kernel, command line or "
            f"architecture, or damaged: remove that first with `vmbottle image rm {' '.join(names) or 'NAME'}`"
        )

    def _sweep(self) -> None:
        """Deletes what no name stands for; folders that are being filled are left alone."""
        named = {_address_or_none(self._names / f"{name}.json") for name in self.names()}
        if None in named:  # a damaged record may stand for any of them
            return
        for folder in self._blobs.iterdir():
            if _SHA256.fullmatch(folder.name) and folder.name not in named:
                # Under its name it is whole or not there.
                shutil.rmtree(folder.rename(self._blobs / f".old-{secrets.token_hex(8)}"), ignore_errors=True)

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
    hint = f"did you mean {close[0]!r}? " if close else ""
    return CatalogError(f"there is no image named {name!r}: {hint}there {'are ' + ', '.join(known) if known else 'are none'}")


def _damaged(name: str, detail: str) -> CatalogError:
    return CatalogError(f"the image {name!r} is damaged: {detail}. Remove it with `vmbottle image rm {name}`, then build or add it again")


def _check_name(name: str) -> None:
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
    address = json.loads(path.read_bytes())["sha256"]
    if not _SHA256.fullmatch(address):
        raise ValueError("it holds no sha256")
    return str(address)


def _address_or_none(path: Path) -> str | None:
    try:
        return _address(path)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _describe(folder: Path, kind: DiskFormat, *, arch: str, cmdline: str, description: str, origin: Path) -> _Manifest:  # noqa: PLR0913
    """Makes the record of what was copied into a folder, as it is there now: the original may have changed meanwhile."""
    with (folder / f"disk.{kind}").open("rb") as file:
        copied, size = _inspect(file, origin)
    if copied != kind:
        raise CatalogError(f"{origin} was changed while it was copied")
    files = {}
    for path in folder.iterdir():
        path.chmod(0o444)
        files[path.name] = {"sha256": _sha256(path), "size": path.stat().st_size}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return _Manifest(format=kind, virtual_size=size, arch=arch, cmdline=cmdline, created=created, description=description, files=files)


def _copy(source: BinaryIO, target: Path) -> None:
    with target.open("xb") as copy:
        copy_sparse(source.fileno(), copy.fileno())
        os.fsync(copy.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _looks(file: BinaryIO) -> list[int]:
    status = os.fstat(file.fileno())
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _write_json(path: Path, value: object, *, mode: int = 0o600) -> None:
    with atomic_file(path, mode=mode) as file:
        file.write(json.dumps(value, indent=2, sort_keys=True).encode())


# --- building --------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Recipe:
    """How a base image is made with mmdebstrap.

    Attributes:
        description: What comes out.
        suite: The release's name in its archive.
        keyring: The keys of its archive, and the package that has them.
        packages: What it has besides the essential packages; `{arch}` stands for the architecture's Debian name.
        arches: By `uname -m`, the architecture's Debian name and its serial console.
        early: Files that are there before the kernel is configured.
        files: Files that are laid over the result.
        links: Symbolic links that are laid over it.
        disk_size: Of the file system, in bytes; what is not used takes no space.
    """

    description: str
    suite: str
    keyring: tuple[Path, str]
    packages: tuple[str, ...]
    arches: Mapping[str, tuple[str, str]]
    early: Mapping[str, str]
    files: Mapping[str, str]
    links: Mapping[str, str]
    disk_size: int


# What a machine that lives for seconds, on a clock and a disk of its own, never needs.
_MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "cloud-init-hotplugd.socket",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "logrotate.timer",
    "man-db.timer",
    "motd-news.timer",
    "serial-getty@ttyS0.service",
    "serial-getty@ttyAMA0.service",
    "systemd-binfmt.service",
    "systemd-journal-flush.service",
    "systemd-networkd-wait-online.service",
    "systemd-timesyncd.service",
)

_CLOUD_CONFIG = """\
datasource_list: [NoCloud, None]
network: {config: disabled}
locale: C.UTF-8
cloud_init_modules: [bootcmd, write_files, resizefs, set_hostname, update_hostname, update_etc_hosts, ca_certs, users_groups, ssh]
cloud_config_modules: [set_passwords, ntp, timezone, apt_configure, runcmd]
cloud_final_modules: [package_update_upgrade_install, write_files_deferred, scripts_per_boot, scripts_per_instance, scripts_user, final_message]
"""

_DEBIAN_PACKAGES = (
    "linux-image-cloud-{arch}",
    "ca-certificates",
    "cloud-init",
    "dbus",
    "e2fsprogs",
    "init",
    "iproute2",
    "libnss-myhostname",  # a guest without a name server still knows its own name
    "libpam-systemd",
    "lz4",
    "netplan.io-",
    "openssh-server",
    "procps",
    "python3",
    "qemu-guest-agent",
    "sudo",
    "systemd",
    "systemd-sysv",
    "udev",
)

RECIPES: Mapping[str, Recipe] = {
    "debian-12": Recipe(
        description="Debian 12 (bookworm)",
        suite="bookworm",
        keyring=(Path("/usr/share/keyrings/debian-archive-keyring.gpg"), "debian-archive-keyring"),
        packages=_DEBIAN_PACKAGES,
        arches={"x86_64": ("amd64", "ttyS0"), "aarch64": ("arm64", "ttyAMA0")},
        # An initramfs with just what finds the root: a fifth of the size, and seconds less where there is no KVM.
        early={
            "etc/initramfs-tools/conf.d/vmbottle": "MODULES=list\nCOMPRESS=lz4\n",
            "usr/share/initramfs-tools/modules.d/vmbottle": "virtio_pci\nvirtio_blk\next4\nvirtio_net\nvirtio_console\n",
        },
        files={
            "etc/cloud/cloud.cfg.d/90-vmbottle.cfg": _CLOUD_CONFIG,
            "etc/default/locale": "LANG=C.UTF-8\n",
            "etc/hostname": "debian\n",
            "etc/hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
            "etc/machine-id": "",
            "etc/resolv.conf": "nameserver 10.0.2.3\n",  # the name server of QEMU's user network
            "etc/ssh/sshd_config.d/vmbottle.conf": "UseDNS no\nGSSAPIAuthentication no\nPrintMotd no\nMaxSessions 100\nMaxStartups 100\n",
            "etc/systemd/network/80-dhcp.network": "[Match]\nName=e*\n\n[Network]\nDHCP=ipv4\n",
        },
        links={
            **{f"etc/systemd/system/{unit}": "/dev/null" for unit in _MASKED},
            "etc/systemd/system/multi-user.target.wants/systemd-networkd.service": "/lib/systemd/system/systemd-networkd.service",
        },
        disk_size=8 << 30,
    )
}

_CMDLINE = "root=/dev/vda rw console={console} quiet net.ifnames=0 fsck.mode=skip"
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]*(?:[=/][A-Za-z0-9.+:~-]+)?")
_TOOLS = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "qemu-img": "qemu-utils", "tar": "tar"}
_ROOT_TOOLS = {"unshare": "util-linux"}
_USER_TOOLS = {"newuidmap": "uidmap"}
_NEEDED_SPACE = 2 << 30
# What mmdebstrap says it is doing, and what that is called here.
_STEPS = {
    "running apt-get update": "reading the package lists",
    "downloading packages": "downloading the essential packages",
    "extracting archives": "unpacking them",
    "installing essential packages": "installing them",
    "installing remaining packages": "downloading and installing the kernel and the other packages",
    "cleaning package lists": "tidying up",
}


def can_build(name: str) -> bool:
    """Whether there is a recipe of this name."""
    return name in RECIPES


def build(
    store: ImageStore, recipe: str, *, name: str | None = None, include: Sequence[str] = (), progress: Callable[[str], None] = lambda _: None
) -> Image:
    """Makes a base image, as root or as an ordinary user, and puts it into the store; an older one of its name is replaced.

    Args:
        recipe: One of `RECIPES`.
        name: What it is to be called, if not like the recipe.
        include: More packages.
        progress: Gets a line for each step, with the seconds since the start.

    Raises:
        BackendUnavailable: This host lacks what it takes; the remedy says what to install.
        CatalogError: The recipe is unknown, or a step failed; then the message has the end of its output. Nothing was added.
    """
    if recipe not in RECIPES:
        raise CatalogError(f"there is no recipe for {recipe!r}: there {'is' if len(RECIPES) == 1 else 'are'} {', '.join(sorted(RECIPES))}")
    chosen, name = RECIPES[recipe], name or recipe
    _check_name(name)
    for package in include:
        if not _PACKAGE.fullmatch(package):
            raise CatalogError(f"{package!r} is not the name of a package: give names, one by one, such as 'nginx' or 'nginx=1.22.1-9'")
    arch, console = _arch_of(chosen, recipe)
    started = time.monotonic()

    def say(step: str) -> None:
        progress(f"{time.monotonic() - started:4.0f} s  {step}")

    with _explained(f"build {recipe}"), _Workshop.opened(say) as shop, store._staging() as folder:  # noqa: SLF001 - one module
        root = _install(shop, chosen, arch, include)
        say("making the disk")
        _make_disk(shop, root, folder, chosen.disk_size)
        say("adding it to the images")
        words = f"{chosen.description}{', with ' + ', '.join(include) if include else ''}"
        cmdline = _CMDLINE.format(console=console)
        manifest = _describe(folder, "qcow2", arch=host_arch(), cmdline=cmdline, description=words, origin=folder / "disk.qcow2")
        image = store._publish(folder, manifest, name, replace=True)  # noqa: SLF001 - one module
    say("done")
    return image


def _arch_of(recipe: Recipe, name: str) -> tuple[str, str]:
    try:
        return recipe.arches[host_arch()]
    except KeyError:
        raise BackendUnavailable(
            f"{name} cannot be built on this host: there is no recipe for {host_arch()}",
            f"Add a disk of your own with `vmbottle image add FILE --name {name}`",
        ) from None


class _Workshop:
    """A folder to build in, and a way to run tools there with root's view of who owns what.

    An ordinary user gets that view from a user namespace: mmdebstrap maps root and the others in it to the ids set aside for the
    user. These must reach the folder and write to it, so it is open to everyone, inside one that nobody else can list.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.say = say
        self._rootless = os.geteuid() != 0
        # Administrators' tools are not on the path of ordinary users.
        self._path = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"

    @classmethod
    @contextmanager
    def opened(cls, say: Callable[[str], None]) -> Iterator[_Workshop]:
        """Opens a workshop that can be worked in; leaves nothing of it."""
        with tempfile.TemporaryDirectory(prefix="vmbottle-build-", ignore_cleanup_errors=True) as outer:
            shop = cls(Path(outer) / secrets.token_hex(16), say)
            shop.folder.parent.chmod(0o711)
            shop.folder.mkdir()
            shop.folder.chmod(0o777)
            try:
                shop.check()
                yield shop
            finally:
                shop.clear()

    def check(self) -> None:
        """Refuses a host that lacks a tool, space, or the ids that an ordinary user needs."""
        tools = _TOOLS | (_USER_TOOLS if self._rootless else _ROOT_TOOLS)
        missing = {tool: package for tool, package in tools.items() if not shutil.which(tool, path=self._path)}
        if missing:
            raise BackendUnavailable(f"{', '.join(missing)} is missing", f"sudo apt-get install {' '.join(sorted(set(missing.values())))}")
        place = self.folder.parent.parent
        free = shutil.disk_usage(place).free
        if free < _NEEDED_SPACE:
            reason = f"building needs {format_size(_NEEDED_SPACE)} in {place}, which has {format_size(free)} left"
            raise BackendUnavailable(reason, "Set TMPDIR to a folder with more space")
        if self._rootless:
            self._check_namespaces()

    def _check_namespaces(self) -> None:
        for parent in self.folder.parents:
            if not parent.stat().st_mode & stat.S_IXOTH:
                reason = f"{parent} is closed to other users, and building without root uses other user ids"
                raise BackendUnavailable(reason, "Set TMPDIR to a folder that everyone may enter, such as /var/tmp")
        try:
            self.run_as_root("true", "")
        except CatalogError as error:
            raise _no_namespaces(str(error)) from None

    def run(self, *argv: str | Path, on_line: Callable[[str], None] = lambda _: None) -> None:
        """Runs a tool to its end.

        Raises:
            CatalogError: It failed; with the last lines of its output.
        """
        words = [str(word) for word in argv]
        environment = {**os.environ, "PATH": self._path, "TMPDIR": str(self.folder), "LC_ALL": "C.UTF-8"}
        process = subprocess.Popen(  # noqa: S603 - argv list, no shell
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=self.folder,
            env=environment,
            umask=0o022,  # the mapped ids read what we write, and we read what they write
            start_new_session=True,
        )
        tail: deque[str] = deque(maxlen=25)
        try:
            with process:
                for line in process.stdout or ():
                    tail.append("".join(char if char.isprintable() else " " for char in line).rstrip())
                    on_line(tail[-1])
        except BaseException:
            _end_group(process)
            raise
        if process.returncode:
            raise CatalogError(f"{' '.join(words[:2])} ended with status {process.returncode}:\n" + "\n".join(tail))

    def run_as_root(self, *argv: str | Path) -> None:
        """Runs a tool that sees, and makes, files that belong to root."""
        self.run(*(("mmdebstrap", "--unshare-helper") if self._rootless else ()), *argv)

    def bootstrap(self, *arguments: str | Path) -> None:
        """Runs mmdebstrap and reports its steps."""
        # Its mounts and processes end with it, however it ends: it makes namespaces for that itself only for an ordinary user.
        root = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "mmdebstrap", "--mode=root")
        self.run(*(("mmdebstrap", "--mode=unshare") if self._rootless else root), *arguments, on_line=self._report)

    def _report(self, line: str) -> None:
        for start, step in _STEPS.items():
            if line.startswith(f"I: {start}"):
                self.say(step)

    def clear(self) -> None:
        """Removes everything in the folder, whoever owns it."""
        content = list(self.folder.iterdir())
        if content:
            try:
                self.run_as_root("rm", "-rf", "--one-file-system", "--", *content)
            except (CatalogError, OSError) as error:
                self.say(f"cannot remove {self.folder}: {error}")


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it started; its id stays taken until then, so that no other group can be hit."""

    def ended() -> bool:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    if process.returncode is None:
        os.killpg(process.pid, signal.SIGTERM)
        Deadline(5).poll(ended)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _no_namespaces(output: str) -> BackendUnavailable:
    user = pwd.getpwuid(os.geteuid()).pw_name
    lines = [line for file in ("/etc/subuid", "/etc/subgid") if (path := Path(file)).exists() for line in path.read_text().splitlines()]
    if sum(line.split(":")[0] in (user, str(os.geteuid())) for line in lines) < 2:  # noqa: PLR2004 - one in each file
        reason = f"{user} has no subordinate user and group ids, which building without root needs"
        return BackendUnavailable(reason, f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}")
    return BackendUnavailable(
        f"this host gives an ordinary user no user namespace, which building without root needs ({output})",
        "Build as root, or allow it: sudo sysctl -w kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0 "
        "(a host has one or the other)",
    )


def _install(shop: _Workshop, recipe: Recipe, arch: str, include: Sequence[str]) -> Path:
    """Installs the system into a folder."""
    sources = apt_sources(recipe.suite)
    early, late, root = shop.folder / "early.tar", shop.folder / "late.tar", shop.folder / "root"
    _write_tar(early, recipe.early, {})
    _write_tar(late, {**recipe.files, **_foreign_keys(sources.values(), recipe)}, recipe.links)
    for name, text in sources.items():
        (shop.folder / name).write_text(text)
    packages = [package.format(arch=arch) for package in recipe.packages] + list(include)
    shop.bootstrap(
        "--variant=apt",
        "--format=directory",
        f"--architectures={arch}",
        f"--include={','.join(packages)}",
        f"--essential-hook=tar-in {shlex.quote(str(early))} /",
        f"--customize-hook=tar-in {shlex.quote(str(late))} /",
        *([] if sources else [_default_keyring(recipe)]),
        recipe.suite,
        root,
        *(shop.folder / name for name in sources),
    )
    # Every machine has its own, and one that forgot would share these with all others.
    shop.run_as_root("find", root / "etc/ssh", "-name", "ssh_host_*", "-delete")
    return root


def _make_disk(shop: _Workshop, root: Path, folder: Path, size: int) -> None:
    """Puts the system on a disk without partitions, and its kernel beside it."""
    for pattern, target in (("vmlinuz-*", _KERNEL), ("initrd.img-*", _INITRD)):
        found = sorted(root.glob(f"boot/{pattern}"))
        if not found:
            raise CatalogError(f"the packages brought no boot/{pattern}")
        with found[-1].open("rb") as source:
            _copy(source, folder / target)
    raw = shop.folder / "disk.raw"
    lazy = "lazy_itable_init=1,lazy_journal_init=1"
    shop.run_as_root("mke2fs", "-q", "-t", "ext4", "-L", "root", "-E", lazy, "-d", root, raw, f"{size >> 10}k")
    shop.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, folder / "disk.qcow2")
    with (folder / "disk.qcow2").open("rb") as disk:
        os.fsync(disk.fileno())


def _write_tar(path: Path, files: Mapping[str, str | bytes], links: Mapping[str, str]) -> None:
    """Writes root's files, the folders they are in, and links."""

    def member(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.mtime = kind, mode, int(time.time())
        return info

    folders = {str(parent) for name in (*files, *links) for parent in PurePosixPath(name).parents} - {"."}
    with tarfile.open(path, "w") as tar:
        for name in sorted(folders):
            tar.addfile(member(name, tarfile.DIRTYPE, 0o755))
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = member(name, tarfile.REGTYPE, 0o644)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in links.items():
            info = member(name, tarfile.SYMTYPE, 0o777)
            info.linkname = target
            tar.addfile(info)


# --- where packages come from ----------------------------------------------------------------------------------------

_ONE_LINE = re.compile(r"deb\s+(?:\[[^\]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?:\s|$)")
_SIGNED_BY = re.compile(r"signed-by\s*[:=]\s*(/[^\s\],]+)", re.IGNORECASE)


def apt_sources(suite: str, apt: Path = Path("/etc/apt")) -> dict[str, str]:
    """This host's own package sources for a suite and its updates: the files' names and content; empty where it has none.

    Both formats of sources.list(5) are read. A host of another distribution has none, and mmdebstrap knows the default.
    """
    lists = [apt / "sources.list", *sorted(apt.glob("sources.list.d/*.list"))]
    stanzas = sorted(apt.glob("sources.list.d/*.sources"))
    lines = [line for path in lists if path.is_file() for line in _lines(path.read_text(errors="replace"), suite)]
    blocks = [block for path in stanzas if path.is_file() for block in _stanzas(path.read_text(errors="replace"), suite)]
    if not any(suite in text.split() for text in (*lines, *blocks)):
        return {}
    found = {"debian.list": "".join(f"{line}\n" for line in lines), "debian.sources": "\n".join(blocks)}
    return {name: text for name, text in found.items() if text}


def _wanted(suite: str, candidate: str) -> bool:
    return candidate == suite or candidate.startswith(f"{suite}-")


def _lines(text: str, suite: str) -> Iterator[str]:
    for line in text.splitlines():
        entry = line.partition("#")[0].strip()
        match = _ONE_LINE.match(entry)
        if match and _wanted(suite, match["suite"]) and not match["uri"].startswith("cdrom:"):
            yield entry


def _stanzas(text: str, suite: str) -> Iterator[str]:
    lines = "\n".join(line.rstrip() for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n{2,}", lines.strip()):
        # A line that begins with a blank continues the field above it.
        fields = {key.strip().lower(): value.strip() for key, _, value in (field.partition(":") for field in re.split(r"\n(?=\S)", stanza))}
        suites = [candidate for candidate in fields.get("suites", "").split() if _wanted(suite, candidate)]
        if suites and "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() not in ("no", "false", "0"):
            kept = fields | {"types": "deb", "suites": " ".join(suites)}
            yield "".join(f"{key.title()}: {value}\n" for key, value in kept.items())


def _foreign_keys(sources: Iterable[str], recipe: Recipe) -> dict[str, bytes]:
    """The keys that sources name by path, other than the archive's own: the guest needs them where the host has them."""
    paths = {Path(path) for text in sources for path in _SIGNED_BY.findall(text)} - {recipe.keyring[0]}
    return {str(path.relative_to("/")): path.read_bytes() for path in sorted(paths) if path.is_file()}


def _default_keyring(recipe: Recipe) -> str:
    path, package = recipe.keyring
    if not path.exists():
        raise BackendUnavailable(f"this host has no package sources for {recipe.suite}, and not its archive's keys", f"sudo apt-get install {package}")
    return f"--keyring={path}"
