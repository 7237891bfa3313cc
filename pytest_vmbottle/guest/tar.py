"""Trees as tar streams, written from host files and read from hostile guests.

Trees are packed as archives for users here, too.
"""

from __future__ import annotations

import gzip
import itertools
import os
import shutil
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

from pytest_vmbottle.guest.exclusion import NOTHING, Exclusion

__all__ = ["MAX_ENTRIES", "Refused", "pack", "unpack", "write_tar_gz", "write_zip"]

MAX_ENTRIES = 1_000_000
"""More entries than any tree that a test copies has; an archive with more is an attack on the host's inodes."""

_MAX_HEADERS = 8 << 20
"""Bytes of headers for one entry; a file with a hundred thousand holes needs 2 MiB."""
_BLOCK = tarfile.BLOCKSIZE
_KINDS = (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)
_ZIP_UNIX = 3
"""The system code of a zip archive whose attributes hold Unix modes and symbolic links."""
_ZIP_FIRST, _ZIP_LAST = 315532800, 4354819198
"""The range of times in a zip archive, the years 1980 to 2107, in seconds since 1970."""


class Refused(Exception):
    """An archive is invalid, or would write outside of its target."""


def pack(  # noqa: PLR0913 - what is packed, and how
    source: Path,
    sink: BinaryIO,
    *,
    name: str,
    sparse: Callable[[], bool] = bool,
    exclude: Exclusion = NOTHING,
    skipped: Callable[[str], object] = lambda _: None,
) -> None:
    """Write a file or tree as a tar stream, sorted by name.

    The top is called `name`; everything belongs to root.

    Args:
        source: The file or tree to pack.
        sink: The stream to write to.
        name: The top's name in the archive.
        sparse: Function that tells whether the reader knows GNU tar's sparse format; called at the first file with holes.
        exclude: What is left out.
        skipped: Function that is called with the path of each socket and FIFO in the tree, which are left out too.

    Raises:
        OSError: A file cannot be read, or became shorter meanwhile.
        Refused: An entry is a device, or the source itself is neither a file nor a folder nor a symbolic link.
    """
    with tarfile.open(fileobj=sink, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for path, member in _members(tar, os.fspath(source), name, exclude, skipped):
            if not member.isreg():
                tar.addfile(member)
                continue
            with open(path, "rb") as content:  # noqa: PTH123 - of thousands
                segments = _segments(content, member.size)
                if segments is not None and sparse():
                    _add_sparse(tar, member, content, segments)
                else:
                    tar.addfile(member, content)


def _members(
    tar: tarfile.TarFile, source: str, name: str, exclude: Exclusion, skipped: Callable[[str], object]
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield the members of a file or tree, each folder before its content."""
    # Not by the library's `add`, which recurses: Python's stack would limit the depth.
    left: list[tuple[str, tuple[str, ...]]] = [(source, ())]
    while left:
        path, below = left.pop()
        # Before the library sees it, which makes a later link to the same file one to this entry.
        if below and exclude.matches(below):
            continue
        member = tar.gettarinfo(path, arcname="/".join((name, *below)))
        kind = getattr(member, "type", None)  # of a socket the library makes None
        if below and kind in (None, tarfile.FIFOTYPE):
            skipped(path)
            continue
        if kind not in _KINDS:
            raise Refused(f"{path} is neither a file nor a folder nor a symbolic link")
        member.mtime = int(member.mtime)  # fractions take an extended header each, half as much again for small files
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        yield path, member
        if member.isdir():
            left += [(f"{path}/{child}", (*below, child)) for child in sorted(os.listdir(path), reverse=True)]  # noqa: PTH208 - of thousands


def _segments(file: BinaryIO, size: int) -> list[tuple[int, int]] | None:
    """Return the data segments of a file with holes, or None if it has no holes."""
    # Most files have no holes, and are not searched for them.
    if os.fstat(file.fileno()).st_blocks * _BLOCK >= size:
        return None
    found, at = [], 0
    while at < size:
        try:
            start = os.lseek(file.fileno(), at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            break
        at = min(os.lseek(file.fileno(), start, os.SEEK_HOLE), size)
        found.append((start, at - start))
    file.seek(0)
    # The empty segment says how long a file is that ends with a hole, as GNU tar writes it.
    return [*found, (size, 0)]


def _add_sparse(tar: tarfile.TarFile, member: tarfile.TarInfo, content: BinaryIO, segments: list[tuple[int, int]]) -> None:
    """Add a file without its holes, in the format 1.0 of GNU tar's manual ("Storing Sparse Files")."""
    table = "".join(f"{number}\n" for number in (len(segments), *itertools.chain(*segments))).encode()
    table += bytes(-len(table) % _BLOCK)
    fields = {"major": "1", "minor": "0", "name": member.name, "realsize": str(member.size)}
    member.pax_headers = {f"GNU.sparse.{key}": value for key, value in fields.items()}
    folder, _, last = member.name.rpartition("/")
    # A tar that does not know the format unpacks table and data under this name, and no damaged file under the right one.
    member.name = f"{folder}/GNUSparseFile.0/{last}" if folder else f"GNUSparseFile.0/{last}"
    member.size = len(table) + sum(length for _, length in segments)
    tar.addfile(member, _Concatenated(table, content, segments))  # type: ignore[arg-type] # it only reads


class _Concatenated:
    """A stream of some bytes, followed by the segments of a file."""

    def __init__(self, first: bytes, file: BinaryIO, segments: list[tuple[int, int]]) -> None:
        self._ready, self._file, self._left = first, file, segments[::-1]

    def read(self, size: int) -> bytes:
        while len(self._ready) < size and self._left:
            start, length = self._left.pop()
            taken = min(length, size)
            self._file.seek(start)
            self._ready += self._file.read(taken)
            if taken < length:
                self._left.append((start + taken, length - taken))
        given, self._ready = self._ready[:size], self._ready[size:]
        return given


def write_tar_gz(tree: Path, sink: IO[bytes]) -> None:
    """Pack a tree as a tar archive compressed by gzip; equal trees give equal archives."""
    # A name or a time in the header would make archives of equal trees differ.
    with gzip.GzipFile(filename="", mode="wb", fileobj=sink, mtime=0) as packed:
        pack(tree, packed, name=tree.name)  # type: ignore[arg-type] # it only writes


def write_zip(tree: Path, sink: IO[bytes]) -> None:
    """Pack a tree as a zip archive with modes and symbolic links, as Info-ZIP stores them.

    Equal trees give equal archives.

    Raises:
        Refused: A name is not text, which a zip archive cannot hold.
    """
    with zipfile.ZipFile(sink, "w", compression=zipfile.ZIP_DEFLATED) as packed:
        for path in _tree(tree):
            status, name = path.lstat(), path.relative_to(tree.parent).as_posix()
            # Zip cannot hold a time before 1980 or after 2107.
            when = time.gmtime(min(max(status.st_mtime, _ZIP_FIRST), _ZIP_LAST))
            entry = zipfile.ZipInfo(f"{name}/" if stat.S_ISDIR(status.st_mode) else name, when[:6])
            entry.create_system, entry.external_attr = _ZIP_UNIX, status.st_mode << 16
            entry.compress_type, entry.file_size = zipfile.ZIP_DEFLATED, status.st_size
            try:
                _zip_one(packed, entry, path, status.st_mode)
            except UnicodeEncodeError as error:
                raise Refused(f"{name!r} is not valid UTF-8, as names in a zip archive must be: use 'tar.gz'") from error


def _tree(top: Path) -> Iterator[Path]:
    """Yield the paths of a tree of any depth, sorted by name.

    The library recurses, which limits the depth.
    """
    left = [top]
    while left:
        path = left.pop()
        yield path
        if path.is_dir() and not path.is_symlink():
            left += sorted(path.iterdir(), reverse=True)


def _zip_one(packed: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        packed.writestr(entry, b"")
    elif stat.S_ISLNK(mode):
        packed.writestr(entry, os.fsencode(path.readlink()))
    else:
        with path.open("rb") as content, packed.open(entry, "w") as place:
            shutil.copyfileobj(content, place, 1 << 20)


def unpack(source: BinaryIO, folder: Path, *, exclude: Exclusion = NOTHING, skipped: Callable[[str], object] = lambda _: None) -> None:
    """Unpack a tar file into an empty folder, by strict rules of our own.

    The library's filters have been bypassed (CVE-2025-4517).

    Only folders, regular files, hard links among them and symbolic links are accepted, each name once, each below a folder that came before
    it. Symbolic links are made as they are and never followed, so they cannot redirect a later entry. Set-id bits are dropped. Holes in
    files stay holes, if there is room for the files without them.

    Args:
        source: The archive.
        folder: The folder.
        exclude: What is left out of the tree that the archive holds.
        skipped: Function that is called with the name of each FIFO below the top, which are left out too.

    Raises:
        Refused: The archive holds anything else, or is damaged.
    """
    bounded = _Bounded(source)
    reader = _Reader(folder, exclude, skipped)
    try:
        # Only uncompressed archives, because a small compressed one can expand to any size.
        with tarfile.open(fileobj=bounded, mode="r:") as tar:  # type: ignore[call-overload] # it only reads and seeks
            count = 0
            for count, member in enumerate(tar, start=1):
                if count > MAX_ENTRIES:
                    raise Refused(f"the archive has more than {MAX_ENTRIES} entries")
                reader.take(source, member)
                bounded.left = _MAX_HEADERS
                tar.members.clear()  # kept for look-ups by name that nobody makes
            if not count:  # of a damaged first header, newer versions of the library make an empty archive
                raise Refused("the archive is empty")
            _check_end(source, tar.offset)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:  # the library lets more through than its own error
        raise Refused(f"the tar archive is damaged: {error}") from error
    reader.finish()


class _Bounded:
    """A file with a limit on the bytes of one entry's headers.

    The library keeps headers in memory, however long they are.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.left = _MAX_HEADERS
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise Refused(f"an entry has more than {_MAX_HEADERS} bytes of headers")
        return self._file.read(size)


def _check_end(source: BinaryIO, offset: int) -> None:
    """Raise if an archive is truncated, which the library takes for its end."""
    source.seek(offset)
    if source.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
        raise Refused("the tar archive is damaged: it ends early")


class _Reader:
    def __init__(self, root: Path, exclude: Exclusion, skipped: Callable[[str], object]) -> None:
        self._root, self._exclude, self._skipped = root, exclude, skipped
        self._room = shutil.disk_usage(root).free
        self._times: list[tuple[Path, float]] = []
        self._modes: dict[tuple[str, ...], int] = {(): 0o700}
        self._files: set[tuple[str, ...]] = set()

    def take(self, source: BinaryIO, member: tarfile.TarInfo) -> None:
        parts = _parts(member.name)
        path = self._root.joinpath(*parts)
        if member.size < 0:  # the library would read on at an earlier place, for ever (CVE-2025-8194)
            raise Refused(f"{member.name!r} has a negative size")
        if self._exclude.covers(parts[1:]):
            return
        self._check_place(member.name, parts, path)
        if member.isdir():
            # The final mode is set in `finish`: it may forbid to write the folder's files.
            path.mkdir(mode=0o700)
            self._modes[parts] = member.mode & 0o777
            self._times.append((path, member.mtime))
        elif member.isreg():
            self._write(source, member, path)
            self._files.add(parts)
        elif member.issym() and member.linkname:
            path.symlink_to(member.linkname)
            os.utime(path, (member.mtime, member.mtime), follow_symlinks=False)
        elif member.islnk():
            self._link(member, path)
        elif member.isfifo() and parts[1:]:
            self._skipped(member.name)
        else:
            raise Refused(f"{member.name!r} is neither a file nor a folder nor a link")

    def _check_place(self, name: str, parts: tuple[str, ...], path: Path) -> None:
        # The folder must be one that this archive made: a symbolic link in its place would lead elsewhere.
        if parts[:-1] not in self._modes:
            raise Refused(f"{name!r} is in the archive without its folder")
        if os.path.lexists(path):
            raise Refused(f"{name!r} is in the archive twice")

    def _link(self, member: tarfile.TarInfo, path: Path) -> None:
        target = _parts(member.linkname)
        # Only to a file of this archive: a hard link to anything else would open a file of the host.
        if target not in self._files:
            raise Refused(f"{member.name!r} is a hard link to something that is not in the archive")
        os.link(self._root.joinpath(*target), path, follow_symlinks=False)

    def _write(self, source: BinaryIO, member: tarfile.TarInfo, path: Path) -> None:
        # Private until it is complete, and never through a link that an earlier entry made.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            source.seek(member.offset_data)
            for start, length in self._layout(member):
                file.seek(start)
                _copy(source, file, length, member.name)
            if member.issparse():
                file.truncate(member.size)
            file.flush()  # a write after it would change the time again
            os.fchmod(file.fileno(), member.mode & 0o777)
            os.utime(file.fileno(), (member.mtime, member.mtime))

    def _layout(self, member: tarfile.TarInfo) -> list[tuple[int, int]]:
        """Return the segments of a sparse file's data, in order.

        They are checked, because a few bytes can describe a sparse file that fills any disk once it is copied.
        """
        sparse = cast("list[tuple[int, int]] | None", member.sparse)
        if sparse is None:
            return [(0, member.size)]
        self._room -= member.size
        if self._room < 0:
            raise Refused(f"{member.name!r} has {member.size} bytes with its holes, more than the disk has free")
        pieces, end = [piece for piece in sparse if piece[1]], 0  # empty ones tell of a hole at the end, or nothing
        for start, length in pieces:
            if start < end or length < 0 or start + length > member.size:
                raise Refused(f"{member.name!r} has an invalid list of its parts")
            end = start + length
        return pieces

    def finish(self) -> None:
        """Set the times and modes of the folders, once nothing more is written into them."""
        # Before the modes, which may forbid the way to a folder below.
        for path, mtime in reversed(self._times):
            os.utime(path, (mtime, mtime))
        # Children first, because a folder's mode may forbid to enter it.
        for parts, mode in sorted(self._modes.items(), reverse=True):
            if parts:
                self._root.joinpath(*parts).chmod(mode)


def _copy(source: BinaryIO, target: BinaryIO, length: int, name: str) -> None:
    while length:
        block = source.read(min(length, 1 << 20))
        if not block:
            raise Refused(f"the tar archive is damaged: it ends early, in {name!r}")
        target.write(block)
        length -= len(block)


def _parts(name: str) -> tuple[str, ...]:
    path = PurePosixPath(name)
    parts = path.parts
    if path.is_absolute() or ".." in parts or not parts:
        raise Refused(f"the name {name!r} leads out of the archive")
    return parts
