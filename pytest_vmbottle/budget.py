"""The memory that all machines of one catalog may have together: shares of it are taken in turn, and end with who holds them.

Every share, and every wish for one, is an empty file in one folder, locked by its process for as long as it lives::

    0000000016-4241-77ab01c3-1073741824.held        the number of its turn, the process and a token of it, and bytes
    0000000017-4242-9f3c2154-1073741824.waiting
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from pytest_vmbottle import host
from pytest_vmbottle._os import Deadline, Reminder, format_size, private_dir, try_lock
from pytest_vmbottle.errors import CatalogError, SpecError

__all__ = ["Budget"]

_SHARE = 0.8
"""Of the memory that is to be had, for machines; the rest is for the hypervisors, the tests, and whatever else runs here."""
_NAME = re.compile(r"(\d{10})-(\d{1,10})-([0-9a-f]{8})-(\d{1,20})\.(held|waiting)")


@attrs.frozen(kw_only=True, order=True)
class _Turn:
    """A share that is held, or waited for."""

    number: int
    pid: int
    owner: str
    size: int
    held: bool

    @classmethod
    def named(cls, name: str) -> _Turn | None:
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        return cls(number=int(match[1]), pid=int(match[2]), owner=match[3], size=int(match[4]), held=match[5] == "held")

    @property
    def name(self) -> str:
        return f"{self.number:010d}-{self.pid}-{self.owner}-{self.size}.{'held' if self.held else 'waiting'}"


class Budget:
    """Gives out shares of memory, first come, first served, to all processes that use one folder.

    Who holds a share and waits for another one keeps nobody from going on for ever: where all that is held belongs to processes that wait
    themselves, the first of these goes ahead, even if the limit is exceeded by that.
    """

    def __init__(self, folder: Path, *, limit: int | None = None) -> None:
        """Takes the folder, which is made when it is needed.

        Args:
            folder: Where shares are kept.
            limit: Bytes that may be held together; by default a share of what this host, or its control group, has to spare.
        """
        self._folder, self._limit = folder, limit
        self._owner, self._pid = secrets.token_hex(4), os.getpid()

    @contextmanager
    def share(self, size: int, *, name: str, deadline: Deadline, waiting: Callable[[str], None]) -> Iterator[None]:
        """Holds a share for the length of a block, which begins when it is to be had.

        Args:
            size: Its bytes.
            name: What the machine is called that it is for.
            deadline: When to give up.
            waiting: Told now and then, in a sentence, how long it has been and who holds what.

        Raises:
            SpecError: It can never be had: it is more than there is, or more than the other shares of this process leave.
            CatalogError: Others have held too much until the deadline.
        """
        if self._pid != os.getpid():  # a forked child is somebody else
            self._owner, self._pid = secrets.token_hex(4), os.getpid()
        turn, fd = self._queue(size, name, deadline)
        try:
            turn = self._wait(turn, deadline, waiting)
            yield
        finally:
            if turn.pid == os.getpid():
                for held in (False, True):
                    (self._folder / attrs.evolve(turn, held=held).name).unlink(missing_ok=True)
            os.close(fd)

    def _queue(self, size: int, name: str, deadline: Deadline) -> tuple[_Turn, int]:
        """Puts a wish behind all others; returns it, and the descriptor that keeps it alive."""
        private_dir(self._folder)
        with self._alone(deadline):
            turns = self._turns()
            self._check_fits(size, name, sum(turn.size for turn in turns if turn.held and turn.owner == self._owner))
            number = max((turn.number for turn in turns), default=0) + 1
            turn = _Turn(number=number, pid=self._pid, owner=self._owner, size=size, held=False)
            fd = os.open(self._folder / turn.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            return turn, fd

    def _check_fits(self, size: int, name: str, own: int) -> None:
        total = host.total_memory()
        most, what = (total, "this host's") if self._limit is None or self._limit > total else (self._limit, "the memory budget of")
        # A machine that is all there is leaves nothing for its hypervisor.
        if size > most - own or (size == total and not own):
            beside = f", of which other machines of this process have {format_size(own)}" if own else ""
            raise SpecError(
                f"memory={format_size(size)} for the machine {name!r} is more than {what} {format_size(most)}{beside}: ask for less"
            )

    def _wait(self, turn: _Turn, deadline: Deadline, waiting: Callable[[str], None]) -> _Turn:
        reminder = Reminder()

        def go() -> _Turn | None:
            with self._alone(deadline):
                turns = self._turns()
                limit = self._room(turns)
                if turn == _next(turns, limit):
                    mine = attrs.evolve(turn, held=True)
                    (self._folder / turn.name).rename(self._folder / mine.name)
                    return mine
            if reminder.due():
                waiting(f"waiting for {format_size(turn.size)}, {reminder.elapsed:.0f} s: {_described(turns, turn, limit)}")
            return None

        mine = deadline.poll(go, every=0.03, first=0.01)
        if mine is None:
            turns = self._turns()
            words = _described(turns, turn, self._room(turns))
            raise CatalogError(f"{format_size(turn.size)} of memory were not to be had within {deadline.seconds:.0f} s: {words}")
        return mine

    def _room(self, turns: Iterable[_Turn]) -> int:
        """Bytes that may be held together now."""
        if self._limit is not None:
            return self._limit
        # What is held may be in use already: it is no longer available, and yet of the budget.
        held = sum(turn.size for turn in turns if turn.held)
        return int(_SHARE * min(host.total_memory(), host.available_memory() + held))

    def _turns(self) -> list[_Turn]:
        """All shares and wishes, in their order; the files of the dead are removed."""
        found = []
        for path in self._folder.iterdir():
            turn = _Turn.named(path.name)
            if turn is not None and _is_alive(path):
                found.append(turn)
        return sorted(found)

    @contextmanager
    def _alone(self, deadline: Deadline) -> Iterator[None]:
        """Holds the folder locked for a moment."""
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not deadline.poll(lambda: try_lock(fd), every=0.02, first=0.001):
                raise CatalogError(f"the folder {self._folder} was locked by another process for {deadline.seconds:.0f} s")
            yield
        finally:
            os.close(fd)


def _next(turns: list[_Turn], limit: int) -> _Turn | None:
    """Whose turn it is to get what it waits for, if anybody's."""
    waiting = [turn for turn in turns if not turn.held]
    if not waiting:
        return None
    taken, holders = sum(turn.size for turn in turns if turn.held), {turn.owner for turn in turns if turn.held}
    if taken + waiting[0].size <= limit:
        return waiting[0]
    if holders <= {turn.owner for turn in waiting}:  # nobody will give anything back before he gets more
        return next((turn for turn in waiting if turn.owner in holders), waiting[0])
    return None


def _described(turns: list[_Turn], turn: _Turn, limit: int) -> str:
    held: Counter[int] = Counter()
    for each in turns:
        if each.held:
            held[each.pid] += each.size
    before = sum(not each.held and each < turn for each in turns)
    who = ", ".join(f"process {pid} ({format_size(size)})" for pid, size in held.most_common(5))
    queue = f"; {before} {'waits' if before == 1 else 'wait'} before" if before else ""
    return f"of the memory budget of {format_size(limit)}, {format_size(held.total())} are held by {who or 'nobody'}{queue}"


def _is_alive(path: Path) -> bool:
    """Whether the process that made a file lives; if not, the file is removed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False  # given back a moment ago
    try:
        if not try_lock(fd):
            return True
        path.unlink(missing_ok=True)
        return False
    finally:
        os.close(fd)
