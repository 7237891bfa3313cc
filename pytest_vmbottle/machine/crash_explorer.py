"""Crash explorer: what a machine finds on a disk after the power went at any moment of what was recorded."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle.backends.port import ROOT_DISK, DataDisk, Disk, Start
from pytest_vmbottle.channels.port import GUEST_PATH, Command
from pytest_vmbottle.disks.crash_states import CrashState, WriteHistory
from pytest_vmbottle.disks.overlay import write_overlay
from pytest_vmbottle.disks.write_log import read_log
from pytest_vmbottle.errors import MachineError, Unsupported
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.host.package_data import read_script

if TYPE_CHECKING:
    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["AfterCrash", "CrashLog", "MakeMachine", "record_crashes"]

MakeMachine = Callable[["MachineSpec", Start], AbstractContextManager["Machine"]]
"""Function that starts a machine for a block."""

_RELEASE = read_script(__package__, "disk_release.sh")
_PATIENCE = 20.0
"""Seconds for a checker to release a disk, before another one takes its place."""
_SHRINKS = 40
"""Most states that are tried to find one with fewer losses."""


@contextmanager
def record_crashes(vm: Machine, disk: str, make: MakeMachine) -> Iterator[CrashLog]:
    """Record what a machine writes to a disk, for the length of a block.

    The caller closes the log when nobody needs its states any more.

    Args:
        vm: The machine.
        disk: The name of the disk; `"root"` is the root disk.
        make: Function that starts the machines which look at states.

    Raises:
        MachineError: There is no such disk; or, at the end of the block, so much was written that its log was ended.
        Unsupported: The backend cannot record it.
    """
    folder = private_dir(vm.lifecycle.folder / f"crash-{secrets.token_hex(4)}")
    with vm.lifecycle.instance.record_writes(disk, folder) as file:
        yield CrashLog(vm, disk, file, make)


@attrs.frozen
class AfterCrash:
    """State of a disk after a crash.

    Attributes:
        text: A short name, by which `CrashLog.state` returns the same one.
        acknowledged: How many marks had been set by then.
        marks: What they were set with.
        kind: `"cut"` (the last writes are missing), `"torn"` (the last one is cut off too) or `"reordered"` (others are missing).
        lost: How many writes are missing that had been made, but not flushed.
    """

    text: str
    acknowledged: int
    marks: tuple[object, ...]
    kind: str
    lost: int
    _log: CrashLog = attrs.field(repr=False, eq=False)

    def __str__(self) -> str:
        return self.text

    def machine(self, *, boot: bool = False) -> AbstractContextManager[Machine]:
        """Start a machine that has the disk as the crash left it, for the length of a block.

        It is a clone of the machine that was recorded, as that was at first. The next state is plugged into the same clone, so a block
        should leave nothing behind outside of the disk; what it has mounted is unmounted. If the disk is still in use at the end of the
        block, or the block fails, the next state gets another clone.

        Args:
            boot: Whether to boot from the disk, which must be the root disk.

        Raises:
            MachineError: The machine could not be started, or could not take the disk.
            ValueError: A root disk can only be booted from, and another one cannot be.
        """
        return self._log.machine(self, boot=boot)


class CrashLog:
    """What was written to a disk, in its order, and what a crash at any moment would have left.

    Attributes:
        summary: How many states there were, and how many were looked at, of each kind.
    """

    def __init__(self, vm: Machine, disk: str, file: Path, make: MakeMachine) -> None:
        """Take the log.

        Args:
            vm: The machine that writes.
            disk: The name of the disk.
            file: The log's file, in a folder with a copy of the disk as it was at first.
            make: Function that starts a machine.
        """
        self._vm, self._name, self._file, self._make = vm, disk, file, make
        self._marks: list[tuple[int, object]] = []
        self._source = vm.lifecycle.boot_source
        self._checker: Machine | None = None
        self._checkers = ExitStack()
        self.summary = "no state was looked at"

    def mark(self, value: object = None) -> None:
        """Note that something was acknowledged: what was written up to now must survive every crash from now on.

        Args:
            value: What it was, for `AfterCrash.marks`.
        """
        with suppress(FileNotFoundError):  # it became too long, which the end of the block tells
            self._marks.append((self._file.stat().st_size, value))

    @cached_property
    def _history(self) -> WriteHistory:
        return WriteHistory(read_log(self._file), [length for length, _ in self._marks])

    def states(self, limit: int = 200, *, seed: int = 0) -> Iterator[AfterCrash]:
        """Go through states of the disk, those with the fewest losses first.

        Args:
            limit: The most states; where there are more, some of each kind are chosen.
            seed: What the choice is made by: the same one with the same log gives the same states.

        Raises:
            ValueError: Nothing was written to the disk.
        """
        if not self._history.writes:
            raise ValueError(f"nothing was written to the disk {self._name!r} while it was recorded: is it mounted, and is data synced?")
        chosen, there = self._history.states(limit, seed)
        tried = dict.fromkeys(there, 0)
        for state in chosen:
            tried[state.kind] += 1
            counts = ", ".join(f"{tried[kind]} of {count} {kind}" for kind, count in there.items())
            self.summary = f"{len(self._history.writes)} writes to the disk {self._name!r}; states looked at: {counts}; seed {seed}"
            yield self._told(state)

    def state(self, text: str) -> AfterCrash:
        """Return the state of a name, as it was printed.

        Raises:
            ValueError: This log has no such state.
        """
        return self._told(self._history.state(text))

    def check(self, look: Callable[[Machine, AfterCrash], object], *, limit: int = 200, seed: int = 0) -> None:
        """Call a function with each state's machine, and report all states for which it fails; the first one with as few losses as can be.

        Args:
            look: Function that gets a machine with the disk, and the state; it fails by an exception.
            limit: As for `states`.
            seed: As for `states`.

        Raises:
            AssertionError: It failed for some states.
        """
        failed = {state.text: error for state in self.states(limit, seed=seed) if (error := self._failure(look, state))}
        if not failed:
            return
        least, error = self._shrunk(look, next(iter(failed)), next(iter(failed.values())))
        others = ", ".join(list(failed)[:10])
        raise AssertionError(f"{least} failed, as did {len(failed)} states in all ({others}); {self.summary}: {error}") from error

    def close(self) -> None:
        """End the machines that looked at states; may be called again."""
        self._checker = None
        self._checkers.close()

    # -- what `check` does -----------------------------------------------------------------------------------------------------------

    def _failure(self, look: Callable[[Machine, AfterCrash], object], state: AfterCrash) -> Exception | None:
        try:
            with state.machine() as after:
                look(after, state)
        except Exception as error:
            return error
        return None

    def _shrunk(self, look: Callable[[Machine, AfterCrash], object], text: str, error: Exception) -> tuple[str, Exception]:
        """Give back one lost write after the other, as long as the function still fails."""
        least = self._history.state(text)
        for number in sorted(least.lost)[:_SHRINKS]:
            fewer = attrs.evolve(least, lost=least.lost - {number})
            found = self._failure(look, self._told(fewer))
            if found is not None:
                least, error = fewer, found
        return self._history.text(least), error

    # -- the machines ----------------------------------------------------------------------------------------------------------------

    def _told(self, state: CrashState) -> AfterCrash:
        count = self._history.acknowledged(state)
        return AfterCrash(
            text=self._history.text(state),
            acknowledged=count,
            marks=tuple(value for _, value in self._marks[:count]),
            kind=state.kind,
            lost=len(state.lost),
            log=self,
        )

    @contextmanager
    def machine(self, state: AfterCrash, *, boot: bool) -> Iterator[Machine]:
        """Start a machine with the disk of a state (see `AfterCrash.machine`)."""
        if boot is not (self._name == ROOT_DISK):
            raise ValueError("a root disk is looked at with boot=True, and another disk without it")
        image = self._written(state)
        try:
            with self._booted(image) if boot else self._plugged(image) as machine:
                yield machine
        except Exception as error:
            error.add_note(f"This is the state {state}: log.state({state.text!r}) brings it back. {self.summary}")
            raise
        finally:
            image.unlink(missing_ok=True)

    def _written(self, state: AfterCrash) -> Path:
        """Write the disk of a state, as an overlay on the copy of the disk as it was."""
        image = self._file.with_name(f"{state.text}.qcow2")
        image.unlink(missing_ok=True)
        content = self._history.content(self._history.state(state.text))
        size = self._source.disk_size if self._name == ROOT_DISK else self._data.size
        with self._file.open("rb") as data:
            write_overlay(image, size=size, block=self._history.block, blocks=content, data=data)
        return image

    @cached_property
    def _data(self) -> DataDisk:
        return next(disk for disk in self._source.data if disk.name == self._name)

    def _booted(self, image: Path) -> AbstractContextManager[Machine]:
        copy = self._vm.lifecycle.instance.overlay
        if copy is None:
            raise MachineError("its backend has no disk of its own to boot from", machine=self._vm.name)
        disks = (*self._source.disks, Disk(path=self._file.with_name(copy.name)))
        start = attrs.evolve(self._source, saved=None, ram=None, building=False, kept=True, disks=disks, overlay=image, data=())
        return self._make(self._vm.spec, start)

    @contextmanager
    def _plugged(self, image: Path) -> Iterator[Machine]:
        checker = self._checker or self._new_checker()
        # Nobody's until it is given back: one with which anything went wrong is not used again.
        self._checker = None
        data = self._data
        disk = attrs.evolve(data, disks=(*data.disks, Disk(path=self._file.with_name(data.file))), overlay=image, saved=False)
        if any(each.name == self._name for each in checker.lifecycle.instance.data):
            checker.lifecycle.change_disk(disk, Deadline(_PATIENCE))
        else:
            checker.lifecycle.plug_disk(disk, Deadline(_PATIENCE))
        yield checker
        if self._released(checker):
            self._checker = checker
        else:
            self.close()

    def _new_checker(self) -> Machine:
        self.close()
        first = self._vm.lifecycle.source or self._source
        # Without the disk, if the machine was given it after the restore.
        start = attrs.evolve(first, data=tuple(disk for disk in first.data if disk.saved or disk.name != self._name))
        checker = self._checkers.enter_context(self._make(self._vm.spec, start))
        if any(disk.name == self._name for disk in start.data) and not self._released(checker):
            raise MachineError(f"the disk {self._name!r} of the pack is in use, and cannot be replaced: unmount it in the layer")
        return checker

    def _released(self, checker: Machine) -> bool:
        """Have the disk unmounted, and removed where it cannot be changed; return whether the guest let it go."""
        with suppress(MachineError):
            try:
                return checker.lifecycle.release_disk(self._name, Deadline(_PATIENCE))
            except Unsupported:
                return self._unplugged(checker)
        return False

    def _unplugged(self, checker: Machine) -> bool:
        command = Command(argv=("/bin/sh", "-c", _RELEASE, "sh", self._name), env=(("PATH", GUEST_PATH),))
        if checker.lifecycle.channel.run(command, deadline=Deadline(_PATIENCE)).returncode != 0:
            return False
        checker.lifecycle.unplug_disk(self._name, Deadline(_PATIENCE))
        return True
