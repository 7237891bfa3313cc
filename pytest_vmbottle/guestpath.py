"""Paths in a guest, with the verbs and the errors of `pathlib`."""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import PurePosixPath
from typing import BinaryIO, Literal, Protocol

import attrs

from pytest_vmbottle.result import Result, printable
from pytest_vmbottle.spec import is_mode

__all__ = ["BULK", "FOLLOW", "Entry", "GuestPath", "Shell", "mode_word", "owner_word", "raise_for", "with_any_bytes"]

_SAID = 2000
"""Characters of what a program in the guest said that are told."""
BULK = 1 << 20
"""Bytes from which on data takes the channel with the most throughput."""

# What our scripts say by their status; far from what the programs in them end with.
_STATUS = {
    101: errno.ENOENT,
    102: errno.EISDIR,
    103: errno.ENOTDIR,
    104: errno.EEXIST,
    105: errno.EACCES,
    107: errno.EXDEV,
    108: errno.EINVAL,
}
# What programs say at the end of a line: strerror(3) of glibc in the C locale, then what musl, dash and busybox say otherwise.
_TEXTS = {
    "No such file or directory": errno.ENOENT,
    "Permission denied": errno.EACCES,
    "Operation not permitted": errno.EPERM,
    "Is a directory": errno.EISDIR,
    "Not a directory": errno.ENOTDIR,
    "File exists": errno.EEXIST,
    "Directory not empty": errno.ENOTEMPTY,
    "No space left on device": errno.ENOSPC,
    "Read-only file system": errno.EROFS,
    "Disk quota exceeded": errno.EDQUOT,
    "File name too long": errno.ENAMETOOLONG,
    "Too many levels of symbolic links": errno.ELOOP,
    "Too many links": errno.EMLINK,
    "File too large": errno.EFBIG,
    "Invalid argument": errno.EINVAL,
    "Invalid cross-device link": errno.EXDEV,
    "Device or resource busy": errno.EBUSY,
    "Text file busy": errno.ETXTBSY,
    "No such device or address": errno.ENXIO,
    "No such device": errno.ENODEV,
    "Operation not supported": errno.EOPNOTSUPP,
    "Cannot allocate memory": errno.ENOMEM,
    "Input/output error": errno.EIO,
    "Filename too long": errno.ENAMETOOLONG,
    "Symbolic link loop": errno.ELOOP,
    "Cross-device link": errno.EXDEV,
    "Resource busy": errno.EBUSY,
    "Quota exceeded": errno.EDQUOT,
    "Not supported": errno.EOPNOTSUPP,
    "Out of memory": errno.ENOMEM,
    "I/O error": errno.EIO,
    "Directory nonexistent": errno.ENOENT,
    "nonexistent directory": errno.ENOENT,
    "No such file": errno.ENOENT,
    "no such file": errno.ENOENT,
}
_SHORT_WRITE = re.compile(r"Wrote only \d+ of \d+ bytes$")  # GNU tar, where the disk was full in the middle of a block
_NOBODY = re.compile(r"chown: ((?:invalid|unknown) (?:user|group|spec).*)")
_PASSED_OVER = {errno.EACCES, errno.ENOENT, errno.ELOOP}
"""What a listing leaves out, as pathlib's do: folders that may not be read, and what is removed meanwhile."""

# For words that are no UTF-8, which the channels cannot carry: they come in octal. A command's output loses its last line breaks, hence the
# full stop.
_DECODE = r"""n=$#; while [ "$n" -gt 0 ]; do word=$(printf '%b.' "$1"); shift; set -- "$@" "${word%.}"; n=$((n - 1)); done
"""

# Sets `path` to what symbolic links lead to, there or not. BusyBox takes `readlink -f` of what is not there from the wrong folder.
FOLLOW = r"""
follow() {
  path=$1 links=0
  while [ -L "$path" ]; do
    links=$((links + 1)); [ "$links" -le 40 ] || { stat -L "$1" > /dev/null; exit 1; }
    to=$(readlink "$path" && echo .) || exit 1
    to=${to%?.}
    case $to in /*) path=$to ;; *) path=${path%/*}/$to ;; esac
  done
}
"""
# All paths are absolute, so that none can be taken for an option.
_READ = 'exec cat "$1"'
# Written beside it and renamed, so that nobody reads half of it. A symbolic link is written through and a file keeps its mode and owner, as
# with open(2). Where that cannot be done it is written in place: what is no regular file, the files of others, /proc and /sys.
_WRITE = (
    FOLLOW
    + r"""
path=$1 mode=$3 owner=$4
follow "$path"
[ -d "$path" ] && exit 102
new=$path
if [ ! -e "$path" ] || { [ -f "$path" ] && { [ -O "$path" ] || [ "$(id -u)" = 0 ]; }; }; then
  new=$(mktemp "${path%/*}/.vmbottle.XXXXXXXX" 2>&1) || {
    case $([ -w "$path" ] && echo "$new") in
      *denied | *permitted | *directory) new=$path ;;
      *) echo "$new" >&2; exit 1 ;;
    esac
  }
fi
[ "$new" = "$path" ] || trap 'rm -f "$new"' EXIT
cat > "$new" || exit 1
if [ "$new" != "$path" ]; then
  [ "$(wc -c < "$new")" -eq "$2" ] || { echo "only a part of it arrived" >&2; exit 1; }
  if [ -e "$path" ]; then : "${owner:=$(stat -c %u:%g "$path")}" "${mode:=$(stat -c %a "$path")}"
  else : "${mode:=$(printf %o $((0666 & ~0$(umask))))}"; fi
fi
[ -z "$owner" ] || chown -- "$owner" "$new" || exit 1
[ -z "$mode" ] || chmod "$mode" "$new" || exit 1
[ "$new" = "$path" ] || mv -f "$new" "$path" # no exec: it would skip the trap
"""
)
# $2 depth, $3 -L. Each kind of entry is printed with a letter before it.
_SCAN = r"""
stat -L "$1/" > /dev/null || exit 1
[ -r "$1/" ] || exit 105
exec find $3 "$1/" -mindepth 1 ${2:+-maxdepth "$2"} \
""" + r" -o ".join(rf"-type {kind} -exec printf '{kind}%s\0' {{}} +" for kind in "dlfpsbc")
_MKDIR = r"""
[ -z "$2" ] || [ ! -d "$1" ] || exit 0
[ -z "$3" ] || mkdir -p "${1%/*}/" || {
  above=$1; while [ ! -e "$above/" ] && [ ! -e "$above" ]; do above=${above%/*}; done
  [ -d "$above/" ] || exit 103 # for which mkdir has another name
  exit 1
}
exec mkdir -m "$(printf %o $((0$4 & ~0$(umask))))" "$1"
"""
_TOUCH = r"""
[ -n "$3" ] || { [ ! -e "$1" ] && [ ! -L "$1" ]; } || exit 104
[ ! -e "$1" ] || exec touch "$1"
touch "$1" && exec chmod "$(printf %o $((0$2 & ~0$(umask))))" "$1"
"""
# mv would copy to another file system, move into a folder, and take a symbolic link to a folder for one.
_RENAME = r"""
is_dir() { [ -d "$1" ] && [ ! -L "$1" ]; }
device=$(stat -c %d "$1") || exit 1
there=$(stat -c %d "${2%/*}/") || exit 1
[ "$device" = "$there" ] || exit 107
case $2 in "$1"/*) exit 108 ;; esac
if is_dir "$2"; then
  is_dir "$1" || exit 102
  rmdir "$2" || exit 1
elif is_dir "$1"; then
  [ ! -e "$2" ] && [ ! -L "$2" ] || exit 103
fi
if [ -L "$1" ] || [ -L "$2" ] && [ -e "$2" ]; then # mv looks at what they lead to: GNU's for the same file, BusyBox's for a folder
  mv -fT "$1" "$2" 2> /dev/null && exit
  unlink "$2" || exit 1
fi
exec mv -fT "$1" "$2"
"""
_LINK = '[ ! -e "$1" ] && [ ! -L "$1" ] || exit 104; exec ln $3 -- "$2" "$1"'
_READLINK = 'stat "$1" > /dev/null || exit 1; [ -L "$1" ] || exit 108; exec readlink "$1"'
_RMTREE = 'stat "$1" > /dev/null || exit 1; [ -d "$1" ] && [ ! -L "$1" ] || exit 103; exec rm -rf "$1"'
_STAT = 'exec stat $2 -c "%f %i %d %h %u %g %s %X %Y %Z %b %o %t %T|%x|%y|%z" "$1"'
_OWNER = 'exec stat -L -c "$2" "$1"'
_CHMOD = 'stat -L "$1" > /dev/null && exec chmod "0$2" "$1"'  # five digits clear a folder's set-id bits too
_CHOWN = 'exec chown -- "$2" "$1"'

_HASHES = {
    "md5": "md5sum",
    "sha1": "sha1sum",
    "sha224": "sha224sum",
    "sha256": "sha256sum",
    "sha384": "sha384sum",
    "sha512": "sha512sum",
    "blake2b": "b2sum",
}
Type = Literal["dir", "symlink", "file", "fifo", "socket", "block", "char"]
_TYPES: dict[str, Type] = {"d": "dir", "l": "symlink", "f": "file", "p": "fifo", "s": "socket", "b": "block", "c": "char"}


class Shell(Protocol):
    """What a path needs of its machine."""

    def script(self, text: str, *words: str) -> Result:
        """Runs a POSIX shell script of ours with arguments; never raises for its status."""

    def feed(self, text: str, *words: str, source: BinaryIO, size: int, framed: bool = False) -> Result:
        """The same with a file as input; with `framed` the script knows itself where it ends."""

    def fetch(self, text: str, *words: str, sink: BinaryIO, size: int) -> Result:
        """The same with the output, of about `size` bytes, going to a file."""


@attrs.frozen(kw_only=True)
class Entry:
    """Something that was found in a folder.

    Attributes:
        path: Where it is.
        type: What it is itself, no symbolic link followed: `"file"`, `"dir"`, `"symlink"`, `"fifo"`, `"socket"`, `"block"` or `"char"`.
    """

    path: GuestPath
    type: Type

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.name


class GuestPath:
    r"""An absolute path in a guest, with pathlib's verbs and errors. It is made by `Machine.path`, and `/` joins.

    What it does, the machine's user does, with that user's rights. Names are any bytes but NUL: those that are no UTF-8 are written with
    surrogate escapes, as `os.fsdecode` makes them. Each verb is one command in the guest. All of them raise the `OSError` that pathlib
    raises, with `errno` and `filename`: `FileNotFoundError`, `PermissionError`, or without a class of its own such as `ENOSPC`.

    It is no `os.PathLike`, because it means nothing to the host: `open()` refuses it with `TypeError`.

        motd = vm.path("/etc") / "motd"
        motd.write_text("hello\n", mode=0o644)
        assert motd in vm.path("/etc").iterdir()
    """

    # -- the path itself -------------------------------------------------------------------------------------------------------------

    def __init__(self, path: str | PurePosixPath, *, shell: Shell) -> None:
        """Names a place; nothing is asked of the guest.

        Raises:
            ValueError: The path is not absolute, has a NUL byte in it, or a character that no name can have.
        """
        if path == "":
            raise ValueError("an empty path names nothing in the guest: write an absolute one, such as '/srv'")
        self._pure = PurePosixPath(path)
        self._shell = shell
        if not self._pure.is_absolute():
            raise ValueError(f"{str(path)!r} is not an absolute path in the guest")
        _check_text(str(path))

    def _at(self, pure: PurePosixPath) -> GuestPath:
        return GuestPath(pure, shell=self._shell)

    @property
    def shell(self) -> Shell:
        """The machine it is on, as far as a path sees it.

        Example:
            >>> vm.path("/etc").shell is vm
            True
        """
        return self._shell

    @property
    def name(self) -> str:
        """The last part.

        Example:
            >>> vm.path("/srv/www.tar.gz").name
            'www.tar.gz'
        """
        return self._pure.name

    @property
    def stem(self) -> str:
        """The last part without its suffix.

        Example:
            >>> vm.path("/srv/www.tar.gz").stem
            'www.tar'
        """
        return self._pure.stem

    @property
    def suffix(self) -> str:
        """The last part from its last dot on, or nothing.

        Example:
            >>> vm.path("/srv/www.tar.gz").suffix
            '.gz'
        """
        return self._pure.suffix

    @property
    def suffixes(self) -> list[str]:
        """All suffixes: `[".tar", ".gz"]`.

        Example:
            >>> vm.path("/srv/www.tar.gz").suffixes
            ['.tar', '.gz']
        """
        return self._pure.suffixes

    @property
    def parts(self) -> tuple[str, ...]:
        """Its parts; the first is `"/"`.

        Example:
            >>> vm.path("/srv/www").parts
            ('/', 'srv', 'www')
        """
        return self._pure.parts

    @property
    def parent(self) -> GuestPath:
        """The folder it is in.

        Example:
            >>> vm.path("/srv/www").parent
            GuestPath('/srv')
        """
        return self._at(self._pure.parent)

    @property
    def parents(self) -> tuple[GuestPath, ...]:
        """The folders it is in, up to `/`.

        Example:
            >>> vm.path("/srv/www").parents
            (GuestPath('/srv'), GuestPath('/'))
        """
        return tuple(self._at(folder) for folder in self._pure.parents)

    def joinpath(self, *others: str | PurePosixPath) -> GuestPath:
        """The path with others after it; an absolute one takes its place, as in pathlib.

        Example:
            >>> vm.path("/srv").joinpath("www", "index.html")
            GuestPath('/srv/www/index.html')
        """
        return self._at(self._pure.joinpath(*others))

    def with_name(self, name: str) -> GuestPath:
        """The path with another last part.

        Example:
            >>> vm.path("/srv/a.txt").with_name("b.txt")
            GuestPath('/srv/b.txt')
        """
        return self._at(self._pure.with_name(name))

    def with_stem(self, stem: str) -> GuestPath:
        """The path with another stem and the same suffix.

        Example:
            >>> vm.path("/srv/a.txt").with_stem("b")
            GuestPath('/srv/b.txt')
        """
        return self._at(self._pure.with_stem(stem))

    def with_suffix(self, suffix: str) -> GuestPath:
        """The path with another suffix.

        Example:
            >>> vm.path("/srv/a.txt").with_suffix(".bak")
            GuestPath('/srv/a.bak')
        """
        return self._at(self._pure.with_suffix(suffix))

    def relative_to(self, other: str | PurePosixPath | GuestPath) -> PurePosixPath:
        """The way from another path to this one.

        Raises:
            ValueError: This path is not below the other.

        Example:
            >>> str(vm.path("/srv/www/a.txt").relative_to("/srv"))
            'www/a.txt'
        """
        return self._pure.relative_to(str(other))

    def is_relative_to(self, other: str | PurePosixPath | GuestPath) -> bool:
        """Whether it is the other path or below it.

        Example:
            >>> vm.path("/srv/www").is_relative_to("/srv")
            True
        """
        return self._pure.is_relative_to(str(other))

    def match(self, pattern: str) -> bool:
        """Whether the path's end matches a pattern, as `pathlib.PurePath.match` does.

        Example:
            >>> vm.path("/srv/www/a.txt").match("www/*.txt")
            True
        """
        return self._pure.match(pattern)

    def as_posix(self) -> str:
        """The path as text.

        Example:
            >>> vm.path("/srv//www").as_posix()
            '/srv/www'
        """
        return str(self._pure)

    def __truediv__(self, other: str | PurePosixPath) -> GuestPath:
        try:
            return self.joinpath(other)
        except TypeError:
            return NotImplemented

    def __str__(self) -> str:
        return str(self._pure)

    def __repr__(self) -> str:
        return f"GuestPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GuestPath) and self._pure == other._pure and self._shell is other._shell

    def __lt__(self, other: object) -> bool:
        return self._pure < other._pure if isinstance(other, GuestPath) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._pure)

    # -- contents --------------------------------------------------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        r"""The file's content.

        Raises:
            FileNotFoundError, IsADirectoryError, PermissionError: As `pathlib.Path.read_bytes` does.

        Example:
            >>> vm.path("/etc/hostname").read_bytes().endswith(b"\n")
            True
        """
        return self._output(raise_for, _READ)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        r"""The file's content as text. Line ends stay as they are: `"\r\n"` is not made `"\n"`.

        Example:
            >>> vm.path("/proc/sys/kernel/ostype").read_text()
            'Linux\n'
        """
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: bytes | bytearray | memoryview, *, mode: int | None = None, owner: str | int | None = None) -> int:
        """Replaces the file's content, all at once; returns the number of bytes.

        It is written beside the file and renamed: nobody sees a part of it, and a full disk leaves the old content. A symbolic link is
        written through; other names (hard links) of an old file keep the old content. Only where that cannot be done, it is written in
        place: devices and pipes, `/proc` and `/sys`, files of another user, folders that may not be written.

        Args:
            data: The new content.
            mode: Permission bits; by default those it has, or for a new file what the umask leaves of 0666.
            owner: `"user"`, `"user:group"`, `":group"` or a number; by default the one it has, or for a new file who writes it.

        Raises:
            FileNotFoundError: Its folder does not exist.
            IsADirectoryError, PermissionError, OSError: As `pathlib.Path.write_bytes` does; `errno` is `ENOSPC` for a full disk.
            LookupError: There is no such user or group in the guest.

        Example:
            >>> vm.path("/srv/blob").write_bytes(bytes(1024), mode=0o600)
            1024
        """
        content = bytes(memoryview(data))
        words = (str(len(content)), "" if mode is None else mode_word(mode), owner_word(owner))
        self._check(self._shell.feed(_WRITE, str(self), *words, source=BytesIO(content), size=len(content)))
        return len(content)

    def write_text(
        self, data: str, encoding: str = "utf-8", errors: str = "strict", *, mode: int | None = None, owner: str | int | None = None
    ) -> int:
        """Replaces the file's content with text, as `write_bytes` does; returns the number of characters.

        Example:
            >>> vm.path("/srv/app.ini").write_text("[app]", owner="nobody")
            5
        """
        if isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data must be text, not {type(data).__name__}: bytes are written by write_bytes()")
        self.write_bytes(data.encode(encoding, errors), mode=mode, owner=owner)
        return len(data)

    def hash(self, algorithm: str = "sha256") -> str:
        """The digest of the file's content, in hexadecimal, computed in the guest.

        Args:
            algorithm: `"md5"`, `"sha1"`, `"sha224"`, `"sha256"`, `"sha384"`, `"sha512"` or `"blake2b"`.

        Raises:
            ValueError: The algorithm is none of these.
            FileNotFoundError, IsADirectoryError, PermissionError: As `read_bytes` does.

        Example:
            >>> _ = vm.path("/srv/abc").write_text("abc")
            >>> vm.path("/srv/abc").hash("md5")
            '900150983cd24fb0d6963f7d28e17f72'
        """
        if algorithm not in _HASHES:
            raise ValueError(f"{algorithm!r} is not an algorithm for this: use one of {', '.join(_HASHES)}")
        result = self._check(self._shell.script(f'exec {_HASHES[algorithm]} "$1"', str(self)))
        return result.stdout.removeprefix("\\").split()[0]  # the backslash says that the name is escaped

    # -- what it is ------------------------------------------------------------------------------------------------------------------

    def stat(self) -> os.stat_result:
        """What is known of the file, symbolic links followed, as `os.stat` gives it.

        Raises:
            FileNotFoundError, PermissionError: As `pathlib.Path.stat` does.

        Example:
            >>> oct(vm.path("/etc/passwd").stat().st_mode)
            '0o100644'
        """
        return _stat_result(self._check(self._shell.script(_STAT, str(self), "-L")).stdout)

    def lstat(self) -> os.stat_result:
        """The same of a symbolic link itself.

        Example:
            >>> stat.S_ISLNK(vm.path("/bin").lstat().st_mode)
            True
        """
        return _stat_result(self._check(self._shell.script(_STAT, str(self), "")).stdout)

    def exists(self) -> bool:
        """Whether something is there; a symbolic link counts if its target does.

        Raises:
            PermissionError: The user may not know. So do `is_file` and its like.

        Example:
            >>> vm.path("/etc/passwd").exists(), vm.path("/nothing").exists()
            (True, False)
        """
        return self._mode(self.stat) is not None

    def is_file(self) -> bool:
        """Whether it is a regular file, or a symbolic link to one.

        Example:
            >>> vm.path("/etc/passwd").is_file()
            True
        """
        return stat.S_ISREG(self._mode(self.stat) or 0)

    def is_dir(self) -> bool:
        """Whether it is a folder, or a symbolic link to one.

        Example:
            >>> vm.path("/etc").is_dir()
            True
        """
        return stat.S_ISDIR(self._mode(self.stat) or 0)

    def is_symlink(self) -> bool:
        """Whether it is a symbolic link, wherever that leads.

        Example:
            >>> vm.path("/bin").is_symlink()
            True
        """
        return stat.S_ISLNK(self._mode(self.lstat) or 0)

    def _mode(self, ask: Callable[[], os.stat_result]) -> int | None:
        try:
            return ask().st_mode
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                return None
            raise

    def owner(self) -> str:
        """The name of the user that it belongs to, or `"UNKNOWN"`.

        Example:
            >>> vm.path("/etc/shadow").owner()
            'root'
        """
        return self._check(self._shell.script(_OWNER, str(self), "%U")).stdout.rstrip("\n")

    def group(self) -> str:
        """The name of the group that it belongs to, or `"UNKNOWN"`.

        Example:
            >>> vm.path("/etc/shadow").group()
            'shadow'
        """
        return self._check(self._shell.script(_OWNER, str(self), "%G")).stdout.rstrip("\n")

    def readlink(self) -> PurePosixPath:
        """Where a symbolic link leads, as it was written.

        Raises:
            FileNotFoundError: Nothing is there.
            OSError: It is no symbolic link (`EINVAL`).

        Example:
            >>> vm.path("/bin").readlink()
            PurePosixPath('usr/bin')
        """
        return PurePosixPath(self._check(self._shell.script(_READLINK, str(self))).stdout[:-1])

    # -- what is in it ---------------------------------------------------------------------------------------------------------------

    def scan(self, *, depth: int | None = 1) -> list[Entry]:
        """What is in the folder and, to a depth, below it, with its types, sorted by path; all of it in one command.

        Folders below it that may not be read seem empty, as in pathlib's walk. Symbolic links are not followed.

        Args:
            depth: 1 for the folder alone, None without a limit.

        Raises:
            FileNotFoundError, NotADirectoryError, PermissionError: Of the folder itself, as `pathlib.Path.iterdir` does.

        Example:
            >>> [(entry.name, entry.type) for entry in vm.path("/etc/apt").scan() if entry.name == "sources.list.d"]
            [('sources.list.d', 'dir')]
        """
        if depth is not None and depth < 1:
            raise ValueError(f"depth={depth}: 1 is the folder alone, None is without a limit")
        return self._scan(depth)

    def _scan(self, depth: int | None, *, follow: bool = False) -> list[Entry]:
        output = self._output(_raise_for_listing, _SCAN, "" if depth is None else str(depth), "-L" if follow else "")
        skip = 2 + len(os.fsencode(str(self)))  # the letter, the folder and a slash
        rows = [(line[:1].decode("latin-1"), line[skip:].decode("utf-8", "surrogateescape")) for line in output.split(b"\0")[:-1]]
        if any(kind not in _TYPES or not name or {"", "..", "."} & set(name.split("/")) for kind, name in rows):
            raise OSError(errno.EIO, "the guest's listing makes no sense", str(self))
        return sorted((Entry(path=self / name, type=_TYPES[kind]) for kind, name in rows), key=lambda entry: entry.path)

    def iterdir(self) -> Iterator[GuestPath]:
        """What is in the folder, sorted.

        Raises:
            FileNotFoundError, NotADirectoryError, PermissionError: As `pathlib.Path.iterdir` does.

        Example:
            >>> vm.path("/etc/passwd") in vm.path("/etc").iterdir()
            True
        """
        return iter([entry.path for entry in self.scan()])

    def walk(self, *, depth: int | None = None) -> Iterator[tuple[GuestPath, list[str], list[str]]]:
        """Folders from the top down, each with the names of the folders and of all else in it, as `pathlib.Path.walk`.

        All is read at once, by one command. Names that are taken out of the list of folders are not entered. See `scan` for other types.

        Args:
            depth: How many levels of folders are entered: 1 for this one alone, None for all.

        Raises:
            FileNotFoundError, NotADirectoryError, PermissionError: Of this folder.

        Example:
            >>> sum(len(files) for folder, dirs, files in vm.path("/etc").walk()) > 100
            True
        """
        inside: dict[GuestPath, tuple[list[str], list[str]]] = {}
        for entry in self.scan(depth=depth):
            inside.setdefault(entry.path.parent, ([], []))[entry.type != "dir"].append(entry.name)
        return self._walk(inside, depth)

    def _walk(
        self, inside: dict[GuestPath, tuple[list[str], list[str]]], depth: int | None
    ) -> Iterator[tuple[GuestPath, list[str], list[str]]]:
        waiting = [self]
        while waiting:
            folder = waiting.pop()
            dirs, files = inside.get(folder, ([], []))
            yield folder, dirs, files
            if depth is None or len(folder.parts) - len(self.parts) + 1 < depth:
                waiting += [folder / name for name in reversed(dirs)]

    def glob(self, pattern: str) -> Iterator[GuestPath]:
        """What is below the folder and matches a pattern, sorted; `**` stands for any number of folders.

        Names with a dot first are matched too, as in pathlib. A pattern with a slash at its end matches folders only. With `**`, symbolic
        links to folders are not followed.

        Raises:
            ValueError: The pattern is empty, absolute, or has `..` in it.
            PermissionError: The folder in which it begins may not be read.

        Example:
            >>> list(vm.path("/etc").glob("pass*d"))
            [GuestPath('/etc/passwd')]
        """
        parts = PurePosixPath(pattern).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise ValueError(f"{pattern!r} is not a pattern below a folder")
        fixed = 0
        while fixed < len(parts) - 1 and not set(parts[fixed]) & set("*?["):
            fixed += 1
        base, wanted = self.joinpath(*parts[:fixed]), parts[fixed:]
        deep, folders = "**" in wanted, pattern.endswith("/")
        try:
            found = base._scan(None if deep else len(wanted), follow=not deep and (folders or len(wanted) > 1))  # noqa: SLF001 - of this very class
        except (FileNotFoundError, NotADirectoryError):
            found = []
        matchers = [None if part == "**" else re.compile(fnmatch.translate(part)) for part in wanted]
        skip = len(base.parts)
        return iter([e.path for e in found if _matches(e.path.parts[skip:], matchers) and (e.type == "dir" or not folders)])

    def rglob(self, pattern: str) -> Iterator[GuestPath]:
        """What is anywhere below the folder and matches a pattern: `glob` with `**/` before it.

        Example:
            >>> vm.path("/etc/ssh/sshd_config") in vm.path("/etc").rglob("sshd_*")
            True
        """
        if pattern.startswith("/"):
            raise ValueError(f"{pattern!r} is not a pattern below a folder")
        return self.glob(f"**/{pattern}")

    # -- changes ---------------------------------------------------------------------------------------------------------------------

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:  # noqa: FBT001, FBT002 - as pathlib has it
        """Makes a folder.

        Args:
            mode: Permission bits, of which the umask is taken away.
            parents: Whether to make the folders above it too.
            exist_ok: Whether it may be there already.

        Raises:
            FileExistsError, FileNotFoundError, PermissionError: As `pathlib.Path.mkdir` does.

        Example:
            >>> vm.path("/srv/made/below").mkdir(parents=True, exist_ok=True)
        """
        words = ("1" if exist_ok else "", "1" if parents else "", mode_word(mode))
        self._check(self._shell.script(_MKDIR, str(self), *words))

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:  # noqa: FBT001, FBT002 - as pathlib has it
        """Makes an empty file, or sets the times of one that is there to now.

        Raises:
            FileExistsError, FileNotFoundError, PermissionError: As `pathlib.Path.touch` does.

        Example:
            >>> vm.path("/srv/touched").touch()
            >>> vm.path("/srv/touched").stat().st_size
            0
        """
        self._check(self._shell.script(_TOUCH, str(self), mode_word(mode), "1" if exist_ok else ""))

    def unlink(self, missing_ok: bool = False) -> None:  # noqa: FBT001, FBT002 - as pathlib has it
        """Removes a file or a symbolic link.

        Raises:
            FileNotFoundError, IsADirectoryError, PermissionError: As `pathlib.Path.unlink` does.

        Example:
            >>> vm.path("/srv/gone").touch()
            >>> vm.path("/srv/gone").unlink()
            >>> vm.path("/srv/gone").exists()
            False
        """
        self._remove('exec unlink "$1"', missing_ok=missing_ok)

    def rmdir(self) -> None:
        """Removes an empty folder.

        Raises:
            OSError: It is not empty (`ENOTEMPTY`).
            FileNotFoundError, NotADirectoryError, PermissionError: As `pathlib.Path.rmdir` does.

        Example:
            >>> vm.path("/srv/empty").mkdir()
            >>> vm.path("/srv/empty").rmdir()
        """
        self._remove('exec rmdir "$1"')

    def rmtree(self, *, missing_ok: bool = False) -> None:
        """Removes a folder with all that is in it, as `shutil.rmtree` does. Symbolic links in it are removed and not followed.

        Raises:
            FileNotFoundError, PermissionError: As `shutil.rmtree` does.
            NotADirectoryError: It is a file, or a symbolic link.
            ValueError: It is `/`.

        Example:
            >>> vm.path("/srv/tree/below").mkdir(parents=True)
            >>> vm.path("/srv/tree").rmtree()
            >>> vm.path("/srv/tree").exists()
            False
        """
        if not self._pure.name or ".." in self.parts:
            raise ValueError(f"{self} is not removed with all that is in it: name the folder plainly")
        self._remove(_RMTREE, missing_ok=missing_ok)

    def _remove(self, script: str, *, missing_ok: bool = False) -> None:
        try:
            self._check(self._shell.script(script, str(self)))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: str | PurePosixPath | GuestPath) -> GuestPath:
        """Gives it another name on the same file system, in place of a file or an empty folder that has it; returns the new path.

        Raises:
            OSError: The target is on another file system (`EXDEV`), or a folder that is not empty (`ENOTEMPTY`).
            FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError: As `pathlib.Path.rename` does.
            ValueError: The target is not absolute, or on another machine.

        Example:
            >>> vm.path("/srv/old").touch()
            >>> vm.path("/srv/old").rename("/srv/new")
            GuestPath('/srv/new')
        """
        final = self._beside(target)
        if final != self:
            raise_for(self._shell.script(_RENAME, str(self), str(final)), self, final)
        elif not self.is_symlink():
            self.stat()
        return final

    def replace(self, target: str | PurePosixPath | GuestPath) -> GuestPath:
        """The same as `rename`, as it is in pathlib on a POSIX system.

        Example:
            >>> vm.path("/srv/next").touch()
            >>> vm.path("/srv/next").replace("/srv/current")
            GuestPath('/srv/current')
        """
        return self.rename(target)

    def _beside(self, target: str | PurePosixPath | GuestPath) -> GuestPath:
        if not isinstance(target, GuestPath):
            return self._at(PurePosixPath(target))
        if target.shell is not self._shell:
            raise ValueError(f"{target} is on another machine than {self}")
        return target

    def symlink_to(self, target: str | PurePosixPath | GuestPath) -> None:
        """Makes it a symbolic link to a target, which may be relative and need not exist.

        Raises:
            FileExistsError, FileNotFoundError, PermissionError: As `pathlib.Path.symlink_to` does.

        Example:
            >>> vm.path("/srv/link").symlink_to("/etc/passwd")
            >>> vm.path("/srv/link").read_text() == vm.path("/etc/passwd").read_text()
            True
        """
        _check_text(str(target))
        raise_for(self._shell.script(_LINK, str(self), str(target), "-s"), str(target), self)

    def hardlink_to(self, target: str | PurePosixPath | GuestPath) -> None:
        """Makes it another name of a file.

        Raises:
            FileExistsError, FileNotFoundError, PermissionError: As `pathlib.Path.hardlink_to` does.

        Example:
            >>> vm.path("/srv/first").touch()
            >>> vm.path("/srv/second").hardlink_to(vm.path("/srv/first"))
            >>> vm.path("/srv/first").stat().st_nlink
            2
        """
        there = self._beside(target)
        raise_for(self._shell.script(_LINK, str(self), str(there), ""), there, self)

    def chmod(self, mode: int) -> None:
        """Sets the permission bits; symbolic links are followed.

        Raises:
            FileNotFoundError, PermissionError: As `pathlib.Path.chmod` does.

        Example:
            >>> vm.path("/srv/script").touch()
            >>> vm.path("/srv/script").chmod(0o755)
            >>> oct(vm.path("/srv/script").stat().st_mode)
            '0o100755'
        """
        self._check(self._shell.script(_CHMOD, str(self), mode_word(mode)))

    def chown(self, user: str | int | None = None, group: str | int | None = None) -> None:
        """Changes whom it belongs to, by names of the guest or by numbers, as `shutil.chown`; symbolic links are followed.

        Raises:
            LookupError: There is no such user or group in the guest.
            FileNotFoundError, PermissionError: As `shutil.chown` does.
            ValueError: Neither is given.

        Example:
            >>> vm.path("/srv/theirs").touch()
            >>> vm.path("/srv/theirs").chown("nobody", "nogroup")
            >>> vm.path("/srv/theirs").owner()
            'nobody'
        """
        if user is None and group is None:
            raise ValueError("user and/or group must be set")
        words = (owner_word(user), "" if group is None else f":{owner_word(group)}")
        self._check(self._shell.script(_CHOWN, str(self), "".join(words)))

    # -- how -------------------------------------------------------------------------------------------------------------------------

    def _check(self, result: Result) -> Result:
        __tracebackhide__ = True
        raise_for(result, self)
        return result

    def _output(self, check: Callable[[Result, GuestPath], None], text: str, *words: str) -> bytes:
        """What a script that only reads prints, however long it is."""
        __tracebackhide__ = True
        result = self._shell.script(text, str(self), *words)
        if not result.truncated:
            check(result, self)
            return result.stdout_bytes
        sink = BytesIO()
        check(self._shell.fetch(text, str(self), *words, sink=sink, size=len(result.stdout)), self)
        return sink.getvalue()


def with_any_bytes(text: str, words: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """A shell script and its arguments so that all of it is UTF-8, whatever bytes the arguments stand for."""
    try:
        "".join(words).encode()
    except UnicodeEncodeError:
        encoded = (word.encode("utf-8", "surrogateescape") for word in words)
        return _DECODE + text, tuple("".join(f"\\0{byte:03o}" for byte in word) for word in encoded)
    return text, tuple(words)


def owner_word(owner: str | int | None) -> str:
    """An owner as chown(1) takes it, empty for None.

    Raises:
        ValueError: It is empty or negative.
    """
    if owner is None:
        return ""
    if owner in {"", ":"} or (isinstance(owner, int) and (isinstance(owner, bool) or owner < 0)):
        raise ValueError(f"{owner!r} is not an owner: use 'user', 'user:group' or a number")
    return str(owner)


def raise_for(result: Result, path: GuestPath | str, other: GuestPath | None = None) -> None:
    """Raises what Python raises for the same failure on the host, if there was one.

    Raises:
        OSError: With `errno`, `filename` and `filename2`; `EIO` where the guest says something that is unknown here.
        LookupError: There is no such user or group.
    """
    if result.ok:
        return
    __tracebackhide__ = True
    if nobody := _NOBODY.search(result.stderr):
        raise LookupError(printable(f"{nobody[1][:_SAID]} (in the guest), for {str(path)!r}"))
    number = _number(result)
    reason = os.strerror(number) if number else printable(result.stderr.strip()[-_SAID:]) or f"status {result.returncode}"
    raise OSError(number or errno.EIO, f"{reason} (in the guest)", str(path), None, None if other is None else str(other))


def _number(result: Result) -> int:
    numbers = (_TEXTS.get(line.rpartition(": ")[2]) or (errno.ENOSPC if _SHORT_WRITE.search(line) else 0) for line in _lines(result))
    return _STATUS.get(result.returncode) or next(filter(None, numbers), 0)


def _lines(result: Result) -> list[str]:
    return [line.rstrip() for line in result.stderr.split("\n") if line.strip()]


def _raise_for_listing(result: Result, path: GuestPath) -> None:
    """The same, but for places within it that find(1) could not read."""
    lines = _lines(result)
    if result.returncode == 1 and lines and lines[0].startswith("find: "):
        known = (_TEXTS.get(line.rpartition(": ")[2]) for line in lines)
        if all(number in _PASSED_OVER or "loop detected" in line for number, line in zip(known, lines, strict=True)):
            return
    raise_for(result, path)


def _check_text(path: str) -> None:
    if "\0" in path:
        raise ValueError(f"{path!r} has a NUL byte in it")
    try:
        path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(f"{path!r} has a character in it that no name can have") from None


def mode_word(mode: int) -> str:
    """Permission bits as chmod(1) takes them.

    Raises:
        ValueError: They are none.
    """
    if not is_mode(mode):
        raise ValueError(f"mode={mode!r} are not permission bits: write them as 0o644")
    return f"{mode:04o}"


def _stat_result(line: str) -> os.stat_result:
    numbers, *times = line.split("|")
    mode, *decimal = numbers.split()
    inode, device, links, uid, gid, size, atime, mtime, ctime, blocks, block = (int(word) for word in decimal[:-2])
    nanoseconds = [int(found[1]) if (found := re.search(r"\.(\d{9})", time)) else 0 for time in times]
    extra: dict[str, float] = {"st_blocks": blocks, "st_blksize": block, "st_rdev": os.makedev(*(int(word, 16) for word in decimal[-2:]))}
    for name, seconds, fraction in zip(("atime", "mtime", "ctime"), (atime, mtime, ctime), nanoseconds, strict=True):
        extra |= {f"st_{name}": seconds + fraction / 1e9, f"st_{name}_ns": seconds * 10**9 + fraction}
    return os.stat_result((int(mode, 16), inode, device, links, uid, gid, size, atime, mtime, ctime), extra)


def _matches(names: Sequence[str], matchers: Sequence[re.Pattern[str] | None]) -> bool:
    if not matchers:
        return not names
    first, rest = matchers[0], matchers[1:]
    if first is None:
        return any(_matches(names[start:], rest) for start in range(len(names) + 1))
    return bool(names) and first.match(names[0]) is not None and _matches(names[1:], rest)
