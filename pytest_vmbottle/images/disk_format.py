"""Detection of safe disk images, from a file's first bytes.

A disk comes from anywhere, and a qcow2 can name host files and servers that QEMU would open in its user's name. So its header
is read here, strictly, before any tool of QEMU sees it. Format: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import os
import stat
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader
    from pathlib import Path

__all__ = ["DiskFormat", "check_again", "check_whole", "disk_format", "inspect", "opened"]

DiskFormat = Literal["qcow2", "raw"]

_QCOW2_MAGIC = b"QFI\xfb"
# Magic, version, backing file (offset, length), cluster bits, disk size, encryption, L1 table (entries, offset), refcount table (offset,
# clusters), snapshots (number, offset). From version 3: features (incompatible, compatible, autoclear), refcount order, header length.
_QCOW2 = struct.Struct(">4sIQIIQIIQQIIQ")
_QCOW2_V3 = struct.Struct(">QQQII")
_COMPRESSION_AT = _QCOW2.size + _QCOW2_V3.size
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN_FEATURES = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2
_EXTENSION = struct.Struct(">II")  # what it is, and the length of its data
_END, _BACKING_FORMAT, _FEATURE_NAMES = 0, 0xE2792ACA, 0x6803F857
_REFUSED_EXTENSIONS = {0x23852875: "bitmaps", 0x0537BE77: "an encryption header", 0x44415441: "the name of a data file"}
# QEMU's own limits: a larger table is an attack on memory, not a disk.
_MAX_L1 = 32 << 20
_MAX_REFCOUNT_TABLE = 8 << 20
_MAX_DISK = 16 << 40
_MIN_DISK = 1 << 20
_SECTOR = 512
_OFFSET, _COMPRESSED = 0x00FFFFFFFFFFFE00, 1 << 62  # in the entries of tables
_VHD = b"conectix"

# How a file begins that is no disk, though people try: a download still packed, another hypervisor's format.
_LOOKALIKES = (
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"\xfd7zXZ\0", "an xz archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"KDMV", "a VMDK: convert it first with `qemu-img convert -O qcow2`"),
    (b"vhdxfile", "a VHDX: convert it first with `qemu-img convert -O qcow2`"),
    (_VHD, "a VHD: convert it first with `qemu-img convert -f vpc -O qcow2`"),
    (b"LUKS\xba\xbe", "an encrypted LUKS volume: decrypt it first"),
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
# Up to the end of the farthest signature, that of btrfs.
_HEAD = 0x10048


def disk_format(head: bytes, size: int) -> tuple[DiskFormat, int]:
    """Detect the format of a disk image that is safe to give to QEMU.

    Args:
        head: The file's first 65,608 bytes, or all of it if it is shorter.
        size: The file's length in bytes.

    Returns:
        The format, and the size in bytes that the guest will see.

    Raises:
        CatalogError: It is not a disk image, or it refers to something outside itself.
    """
    if head.startswith(_QCOW2_MAGIC):
        return "qcow2", _qcow2_size(head, size)
    for magic, what in _LOOKALIKES:
        if head.startswith(magic):
            raise CatalogError(f"is not a disk image but {what}")
    if size >= _MIN_DISK and size % _SECTOR:
        raise CatalogError(
            f"is not a disk image: its size, {size} bytes, is not a multiple of {_SECTOR}; it was cut off, or something follows its end"
        )
    # A raw disk has no magic: without a sign of its content any file would pass for one, and the guest would just not boot.
    if size < _MIN_DISK or not any(head.startswith(magic, at) for at, magic in _SIGNATURES):
        raise CatalogError("is not a disk image: it is not qcow2, and as a raw disk it would begin with a partition table or a file system")
    if size > _MAX_DISK:
        raise CatalogError(f"is not a disk image: {format_size(size)} is more than a disk can have")
    return "raw", size


def _qcow2_size(head: bytes, file_size: int) -> int:
    if len(head) < _QCOW2.size:
        raise CatalogError("is not a disk image: its qcow2 header is cut off")
    _, version, backing_at, backing_len, cluster_bits, size, crypt, *tables = _QCOW2.unpack_from(head)
    if version not in (2, 3):
        raise CatalogError(f"is a qcow of version {version}: only 2 and 3 are supported; make a new one with `qemu-img convert -O qcow2`")
    if backing_at or backing_len:
        raise CatalogError("refers to a backing file: if you trust its origin, make a self-contained copy with `qemu-img convert -O qcow2`")
    if crypt:
        raise CatalogError("is encrypted: decrypt it with `qemu-img convert -O qcow2`")
    # Internal snapshots have disk sizes and VM states of their own, which nothing here has checked.
    if tables[4]:  # their number
        raise CatalogError("has internal snapshots: make a plain copy with `qemu-img convert -O qcow2`")
    if not 0 < size <= _MAX_DISK:
        raise CatalogError(f"is not a disk image: its qcow2 header claims a disk of {size} bytes")
    _need(size % _SECTOR == 0, f"a disk of {size} bytes, which is not a multiple of {_SECTOR}")
    _need(9 <= cluster_bits <= 21, f"clusters of 2^{cluster_bits} bytes")  # noqa: PLR2004 - QEMU's own limits
    extended, length = _check_features(head, cluster_bits) if version == 3 else (False, _QCOW2.size)  # noqa: PLR2004 - it has feature bits
    _check_extensions(head, length, 1 << cluster_bits)
    _check_tables(1 << cluster_bits, size, tables, extended=extended, file_size=file_size)
    return int(size)


def _check_tables(cluster: int, size: int, tables: list[int], *, extended: bool, file_size: int) -> None:
    l1_len, l1_at, refs_at, refs_len, _, snapshots_at = tables
    # Extended L2 entries have 128 bits, others 64.
    per_table = cluster // (16 if extended else 8)
    # A table that does not cover the disk contradicts the header, and QEMU refuses it as well.
    _need(-(-size // (cluster * per_table)) <= l1_len <= _MAX_L1 // 8, f"an L1 table of {l1_len} entries for {size} bytes")
    _need(_inside(l1_at, l1_len * 8, cluster, file_size), "an L1 table outside the file")
    _need(0 < refs_len * cluster <= _MAX_REFCOUNT_TABLE, f"a refcount table of {refs_len} clusters")
    _need(_inside(refs_at, refs_len * cluster, cluster, file_size), "a refcount table outside the file")
    _need(snapshots_at % cluster == 0, "a snapshot table between clusters")


def _check_extensions(head: bytes, at: int, cluster: int) -> None:
    """Refuse header extensions other than feature names and a removed backing file's format."""
    while at < cluster:
        if len(head) < at + _EXTENSION.size:
            raise CatalogError("is not a disk image: its qcow2 header is cut off, or longer than any that is known")
        kind, length = _EXTENSION.unpack_from(head, at)
        at += _EXTENSION.size + -(-length // 8) * 8
        _need(at <= cluster and (kind != _BACKING_FORMAT or length < 16), f"an extension of {length} bytes")  # noqa: PLR2004 - QEMU's limit
        if kind == _END:
            return
        # Unknown extensions may name other files, as the one for an external data file does.
        if kind not in (_BACKING_FORMAT, _FEATURE_NAMES):
            what = _REFUSED_EXTENSIONS.get(kind, f"an unknown extension ({kind:#x})")
            raise CatalogError(f"has {what} in its qcow2 header: make a plain copy with `qemu-img convert -O qcow2`")


def _check_features(head: bytes, cluster_bits: int) -> tuple[bool, int]:
    """Refuse features of a version 3 header other than compression and extended L2 entries.

    Returns:
        Whether it has extended L2 entries, and the length of the header.
    """
    if len(head) < _COMPRESSION_AT:
        raise CatalogError("is not a disk image: its qcow2 header is cut off")
    # The second word has compatible features, which a reader may ignore by definition.
    features, _, extras, refcount_order, length = _QCOW2_V3.unpack_from(head, _QCOW2.size)
    if features & _DATA_FILE:
        raise CatalogError(
            "keeps its data in another file: if you trust its origin, make a self-contained copy with `qemu-img convert -O qcow2`"
        )
    if features & (_DIRTY | _CORRUPT):
        raise CatalogError("was not closed properly or is marked corrupt: repair it with `qemu-img check -r all`")
    if features & ~_KNOWN_FEATURES:
        raise CatalogError(f"needs unknown qcow2 features ({features:#x}): make a plain copy with `qemu-img convert -O qcow2`")
    if extras:
        raise CatalogError("has bitmaps or other extras: make a plain copy with `qemu-img convert -O qcow2`")
    _need(_COMPRESSION_AT <= length <= 1 << cluster_bits and length % 8 == 0, f"a header of {length} bytes")
    _need(refcount_order <= 6, f"refcounts of 2^{refcount_order} bits")  # noqa: PLR2004 - the format's limit
    # The length of the header comes from the file. Beyond it are extensions, not the compression.
    compression = head[_COMPRESSION_AT : min(length, _COMPRESSION_AT + 1)]
    _need(compression == b"\x01" if features & _COMPRESSION else compression in (b"", b"\0"), "an unknown compression")
    extended = bool(features & _EXTENDED_L2)
    _need(not extended or cluster_bits >= 14, "extended L2 entries in clusters that are too small")  # noqa: PLR2004 - the format's limit
    return extended, length


def _need(holds: bool, otherwise: str) -> None:  # noqa: FBT001 - the two read as a sentence
    if not holds:
        raise CatalogError(f"is not a disk image: its qcow2 header claims {otherwise}")


def _inside(at: int, length: int, cluster: int, file_size: int) -> bool:
    # The first cluster belongs to the header, so that a table there would overlap it.
    return at >= cluster and at % cluster == 0 and at + length <= file_size


def inspect(file: BufferedReader, path: Path) -> tuple[DiskFormat, int]:
    """Detect the format of an open file, as `disk_format` does.

    Errors name `path`.
    """
    try:
        size = os.fstat(file.fileno()).st_size
        kind = disk_format(os.pread(file.fileno(), _HEAD, 0), size)
        if os.pread(file.fileno(), len(_VHD), max(0, size - _SECTOR)) == _VHD:  # of a fixed size: it begins like a raw disk
            raise CatalogError("is not a disk image but a VHD: convert it first with `qemu-img convert -f vpc -O qcow2`")
    except CatalogError as error:
        raise CatalogError(f"{path} {error}") from None
    return kind


def check_again(path: Path, kind: str) -> None:
    """Check that a disk which others can write to is still safe.

    It may have changed since it was first used.

    Args:
        path: The disk's path.
        kind: The format that it had at first.

    Raises:
        CatalogError: It is gone, is not a safe disk image, or has another format.
    """
    try:
        with opened(path) as file:
            found, _ = inspect(file, path)
    except OSError as error:
        raise CatalogError(f"cannot start from {path} again: {error.strerror or error}; it was there when it was first used") from error
    if found != kind:
        raise CatalogError(f"{path} was changed since it was first used: it was a {kind} disk, and is {found} now; run it again")


def check_whole(file: BufferedReader, path: Path) -> None:
    """Check that a qcow2 refers to no cluster beyond the end of its file.

    Raises:
        CatalogError: It does: the file is truncated.
    """
    # Callers run `inspect` first, which bounds the numbers that are used here.
    size, head = os.fstat(file.fileno()).st_size, os.pread(file.fileno(), _HEAD, 0)
    if not head.startswith(_QCOW2_MAGIC):
        return
    _, version, _, _, cluster_bits, _, _, l1_len, l1_at, *_ = _QCOW2.unpack_from(head)
    features = _QCOW2_V3.unpack_from(head, _QCOW2.size)[0] if version > 2 else 0  # noqa: PLR2004 - older ones have none
    step = 2 if features & _EXTENDED_L2 else 1
    # Part of the word is the length: see "Compressed Clusters Descriptor" in the format.
    compressed = (1 << 62 - (cluster_bits - 8)) - 1
    # QEMU reads zeros beyond the end of a file, so the guest would find damaged files, and only much later.
    for table in set(_entries(file, l1_at, l1_len)):
        for entry in _entries(file, table & _OFFSET, (1 << cluster_bits) // 8)[::step] if table & _OFFSET else ():
            at = entry & compressed if entry & _COMPRESSED else entry & _OFFSET
            if at >= size:
                raise CatalogError(
                    f"{path} is not a whole disk image: it ends after {format_size(size)}, before the end of its data; get it again"
                )


def _entries(file: BufferedReader, at: int, count: int) -> tuple[int, ...]:
    """Read a table of a qcow2.

    Entries beyond the end of the file read as the largest number.
    """
    content = os.pread(file.fileno(), count * 8, at)
    return struct.unpack(f">{count}Q", content.ljust(count * 8, b"\xff"))


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file that a user named.

    A folder, pipe or device is refused at once.
    """
    # Not blocking, because a FIFO would wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CatalogError(f"{path} is not a disk image: it is not a regular file")
    with os.fdopen(fd, "rb") as file:
        yield file
