"""Copies of files and trees between host and guest; what arrives gets its final name only when all of it is there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from pytest_vmbottle import archive
from pytest_vmbottle.errors import TransferError
from pytest_vmbottle.guestpath import GuestPath, raise_for

__all__ = ["copy_in", "copy_out"]

# $1 destination, $2 the source's name: a destination that is a folder means a place in it.
_TARGET = r"""
path=$1; [ -d "$path" ] && path=${path%/}/$2
parent=${path%/*}; [ -d "${parent:-/}" ] || exit 101
"""
_PUT_FILE = (
    _TARGET
    + r"""
[ -d "$path" ] && exit 102
new=$(mktemp "$parent/.vmbottle.XXXXXXXX") || exit 105
trap 'rm -f "$new"' EXIT
cat > "$new" || exit 1
[ "$(wc -c < "$new")" -eq "$3" ] || { echo "only a part of it arrived" >&2; exit 1; }
chmod "$4" "$new" && mv -f "$new" "$path"
"""
)
# A folder that is there already is merged into, file by file, each by a rename.
_PUT_TREE = (
    _TARGET
    + r"""
new=$(mktemp -d "$parent/.vmbottle.XXXXXXXX") || exit 105
trap 'rm -rf "$new"' EXIT
tar -xpf - -C "$new" || exit 1
[ -d "$path" ] || { [ -e "$path" ] && exit 103; mv "$new/$2" "$path"; exit; }
cd "$new/$2" || exit 1
find . -type d -exec sh -c 'for d do mkdir -p "$0/$d" || exit 1; done' "$path" {} + &&
find . ! -type d -exec sh -c 'for f do mv -f "$f" "$0/$f" || exit 1; done' "$path" {} +
"""
)
_SIZE = '[ -e "$1" ] || [ -L "$1" ] || exit 101; exec du -sk -- "$1"'
_GET = '[ -e "$1" ] || [ -L "$1" ] || exit 101; cd "${1%/*}/" && exec tar -cf - "./${1##*/}"'


def copy_in(source: Path, target: GuestPath) -> None:
    """Copies a host file or tree to the guest.

    Raises:
        FileNotFoundError: The source, or the folder it is to go to, does not exist.
        TransferError: The copy broke off.
    """
    if not os.path.lexists(source):
        raise FileNotFoundError(2, "No such file or directory (on the host)", str(source))
    name = source.name or source.resolve().name
    if source.is_file() and not source.is_symlink():
        status = source.stat()
        with source.open("rb") as content:
            words = (str(target), name, str(status.st_size), f"{status.st_mode & 0o7777:o}")
            result = target.shell.feed(_PUT_FILE, *words, source=content, size=status.st_size)
    else:
        with tempfile.TemporaryFile() as stream:
            archive.pack(source, stream, name=name)
            size = stream.tell()
            stream.seek(0)
            result = target.shell.feed(_PUT_TREE, str(target), name, source=stream, size=size)
    try:
        raise_for(result, target)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TransferError(error.strerror or "it broke off", src=source, dst=str(target)) from error


def copy_out(source: GuestPath, target: Path) -> None:
    """Copies a guest's file or tree to the host; nothing the guest sends gets out of the target.

    Raises:
        FileNotFoundError: The source, or the folder it is to go to, does not exist.
        TransferError: The copy broke off, or the guest sent what must not be written.
    """
    final = target / source.name if target.is_dir() else target
    if not final.parent.is_dir():
        raise FileNotFoundError(2, "No such file or directory (on the host)", str(final.parent))
    with tempfile.TemporaryFile() as stream, tempfile.TemporaryDirectory(prefix=".vmbottle-", dir=final.parent) as scratch:
        try:
            measured = source.shell.script(_SIZE, str(source))
            raise_for(measured, source)
            result = source.shell.fetch(_GET, str(source), sink=stream, size=int(measured.stdout.split()[0]) << 10)
            raise_for(result, source)
            stream.seek(0)
            archive.unpack(stream, Path(scratch))
            _settle(Path(scratch) / source.name, final)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, IndexError, archive.Refused) as error:
            raise TransferError(str(error), src=str(source), dst=final) from error


def _settle(arrived: Path, final: Path) -> None:
    if not os.path.lexists(arrived):
        raise archive.Refused("what was asked for is not in it")
    merging = final.is_dir() and not final.is_symlink() and arrived.is_dir() and not arrived.is_symlink()
    if not merging:
        _rename(arrived, final)
        return
    for child in arrived.iterdir():
        _settle(child, final / child.name)
    shutil.copymode(arrived, final)


def _rename(arrived: Path, final: Path) -> None:
    if arrived.is_symlink() or not arrived.is_dir():
        arrived.replace(final)
        return
    mode = arrived.stat().st_mode  # a folder that its owner may not write cannot be moved, because its parent changes
    arrived.chmod(mode | 0o200)
    arrived.replace(final)
    final.chmod(mode)
