"""Copies of files and trees between host and guest.

A copy gets its final name only when it is complete.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, BinaryIO, Self, cast

from pytest_vmbottle.errors import TransferError, VMBottleError
from pytest_vmbottle.guest import landing
from pytest_vmbottle.guest import tar as archive
from pytest_vmbottle.guest.exclusion import NOTHING, Exclusion
from pytest_vmbottle.guest.path import BULK, UNABLE, GuestPath, mode_word, raise_for
from pytest_vmbottle.host.files import atomic_file
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.result import Result
from pytest_vmbottle.shown import printable

__all__ = ["FORMATS", "copy_in", "copy_out", "pack_out"]

FORMATS: dict[str, Callable[[Path, IO[bytes]], None]] = {"zip": archive.write_zip, "tar.gz": archive.write_tar_gz}
"""Archive formats for a guest's folder."""

_GNU = "tar --version 2>/dev/null | grep -q GNU"
_PUT = read_script(__package__, "copy_put.sh")
_CLEAR = 'path=$1; [ -d "$path" ] && rm -rf "${path%/}/$2"; rm -rf "${path%/*}/$2"'
_MEASURE = read_script(__package__, "copy_measure.sh")
# Not every shell's `cd` says why it failed.
_RESOLVE = 'stat -L "$1/." > /dev/null && cd -P "$1" && pwd -P'
_HEADERS = 4
"""Kilobytes that an entry needs at most besides its content."""
_MOST = 1 << 40
"""Bytes that a guest may send at most."""
_GET = read_script(__package__, "copy_get.sh")
_MOST_AT_ONCE = 8 << 20
"""Bytes of a file alone that goes by one operation of the runner; beyond that a disk is quicker."""
_IGNORED = re.compile(r"^tar: (.*): socket ignored$", re.MULTILINE)
"""Message of GNU's tar for a socket."""
_NAMED, _NAME = 3, 200
"""Most paths that a message names, and most characters of each."""
log = logging.getLogger(__name__)


def copy_in(source: Path, target: GuestPath, exclude: Exclusion = NOTHING, *, contents: bool = False) -> None:
    """Copy a host file or tree to the guest, without what is excluded; or the contents of a folder, into the target itself.

    Raises:
        FileNotFoundError: The source, or the target's folder, does not exist.
        NotADirectoryError: The contents are wanted of what is no folder.
        PermissionError: A file or folder of the source cannot be read.
        TransferError: The copy broke off.
    """
    if not os.path.lexists(source):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory (on the host)", str(source))
    if contents:
        if not source.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory (on the host)", str(source))
        source = source.resolve()
    itself = "1" if contents or source.name == ".." else ""  # goes to the destination itself, as with `cp -r`
    name = source.resolve().name if itself or not source.name else source.name
    # Hidden and random, so that it meets no file of the guest's; it gets its name when it is complete.
    temporary = f".vmbottle.{secrets.token_hex(8)}"
    if not name:
        raise TransferError("the whole file system cannot be copied: name its folders", src=source, dst=str(target))
    with _failures(source, target):
        if (placed := _place(source, target, name)) is not None:
            raise_for(placed, target)
            return
    with _failures(source, target), tempfile.TemporaryFile() as stream, _Skipped() as skipped:
        # Asked once, and only if there is a file with holes: it is another round trip.
        sparse = cache(lambda: target.shell.script(_GNU).ok)
        archive.pack(source, stream, name=name, sparse=sparse, exclude=exclude, skipped=skipped)
        size = stream.tell()
        stream.seek(0)
        try:
            words = (str(target), name, temporary, _blocking(size), itself)
            # tar finds the end of its input by itself, so it may read a disk that is longer than the archive.
            result = target.shell.feed(_PUT, *words, source=stream, size=size, framed=True)
        except VMBottleError:  # it was killed at its time-out, or the channel is lost
            with suppress(VMBottleError):
                target.shell.script(_CLEAR, str(target), temporary)
            raise
        raise_for(result, target)


def _place(source: Path, target: GuestPath, name: str) -> Result | None:
    """Copy a file alone at once; return None if it is none, has holes or is large, or if the channel cannot."""
    about = source.lstat()
    if not _is_small(about):
        return None
    with source.open("rb") as file:
        content = file.read(about.st_size)
    if len(content) < about.st_size:  # it is just being written: the other way says so if it stays shorter
        return None
    words = (str(target), name, str(len(content)), mode_word(stat.S_IMODE(about.st_mode)), str(int(about.st_mtime)))
    result = target.shell.operation("place", *words, content=content)
    return None if result is None or result.returncode == UNABLE else result


def _is_small(about: os.stat_result) -> bool:
    return stat.S_ISREG(about.st_mode) and about.st_size <= _MOST_AT_ONCE and about.st_blocks * 512 >= about.st_size


def copy_out(source: GuestPath, target: Path, exclude: Exclusion = NOTHING) -> None:
    """Copy a guest's file or tree to the host, without what is excluded; or the contents of a folder, into the target itself.

    Nothing is written outside of the target, whatever the guest sends.

    Raises:
        FileNotFoundError: The source, or the target's folder, does not exist.
        NotADirectoryError: The contents are wanted of what is no folder.
        TransferError: The copy broke off, or the guest sent content that must not be written.
    """
    named = _named(source)
    within = named.name if named is source else None
    with (
        _failures(source, target),
        landing.destination(target, within) as (folder, opened, name),
        _arrived(named, folder, exclude) as arrived,
    ):
        landing.settle(arrived, opened, name)


def _named(source: GuestPath) -> GuestPath:
    """Return the path with a name as its last part; the guest resolves `/srv/x/..`, and a folder whose contents are meant."""
    if source.name != ".." and not source.means_contents:
        return source
    result = source.shell.script(_RESOLVE, str(source))
    raise_for(result, source)
    return source.joinpath(result.stdout.removesuffix("\n"))


def pack_out(source: GuestPath, target: Path, form: str, exclude: Exclusion = NOTHING) -> Path:
    """Pack a guest's folder, without what is excluded, into a file of the host, and return its path.

    Raises:
        FileNotFoundError: The folder, or the target's folder, does not exist.
        IsADirectoryError: The target is a folder.
        NotADirectoryError: The source is not a folder.
        TransferError: The copy broke off, or the guest sent content that must not be packed.
        ValueError: There is no such format.
    """
    if form not in FORMATS:
        raise ValueError(f"{form!r} is not a format: write {' or '.join(map(repr, FORMATS))}")
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a directory (on the host)", str(target))
    _check_folder(target.parent)
    if not source.is_dir() and source.exists():
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory (in the guest)", str(source))
    # Less the umask, like any file that a program makes; what `atomic_file` makes is private by default.
    with _failures(source, target), _arrived(_named(source), target.parent, exclude) as arrived, atomic_file(target, mode=0o666) as file:
        FORMATS[form](arrived, file)
    return target


class _Skipped:
    """Count of sockets and FIFOs that a copy leaves out, which is logged at its end."""

    def __init__(self) -> None:
        self._count = 0
        # A few, because a guest may have any number.
        self._names: list[str] = []

    def __call__(self, path: str) -> None:
        self._count += 1
        if self._count <= _NAMED:
            self._names.append(printable(path[:_NAME]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._count:
            others = [f"{self._count - _NAMED} more"] if self._count > _NAMED else []
            log.warning("not copied, because these are sockets or FIFOs: %s", ", ".join([*self._names, *others]))


@contextmanager
def _failures(source: Path | GuestPath, target: Path | GuestPath) -> Iterator[None]:
    """Turn failures of a block into errors that name the copy."""
    try:
        yield
    except (FileNotFoundError, PermissionError, VMBottleError):
        raise
    # A ValueError may come from a guest whose answer has other words than it should.
    except (OSError, ValueError, IndexError, archive.Refused) as error:
        number, reason = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
        raise TransferError(reason or str(error) or "it was interrupted", src=str(source), dst=str(target), number=number) from error


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory (on the host)", str(folder))


def _blocking(size: int) -> str:
    """Return the factor for `tar -b`: blocks of 1 MiB for much data, else the default.

    The last block is padded to its full length.
    """
    return "2048" if size >= BULK else ""


@contextmanager
def _arrived(source: GuestPath, folder: Path, exclude: Exclusion) -> Iterator[Path]:
    """Unpack the guest's file or tree below a host folder, for the length of a block."""
    if not source.name:
        raise archive.Refused("the whole file system cannot be copied: name its folders")
    # On the target's file system, so that the last step is a rename.
    with tempfile.TemporaryFile(dir=folder) as stream, landing.scratch(folder) as scratch, _Skipped() as skipped:
        _fetch(source, stream, exclude, skipped)
        stream.seek(0)
        archive.unpack(stream, scratch, exclude=exclude, skipped=skipped)
        arrived = scratch / source.name
        if not os.path.lexists(arrived):
            raise archive.Refused("the archive does not contain what was requested")
        yield arrived


def _fetch(source: GuestPath, stream: IO[bytes], exclude: Exclusion, skipped: Callable[[str], object]) -> None:
    """Write the guest's file or tree to a host file, as a tar archive."""
    # A small file alone comes at once; anything else is only looked at.
    whole = source.shell.operation("fetch", str(source), str(_MOST_AT_ONCE))
    if whole is not None and whole.returncode != UNABLE:
        raise_for(whole, source)
        stream.write(whole.stdout_bytes)
        return
    measured = source.shell.script(_MEASURE, str(source))
    raise_for(measured, source)
    kilobytes, entries, *gnu = measured.stdout.split()
    # The guest measures, so the number is bounded: it becomes the size of a disk.
    size = min(int(kilobytes) + _HEADERS * int(entries) << 10, _MOST)
    words = (_blocking(size), *(gnu or [""]), *exclude.tar_options(source.name))
    result = source.shell.fetch(_GET, str(source), *words, sink=cast("BinaryIO", stream), size=size)
    raise_for(result, source)
    for ignored in _IGNORED.finditer(result.stderr):
        skipped(ignored[1])
