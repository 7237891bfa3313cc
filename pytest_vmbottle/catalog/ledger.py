"""Resource report of a run: what it made, kept, left behind, and reclaimed from dead runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle.host.deadline import Deadline

__all__ = ["Ledger", "processes_naming"]

_GRACE = 1.0
"""Seconds in which a process or folder that is ending may still be seen."""


@attrs.define(kw_only=True)
class Ledger:
    """Resource counts of one process, or the sum of several.

    They can be sent between processes.

    Attributes:
        machines: Number of machines that were started.
        folders: Number of private folders that were made, for machines and builds.
        packs: The keys of packs that were published.
        locks: The names of locks that were taken.
        kept: Things that stay on purpose, with reasons.
        reclaimed: Numbers of things of dead runs that were removed, by kind.
        left: Things that should be gone, and are not.
    """

    machines: int = 0
    folders: int = 0
    packs: set[str] = attrs.field(factory=set)
    locks: set[str] = attrs.field(factory=set)
    kept: dict[str, str] = attrs.field(factory=dict)
    reclaimed: dict[str, int] = attrs.field(factory=dict)
    left: list[str] = attrs.field(factory=list)

    def reclaim(self, **counts: int) -> None:
        """Count removed things of dead runs by kind, such as `machine=2`."""
        for kind, count in counts.items():
            if count:
                self.reclaimed[kind] = self.reclaimed.get(kind, 0) + count

    def keep(self, what: object, why: str) -> None:
        """Record a thing that stays on purpose, and why."""
        self.kept[str(what)] = why

    def leave(self, *gone: Path) -> None:
        """Record paths that should be gone, and processes that name something below them.

        Processes that were just killed get a moment to end.
        """
        Deadline(_GRACE).poll(lambda: not _there(gone), every=0.05)
        self.left += _there(gone)

    def sent(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        return attrs.asdict(self, value_serializer=lambda _, __, value: sorted(value) if isinstance(value, set) else value)

    def add(self, sent: Mapping[str, Any]) -> None:
        """Add the counts of another process."""
        other = Ledger(**{**sent, "packs": set(sent.get("packs", ())), "locks": set(sent.get("locks", ()))})
        self.machines += other.machines
        self.folders += other.folders
        self.packs |= other.packs
        self.locks |= other.locks
        self.kept |= other.kept
        self.left += other.left
        self.reclaim(**other.reclaimed)

    def lines(self) -> list[str]:
        """Return the lines for the end of a run; none for a run that made nothing."""
        counts = {"machine": self.machines, "pack": len(self.packs), "lock": len(self.locks), "folder": self.folders}
        if not any(counts.values()) and not self.reclaimed and not self.left and not self.kept:
            return []
        kept = [f"{_many(len(self.packs), 'pack')} for later runs"] if self.packs else []
        kept += [f"{_many(len(self.locks), 'lock')} (lock files are never removed)"] if self.locks else []
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
    """Yield this user's processes that mention a text, with their command lines.

    The text may be in the command line or in the environment. This process is left out.
    """
    wanted = os.fsencode(text)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int(entry.name) == os.getpid() or entry.stat().st_uid != os.geteuid():
                continue
            words = (entry / "cmdline").read_bytes()
            # Its environment too: a command line need not name the folder, but the mark in the environment does.
            if wanted in words or wanted in (entry / "environ").read_bytes():
                yield int(entry.name), words.replace(b"\0", b" ").decode(errors="backslashreplace")
        except OSError:
            continue  # it has just ended, or is not to be looked at


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}{'es' if what.endswith('s') else 's'}"


def _either(text: str) -> str:
    return text or "nothing"
