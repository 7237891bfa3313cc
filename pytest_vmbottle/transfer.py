"""Copies of files and trees between host and guest; what arrives gets its final name only when all of it is there."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from pytest_vmbottle import archive, landing
from pytest_vmbottle._os import atomic_file
from pytest_vmbottle.errors import TransferError, VMBottleError
from pytest_vmbottle.guestpath import BULK, GuestPath, raise_for

__all__ = ["FORMATS", "copy_in", "copy_out", "pack_out"]

FORMATS: dict[str, Callable[[Path, IO[bytes]], None]] = {"zip": archive.write_zip, "tar.gz": archive.write_tar_gz}
"""What a guest's folder can be packed as."""

_GNU = "tar --version 2>/dev/null | grep -q GNU"
# $1 destination, $2 the source's name, $3 a name that is not there yet, $4 tar's blocking factor, which not every tar has. A destination
# that is a folder means a place in it, or with $5 itself. A folder that is there already is merged into, file by file, each by a rename. Of
# a full disk tar may say "Wrote only 512 of 1048576 bytes"; the probe has it named.
_PUT = rf"""
path=$1; [ -z "$5" ] && [ -d "$path" ] && path=${{path%/}}/$2
parent=${{path%/*}}; [ -d "$parent/" ] || {{ stat -L "$parent/" > /dev/null; exit 1; }}
new=$parent/$3
mkdir -m 700 "$new" || exit 1
trap 'rm -rf "$new"' EXIT
blocks=; [ -n "$4" ] && {_GNU} && blocks="-b $4"
tar $blocks -xpf - -C "$new" || {{ head -c 1048576 /dev/zero > "$new/probe"; exit 1; }}
if [ ! -d "$new/$2" ] || [ -L "$new/$2" ]; then
  [ -d "$path" ] && exit 102
  mv -f "$new/$2" "$path"; exit
fi
[ -d "$path" ] || {{ [ -e "$path" ] && exit 103; mv "$new/$2" "$path"; exit; }}
cd "$new/$2" || exit 1
find . -type d -exec sh -c 'for d do mkdir -p "$0/$d" || exit 1; done' "$path" {{}} + &&
find . ! -type d -exec sh -c 'for f do mv -f "$f" "$0/$f" || exit 1; done' "$path" {{}} +
"""
_CLEAR = 'path=$1; [ -d "$path" ] && rm -rf "${path%/}/$2"; rm -rf "${path%/*}/$2"'
# Its kilobytes with all holes filled, its number of entries, and whether tar is GNU's, which can leave the holes out.
_MEASURE = rf"""
[ -e "$1" ] || [ -L "$1" ] || {{ stat "$1" > /dev/null; exit 1; }}
size=$(du -sk --apparent-size -- "$1" 2>/dev/null || du -sk -- "$1" 2>/dev/null)
[ -n "$size" ] || exit 1
if {_GNU}; then gnu=1; else gnu=; fi
echo "${{size%%[!0-9]*}} $(find "$1" | wc -l) $gnu"
"""
_HEADERS = 4
"""Kilobytes that one entry takes at most besides its content."""
_MOST = 1 << 40
"""Bytes that a guest may send at most."""
# $2 tar's blocking factor, $3 whether it is GNU's. Of that, status 1 says that a file grew or went meanwhile, as logs do.
_GET = r"""
cd "${1%/*}/" || exit
if [ -n "$3" ]; then tar -b "${2:-20}" -cSf - "./${1##*/}"; else tar -cf - "./${1##*/}"; fi
status=$?; [ "$status$3" = 11 ] && exit 0
exit $status
"""


def copy_in(source: Path, target: GuestPath) -> None:
    """Copies a host file or tree to the guest.

    Raises:
        FileNotFoundError: The source, or the folder it is to go to, does not exist.
        PermissionError: A file or folder of the source cannot be read.
        TransferError: The copy broke off.
    """
    if not os.path.lexists(source):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory (on the host)", str(source))
    itself = "1" if source.name == ".." else ""  # goes to the destination itself, as with `cp -r`
    name = source.resolve().name if itself or not source.name else source.name
    temporary = f".vmbottle.{secrets.token_hex(8)}"
    if not name:
        raise TransferError("the whole file system cannot be copied: name its folders", src=source, dst=str(target))
    with _failures(source, target), tempfile.TemporaryFile() as stream:
        archive.pack(source, stream, name=name, sparse=cache(lambda: target.shell.script(_GNU).ok))
        size = stream.tell()
        stream.seek(0)
        try:
            words = (str(target), name, temporary, _blocking(size), itself)
            result = target.shell.feed(_PUT, *words, source=stream, size=size, framed=True)
        except VMBottleError:  # it was killed at its time-out, or the channel is lost
            with suppress(VMBottleError):
                target.shell.script(_CLEAR, str(target), temporary)
            raise
        raise_for(result, target)


def copy_out(source: GuestPath, target: Path) -> None:
    """Copies a guest's file or tree to the host; nothing the guest sends gets out of the target.

    Raises:
        FileNotFoundError: The source, or the folder it is to go to, does not exist.
        TransferError: The copy broke off, or the guest sent what must not be written.
    """
    named = _named(source)
    within = named.name if named is source else None
    with (
        _failures(source, target),
        landing.destination(target, within) as (folder, opened, name),
        _arrived(named, folder) as arrived,
    ):
        landing.settle(arrived, opened, name)


def _named(source: GuestPath) -> GuestPath:
    """A path whose last part is a name; that of `/srv/x/..` the guest knows."""
    if source.name != "..":
        return source
    result = source.shell.script('cd -P "$1" && pwd -P', str(source))
    raise_for(result, source)
    return source.joinpath(result.stdout.removesuffix("\n"))


def pack_out(source: GuestPath, target: Path, form: str) -> Path:
    """Packs a guest's folder into a file of the host, and returns it.

    Raises:
        FileNotFoundError: The folder, or the one the file is to be in, does not exist.
        IsADirectoryError: The file is to have the name of a folder.
        NotADirectoryError: The source is no folder.
        TransferError: The copy broke off, or the guest sent what must not be packed.
        ValueError: There is no such format.
    """
    if form not in FORMATS:
        raise ValueError(f"{form!r} is not a format: write {' or '.join(map(repr, FORMATS))}")
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a directory (on the host)", str(target))
    _check_folder(target.parent)
    if not source.is_dir() and source.exists():
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory (in the guest)", str(source))
    with _failures(source, target), _arrived(_named(source), target.parent) as arrived, atomic_file(target, mode=0o666) as file:
        FORMATS[form](arrived, file)
    return target


@contextmanager
def _failures(source: Path | GuestPath, target: Path | GuestPath) -> Iterator[None]:
    """Says of what went wrong in between which copy it was."""
    try:
        yield
    except (FileNotFoundError, PermissionError, VMBottleError):
        raise
    except (OSError, ValueError, IndexError, archive.Refused) as error:
        number, reason = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
        raise TransferError(reason or str(error) or "it broke off", src=str(source), dst=str(target), number=number) from error


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory (on the host)", str(folder))


def _blocking(size: int) -> str:
    """A factor for `tar -b`: blocks of 1 MiB where there is much, else the usual ones, because the last one is filled up."""
    return "2048" if size >= BULK else ""


@contextmanager
def _arrived(source: GuestPath, folder: Path) -> Iterator[Path]:
    """The guest's file or tree, unpacked below a host's folder for as long as the context lasts."""
    if not source.name:
        raise archive.Refused("the whole file system cannot be copied: name its folders")
    with tempfile.TemporaryFile(dir=folder) as stream, landing.scratch(folder) as scratch:
        measured = source.shell.script(_MEASURE, str(source))
        raise_for(measured, source)
        kilobytes, entries, *gnu = measured.stdout.split()
        size = min(int(kilobytes) + _HEADERS * int(entries) << 10, _MOST)
        result = source.shell.fetch(_GET, str(source), _blocking(size), *(gnu or [""]), sink=stream, size=size)
        raise_for(result, source)
        stream.seek(0)
        archive.unpack(stream, scratch)
        arrived = scratch / source.name
        if not os.path.lexists(arrived):
            raise archive.Refused("what was asked for is not in it")
        yield arrived
