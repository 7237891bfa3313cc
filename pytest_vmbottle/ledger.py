"""What a run made on this computer, what it keeps on purpose, what it left behind, and what it reclaimed from dead runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle._os import Deadline

__all__ = ["Ledger", "processes_naming"]

_GRACE = 1.0
"""Seconds in which what was ended may still be seen."""


@attrs.define(kw_only=True)
class Ledger:
    """The books of one process, or of several that were added up. All of it can be sent between processes.

    Attributes:
        machines: How many machines were started.
        folders: How many private folders were made, for machines and for what is being built.
        packs: The keys of packs that were published.
        locks: The names of locks that were taken.
        kept: What stays on purpose, and why.
        reclaimed: How much of what dead runs have left was removed, by what it is.
        left: What should be gone, and is not.
    """

    machines: int = 0
    folders: int = 0
    packs: set[str] = attrs.field(factory=set)
    locks: set[str] = attrs.field(factory=set)
    kept: dict[str, str] = attrs.field(factory=dict)
    reclaimed: dict[str, int] = attrs.field(factory=dict)
    left: list[str] = attrs.field(factory=list)

    def reclaim(self, **counts: int) -> None:
        """Notes what was removed of what dead runs have left, such as `machine=2`."""
        for kind, count in counts.items():
            if count:
                self.reclaimed[kind] = self.reclaimed.get(kind, 0) + count

    def keep(self, what: object, why: str) -> None:
        """Notes something that stays although it could be taken for left behind."""
        self.kept[str(what)] = why

    def leave(self, *gone: Path) -> None:
        """Notes which paths are there although they should be gone, and which processes name something below them.

        What was just killed has a moment to end.
        """
        Deadline(_GRACE).poll(lambda: not _there(gone), every=0.05)
        self.left += _there(gone)

    def sent(self) -> dict[str, Any]:
        """Itself as plain values."""
        return attrs.asdict(self, value_serializer=lambda _, __, value: sorted(value) if isinstance(value, set) else value)

    def add(self, sent: Mapping[str, Any]) -> None:
        """Adds the books of another process."""
        other = Ledger(**{**sent, "packs": set(sent.get("packs", ())), "locks": set(sent.get("locks", ()))})
        self.machines += other.machines
        self.folders += other.folders
        self.packs |= other.packs
        self.locks |= other.locks
        self.kept |= other.kept
        self.left += other.left
        self.reclaim(**other.reclaimed)

    def lines(self) -> list[str]:
        """What to tell at the end of a run; nothing for a run that made nothing."""
        counts = {"machine": self.machines, "pack": len(self.packs), "lock": len(self.locks), "folder": self.folders}
        if not any(counts.values()) and not self.reclaimed and not self.left and not self.kept:
            return []
        kept = [f"{_many(len(self.packs), 'pack')} for later runs"] if self.packs else []
        kept += [f"{_many(len(self.locks), 'lock')}, whose files are never removed"] if self.locks else []
        reclaimed = [_many(count, kind) for kind, count in sorted(self.reclaimed.items())]
        return [
            f"made {', '.join(_many(count, kind) for kind, count in counts.items())}; kept {_either('; '.join(kept))}",
            f"reclaimed from dead runs: {_either(', '.join(reclaimed))}; left behind: {len(self.left) or 'nothing'}",
            *(f"kept {what}: {why}" for what, why in self.kept.items()),
            *(f"LEAK: {each}" for each in self.left),
        ]


def _there(gone: Iterable[Path]) -> list[str]:
    paths = [f"{path} is still there" for path in gone if os.path.lexists(path)]
    return paths + [f"process {pid} still runs: {words[:200]}" for path in gone for pid, words in processes_naming(f"{path}/")]


def processes_naming(text: str) -> Iterator[tuple[int, str]]:
    """The processes of this user in whose command lines or environments a text occurs, this one left out, with their command lines."""
    wanted = os.fsencode(text)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int(entry.name) == os.getpid() or entry.stat().st_uid != os.geteuid():
                continue
            words = (entry / "cmdline").read_bytes()
            if wanted in words or wanted in (entry / "environ").read_bytes():
                yield int(entry.name), words.replace(b"\0", b" ").decode(errors="backslashreplace")
        except OSError:
            continue  # it has just ended, or is not to be looked at


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}{'es' if what.endswith('s') else 's'}"


def _either(text: str) -> str:
    return text or "nothing"
