"""Small records in files, written atomically with a checksum, and read with distrust.

The writer may have been killed, or be another program.

::

    {"version": 1, "sha256": "...", "record": {...}}

Files of version 0 have the facts alone: old ones, and those whose digest is written elsewhere, as those in a pack.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pytest_vmbottle.host.files import atomic_file

__all__ = ["Damaged", "describe_holder", "note_holder", "read", "read_as", "write"]

_T = TypeVar("_T")

_LARGEST = 4 << 20
"""Most bytes of a record's file."""


class Damaged(ValueError):
    """The file is no record, is damaged, or was written by a newer version."""


def write(path: Path, facts: Mapping[str, Any], *, version: int = 1, mode: int = 0o600) -> None:
    """Write a record atomically in place of the old one.

    Args:
        path: Path of the file, whose folder must exist.
        facts: Values that JSON can write.
        version: Version of the facts' meaning, 1 or more; 0 to write them without a checksum.
        mode: Permission bits of the file.
    """
    whole = {"version": version, "sha256": _digest(version, facts), "record": dict(facts)} if version else dict(facts)
    with atomic_file(path, mode=mode) as file:
        file.write(json.dumps(whole, indent=1).encode())


def read(path: Path, *, version: int = 1) -> dict[str, Any]:
    """Read a record, with or without a version.

    Args:
        path: Path of the file.
        version: The newest version that is understood.

    Raises:
        OSError: It cannot be read; FileNotFoundError if there is none.
        Damaged: It is no record, is damaged, or a newer version has written it.
    """
    return read_as(path, dict, version=version)


def read_as(path: Path, make: Callable[[dict[str, Any]], _T], *, version: int = 1) -> _T:
    """Read a record and convert its facts to a value.

    Args:
        path: Path of the file.
        make: Function that converts the facts; a failure of it means a damaged record.
        version: The newest version that is understood.

    Raises:
        OSError: It cannot be read; FileNotFoundError if there is none.
        Damaged: It is no record, is damaged, or a newer version has written it.
    """
    text = _text(path)
    try:
        return make(_facts(json.loads(text, object_pairs_hook=_object, parse_constant=_refuse), version))
    except KeyError as error:
        raise Damaged(f"it lacks {error}") from error
    # All that conversion of strange facts may end in: cattrs raises groups, and deep nesting in JSON exhausts the stack.
    except (ValueError, TypeError, AttributeError, RecursionError, ExceptionGroup) as error:
        raise Damaged(str(error)) from error


def _facts(whole: object, version: int) -> dict[str, Any]:
    if not isinstance(whole, dict):
        raise TypeError("it is not a record")
    if whole.keys() != {"version", "sha256", "record"}:
        return whole
    found, facts = whole["version"], whole["record"]
    # Checked before the version, which it covers: a damaged version must not be reported as a newer program's.
    if not isinstance(facts, dict) or whole["sha256"] != _digest(found, facts):
        raise ValueError("its checksum is wrong")
    if not isinstance(found, int) or not 0 < found <= version:
        raise ValueError(f"it has version {found!r}, and only {version} is supported: a newer pytest-vmbottle has written it")
    return facts


def note_holder(path: Path, *, since: float, step: str = "") -> None:
    """Record that this process does something that others may wait for.

    Args:
        path: Path of the record, beside the lock that they wait for.
        since: Time of its beginning, in seconds since 1970.
        step: Its progress, for people.
    """
    with suppress(OSError):  # it is for people, no more
        write(path, {"pid": os.getpid(), "since": since, "step": step})


def describe_holder(path: Path) -> str:
    """Describe a lock's holder as the rest of a sentence: its process, its start and its progress."""

    def words(found: Mapping[str, Any]) -> str:
        step = f" ({str(found['step'])[:200].strip()})" if found.get("step") else ""
        return f"process {int(found['pid'])} has held the lock for {time.time() - float(found['since']):.0f} s{step}"

    try:
        return read_as(path, words)
    except (OSError, Damaged):
        return "another process holds the lock"


def _text(path: Path) -> bytes:
    """Return the content of a plain file of bounded size.

    No symbolic link is followed, and nothing is waited for.
    """
    # A FIFO in its place would block without O_NONBLOCK, and a device could have no end.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:  # noqa: PTH123 - opened already
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged("it is not a regular file")
        # One byte more than allowed shows that there is more, even where the file grows meanwhile.
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise Damaged(f"it is longer than {_LARGEST >> 20} MiB")
    return text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    # JSON allows a name twice, and readers differ in which one counts.
    if len(found) != len(pairs):
        raise ValueError("it has a key twice")
    return found


def _refuse(word: str) -> None:
    # NaN and Infinity: Python reads and writes them, but they are not JSON, and NaN is equal to nothing.
    raise ValueError(f"{word} is not a number")


def _digest(version: object, facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([version, facts], sort_keys=True).encode()).hexdigest()
