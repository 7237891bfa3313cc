"""Many files written into a guest at once."""

from __future__ import annotations

import os
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pytest_vmbottle.guestpath import FOLLOW, GuestPath, Shell, mode_word, owner_word, raise_for
from pytest_vmbottle.result import Result
from pytest_vmbottle.spec import Content, File

__all__ = ["Content", "File", "write_files"]

# What fails says which path it was about on its standard output.
_FAIL = r"""
set -u # an empty folder's name would be the root's
fail() { printf '%s\0' "$1"; [ $# -eq 1 ] || echo "$1: $2" >&2; exit 1; }
"""
# What a guest cannot do without is never emptied.
_VITAL = r"""
vital() {
  case $1 in
    /usr/local/?*/?* | /usr/share/?*/?* | /usr/src/?*) return 1 ;;
    / | /bin | /bin/* | /boot | /boot/* | /dev | /dev/* | /etc | /home | /lib | /lib/* | /lib32* | /lib64* | /libx32* | /media | /mnt) ;;
    /opt | /proc | /proc/* | /root | /run | /sbin | /sbin/* | /srv | /sys | /sys/* | /tmp | /usr | /usr/* | /var) ;;
    /var/backups | /var/cache | /var/lib | /var/local | /var/lock | /var/log | /var/mail | /var/opt | /var/run | /var/spool | /var/tmp) ;;
    *) return 1 ;;
  esac
}
"""
# For all that is staged for the folder `top`: whether it can be placed, and the owner and mode of what it takes the place of.
_CHECK = (
    _FAIL
    + FOLLOW
    + r"""
for new do
  follow "$top/${new#./}"
  if [ -d "$new" ]; then
    [ -n "$clean" ] || [ -d "$path" ] || [ ! -e "$path" ] || fail "$path" "Not a directory"
  elif [ -z "$clean" ] && [ -e "$path" ]; then
    [ ! -d "$path" ] || fail "$path" "Is a directory"
    [ -f "$path" ] || fail "$path" "File exists"
    [ -n "$owner" ] || chown "$(stat -c %u:%g "$path")" "$new" || fail "$path"
    run=; [ ! -x "$new" ] || run=+x # what was executable on the host is so here too
    [ -n "$mode" ] || chmod "$(stat -c %a "$path")" "$new" && { [ -z "$run" ] || [ -n "$mode" ] || chmod "$run" "$new"; } || fail "$path"
  fi
done
"""
)
# For the files of one folder. They are renamed together, but for those that have a symbolic link's name: these go where it leads.
_MOVE = (
    _FAIL
    + FOLLOW
    + r"""
for new do
  shift
  follow "$folder/${new##*/}"
  if [ "$path" = "$folder/${new##*/}" ]; then set -- "$@" "$new"; else mv -f "$new" "$path" || fail "$path"; fi
done
[ $# -eq 0 ] || mv -f "$@" "$folder/" || fail "$folder/${1##*/}"
"""
)
# For the folders of what is staged, each after the one that it is in.
_PLACE = (
    _FAIL
    + r"""
make() {
  [ ! -d "$1/" ] || return 0
  make "${1%/*}"
  mkdir "$1" || fail "$1"
  [ -z "$owner" ] || chown -- "$owner" "$1" || fail "$1"
}
for new do
  folder=$top; [ "$new" = . ] || folder=$top/${new#./}
  make "$folder"
  export folder
  find "$new" -mindepth 1 -maxdepth 1 -type f -exec sh -c 'eval "$move"' sh {} + || exit 1
done
"""
)
# All is unpacked beside where it is to go, and checked, before anything that is there is touched. The folders that it goes to are words,
# and the tar stream has a number in place of each: a symbolic link leads from there to its stage.
_WRITE_FILES = (
    _FAIL
    + _VITAL
    + r"""
clean=$1 mode=$2 owner=$3 check=$4 place=$5 move=$6; shift 6
export clean mode owner check place move top # as words of find's, they could not have {} in them
for top do
  [ -n "$clean" ] && [ -d "$top" ] || continue
  real=$(cd -P "$top" && pwd -P && echo .) || fail "$top"
  ! vital "${real%?.}" || { printf '%s\0' "$top"; exit 110; }
done
links=$(mktemp -d) || fail ''
trap 'for link in "$links"/*; do rm -rf "$(readlink "$link")"; done; rm -rf "$links"' EXIT
count=0
for top do
  base=$top
  while [ ! -d "$base/" ]; do [ ! -e "$base" ] || fail "$base" "Not a directory"; base=${base%/*}; done
  stage=$(mktemp -d "$base/.vmbottle.XXXXXXXX") || fail "$top"
  ln -s "$stage" "$links/$count" || fail "$top"
  count=$((count + 1))
done
tar -xomf - -C "$links" || exit 1
files() { find "$links"/*/ -type f -exec "$@" {} + || fail ''; }
if [ -n "$mode" ]; then files chmod "$mode"
else
  run() { find "$links"/*/ -type f "$@" || fail ''; }
  run ! -perm -100 -exec chmod "$(printf %o $((0666 & ~0$(umask))))" {} +
  run -perm -100 -exec chmod "$(printf %o $((0777 & ~0$(umask))))" {} +
fi
[ -z "$owner" ] || files chown -- "$owner"
each() {
  step=$1; shift; count=0
  for top do
    stage=$(readlink "$links/$count"); count=$((count + 1))
    cd "$stage" || fail "$top"
    "$step"
  done
}
check() { find . -exec sh -c 'eval "$check"' sh {} + || exit 1; }
place() { find . -type d -exec sh -c 'eval "$place"' sh {} + || exit 1; }
old() { find . -xdev -mindepth 1 -depth ! -path "./${stage##*/}" ! -path "./${stage##*/}/*" "$@"; }
empty() {
  [ -d "$top" ] || return 0
  cd -P "$top" || fail "$top"
  old ! -type d -exec rm -f {} + && old -type d -exec rmdir {} + || fail "$top"
}
each check "$@"
for list in "$links"/.modes/*; do
  [ ! -e "$list" ] || (cd "$links" && xargs -0 chmod "${list##*/}" <"$list") || fail ''
done
[ -z "$clean" ] || each empty "$@"
each place "$@"
[ -z "$(find "$links"/*/ -type f)" ] || fail '' "not all of it could be placed"
cd /
"""
)
_VITAL_STATUS = 110


def write_files(shell: Shell, files: Mapping[GuestPath, File], *, clean: bool, mode: int | None, owner: str | int | None) -> None:
    """Writes files by one command (see `Machine.write_files`).

    Raises:
        ValueError: The paths make no sense together, or `clean` would empty a folder that the guest needs.
        OSError: A file could not be written; `filename` says which.
    """
    _check_paths(files)
    words = ("1" if clean else "", "" if mode is None else mode_word(mode), owner_word(owner))
    if not files:
        return
    tops = _tops({path.parent for path in files})
    members = {_member(path, tops): path for path in sorted(files)}
    with tempfile.TemporaryFile() as stream:
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
            contents = {name: files[path] for name, path in members.items()}
            for name, content in contents.items():
                _add(tar, name, content[0] if isinstance(content, tuple) else content)
            for bits, names in _modes(contents).items():
                _add(tar, f".modes/{bits}", b"".join(names))
        size = stream.tell()
        stream.seek(0)
        folders = [str(top) for top in tops]
        result = shell.feed(_WRITE_FILES, *words, _CHECK, _PLACE, _MOVE, *folders, source=stream, size=size)
    _raise_for(result, members, tops)


def _check_paths(files: Iterable[GuestPath]) -> None:
    known = set(files)
    for path in known:
        if ".." in path.parts or not path.name:
            raise ValueError(f"{path} cannot be written as a file: name it plainly, without '..'")
        inside = next((folder for folder in path.parents if folder in known), None)
        if inside is not None:
            raise ValueError(f"{inside} cannot be a file and the folder of {path}")


def _tops(folders: set[GuestPath]) -> list[GuestPath]:
    """The folders that are not in another one of them."""
    return sorted(folder for folder in folders if not folders.intersection(folder.parents))


def _member(path: GuestPath, tops: list[GuestPath]) -> str:
    place = next(number for number, top in enumerate(tops) if path.is_relative_to(top))
    return f"{place}/{path.relative_to(tops[place])}"


def _modes(contents: Mapping[str, File]) -> dict[str, list[bytes]]:
    """Members with permission bits of their own, by those bits; each name has a NUL at its end."""
    found: dict[str, list[bytes]] = {}
    for name, content in contents.items():
        if isinstance(content, tuple):
            found.setdefault(mode_word(content[1]), []).append(os.fsencode(f"./{name}\0"))
    return found


def _add(tar: tarfile.TarFile, name: str, content: Content) -> None:
    member = tarfile.TarInfo(name)
    member.mode, member.mtime = 0o600, int(time.time())
    if isinstance(content, Path):
        with content.open("rb") as file:
            status = os.fstat(file.fileno())
            member.mode |= status.st_mode & 0o100
            _add_stream(tar, member, file, status.st_size)
        return
    data = content.encode() if isinstance(content, str) else bytes(memoryview(content))
    _add_stream(tar, member, BytesIO(data), len(data))


def _add_stream(tar: tarfile.TarFile, member: tarfile.TarInfo, source: BinaryIO, size: int) -> None:
    member.size = size
    tar.addfile(member, source)


def _raise_for(result: Result, members: Mapping[str, GuestPath], tops: list[GuestPath]) -> None:
    __tracebackhide__ = True
    if result.ok:
        return
    told = result.stdout.split("\0")[0]
    if result.returncode == _VITAL_STATUS:
        raise ValueError(f"clean=True would empty {told}, which the guest needs: write to a folder of your own, or leave clean out")
    named = (path for name, path in members.items() if f" {name}: " in result.stderr)  # by tar
    raise_for(result, str(PurePosixPath(told)) if told else next(named, tops[0]))
