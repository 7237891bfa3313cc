"""Writing of many files into a guest at once."""

from __future__ import annotations

import os
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pytest_vmbottle.guest.path import GuestPath, Shell, mode_word, owner_word, raise_for
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.result import Result
from pytest_vmbottle.spec import Content, File

__all__ = ["Content", "File", "write_files"]

_CHECK = read_script(__package__, "write_files_check.sh")
_MOVE = read_script(__package__, "write_files_move.sh")
_PLACE = read_script(__package__, "write_files_place.sh")
_WRITE_FILES = read_script(__package__, "write_files.sh")
_VITAL_STATUS = 110


def write_files(shell: Shell, files: Mapping[GuestPath, File], *, clean: bool, mode: int | None, owner: str | int | None) -> None:
    """Write files by one command (see `Machine.write_files`).

    Raises:
        ValueError: The paths contradict each other, or `clean` would empty a folder that the guest needs.
        OSError: A file could not be written; `filename` says which.
    """
    _check_paths(files)
    words = ("1" if clean else "", "" if mode is None else mode_word(mode), owner_word(owner))
    if not files:
        return
    tops = _tops({path.parent for path in files})
    members = {_member(path, tops): path for path in sorted(files)}
    # In a file first, because the size has to be known before the guest is asked to read.
    with tempfile.TemporaryFile() as stream:
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
            contents = {name: files[path] for name, path in members.items()}
            for name, content in contents.items():
                _add(tar, name, content[0] if isinstance(content, tuple) else content)
            # In a folder that no file of the user's can be in: the names of those begin with a number.
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
            raise ValueError(f"{inside} cannot be both a file and the folder of {path}")


def _tops(folders: set[GuestPath]) -> list[GuestPath]:
    """Return the folders that are not inside another one of them."""
    return sorted(folder for folder in folders if not folders.intersection(folder.parents))


def _member(path: GuestPath, tops: list[GuestPath]) -> str:
    place = next(number for number, top in enumerate(tops) if path.is_relative_to(top))
    return f"{place}/{path.relative_to(tops[place])}"


def _modes(contents: Mapping[str, File]) -> dict[str, list[bytes]]:
    """Group the members that have permission bits of their own by those bits.

    Each name ends with a NUL.
    """
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
            # Its other bits do not count: those come from the guest's umask, or from the file that it replaces.
            member.mode |= status.st_mode & 0o100
            _add_stream(tar, member, file, status.st_size)
        return
    data = content.encode() if isinstance(content, str) else bytes(memoryview(content))
    _add_stream(tar, member, BytesIO(data), len(data))


def _add_stream(tar: tarfile.TarFile, member: tarfile.TarInfo, source: BinaryIO, size: int) -> None:
    member.size = size
    tar.addfile(member, source)


def _raise_for(result: Result, members: Mapping[str, GuestPath], tops: list[GuestPath]) -> None:
    if result.ok:
        return
    told = result.stdout.split("\0")[0]
    if result.returncode == _VITAL_STATUS:
        raise ValueError(f"clean=True would empty {told}, which the guest needs: write to a folder of your own, or leave clean out")
    named = (path for name, path in members.items() if f" {name}: " in result.stderr)  # by tar
    raise_for(result, str(PurePosixPath(told)) if told else next(named, tops[0]))
