"""States in which a crash may leave a disk, told by the log of its writes.

A disk may keep what it was given in a cache until it is told to flush. So at any moment each write that no flush has followed may be lost,
in any combination, and the last one to arrive may be cut off in its middle (torn).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import gcd

import attrs

from pytest_vmbottle.disks.write_log import SECTOR, Entry

__all__ = ["KINDS", "CrashState", "WriteHistory"]

KINDS = ("cut", "torn", "reordered")
"""Kinds of states: what came last is missing; the last one is torn too; others are missing."""

_WHOLE = 4096
_TEXT = re.compile(r"w(?P<upto>\d+)(?:-u(?P<last>\d+)|-x(?P<mask>[0-9a-f]+))?(?P<torn>-t)?")


@attrs.frozen(kw_only=True)
class CrashState:
    """Writes of a disk, numbered from 1, that are there after a crash.

    Attributes:
        upto: The last write before the crash.
        lost: The writes up to that one which are missing.
        torn: Whether only the first half is there of the last write that is not missing.
    """

    upto: int
    lost: frozenset[int] = frozenset()
    torn: bool = False

    @property
    def kind(self) -> str:
        """Its kind, of `KINDS`."""
        if self.torn:
            return "torn"
        return "cut" if self.lost == frozenset(range(self.upto - len(self.lost) + 1, self.upto + 1)) else "reordered"

    @property
    def losses(self) -> int:
        """Number of writes that are missing, or in part."""
        return len(self.lost) + self.torn


class WriteHistory:
    """The writes of a disk in their order, and when they were safe."""

    def __init__(self, entries: Iterable[Entry], marks: Sequence[int] = ()) -> None:
        """Take the entries of a log.

        Args:
            entries: The entries.
            marks: Lengths of the log in bytes at moments that are counted.
        """
        self.writes: list[Entry] = []
        self._fences: list[int] = []  # how many writes each one's last flush before it had made safe
        self._flushed: list[int] = [0]  # by the number of writes: the length of the log before the next write, flushes included
        safe = 0
        for entry in entries:
            if entry.flush:
                safe = len(self.writes)
            if entry.count:
                self.writes.append(entry)
                self._fences.append(safe)
                self._flushed.append(entry.end)
            else:
                self._flushed[-1] = entry.end
        self._safe, self._marks = safe, sorted(marks)

    @cached_property
    def block(self) -> int:
        """Bytes of the largest block of which all writes are multiples, at most 4096: what disks write as a whole, or not at all."""
        common = gcd(*(number for write in self.writes for number in (write.sector, write.count)), _WHOLE // SECTOR)
        return (common & -common) * SECTOR

    def unflushed(self, upto: int) -> list[int]:
        """Return the writes that were not safe yet when this one was made, and itself."""
        if not upto:
            return []
        return [number for number in range(self._fences[upto - 1] + 1, upto + 1) if not self.writes[number - 1].fua]

    def acknowledged(self, state: CrashState) -> int:
        """Return how many marks were set before the crash of a state.

        What lost nothing is counted up to the next write, and what lost something up to the write itself: a flush would have saved it.
        """
        length = self.writes[state.upto - 1].end if state.losses else self._flushed[state.upto]
        if not state.losses and state.upto == len(self.writes):
            return len(self._marks)
        return sum(mark <= length for mark in self._marks)

    def content(self, state: CrashState) -> Mapping[int, int | None]:
        """Return the blocks that are not as they were at first: where in the log each is, None for one that reads as zeros."""
        found: dict[int, int | None] = {}
        there = [number for number in range(1, state.upto + 1) if number not in state.lost]
        for number in there:
            write = self.writes[number - 1]
            first, count = write.sector * SECTOR // self.block, write.count * SECTOR // self.block
            if state.torn and number == there[-1]:
                count //= 2
            for index in range(count):
                found[first + index] = None if write.data is None else write.data + index * self.block
        return found

    def after_power_cut(self, *, torn: bool = False) -> CrashState:
        """Return the state after the last write, without all that no flush has followed; with half of the first one of that, if torn."""
        upto = len(self.writes)
        unflushed = [number for number in range(self._safe + 1, upto + 1) if not self.writes[number - 1].fua]
        kept = unflushed[:1] if torn else []
        return CrashState(upto=upto, lost=frozenset(unflushed) - frozenset(kept), torn=bool(kept))

    # -- all of them -----------------------------------------------------------------------------------------------------------------

    def _ends(self) -> list[int]:
        """Return the last write before each flush that makes something safe, and the last of all."""
        ends = [fence for fence in sorted({*self._fences, self._safe}) if fence]
        return [*ends, len(self.writes)] if self.writes and self._safe < len(self.writes) else ends

    def _cuts(self) -> list[CrashState]:
        """Return each content that a cut leaves, once: as it is when the crash came as late as possible."""
        latest: dict[int, CrashState] = {number: CrashState(upto=number) for number in range(len(self.writes) + 1)}
        for end in self._ends():
            lost: list[int] = []
            for number in reversed(self.unflushed(end)):
                if number != end - len(lost):
                    break  # the one between is safe
                lost.append(number)
                latest[number - 1] = CrashState(upto=end, lost=frozenset(lost))
        return list(latest.values())

    def _tears(self) -> list[CrashState]:
        blocks = self.block // SECTOR
        cuts = {state.upto - len(state.lost): state for state in self._cuts()}
        fit = (number for number, write in enumerate(self.writes, 1) if write.count >= 2 * blocks and not write.fua)
        # A write that was safe before the crash came is whole.
        return [
            attrs.evolve(cuts[number], torn=True) if number in self.unflushed(cuts[number].upto) else CrashState(upto=number, torn=True)
            for number in fit
        ]

    def _gaps(self, chance: random.Random, limit: int) -> list[CrashState]:
        """Return states in which one write of those between two flushes is missing, then some in which several are."""
        spans = [(end, found) for end in self._ends() if len(found := self.unflushed(end)) > 1]
        single = [CrashState(upto=end, lost=frozenset({number})) for end, found in spans for number in found[:-1]]
        several: dict[CrashState, None] = {}
        # Bounded twice: there may be fewer than are asked for, and 2^n of them.
        for _ in range(4 * limit):
            if len(several) >= limit or not spans:
                break
            end, found = chance.choice(spans)
            lost = frozenset(number for number in found if chance.random() < 0.5)  # noqa: PLR2004 - a coin
            state = CrashState(upto=end, lost=lost)
            if len(lost) > 1 and state.kind == "reordered":
                several[state] = None
        return [*single, *several]

    def states(self, limit: int, seed: int) -> tuple[list[CrashState], Mapping[str, int]]:
        """Return at most so many states, those with the fewest losses first, and how many of each kind there are.

        Args:
            limit: How many.
            seed: What decides the choice where there are more.
        """
        chance = random.Random(seed)  # noqa: S311 - no secret
        kinds = dict(zip(KINDS, (self._cuts(), self._tears(), self._gaps(chance, limit)), strict=True))
        chosen: list[CrashState] = []
        # The rarest kind first, so that what it leaves of its share goes to the others.
        for done, kind in enumerate(sorted(KINDS, key=lambda kind: len(kinds[kind]))):
            share = -(-(limit - len(chosen)) // (len(KINDS) - done))
            chosen += _some(kinds[kind], share, chance)
        ordered = sorted(chosen, key=lambda state: (state.losses, state.upto, sorted(state.lost)))
        return ordered, {kind: len(found) for kind, found in kinds.items()}

    # -- as text ---------------------------------------------------------------------------------------------------------------------

    def text(self, state: CrashState) -> str:
        """Return a short name of a state: `w41` is all up to the write 41, `w41-u3` without the last three that no flush had followed."""
        lost = ""
        if state.lost:
            mask = sum(1 << place for place, number in enumerate(reversed(self.unflushed(state.upto))) if number in state.lost)
            lost = f"-u{mask.bit_length()}" if mask & (mask + 1) == 0 else f"-x{mask:x}"
        return f"w{state.upto}{lost}{'-t' if state.torn else ''}"

    def state(self, text: str) -> CrashState:
        """Return the state of a name.

        Raises:
            ValueError: It is no name of a state, or this log has no such state.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no state of a disk: write one as it was printed, such as 'w41' or 'w41-u3'")
        upto = int(match["upto"])
        if upto > len(self.writes):
            raise ValueError(f"{text!r}: this disk was written to {len(self.writes)} times only")
        mask = (1 << int(match["last"])) - 1 if match["last"] else int(match["mask"] or "0", 16)
        unflushed = self.unflushed(upto)
        if mask.bit_length() > len(unflushed):
            raise ValueError(f"{text!r}: at the write {upto} only {len(unflushed)} were not flushed yet")
        lost = frozenset(number for place, number in enumerate(reversed(unflushed)) if mask >> place & 1)
        return CrashState(upto=upto, lost=lost, torn=bool(match["torn"]))


def _some(states: Sequence[CrashState], count: int, chance: random.Random) -> list[CrashState]:
    """Choose so many states, the first and the last one among them."""
    if len(states) <= count:
        return list(states)
    ends = [states[0], states[-1]][:count]
    return [*ends, *chance.sample(states[1:-1], count - len(ends))]
