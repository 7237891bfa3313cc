"""Trees as tar streams: written from the host's files, and read from a guest that may want to do harm."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

__all__ = ["MAX_ENTRIES", "Refused", "pack", "unpack"]

MAX_ENTRIES = 1_000_000
"""More than any tree that a test copies; an archive with more is an attack on the host's inodes."""


class Refused(Exception):
    """An archive that could write elsewhere than where it is unpacked, or makes no sense."""


def pack(source: Path, sink: BinaryIO, *, name: str) -> None:
    """Writes a file or tree as a tar stream whose top is `name`; everything in it belongs to root."""

    def as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        return member

    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        tar.add(source, arcname=name, filter=as_root)


def unpack(source: BinaryIO, folder: Path) -> None:
    """Unpacks a tar file into an empty folder, by rules of our own: the library's filters have been got around (CVE-2025-4517).

    Only folders, regular files, hard links among them and symbolic links come out, each name once, each below a folder that came before
    it. Symbolic links are made as they are and never followed, so they cannot lead a later entry astray. Set-id bits are dropped.

    Raises:
        Refused: The archive has something else in it, or is damaged.
    """
    reader = _Reader(folder)
    try:
        with tarfile.open(fileobj=source, mode="r:") as tar:
            count = 0
            for count, member in enumerate(tar, start=1):
                if count > MAX_ENTRIES:
                    raise Refused(f"it has more than {MAX_ENTRIES} entries")
                reader.take(tar, member)
                tar.members.clear()  # type: ignore[attr-defined] # kept for look-ups by name that nobody makes
            if not count:  # of a damaged first header, newer versions of the library make an empty archive
                raise Refused("there is nothing in it")
            _check_end(source, tar.offset)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:  # the library lets more through than its own error
        raise Refused(f"it is not a whole tar archive: {error}") from error
    reader.finish()


def _check_end(source: BinaryIO, offset: int) -> None:
    """Tells an archive's end from the place where it breaks off, which the library takes for its end too."""
    source.seek(offset)
    if source.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
        raise Refused("it is not a whole tar archive: it breaks off")


class _Reader:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._modes: dict[tuple[str, ...], int] = {(): 0o700}
        self._files: set[tuple[str, ...]] = set()

    def take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = _parts(member.name)
        path = self._root.joinpath(*parts)
        if member.size < 0:  # the library would read on at an earlier place, for ever (CVE-2025-8194)
            raise Refused(f"{member.name!r} has no size")
        self._check_place(member.name, parts, path)
        if member.isdir():
            path.mkdir(mode=0o700)
            self._modes[parts] = member.mode & 0o777
        elif member.isreg() and not member.issparse():  # a few bytes can stand for a sparse file that fills any disk
            self._write(tar, member, path)
            self._files.add(parts)
        elif member.issym() and member.linkname:
            path.symlink_to(member.linkname)
        elif member.islnk():
            self._link(member, path)
        else:
            raise Refused(f"{member.name!r} is neither a file nor a folder nor a link")

    def _check_place(self, name: str, parts: tuple[str, ...], path: Path) -> None:
        if parts[:-1] not in self._modes:
            raise Refused(f"{name!r} comes without the folder it is in")
        if os.path.lexists(path):
            raise Refused(f"{name!r} is there twice")

    def _link(self, member: tarfile.TarInfo, path: Path) -> None:
        target = _parts(member.linkname)
        if target not in self._files:
            raise Refused(f"{member.name!r} is a hard link to something that is not in it")
        os.link(self._root.joinpath(*target), path, follow_symlinks=False)

    def _write(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
        content = tar.extractfile(member)
        if content is None:
            raise Refused(f"{member.name!r} has no content")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
            file.flush()  # a write after it would change the time again
            os.fchmod(file.fileno(), member.mode & 0o777)
            os.utime(file.fileno(), (member.mtime, member.mtime))

    def finish(self) -> None:
        """Gives the folders their modes, now that nothing more is written into them."""
        for parts, mode in sorted(self._modes.items(), reverse=True):
            if parts:
                self._root.joinpath(*parts).chmod(mode)


def _parts(name: str) -> tuple[str, ...]:
    path = PurePosixPath(name)
    parts = path.parts
    if path.is_absolute() or ".." in parts or not parts:
        raise Refused(f"the name {name!r} leads out of it")
    return parts
