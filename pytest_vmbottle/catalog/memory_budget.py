"""Memory budget of all machines of one catalog.

Processes reserve memory in turn; a reservation ends with its process.

Every reservation, held or waiting, is an empty file in one folder, locked by its process for as long as it lives::

    0000000016-4241-77ab01c3-1073741824.held        its number in the queue, the process id, a token of the process, and bytes
    0000000017-4242-9f3c2154-1073741824.waiting
"""

from __future__ import annotations

import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from pytest_vmbottle.errors import CatalogError, SpecError
from pytest_vmbottle.host import resources as host
from pytest_vmbottle.host.deadline import Deadline, Reminder
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.host.locks import new, tried
from pytest_vmbottle.host.sizes import format_size

__all__ = ["Budget"]

_SHARE = 0.8
"""Part of the available memory that machines may have; the rest is for hypervisors, tests and other programs."""
_MOMENT = 5.0
"""Seconds for a lock that is held for some milliseconds each time."""
_NAME = re.compile(r"(\d{10})-(\d{1,10})-([0-9a-f]{8})-(\d{1,20})\.(held|waiting)")


@attrs.frozen(kw_only=True, order=True)
class _Reservation:
    """A reservation that is held or waited for."""

    number: int
    pid: int
    owner: str
    size: int
    held: bool

    @classmethod
    def named(cls, name: str) -> _Reservation | None:
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        return cls(number=int(match[1]), pid=int(match[2]), owner=match[3], size=int(match[4]), held=match[5] == "held")

    @property
    def name(self) -> str:
        return f"{self.number:010d}-{self.pid}-{self.owner}-{self.size}.{'held' if self.held else 'waiting'}"


class Budget:
    """Reservations of memory for all processes that use one folder, first come, first served.

    Deadlock rule: if every holder of a reservation waits for another one, the first of these waiters gets it, even beyond the limit.
    """

    def __init__(self, folder: Path, *, limit: int | None = None, owner: str | None = None) -> None:
        """Take the folder, which is created on first use.

        Args:
            folder: The folder of the reservations.
            limit: Bytes that may be reserved together; by default a part of the memory that this host, or its control group, has available.
            owner: A token that budgets of one process have in common; by default this one has its own.
        """
        self._folder, self._limit = folder, limit
        # A token besides the process id, because the kernel gives ids out again.
        self._owner, self._pid = owner or secrets.token_hex(4), os.getpid()

    @contextmanager
    def reserve(self, size: int, *, name: str, deadline: Deadline, waiting: Callable[[str], None]) -> Iterator[None]:
        """Wait for a reservation and hold it for a block.

        Args:
            size: Bytes to reserve.
            name: The name of the machine that it is for.
            deadline: Deadline of the wait.
            waiting: Function that gets a sentence from time to time: how long the wait has been, and who holds what.

        Raises:
            SpecError: The size can never be reserved: it is more than the limit, or more than this process's other reservations leave of
                it.
            CatalogError: Others have held too much memory until the deadline.
        """
        if self._pid != os.getpid():  # a forked child is somebody else
            self._owner, self._pid = secrets.token_hex(4), os.getpid()
        turn, fd = self._queue(size, name, deadline)
        try:
            turn = self._wait(turn, deadline, waiting)
            yield
        finally:
            # A forked child only closes its copy of the descriptor, because the reservation is its parent's.
            if turn.pid == os.getpid():
                # By either name: a signal may have come between the rename and the assignment.
                for held in (False, True):
                    (self._folder / attrs.evolve(turn, held=held).name).unlink(missing_ok=True)
            os.close(fd)

    @contextmanager
    def reserve_spare(self, size: int) -> Iterator[bool]:
        """Hold memory that nobody waits for, for a block, if there is as much now; the block is told whether.

        Raises:
            CatalogError: The folder is locked for long.
        """
        private_dir(self._folder)
        fd, path = -1, None
        with self._alone(Deadline(_MOMENT)):
            turns = self._turns()
            if self._is_free(size, turns):
                number = max((turn.number for turn in turns), default=0) + 1
                path = self._folder / _Reservation(number=number, pid=os.getpid(), owner=self._owner, size=size, held=True).name
                fd = new(path)
        try:
            yield path is not None
        finally:
            if path is not None:
                path.unlink(missing_ok=True)
                os.close(fd)

    def is_free(self, size: int) -> bool:
        """Tell whether as much memory could be held now.

        Raises:
            CatalogError: The folder is locked for long.
        """
        private_dir(self._folder)
        with self._alone(Deadline(_MOMENT)):
            return self._is_free(size, self._turns())

    def _is_free(self, size: int, turns: list[_Reservation]) -> bool:
        return all(turn.held for turn in turns) and sum(turn.size for turn in turns) + size <= self._room(turns)

    def is_wanted(self) -> bool:
        """Tell whether anybody waits for memory."""
        # Without a look whether he lives: it is asked often, and a dead one's file goes when the next one queues.
        return any(path.suffix == ".waiting" for path in self._folder.iterdir())

    def _queue(self, size: int, name: str, deadline: Deadline) -> tuple[_Reservation, int]:
        """Queue a request behind all others; return it, and the descriptor that keeps it alive."""
        private_dir(self._folder)
        with self._alone(deadline):
            turns = self._turns()
            # Counted with this process's own, which it cannot give back while it waits for more.
            self._check_fits(size, name, sum(turn.size for turn in turns if turn.held and turn.owner == self._owner))
            # Behind all that are there, so that nobody overtakes.
            number = max((turn.number for turn in turns), default=0) + 1
            turn = _Reservation(number=number, pid=self._pid, owner=self._owner, size=size, held=False)
            # With the folder locked, so that nobody sees the file before its own lock and takes it for a dead process's.
            return turn, new(self._folder / turn.name)

    def _check_fits(self, size: int, name: str, own: int) -> None:
        total = host.total_memory()
        most, what = (total, "this host's") if self._limit is None or self._limit > total else (self._limit, "the memory budget of")
        # A machine that is all there is leaves nothing for its hypervisor.
        if size > most - own or (size == total and not own):
            beside = f" (other machines of this process have {format_size(own)} of it)" if own else ""
            raise SpecError(
                f"memory={format_size(size)} for the machine {name!r} is more than {what} {format_size(most)}{beside}: reduce memory="
            )

    def _wait(self, turn: _Reservation, deadline: Deadline, waiting: Callable[[str], None]) -> _Reservation:
        reminder, words = Reminder(), ""

        def go() -> _Reservation | None:
            nonlocal words
            with self._alone(deadline):
                turns = self._turns()
                # Read anew each time: in default mode the limit changes with the host's other programs.
                limit = self._room(turns)
                if turn == _next(turns, limit):
                    mine = attrs.evolve(turn, held=True)
                    # A rename, because it keeps the inode, and with it the lock that proves that we live.
                    (self._folder / turn.name).rename(self._folder / mine.name)
                    return mine
            words = _described(turns, turn, limit)
            if reminder.due():
                waiting(f"waiting for {format_size(turn.size)} of memory, {reminder.elapsed:.0f} s: {words}")
            return None

        # Polled, because nothing wakes those who wait when a process dies and the kernel ends its lock.
        mine = deadline.poll(go, every=0.03, first=0.01)
        if mine is None:
            raise CatalogError(f"timed out after {deadline.seconds:.0f} s waiting for {format_size(turn.size)} of memory: {words}")
        return mine

    def _room(self, turns: Iterable[_Reservation]) -> int:
        """Return the bytes that may be reserved together now."""
        if self._limit is not None:
            return self._limit
        # What is held may be in use already: it is no longer available, and yet of the budget.
        held = sum(turn.size for turn in turns if turn.held)
        return int(_SHARE * min(host.total_memory(), host.available_memory() + held))

    def _turns(self) -> list[_Reservation]:
        """Return all reservations in their order, and remove those of dead processes."""
        found = []
        for path in self._folder.iterdir():
            turn = _Reservation.named(path.name)
            if turn is not None and _is_alive(path):
                found.append(turn)
        return sorted(found)

    @contextmanager
    def _alone(self, deadline: Deadline) -> Iterator[None]:
        """Lock the folder for a moment."""
        with tried(self._folder, deadline=deadline) as is_ours:
            if not is_ours:
                raise CatalogError(f"timed out after {deadline.seconds:.0f} s waiting for the lock of the folder {self._folder}")
            yield


def _next(turns: list[_Reservation], limit: int) -> _Reservation | None:
    """Return the waiting reservation that is next to be granted, or None."""
    waiting = [turn for turn in turns if not turn.held]
    if not waiting:
        return None
    taken, holders = sum(turn.size for turn in turns if turn.held), {turn.owner for turn in turns if turn.held}
    # Strictly in order: if small requests overtook it, a large one could wait for ever.
    if taken + waiting[0].size <= limit:
        return waiting[0]
    if holders <= {turn.owner for turn in waiting}:  # nobody will give anything back before he gets more
        return next((turn for turn in waiting if turn.owner in holders), waiting[0])
    return None


def _described(turns: list[_Reservation], turn: _Reservation, limit: int) -> str:
    held: Counter[int] = Counter()
    for each in turns:
        if each.held:
            held[each.pid] += each.size
    before = sum(not each.held and each < turn for each in turns)
    who = ", ".join(f"process {pid} ({format_size(size)})" for pid, size in held.most_common(5))
    queue = f"; {before} {'request is' if before == 1 else 'requests are'} ahead in the queue" if before else ""
    return f"{format_size(held.total())} of the memory budget of {format_size(limit)} are held by {who or 'nobody'}{queue}"


def _is_alive(path: Path) -> bool:
    """Tell whether the process that made a file lives; if not, remove the file."""
    try:
        with tried(path) as is_ours:
            if is_ours:
                path.unlink(missing_ok=True)
            return not is_ours
    except OSError:
        return False  # given back a moment ago
