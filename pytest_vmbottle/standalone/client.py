"""Client side of machines that run without pytest: what is in their folders, and requests to their daemons.

Each machine has a folder `machines/NAME` in the catalog::

    record.json           its record
    order.json            the daemon's instructions, to start it again
    socket, keeper.log    the daemon's socket and log
    console.log           the serial console
    disk/                 its own disk (see `stored`)
    snapshots/LABEL/      a snapshot of it

The daemon holds a lock on that folder as long as it lives, so that nobody takes a dead one for running. The disk stays until the machine is
removed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from pytest_vmbottle.errors import BackendUnavailable, CatalogError, MachineError, SpecError, Unsupported, VMBottleError
from pytest_vmbottle.host import generations, records
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import private_dir, size_on_disk
from pytest_vmbottle.host.locks import is_locked, tried, try_lock
from pytest_vmbottle.result import CommandTimeout, Result, printable
from pytest_vmbottle.standalone.line import Line, connect, exchange
from pytest_vmbottle.standalone.record import ERROR, OFF, STARTING, STOPPED, Record

if TYPE_CHECKING:
    from pytest_vmbottle.channels.port import Terminal
    from pytest_vmbottle.standalone.stored import Stored

__all__ = ["DISK", "LABEL", "LANS", "SNAPSHOTS", "Kept", "Record", "Saved", "all_kept", "find"]

_RECORD, _ORDER, _LOG, _CONSOLE = "record.json", "order.json", "keeper.log", "console.log"
DISK, SNAPSHOTS = "disk", "snapshots"
"""Folders in a machine's folder."""
LANS = "lans"
"""Folder of the private LANs, in the catalog (see `SharedLans`)."""
_FACTS = "start.json"
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}")
"""Name of a snapshot."""
_STAYS = frozenset({DISK, SNAPSHOTS, _ORDER})
"""Entries of the folder that a machine needs to start again."""
_MOMENT = 1.0
"""Seconds within which a process that only looks at a folder releases it."""
_UNWIND = 30.0
"""Seconds that a daemon may take to end a machine whose start was cancelled."""
_ENDING = 150.0
"""Seconds for a machine's daemon to end when it is asked to; the guest's shutdown has a shorter limit."""
# Errors that are raised again by their own kind. Only these, since the name comes from another process.
_KINDS: dict[str, type[VMBottleError]] = {
    kind.__name__: kind for kind in (BackendUnavailable, CatalogError, MachineError, SpecError, Unsupported)
}


@attrs.frozen(kw_only=True)
class Saved:
    """A snapshot of a machine without pytest.

    Attributes:
        label: Its name.
        created: The time when it was made, in seconds since 1970.
        size: Bytes of its files on disk, RAM included; those that it shares with others count too.
    """

    label: str
    created: float
    size: int


class Kept:
    """A machine with a daemon of its own, as seen from any process."""

    def __init__(self, folder: Path) -> None:
        """Take the machine's folder, which need not exist."""
        self.folder = folder
        self.name = folder.name

    @property
    def console(self) -> Path:
        """The file of its serial console, which stays when the machine ends."""
        return self.folder / _CONSOLE

    @property
    def log(self) -> Path:
        """The log of its daemon."""
        return self.folder / _LOG

    # -- its record ------------------------------------------------------------------------------------------------------------------

    def record(self) -> Record:
        """Return the machine's record, corrected if its daemon has died.

        Raises:
            FileNotFoundError: There is no such machine.
        """
        held = self.is_held  # asked first: a daemon writes its record before it ends
        try:
            record = Record.read(self.folder / _RECORD)
        except FileNotFoundError:
            if not self.folder.is_dir():
                raise
            return Record(name=self.name, source="", state=STARTING if held else STOPPED, reason="" if held else "it never ran")
        except records.Damaged as error:
            return Record(name=self.name, source="", state=ERROR, reason=f"its record {self.folder / _RECORD} cannot be read: {error}")
        if record.is_on and not held:
            return self._found_dead(record)
        return record

    def _found_dead(self, record: Record) -> Record:
        """Correct the record of a machine whose daemon died before it could write the end.

        The time of the death is unknown. So the time when it was found is written down, and all later readers see the same.
        """
        found = record.ended(STOPPED, "its daemon died, and the machine with it")
        # It may be claimed anew or removed this moment, or cannot be written: then it is told all the same. A shared lock lets others look.
        with suppress(OSError, records.Damaged), tried(self.folder, shared=True) as is_ours:
            now = Record.read(self.folder / _RECORD) if is_ours else found
            if not now.is_on:
                return now
            if now == record:
                found.write(self.folder / _RECORD)
        return found

    def note(self, record: Record) -> Record:
        """Write the record; for the daemon."""
        record.write(self.folder / _RECORD)
        return record

    @property
    def is_held(self) -> bool:
        """Tell whether its daemon lives."""
        return is_locked(self.folder, shared=True)

    @property
    def can_start_again(self) -> bool:
        """Tell whether it has a disk of its own to start from."""
        return (self.folder / DISK / _FACTS).exists()

    @contextmanager
    def claimed(self, *, again: bool) -> Iterator[int]:
        """Lock the folder for a block, created if it is a new machine's; yield the descriptor that passes the lock on.

        Raises:
            CatalogError: The machine runs, or a new one would take the place of another one's disk.
        """
        fd = self._try_lock(again=again)
        if fd is None:
            raise CatalogError(f"the machine {self.name!r} runs already" if again else self._taken(is_on=True))
        try:
            if not again and self.can_start_again:
                raise CatalogError(self._taken(is_on=False))
            self._tidy(_STAYS if again else frozenset())
            yield fd
        finally:
            os.close(fd)

    def _try_lock(self, *, again: bool) -> int | None:
        # Until the folder is locked or taken: between its making and the lock somebody may remove it.
        while True:
            if not again:
                private_dir(self.folder)
            try:
                return try_lock(self.folder, deadline=Deadline(_MOMENT))
            except FileNotFoundError:  # it is just being removed
                if again:
                    raise CatalogError(f"there is no machine {self.name!r} any more") from None

    def _tidy(self, stays: frozenset[str]) -> None:
        """Remove what a machine of this name has left behind."""
        for left in self.folder.iterdir():
            if left.name not in stays:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()

    def _taken(self, *, is_on: bool) -> str:
        way = f"stop it with `vmbottle machine stop {self.name}`"
        if not is_on:
            way = f"start it with `vmbottle machine start {self.name}`, remove it with `vmbottle machine rm {self.name}`"
        return f"there is a machine {self.name!r} already: {way}, or choose another name with --name"

    def discard(self) -> bool:
        """Remove the machine's folder; return false if its daemon lives."""
        aside = self.folder.with_name(f".{self.name}-{secrets.token_hex(4)}")
        with suppress(FileNotFoundError), tried(self.folder, deadline=Deadline(_MOMENT)) as is_ours:
            if not is_ours:
                return False
            # Renamed first, so that a new machine can take the name while the old folder is being removed.
            shutil.rmtree(self.folder.rename(aside), ignore_errors=True)
        return True

    def wait(self, deadline: Deadline) -> bool:
        """Wait until its daemon has ended; return whether it has by the deadline."""
        return bool(deadline.poll(lambda: not self.is_held, every=0.1, first=0.01))

    # -- its snapshots ---------------------------------------------------------------------------------------------------------------

    def snapshots(self) -> tuple[Saved, ...]:
        """Return its snapshots, oldest first."""
        there = self.folder / SNAPSHOTS
        found = [path / _FACTS for path in (there.iterdir() if there.is_dir() else ()) if LABEL.fullmatch(path.name)]
        return tuple(
            # The time of the file that makes it complete: to read all facts would cost more than to look at them.
            Saved(label=facts.parent.name, created=facts.stat().st_mtime, size=size_on_disk(facts.parent))
            for facts in sorted((facts for facts in found if facts.exists()), key=lambda facts: facts.stat().st_mtime)
        )

    def snapshot_folder(self, label: str) -> Path:
        """Return the folder of a snapshot.

        Raises:
            CatalogError: There is no such snapshot.
        """
        labels = [saved.label for saved in self.snapshots()]
        if label not in labels:
            raise CatalogError(f"the machine {self.name!r} has no snapshot {label!r} (there: {', '.join(labels) or 'none'})")
        return self.folder / SNAPSHOTS / label

    def forget(self, label: str) -> None:
        """Remove a snapshot.

        Raises:
            CatalogError: There is none of this name, or the machine runs from it.
        """
        if not generations.remove(self.snapshot_folder(label)):
            raise CatalogError(f"the machine {self.name!r} runs from the snapshot {label!r}, which is removed when it has ended")

    # -- its keeper ------------------------------------------------------------------------------------------------------------------

    def start(self, order: Mapping[str, Any], say: Callable[[str], None], *, snapshot: Stored | None = None) -> Record:
        """Start a daemon with a new machine, and return when it is ready.

        The daemon goes on when this process ends.

        Args:
            order: The daemon's instructions: `catalog`, `folder`, `settings` and `keywords`, and perhaps `seconds`, after which the machine
                is ended, `memory_seconds`, which it waits for memory at most, and `seats`, its places on its private LANs (see `Seat`).
            say: Function that gets a line about long work.
            snapshot: A snapshot to start from, in place of the source.

        Raises:
            CatalogError: There is a machine of this name already.
            VMBottleError: The machine could not be started; nothing is left of it.
        """
        with self.claimed(again=False) as hold:
            try:
                if snapshot is not None:
                    snapshot.write(self.folder / SNAPSHOTS / snapshot.label)
                    order = {**order, "label": snapshot.label}
                return self._started(order, say, hold, Record(name=self.name, source=str(order["keywords"].get("source", ""))))
            except BaseException:
                self._tidy(frozenset())
                # Under the lock, which ends with this block: nobody has the name in between.
                self.folder.rmdir()
                raise

    def start_again(self, say: Callable[[str], None], *, label: str | None = None, settings: Mapping[str, str] | None = None) -> Record:
        """Start a machine that is off, from its own disk or from one of its snapshots.

        Args:
            say: Function that gets a line about long work.
            label: The snapshot to start from.
            settings: Settings that differ from those of its first start.

        Raises:
            CatalogError: It runs, has no disk of its own, or no such snapshot.
            VMBottleError: It could not be started; it is as it was.
        """
        before = self.record()
        with self.claimed(again=True) as hold:
            if label is not None:
                self.snapshot_folder(label)
            elif not self.can_start_again:
                raise CatalogError(f"the machine {self.name!r} has no disk of its own to start from: {before.reason}")
            order = records.read(self.folder / _ORDER)
            order["settings"] = {**order["settings"], **(settings or {})}
            try:
                return self._started(order | {"label": label or ""}, say, hold, attrs.evolve(before, state=STARTING, reason=""))
            except BaseException as error:
                # It is as it was before, and can be started again.
                self.note(before.ended(STOPPED, f"it could not be started: {printable(str(error)).partition(chr(10))[0]}"))
                raise

    def _started(self, order: Mapping[str, Any], say: Callable[[str], None], hold: int, record: Record) -> Record:
        # A first record, so that the name is listed while the daemon imports its modules.
        self.note(record)
        # Secrets may be in it, as in the disk that lies beside it: both are this user's only.
        records.write(self.folder / _ORDER, {key: value for key, value in order.items() if key != "label"})
        process, line = self._spawn(hold)
        try:
            line.send(order)
            # Then it is confirmed. The daemon ends a machine whose client hangs up before that.
            record = self._await_ready(line, say)
            line.send({"keep": True})
        except BaseException:
            line.close()
            with suppress(subprocess.TimeoutExpired):
                # Time to end its machine in order, since it has noticed that we are gone.
                process.wait(_UNWIND)
            # Without effect if it has ended. A daemon that hangs would keep the name for ever.
            process.kill()
            process.wait()
            raise
        line.close()
        process.returncode = 0  # it is on its own from now on, and nobody is to be warned that it still runs
        return record

    def _spawn(self, hold: int) -> tuple[subprocess.Popen[bytes], Line]:
        # Nameless, so that nobody else can send an order to the daemon, or read one, which may have secrets.
        ours, its = socket.socketpair()
        with its, os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as log:
            process = subprocess.Popen(  # noqa: S603 - argv list, no shell
                # -P, because a module in the user's folder must not hide one of ours.
                [sys.executable, "-P", "-m", "pytest_vmbottle.standalone.daemon", str(self.folder), str(hold), str(its.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The lock belongs to the open file and not to a process (flock(2)), so it passes on with the descriptor.
                pass_fds=(hold, its.fileno()),
                # Ctrl-C and the terminal's end reach the processes of its session, and must not reach the daemon.
                start_new_session=True,
            )
        return process, Line(ours)

    def _await_ready(self, line: Line, say: Callable[[str], None]) -> Record:
        while (message := line.receive()) is not None:
            if "say" in message:
                say(str(message["say"]))
            else:
                _checked(message)
                return self.record()
        raise MachineError(f"the daemon of the machine {self.name!r} ended: {self._last_words() or 'without output'}", machine=self.name)

    def _last_words(self) -> str:
        with suppress(OSError):
            return printable(self.log.read_text(errors="replace")[-4000:].strip())
        return ""

    def ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> Any:
        """Send a request to the daemon, and return the answer.

        Args:
            request: A `verb` and its arguments, as `daemon` lists them.
            descriptors: Open files for the daemon to use.

        Raises:
            MachineError: The machine is not running, or ended meanwhile.
            VMBottleError: The request failed.
        """
        return self.answered(exchange(self._connect(), request, descriptors))

    def answered(self, message: Mapping[str, Any] | None) -> Any:
        """Return what the daemon has answered to a request, None being a line that broke.

        Raises:
            MachineError: The machine ended before there was an answer.
            VMBottleError: The request failed.
        """
        if message is None:
            # The line breaks a moment before whoever ends has let go of the machine, and only then is it known why.
            self.wait(Deadline(_MOMENT))
            raise self._ended("ended meanwhile")
        return _checked(message)

    def _connect(self) -> Line:
        try:
            return connect(self.folder)
        except OSError as error:
            # No socket yet, or one whose daemon has ended: sockets are not removed with their process.
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                raise
            raise self._ended("is not running") from None

    def terminal(  # noqa: PLR0913 - those of a command, and of its window
        self,
        *,
        argv: Sequence[str] = (),
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        kind: str = "xterm-256color",
        size: tuple[int, int] = (80, 24),
    ) -> Terminal:
        """Open a terminal in the guest.

        Args:
            argv: The command on it; by default a login shell.
            user: The user who runs it; by default the machine's.
            env: Variables of the command.
            cwd: Its folder.
            kind: The kind of terminal: the variable `TERM`.
            size: Columns and lines.

        Raises:
            MachineError: The machine is not running.
        """
        # Only who opens a terminal pays for the channels that it is one of.
        from pytest_vmbottle.standalone.terminal import RemoteTerminal  # noqa: PLC0415

        request = {"verb": "terminal", "argv": argv, "user": user, "env": env or {}, "cwd": cwd, "kind": kind, "size": size}
        return RemoteTerminal.open(self._connect(), request, checked=_checked)

    def _ended(self, what: str) -> MachineError:
        try:
            record = self.record()
        except FileNotFoundError:
            return MachineError(f"the machine {self.name!r} is gone", machine=self.name)
        what = "is off" if record.state == OFF else what
        why = f": {record.reason}" if record.reason else ": it is still starting" if record.state == STARTING else ""
        return MachineError(f"the machine {self.name!r} {what}{why}", machine=self.name)

    def stop(self, *, now: bool = False) -> Record:
        """Shut the machine down, or cut its power, and wait until it is off; return its record.

        A daemon that hangs is killed. Nothing happens to a machine that does not run.

        Raises:
            MachineError: It is still starting: it ends with the process that starts it.
        """
        if self.is_held:
            try:
                self.ask({"verb": "stop", "now": now})
            except MachineError:
                # A daemon that is starting takes no requests yet.
                if self.record().state == STARTING:
                    raise
            # The daemon's own limit for a shutdown is shorter, so one that is still there hangs.
            if not self.wait(Deadline(_ENDING)):
                self._kill()
                self.wait(Deadline(_ENDING))
        return self.record()

    def _kill(self) -> None:
        """Kill a daemon that does not answer, and with it the machine."""
        record = self.record()
        # The lock and the identity together, because a process id alone may be another process by now.
        if record.keeper is not None and self.is_held:
            record.keeper.kill()


def _checked(message: Mapping[str, Any]) -> Any:
    """Return the answer in a message, or raise its error."""
    if "error" not in message:
        return message.get("answer")
    kind, text = message["error"], str(message.get("message", ""))
    if kind == CommandTimeout.__name__:
        raise CommandTimeout(Result(argv=tuple(message["argv"]), returncode=-9, stdout="", stderr=""), float(message["seconds"]))
    if kind == ValueError.__name__:
        raise ValueError(text)
    if message.get("errno"):
        # Of the kind that the number says, such as FileNotFoundError.
        raise OSError(int(message["errno"]), text, message.get("filename"))
    # As text alone: its attributes stay with the daemon. By the nearest kind that can be made of a text.
    raise next((_KINDS[name] for name in message.get("kinds", [kind]) if name in _KINDS), VMBottleError)(text)


def all_kept(machines: Path) -> tuple[Kept, ...]:
    """Return the machines in a folder, sorted by name."""
    folders = machines.iterdir() if machines.is_dir() else ()
    return tuple(Kept(folder) for folder in sorted(folders) if not folder.name.startswith(".") and folder.is_dir())


def find(machines: Path, name: str) -> Kept:
    """Return a machine by its name.

    Raises:
        CatalogError: There is no such machine.
    """
    there = {kept.name: kept for kept in all_kept(machines)}
    if name not in there:
        known = f"there are {', '.join(there)}" if there else "there are none"
        raise CatalogError(f"there is no machine {name!r} ({known}): start one with `vmbottle machine start IMAGE --name {name}`")
    return there[name]
