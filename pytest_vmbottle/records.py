"""Small facts in files, written whole and with a checksum, and read with distrust: whoever wrote one may have been killed, or be another.

::

    {"version": 1, "sha256": "...", "record": {...}}

Older files have the facts alone: they are version 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_vmbottle._os import atomic_file

__all__ = ["describe_holder", "load", "note_holder", "read", "write"]

_LARGEST = 4 << 20
"""Bytes beyond which a file is no record."""


def write(path: Path, facts: Mapping[str, Any], *, version: int = 1, mode: int = 0o600) -> None:
    """Writes a record in the place of what is there, all at once.

    Args:
        path: Where to; its folder must be there.
        facts: What JSON can say.
        version: Of what the facts mean, 1 or more.
        mode: Who may read it.
    """
    whole = {"version": version, "sha256": _digest(version, facts), "record": dict(facts)}
    with atomic_file(path, mode=mode) as file:
        file.write(json.dumps(whole, indent=1).encode())


def read(path: Path, *, version: int = 1) -> dict[str, Any]:
    """Reads a record, or one from before there were versions.

    Args:
        path: Where it is.
        version: The newest that is understood.

    Raises:
        OSError: It cannot be read; FileNotFoundError if there is none.
        ValueError: It is no record, is damaged, or a newer version has written it.
    """
    whole = load(path)
    if not isinstance(whole, dict):
        raise ValueError("it is no record")  # noqa: TRY004 - it is a value that came from outside
    if whole.keys() != {"version", "sha256", "record"}:
        return whole
    found, facts = whole["version"], whole["record"]
    if not isinstance(facts, dict) or whole["sha256"] != _digest(found, facts):
        raise ValueError("its checksum is wrong")
    if not isinstance(found, int) or not 0 < found <= version:
        raise ValueError(f"it is of version {found!r}, and only {version} is known here: a newer pytest-vmbottle has written it")
    return facts


def note_holder(path: Path, *, since: float, step: str = "") -> None:
    """Writes down that this process does something that others may wait for.

    Args:
        path: Where; beside the lock that they wait for.
        since: When it began, in seconds since 1970.
        step: How far it is, for people.
    """
    with suppress(OSError):  # it is for people, no more
        write(path, {"pid": os.getpid(), "since": since, "step": step})


def describe_holder(path: Path) -> str:
    """Who does what others wait for, since when, and how far that is, as the rest of a sentence."""
    try:
        found = read(path)
        step = f" ({str(found['step'])[:200].strip()})" if found.get("step") else ""
        return f"process {int(found['pid'])} has been at it for {time.time() - float(found['since']):.0f} s{step}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process is at it"


def load(path: Path) -> Any:
    """Reads strict JSON from a plain file of bounded size; follows no symbolic link and waits for nobody.

    Raises:
        OSError: It cannot be read; FileNotFoundError if it is not there.
        ValueError: It is something else.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:  # noqa: PTH123 - opened already
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no file")
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise ValueError(f"it is longer than {_LARGEST >> 20} MiB")
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it says something twice")
    return found


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _digest(version: object, facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([version, facts], sort_keys=True).encode()).hexdigest()
