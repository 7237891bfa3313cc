"""Paths in a guest, with the verbs and the errors of `pathlib`."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import PurePosixPath
from typing import BinaryIO, Protocol

from pytest_vmbottle.result import Result

__all__ = ["BULK", "GuestPath", "Shell", "raise_for"]

BULK = 1 << 20
"""Bytes from which on data takes the channel with the most throughput."""

# What our scripts say by their status; far from what the programs in them end with.
_STATUS = {
    101: (FileNotFoundError, errno.ENOENT),
    102: (IsADirectoryError, errno.EISDIR),
    103: (NotADirectoryError, errno.ENOTDIR),
    104: (FileExistsError, errno.EEXIST),
    105: (PermissionError, errno.EACCES),
}
_TEXT = {"No such file or directory": 101, "Permission denied": 105, "Is a directory": 102, "Not a directory": 103, "File exists": 104}

_READ = '[ -e "$1" ] || exit 101; [ -d "$1" ] && exit 102; exec cat -- "$1"'
# Written beside it and renamed, so that nobody reads half of it. A symbolic link is written through and a file keeps its mode and owner, as
# with open(2).
_WRITE = r"""
path=$1; [ -L "$path" ] && path=$(readlink -f -- "$path")
[ -d "$path" ] && exit 102
parent=${path%/*}; [ -d "${parent:-/}" ] || exit 101
new=$(mktemp "$parent/.vmbottle.XXXXXXXX") || exit 105
trap 'rm -f "$new"' EXIT
cat > "$new" || exit 1
[ "$(wc -c < "$new")" -eq "$2" ] || { echo "only a part of it arrived" >&2; exit 1; }
if [ -n "$3" ]; then chmod "$3" "$new"
elif [ -e "$path" ]; then chmod "$(stat -c %a "$path")" "$new"; chown "$(stat -c %u:%g "$path")" "$new"
else chmod "$(printf '%o' $((0666 & ~$(umask))))" "$new"; fi && mv -f "$new" "$path"
"""
_LIST = '[ -e "$1" ] || exit 101; [ -d "$1" ] || exit 103; exec find "$1/" -mindepth 1 -maxdepth 1 -print0'
_MKDIR = """
[ -d "$1" ] && [ -n "$2" ] && exit 0; [ -e "$1" ] && exit 104
[ -n "$3" ] && mkdir -p -- "${1%/*}/"
exec mkdir -m "$4" -- "$1"
"""
_UNLINK = '[ -e "$1" ] || [ -L "$1" ] || exit 101; [ -d "$1" ] && [ ! -L "$1" ] && exit 102; exec rm -f -- "$1"'


class Shell(Protocol):
    """What a path needs of its machine."""

    def script(self, text: str, *words: str) -> Result:
        """Runs a POSIX shell script of ours with arguments; never raises for its status."""

    def feed(self, text: str, *words: str, source: BinaryIO, size: int, framed: bool = False) -> Result:
        """The same with a file as input; with `framed` the script knows itself where it ends."""

    def fetch(self, text: str, *words: str, sink: BinaryIO, size: int) -> Result:
        """The same with the output, of about `size` bytes, going to a file."""


class GuestPath:
    """An absolute path in a guest. It is made by `Machine.path`, and `/` joins as with `pathlib`."""

    def __init__(self, path: str | PurePosixPath, *, shell: Shell) -> None:
        """Names a place; nothing is asked of the guest.

        Raises:
            ValueError: The path is not absolute, or has a NUL byte in it.
        """
        self._pure = PurePosixPath(path)
        self._shell = shell
        if not self._pure.is_absolute():
            raise ValueError(f"{path!r} is not an absolute path in the guest")
        if "\0" in str(path):
            raise ValueError(f"{path!r} has a NUL byte in it")

    @property
    def name(self) -> str:
        """The last part."""
        return self._pure.name

    @property
    def parent(self) -> GuestPath:
        """The folder it is in."""
        return GuestPath(self._pure.parent, shell=self._shell)

    @property
    def shell(self) -> Shell:
        """The machine it is on, as far as a path sees it."""
        return self._shell

    def __truediv__(self, other: str | PurePosixPath) -> GuestPath:
        return GuestPath(self._pure / other, shell=self._shell)

    def __str__(self) -> str:
        return str(self._pure)

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is in the guest: open() and os functions work on the host; copy it with vm.cp()")

    def __repr__(self) -> str:
        return f"GuestPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GuestPath) and self._pure == other._pure and self._shell is other._shell

    def __hash__(self) -> int:
        return hash(self._pure)

    def read_bytes(self) -> bytes:
        """The file's content.

        Raises:
            FileNotFoundError, IsADirectoryError, PermissionError: As `pathlib.Path.read_bytes` does.
        """
        result = self._shell.script(_READ, str(self))
        if not result.truncated:
            raise_for(result, self)
            return result.stdout_bytes
        sink = BytesIO()
        raise_for(self._shell.fetch(_READ, str(self), sink=sink, size=len(result.stdout)), self)
        return sink.getvalue()

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The file's content as text."""
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: bytes, *, mode: int | None = None) -> int:
        """Replaces the file's content, all at once; returns the number of bytes.

        Args:
            data: The new content.
            mode: Permission bits; by default those it has, or for a new file what the umask leaves of 0666.

        Raises:
            FileNotFoundError: Its folder does not exist.
            IsADirectoryError, PermissionError: As `pathlib.Path.write_bytes` does.
        """
        bits = "" if mode is None else f"{mode:o}"
        raise_for(self._shell.feed(_WRITE, str(self), str(len(data)), bits, source=BytesIO(data), size=len(data)), self)
        return len(data)

    def write_text(self, data: str, encoding: str = "utf-8", *, mode: int | None = None) -> int:
        """Replaces the file's content with text, all at once; returns the number of characters."""
        self.write_bytes(data.encode(encoding), mode=mode)
        return len(data)

    def exists(self) -> bool:
        """Whether something is there; a symbolic link counts if its target does."""
        return self._test("-e")

    def is_dir(self) -> bool:
        """Whether it is a folder, or a symbolic link to one."""
        return self._test("-d")

    def is_file(self) -> bool:
        """Whether it is a regular file, or a symbolic link to one."""
        return self._test("-f")

    def _test(self, question: str) -> bool:
        return self._shell.script('[ "$1" "$2" ]', question, str(self)).ok

    def mkdir(self, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Makes a folder.

        Raises:
            FileExistsError, FileNotFoundError, PermissionError: As `pathlib.Path.mkdir` does.
        """
        bits = f"{mode & ~0o022:o}"
        raise_for(self._shell.script(_MKDIR, str(self), "1" if exist_ok else "", "1" if parents else "", bits), self)

    def iterdir(self) -> Iterator[GuestPath]:
        """What is in the folder, in no particular order.

        Raises:
            FileNotFoundError, NotADirectoryError: As `pathlib.Path.iterdir` does.
        """
        result = self._shell.script(_LIST, str(self))
        raise_for(result, self)
        for entry in result.stdout.split("\0")[:-1]:
            name = entry.rpartition("/")[2]
            yield self / name

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Removes a file or a symbolic link.

        Raises:
            FileNotFoundError, IsADirectoryError, PermissionError: As `pathlib.Path.unlink` does.
        """
        result = self._shell.script(_UNLINK, str(self))
        if not (missing_ok and result.returncode == 101):  # noqa: PLR2004 - see _STATUS
            raise_for(result, self)


def raise_for(result: Result, path: GuestPath) -> None:
    """Raises what Python raises for the same failure on the host, if there was one."""
    if result.ok:
        return
    __tracebackhide__ = True
    status = result.returncode
    if status not in _STATUS:
        status = next((code for text, code in _TEXT.items() if text in result.stderr), 0)
    kind, number = _STATUS.get(status, (OSError, errno.EIO))
    reason = os.strerror(number) if status else result.stderr.strip() or f"status {result.returncode}"
    raise kind(number, f"{reason} (in the guest)", str(path))
