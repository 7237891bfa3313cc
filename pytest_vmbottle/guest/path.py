"""Paths in a guest, with the verbs and the errors of `pathlib`."""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import PurePosixPath
from typing import BinaryIO, Literal

import attrs

from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.result import Result, printable
from pytest_vmbottle.spec import is_mode
from pytest_vmbottle.timeline import Timeline, recorded

__all__ = ["BULK", "UNABLE", "Entry", "GuestPath", "Shell", "mode_word", "operation_of", "owner_word", "raise_for", "with_any_bytes"]

_SAID = 2000
"""Characters of a guest program's error output that a message quotes."""
BULK = 1 << 20
"""Bytes from which on data takes the channel with the most throughput."""

UNABLE = 120
"""Status of an operation that cannot do what it is asked for; nothing has happened then."""

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
"""Errors that a listing ignores, as pathlib does: unreadable folders, and entries that were removed meanwhile."""

# For words that are no UTF-8, which the channels cannot carry: they come in octal. A command's output loses its last line breaks, hence the
# full stop.
_DECODE = r"""n=$#; while [ "$n" -gt 0 ]; do word=$(printf '%b.' "$1"); shift; set -- "$@" "${word%.}"; n=$((n - 1)); done
"""

# All paths are absolute, so that none can be taken for an option.
_READ = 'exec cat "$1"'
_WRITE = read_script(__package__, "write.sh")
_SCAN = read_script(__package__, "scan.sh")
_MKDIR = read_script(__package__, "mkdir.sh")
_TOUCH = read_script(__package__, "touch.sh")
_RENAME = read_script(__package__, "rename.sh")
# The script looks first, because ln(1) would put the link into a folder of that name.
_LINK = '[ ! -e "$1" ] && [ ! -L "$1" ] || exit 104; exec ln $3 -- "$2" "$1"'
# stat(1) says what is wrong, where readlink(1) and `rm -f` say nothing.
_READLINK = 'stat "$1" > /dev/null || exit 1; [ -L "$1" ] || exit 108; exec readlink "$1"'
_RMTREE = 'stat "$1" > /dev/null || exit 1; [ -d "$1" ] && [ ! -L "$1" ] || exit 103; exec rm -rf "$1"'
# %f, %t and %T are hexadecimal. %x, %y and %z have the nanoseconds.
_STAT = 'exec stat $2 -c "%f %i %d %h %u %g %s %X %Y %Z %b %o %t %T|%x|%y|%z" "$1"'
_OWNER = 'exec stat -L -c "$2" "$1"'
# stat(1) first, because chmod(1) has words of its own for a symbolic link that leads nowhere.
_CHMOD = 'stat -L "$1" > /dev/null && exec chmod "0$2" "$1"'  # five digits clear a folder's set-id bits too
_CHOWN = 'exec chown -- "$2" "$1"'

_UNLINK = 'exec unlink "$1"'
_RMDIR = 'exec rmdir "$1"'
_OPERATIONS = {
    _CHMOD: "chmod",
    _CHOWN: "chown",
    _LINK: "link",
    _MKDIR: "mkdir",
    _OWNER: "owner",
    _READ: "read",
    _READLINK: "readlink",
    _RENAME: "rename",
    _RMDIR: "rmdir",
    _SCAN: "list",
    _STAT: "stat",
    _TOUCH: "touch",
    _UNLINK: "unlink",
    _WRITE: "write",
}
"""Operations of the runner that take a script's words and give its output."""
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
# Numbers are bounded, because a guest may answer anything.
_LISTED = re.compile(rb"([dlfpsbc]) ([0-9]{1,20}|\?) ([0-7]{1,5}|\?) (-?[0-9]{1,15}(?:\.[0-9]{1,12})?|\?) ")
_TYPES: dict[str, Type] = {"d": "dir", "l": "symlink", "f": "file", "p": "fifo", "s": "socket", "b": "block", "c": "char"}


class Shell(ABC):
    """The shell of a machine, as far as a path needs it.

    Attributes:
        timeline: The machine's timeline, which gets the verbs of paths.
    """

    timeline = Timeline(None)

    @abstractmethod
    def script(self, text: str, *words: str) -> Result:
        """Run one of our POSIX shell scripts with arguments; never raise for its status."""

    def operation(self, name: str, *words: str, content: bytes = b"") -> Result | None:  # noqa: ARG002
        """Have an operation of the runner done; return None where there are none, or the status `UNABLE` where it cannot do this."""
        return None

    @abstractmethod
    def feed(self, text: str, *words: str, source: BinaryIO, size: int, framed: bool = False) -> Result:
        """Run a script like `script`, with a file as input.

        With `framed` the script finds the end of its input by itself.
        """

    @abstractmethod
    def fetch(self, text: str, *words: str, sink: BinaryIO, size: int) -> Result:
        """Run a script like `script`, and write its output of about `size` bytes to a file."""


@attrs.frozen(kw_only=True)
class Entry:
    """An entry of a folder.

    Attributes:
        path: The entry's path.
        type: The type of the entry itself, symbolic links not followed: `"file"`, `"dir"`, `"symlink"`, `"fifo"`, `"socket"`, `"block"` or
            `"char"`.
        size: Its bytes; None if the guest's find is not GNU's, as for the next two.
        mode: Its permission bits.
        mtime: The time of its last change, in seconds since 1970.
    """

    path: GuestPath
    type: Type
    size: int | None = attrs.field(default=None, eq=False)
    mode: int | None = attrs.field(default=None, eq=False)
    mtime: float | None = attrs.field(default=None, eq=False)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.name


_verb = recorded("file", lambda path: {"path": str(path)})


class GuestPath:
    r"""An absolute path in a guest, with pathlib's verbs and errors.

    It is made by `Machine.path`; `/` joins paths.

    The verbs run as the machine's user, with that user's rights. Names may hold any bytes but NUL: those that are not UTF-8 are written
    with surrogate escapes, as `os.fsdecode` does. Each verb is one command in the guest. All verbs raise the `OSError` that pathlib raises,
    with `errno` and `filename`: `FileNotFoundError`, `PermissionError`, or a plain `OSError` such as that for `ENOSPC`.

    It is not an `os.PathLike`, because it means nothing to the host: `open()` refuses it with `TypeError`.

        motd = vm.path("/etc") / "motd"
        motd.write_text("hello\n", mode=0o644)
        assert motd in vm.path("/etc").iterdir()
    """

    # -- the path itself -------------------------------------------------------------------------------------------------------------

    def __init__(self, path: str | PurePosixPath, *, shell: Shell) -> None:
        """Create a path without asking the guest.

        Raises:
            ValueError: The path is not absolute, has a NUL byte in it, or a character that no file name can have.
        """
        if path == "":
            raise ValueError("an empty path is invalid: it must be an absolute path in the guest, such as '/srv'")
        self._pure = PurePosixPath(path)
        self.means_contents = str(path).endswith("/") and bool(self._pure.name)
        """True if it was written with a slash at its end: for `Machine.cp` that means what is in the folder."""
        self._shell = shell
        if not self._pure.is_absolute():
            raise ValueError(f"{str(path)!r} is not an absolute path in the guest")
        _check_text(str(path))

    @property
    def _timeline(self) -> Timeline:
        return self._shell.timeline

    def _at(self, pure: PurePosixPath) -> GuestPath:
        return GuestPath(pure, shell=self._shell)

    @property
    def shell(self) -> Shell:
        """The shell that runs commands in the guest of the path.

        Example:
            >>> vm.path("/etc").shell is vm.guest
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
        """The last part from its last dot on, or an empty string.

        Example:
            >>> vm.path("/srv/www.tar.gz").suffix
            '.gz'
        """
        return self._pure.suffix

    @property
    def suffixes(self) -> list[str]:
        """The suffixes: `[".tar", ".gz"]`.

        Example:
            >>> vm.path("/srv/www.tar.gz").suffixes
            ['.tar', '.gz']
        """
        return self._pure.suffixes

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the path; the first is `"/"`.

        Example:
            >>> vm.path("/srv/www").parts
            ('/', 'srv', 'www')
        """
        return self._pure.parts

    @property
    def parent(self) -> GuestPath:
        """The folder that contains the path.

        Example:
            >>> vm.path("/srv/www").parent
            GuestPath('/srv')
        """
        return self._at(self._pure.parent)

    @property
    def parents(self) -> tuple[GuestPath, ...]:
        """The folders above the path, up to `/`.

        Example:
            >>> vm.path("/srv/www").parents
            (GuestPath('/srv'), GuestPath('/'))
        """
        return tuple(self._at(folder) for folder in self._pure.parents)

    def joinpath(self, *others: str | PurePosixPath) -> GuestPath:
        """Return the path joined with others.

        An absolute one replaces it, as in pathlib.

        Example:
            >>> vm.path("/srv").joinpath("www", "index.html")
            GuestPath('/srv/www/index.html')
        """
        return self._at(self._pure.joinpath(*others))

    def with_name(self, name: str) -> GuestPath:
        """Return the path with another last part.

        Example:
            >>> vm.path("/srv/a.txt").with_name("b.txt")
            GuestPath('/srv/b.txt')
        """
        return self._at(self._pure.with_name(name))

    def with_stem(self, stem: str) -> GuestPath:
        """Return the path with another stem and the same suffix.

        Example:
            >>> vm.path("/srv/a.txt").with_stem("b")
            GuestPath('/srv/b.txt')
        """
        return self._at(self._pure.with_stem(stem))

    def with_suffix(self, suffix: str) -> GuestPath:
        """Return the path with another suffix.

        Example:
            >>> vm.path("/srv/a.txt").with_suffix(".bak")
            GuestPath('/srv/a.bak')
        """
        return self._at(self._pure.with_suffix(suffix))

    def relative_to(self, other: str | PurePosixPath | GuestPath) -> PurePosixPath:
        """Return this path relative to another one.

        Raises:
            ValueError: This path is not below the other.

        Example:
            >>> str(vm.path("/srv/www/a.txt").relative_to("/srv"))
            'www/a.txt'
        """
        return self._pure.relative_to(str(other))

    def is_relative_to(self, other: str | PurePosixPath | GuestPath) -> bool:
        """Tell whether it is the other path or below it.

        Example:
            >>> vm.path("/srv/www").is_relative_to("/srv")
            True
        """
        return self._pure.is_relative_to(str(other))

    def match(self, pattern: str) -> bool:
        """Tell whether the path's end matches a pattern, as `pathlib.PurePath.match` does.

        Example:
            >>> vm.path("/srv/www/a.txt").match("www/*.txt")
            True
        """
        return self._pure.match(pattern)

    def as_posix(self) -> str:
        """Return the path as text.

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
        # The same path in two machines is of two files.
        return isinstance(other, GuestPath) and self._pure == other._pure and self._shell is other._shell

    def __lt__(self, other: object) -> bool:
        return self._pure < other._pure if isinstance(other, GuestPath) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._pure)

    # -- contents --------------------------------------------------------------------------------------------------------------------

    @_verb
    def read_bytes(self) -> bytes:
        r"""Return the file's content.

        Raises:
            FileNotFoundError, IsADirectoryError, PermissionError: As `pathlib.Path.read_bytes` does.

        Example:
            >>> vm.path("/etc/hostname").read_bytes().endswith(b"\n")
            True
        """
        return self._output(raise_for, _READ)

    @_verb
    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        r"""Return the file's content as text.

        Line ends stay as they are: `"\r\n"` does not become `"\n"`.

        Example:
            >>> vm.path("/proc/sys/kernel/ostype").read_text()
            'Linux\n'
        """
        return self.read_bytes().decode(encoding, errors)

    @_verb
    def write_bytes(self, data: bytes | bytearray | memoryview, *, mode: int | None = None, owner: str | int | None = None) -> int:
        """Replace the file's content atomically, and return the number of bytes.

        The content is written to a new file, which is then renamed: no reader sees a part of it, and a full disk leaves the old content. A
        symbolic link is followed; other names (hard links) of an old file keep the old content. Only where a rename is impossible the file
        is written in place: devices and pipes, `/proc` and `/sys`, files of another user, folders that may not be written.

        Args:
            data: The new content.
            mode: Permission bits; by default those of the old file, or for a new file 0666 less the umask.
            owner: `"user"`, `"user:group"`, `":group"` or a number; by default the old file's, or for a new file the user who writes it.

        Raises:
            FileNotFoundError: The file's folder does not exist.
            IsADirectoryError, PermissionError, OSError: As `pathlib.Path.write_bytes` does; `errno` is `ENOSPC` for a full disk.
            LookupError: There is no such user or group in the guest.

        Example:
            >>> vm.path("/srv/blob").write_bytes(bytes(1024), mode=0o600)
            1024
        """
        # memoryview refuses what is no data: bytes(5) would be five zeros.
        content = bytes(memoryview(data))
        words = (str(len(content)), "" if mode is None else mode_word(mode), owner_word(owner))
        self._check(self._shell.feed(_WRITE, str(self), *words, source=BytesIO(content), size=len(content)))
        return len(content)

    @_verb
    def write_text(
        self, data: str, encoding: str = "utf-8", errors: str = "strict", *, mode: int | None = None, owner: str | int | None = None
    ) -> int:
        """Replace the file's content with text, as `write_bytes` does.

        Return the number of characters.

        Example:
            >>> vm.path("/srv/app.ini").write_text("[app]", owner="nobody")
            5
        """
        if isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data must be text, not {type(data).__name__}: write bytes with write_bytes()")
        self.write_bytes(data.encode(encoding, errors), mode=mode, owner=owner)
        return len(data)

    @_verb
    def hash(self, algorithm: str = "sha256") -> str:
        """Return the hexadecimal digest of the file's content, computed in the guest.

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
            raise ValueError(f"{algorithm!r} is not a supported algorithm: use one of {', '.join(_HASHES)}")
        result = self._check(self._shell.script(f'exec {_HASHES[algorithm]} "$1"', str(self)))
        return result.stdout.removeprefix("\\").split()[0]  # the backslash says that the name is escaped

    # -- what it is ------------------------------------------------------------------------------------------------------------------

    @_verb
    def stat(self) -> os.stat_result:
        """Return the file's status, as `os.stat` does; symbolic links are followed.

        Raises:
            FileNotFoundError, PermissionError: As `pathlib.Path.stat` does.

        Example:
            >>> oct(vm.path("/etc/passwd").stat().st_mode)
            '0o100644'
        """
        return _stat_result(self._check(self._shell.script(_STAT, str(self), "-L")).stdout)

    @_verb
    def lstat(self) -> os.stat_result:
        """Return the status as `stat` does, of a symbolic link itself.

        Example:
            >>> stat.S_ISLNK(vm.path("/bin").lstat().st_mode)
            True
        """
        return _stat_result(self._check(self._shell.script(_STAT, str(self), "")).stdout)

    @_verb
    def exists(self) -> bool:
        """Tell whether the path exists; a symbolic link counts if its target exists.

        Raises:
            PermissionError: The user may not read the folder. `is_file`, `is_dir` and `is_symlink` raise it too.

        Example:
            >>> vm.path("/etc/passwd").exists(), vm.path("/nothing").exists()
            (True, False)
        """
        return self._mode(self.stat) is not None

    @_verb
    def is_file(self) -> bool:
        """Tell whether it is a regular file, or a symbolic link to one.

        Example:
            >>> vm.path("/etc/passwd").is_file()
            True
        """
        return stat.S_ISREG(self._mode(self.stat) or 0)

    @_verb
    def is_dir(self) -> bool:
        """Tell whether it is a folder, or a symbolic link to one.

        Example:
            >>> vm.path("/etc").is_dir()
            True
        """
        return stat.S_ISDIR(self._mode(self.stat) or 0)

    @_verb
    def is_symlink(self) -> bool:
        """Tell whether it is a symbolic link, whether its target exists or not.

        Example:
            >>> vm.path("/bin").is_symlink()
            True
        """
        return stat.S_ISLNK(self._mode(self.lstat) or 0)

    def _mode(self, ask: Callable[[], os.stat_result]) -> int | None:
        try:
            return ask().st_mode
        except OSError as error:
            # Only errors that mean that nothing is there: a folder that may not be searched must not pass for one without the file.
            if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                return None
            raise

    @_verb
    def owner(self) -> str:
        """Return the name of the file's owner, or `"UNKNOWN"`.

        Example:
            >>> vm.path("/etc/shadow").owner()
            'root'
        """
        return self._check(self._shell.script(_OWNER, str(self), "%U")).stdout.rstrip("\n")

    @_verb
    def group(self) -> str:
        """Return the name of the file's group, or `"UNKNOWN"`.

        Example:
            >>> vm.path("/etc/shadow").group()
            'shadow'
        """
        return self._check(self._shell.script(_OWNER, str(self), "%G")).stdout.rstrip("\n")

    @_verb
    def readlink(self) -> PurePosixPath:
        """Return the target of a symbolic link, as it was written.

        Raises:
            FileNotFoundError: The path does not exist.
            OSError: It is not a symbolic link (`EINVAL`).

        Example:
            >>> vm.path("/bin").readlink()
            PurePosixPath('usr/bin')
        """
        # Without the line break that readlink(1) adds, and only that one: the target may end with more of them.
        return PurePosixPath(self._check(self._shell.script(_READLINK, str(self))).stdout[:-1])

    # -- what is in it ---------------------------------------------------------------------------------------------------------------

    @_verb
    def scan(self, *, depth: int | None = 1) -> list[Entry]:
        """List the entries of the folder and below it, with their types, sorted by path.

        All of it is one command.

        Unreadable folders below it seem empty, as in pathlib's walk. Symbolic links are not followed.

        Args:
            depth: Levels of folders to list: 1 for the folder alone, None for all.

        Raises:
            FileNotFoundError, NotADirectoryError, PermissionError: Of the folder itself, as `pathlib.Path.iterdir` does.

        Example:
            >>> [(entry.name, entry.type) for entry in vm.path("/etc/apt").scan() if entry.name == "sources.list.d"]
            [('sources.list.d', 'dir')]
        """
        if depth is not None and depth < 1:
            raise ValueError(f"depth={depth} is invalid: it must be at least 1 (only the folder itself), or None (no limit)")
        return self._scan(depth)

    def _scan(self, depth: int | None, *, follow: bool = False) -> list[Entry]:
        output = self._output(_raise_for_listing, _SCAN, "" if depth is None else str(depth), "-L" if follow else "")
        return sorted((self._entry(line) for line in output.split(b"\0")[:-1]), key=lambda entry: entry.path)

    def _entry(self, line: bytes) -> Entry:
        """Read a line of `scan.sh`."""
        told = _LISTED.match(line)
        folder = os.fsencode(str(self)) + b"/"
        path = line[told.end() :] if told else b""
        name = path.removeprefix(folder).decode("utf-8", "surrogateescape")
        # Names come from a guest: one with a slash or `..` would lead out of the folder.
        if told is None or not path.startswith(folder) or {"", "..", "."} & set(name.split("/")):
            raise OSError(errno.EIO, "the guest's listing is invalid", str(self))
        kind, size, mode, mtime = (word.decode("ascii") for word in told.groups())
        return Entry(
            path=self / name,
            type=_TYPES[kind],
            size=None if size == "?" else int(size),
            mode=None if mode == "?" else int(mode, 8),
            mtime=None if mtime == "?" else float(mtime),
        )

    @_verb
    def iterdir(self) -> Iterator[GuestPath]:
        """Iterate over the paths in the folder, sorted.

        Raises:
            FileNotFoundError, NotADirectoryError, PermissionError: As `pathlib.Path.iterdir` does.

        Example:
            >>> vm.path("/etc/passwd") in vm.path("/etc").iterdir()
            True
        """
        return iter([entry.path for entry in self.scan()])

    @_verb
    def walk(self, *, depth: int | None = None) -> Iterator[tuple[GuestPath, list[str], list[str]]]:
        """Walk the folders from the top down, as `pathlib.Path.walk` does.

        Each comes with the names of the folders and of everything else in it.

        Everything is read at once, by one command. Folders whose names are removed from the list are not entered. See `scan` for other
        types.

        Args:
            depth: Levels of folders to enter: 1 for this one alone, None for all.

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
            # Only now, because the caller may have removed folders from the list, as with os.walk.
            if depth is None or len(folder.parts) - len(self.parts) + 1 < depth:
                # Reversed, because the last one is taken first.
                waiting += [folder / name for name in reversed(dirs)]

    @_verb
    def glob(self, pattern: str) -> Iterator[GuestPath]:
        """Find the paths below the folder that match a pattern, sorted.

        `**` stands for any number of folders.

        Names that begin with a dot are matched too, as in pathlib. A pattern that ends with a slash matches folders only. With `**`,
        symbolic links to folders are not followed.

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
        # The part without wildcards is a path of its own, so that find(1) does not list what cannot match.
        fixed = 0
        while fixed < len(parts) - 1 and not set(parts[fixed]) & set("*?["):
            fixed += 1
        base, wanted = self.joinpath(*parts[:fixed]), parts[fixed:]
        deep, folders = "**" in wanted, pattern.endswith("/")
        try:
            found = base._scan(None if deep else len(wanted), follow=not deep and (folders or len(wanted) > 1))  # noqa: SLF001 - of this very class
        # As in pathlib: a folder that does not exist has no matches, but one that may not be read is an error.
        except (FileNotFoundError, NotADirectoryError):
            found = []
        matchers = [None if part == "**" else re.compile(fnmatch.translate(part)) for part in wanted]
        skip = len(base.parts)
        return iter([e.path for e in found if _matches(e.path.parts[skip:], matchers) and (e.type == "dir" or not folders)])

    @_verb
    def rglob(self, pattern: str) -> Iterator[GuestPath]:
        """Find the paths at any depth that match a pattern: `glob` with `**/` before it.

        Example:
            >>> vm.path("/etc/ssh/sshd_config") in vm.path("/etc").rglob("sshd_*")
            True
        """
        if pattern.startswith("/"):
            raise ValueError(f"{pattern!r} is not a pattern below a folder")
        return self.glob(f"**/{pattern}")

    # -- changes ---------------------------------------------------------------------------------------------------------------------

    @_verb
    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:  # noqa: FBT001, FBT002 - as pathlib has it
        """Make a folder.

        Args:
            mode: Permission bits, from which the umask is taken away.
            parents: Whether to make missing parent folders too.
            exist_ok: Whether the folder may exist already.

        Raises:
            FileExistsError, FileNotFoundError, PermissionError: As `pathlib.Path.mkdir` does.

        Example:
            >>> vm.path("/srv/made/below").mkdir(parents=True, exist_ok=True)
        """
        words = ("1" if exist_ok else "", "1" if parents else "", mode_word(mode))
        self._check(self._shell.script(_MKDIR, str(self), *words))

    @_verb
    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:  # noqa: FBT001, FBT002 - as pathlib has it
        """Make an empty file, or set the times of an existing one to now.

        Raises:
            FileExistsError, FileNotFoundError, PermissionError: As `pathlib.Path.touch` does.

        Example:
            >>> vm.path("/srv/touched").touch()
            >>> vm.path("/srv/touched").stat().st_size
            0
        """
        self._check(self._shell.script(_TOUCH, str(self), mode_word(mode), "1" if exist_ok else ""))

    @_verb
    def unlink(self, missing_ok: bool = False) -> None:  # noqa: FBT001, FBT002 - as pathlib has it
        """Remove a file or a symbolic link.

        Raises:
            FileNotFoundError, IsADirectoryError, PermissionError: As `pathlib.Path.unlink` does.

        Example:
            >>> vm.path("/srv/gone").touch()
            >>> vm.path("/srv/gone").unlink()
            >>> vm.path("/srv/gone").exists()
            False
        """
        self._remove(_UNLINK, missing_ok=missing_ok)

    @_verb
    def rmdir(self) -> None:
        """Remove an empty folder.

        Raises:
            OSError: It is not empty (`ENOTEMPTY`).
            FileNotFoundError, NotADirectoryError, PermissionError: As `pathlib.Path.rmdir` does.

        Example:
            >>> vm.path("/srv/empty").mkdir()
            >>> vm.path("/srv/empty").rmdir()
        """
        self._remove(_RMDIR)

    @_verb
    def rmtree(self, *, missing_ok: bool = False) -> None:
        """Remove a folder with all its content, as `shutil.rmtree` does.

        Symbolic links in it are removed and not followed.

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
            raise ValueError(f"{self} cannot be removed with its content: name a folder, without '..'")
        self._remove(_RMTREE, missing_ok=missing_ok)

    def _remove(self, script: str, *, missing_ok: bool = False) -> None:
        try:
            self._check(self._shell.script(script, str(self)))
        except FileNotFoundError:
            if not missing_ok:
                raise

    @_verb
    def rename(self, target: str | PurePosixPath | GuestPath) -> GuestPath:
        """Rename the file or folder on the same file system, and return the new path.

        A file, or an empty folder, of the new name is replaced.

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
        # mv(1) would refuse to move a file onto itself, where pathlib only wants it to exist.
        if final != self:
            raise_for(self._shell.script(_RENAME, str(self), str(final)), self, final)
        elif not self.is_symlink():
            self.stat()
        return final

    @_verb
    def replace(self, target: str | PurePosixPath | GuestPath) -> GuestPath:
        """Rename like `rename`, as in pathlib on a POSIX system.

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

    @_verb
    def symlink_to(self, target: str | PurePosixPath | GuestPath) -> None:
        """Make the path a symbolic link to a target.

        The target may be relative and need not exist.

        Raises:
            FileExistsError, FileNotFoundError, PermissionError: As `pathlib.Path.symlink_to` does.

        Example:
            >>> vm.path("/srv/link").symlink_to("/etc/passwd")
            >>> vm.path("/srv/link").read_text() == vm.path("/etc/passwd").read_text()
            True
        """
        _check_text(str(target))
        raise_for(self._shell.script(_LINK, str(self), str(target), "-s"), str(target), self)

    @_verb
    def hardlink_to(self, target: str | PurePosixPath | GuestPath) -> None:
        """Make the path a hard link to a file.

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

    @_verb
    def chmod(self, mode: int) -> None:
        """Set the permission bits; symbolic links are followed.

        Raises:
            FileNotFoundError, PermissionError: As `pathlib.Path.chmod` does.

        Example:
            >>> vm.path("/srv/script").touch()
            >>> vm.path("/srv/script").chmod(0o755)
            >>> oct(vm.path("/srv/script").stat().st_mode)
            '0o100755'
        """
        self._check(self._shell.script(_CHMOD, str(self), mode_word(mode)))

    @_verb
    def chown(self, user: str | int | None = None, group: str | int | None = None) -> None:
        """Change owner and group, by names of the guest or by numbers, as `shutil.chown` does.

        Symbolic links are followed.

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
        raise_for(result, self)
        return result

    def _output(self, check: Callable[[Result, GuestPath], None], text: str, *words: str) -> bytes:
        """Return the output of a read-only script, however long it is."""
        result = self._shell.script(text, str(self), *words)
        if not result.truncated:
            check(result, self)
            return result.stdout_bytes
        # Too long for a channel's reply: the script runs once more, with a file for its output.
        sink = BytesIO()
        check(self._shell.fetch(text, str(self), *words, sink=sink, size=len(result.stdout)), self)
        return sink.getvalue()


def with_any_bytes(text: str, words: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Encode a shell script and its arguments as UTF-8, whatever bytes the arguments stand for."""
    try:
        "".join(words).encode()
    except UnicodeEncodeError:
        # In octal, because a channel may carry text only, and names in a guest are any bytes.
        encoded = (word.encode("utf-8", "surrogateescape") for word in words)
        return _DECODE + text, tuple("".join(f"\\0{byte:03o}" for byte in word) for word in encoded)
    return text, tuple(words)


def operation_of(text: str, words: Sequence[str]) -> str:
    """Return the operation of the runner that does what a script does with such words, or an empty string."""
    name = _OPERATIONS.get(text, "")
    # Of a folder alone: what find(1) does with a tree has more to it.
    return name if name != "list" or tuple(words[1:]) == ("1", "") else ""


def owner_word(owner: str | int | None) -> str:
    """Return an owner as chown(1) takes it, empty for None.

    Raises:
        ValueError: The owner is empty or negative.
    """
    if owner is None:
        return ""
    if owner in {"", ":"} or (isinstance(owner, int) and (isinstance(owner, bool) or owner < 0)):
        raise ValueError(f"{owner!r} is not an owner: use 'user', 'user:group' or a number")
    return str(owner)


def raise_for(result: Result, path: GuestPath | str, other: GuestPath | None = None) -> None:
    """Raise the exception that Python raises on the host for the same failure, if any.

    Raises:
        OSError: With `errno`, `filename` and `filename2`; `EIO` if the guest's message is unknown here.
        LookupError: There is no such user or group.
    """
    if result.ok:
        return
    # No errno stands for a name that is not there, for which shutil.chown raises LookupError.
    if nobody := _NOBODY.search(result.stderr):
        raise LookupError(printable(f"{nobody[1][:_SAID]} (in the guest), for {str(path)!r}"))
    number = _number(result)
    # The guest's words, made safe to show: a name in its messages may hold control characters.
    reason = os.strerror(number) if number else printable(result.stderr.strip()[-_SAID:]) or f"status {result.returncode}"
    raise OSError(number or errno.EIO, f"{reason} (in the guest)", str(path), None, None if other is None else str(other))


def _number(result: Result) -> int:
    numbers = (_TEXTS.get(line.rpartition(": ")[2]) or (errno.ENOSPC if _SHORT_WRITE.search(line) else 0) for line in _lines(result))
    # A status of our own scripts is exact; where a program failed, only its words tell.
    return _STATUS.get(result.returncode) or next(filter(None, numbers), 0)


def _lines(result: Result) -> list[str]:
    return [line.rstrip() for line in result.stderr.split("\n") if line.strip()]


def _raise_for_listing(result: Result, path: GuestPath) -> None:
    """Raise as `raise_for` does, but ignore places below the path that find(1) could not read."""
    lines = _lines(result)
    # Folders below that cannot be read are passed over, as in pathlib's walk.
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
        raise ValueError(f"{path!r} has a character that a file name cannot have") from None


def mode_word(mode: int) -> str:
    """Return permission bits as chmod(1) takes them.

    Raises:
        ValueError: They are not permission bits.
    """
    if not is_mode(mode):
        raise ValueError(f"mode={mode!r} are not permission bits: write them as 0o644")
    return f"{mode:04o}"


def _stat_result(line: str) -> os.stat_result:
    numbers, *times = line.split("|")
    mode, *decimal = numbers.split()
    inode, device, links, uid, gid, size, atime, mtime, ctime, blocks, block = (int(word) for word in decimal[:-2])
    # Whole seconds and nanoseconds apart: a float has no room for both.
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
