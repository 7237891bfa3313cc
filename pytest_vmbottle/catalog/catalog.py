"""The shared folder: its layout, locks, folders of running machines, and leases.

::

    images/      the image store                 packs/KEY/   published packs, never changed; KEY.2/ has replaced one
    run/OWNER/   machines and builds of one process
    locks/       one file per lock, never deleted  quarantine/  damaged things
    proofs/      results of probing this host    machines/NAME/  machines that run without pytest
    budget/      reservations of memory
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_vmbottle.catalog.ledger import Ledger
from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host import generations, locks, records, supervisor
from pytest_vmbottle.host import resources as host
from pytest_vmbottle.host.deadline import Deadline, Reminder
from pytest_vmbottle.host.files import atomic_file, private_dir, sync_dir
from pytest_vmbottle.host.supervisor import Identity, Reaped, Record, Supervisor

__all__ = ["Catalog"]

_LONG_WAIT = 2.0
"""Seconds until a process that waits for a lock is first told so."""
_MOMENT = 0.5
"""Seconds between two checks whether a waiting process is to be told."""
_STALE = 600.0
"""Seconds after which a temporary file belongs to a process that was killed before it renamed the file."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}")


class Catalog:
    """The folder that all workers and runs of one user share.

    The constructor checks the folder; subfolders are made on first use.

    Attributes:
        token: A token of this user of the catalog, for its reservations of memory.
    """

    def __init__(self, root: Path, *, make: bool = True) -> None:
        """Check the folder, and make it if need be.

        Args:
            root: The catalog's folder.
            make: Whether to make a missing folder; otherwise the catalog is empty.

        Raises:
            CatalogError: The folder is on a network file system, belongs to another user, or cannot be written.
        """
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 - resolve() would follow the symlink that is to be refused
        if make or os.path.lexists(self.root):
            _check(self.root)
        self.ledger = Ledger()
        self.token = secrets.token_hex(4)
        self._owner: _Owner | None = None
        # Machines may be started in several threads, and all have to get the same entry.
        self._owning = threading.Lock()

    @property
    def images(self) -> Path:
        """The image store's folder."""
        return self.root / "images"

    @property
    def packs(self) -> Path:
        """The folder of published packs."""
        return self.root / "packs"

    @property
    def proofs(self) -> Path:
        """The folder of the results of probing this host."""
        return self.root / "proofs"

    @property
    def budget(self) -> Path:
        """The folder of the reservations of memory."""
        return self.root / "budget"

    @property
    def machines(self) -> Path:
        """The folder of machines that run without pytest."""
        return self.root / "machines"

    @contextmanager
    def lock(self, name: str, *, deadline: Deadline, waiting: Callable[[str], None], label: str = "") -> Iterator[Callable[[str], None]]:
        """Hold the lock `name` against all other users of this catalog, threads included.

        The block gets a function that takes a line about its progress; waiting processes see the last line.

        Args:
            name: The lock's name, part of a file name.
            deadline: Deadline of the wait.
            waiting: Function that gets a sentence from time to time: how long the wait has been, who holds the lock, and its progress.
            label: The lock's name for people; by default `name`.

        Raises:
            CatalogError: Another process has held it until the deadline; the message names that process.
        """
        folder, label = private_dir(self.root / "locks"), label or name
        path, holder = folder / f"{name}.lock", folder / f"{name}.holder"
        taken, reminder = locks.FileLock(path), Reminder(_LONG_WAIT)
        try:
            # In short steps, so that a waiting process is told from time to time who holds the lock.
            while not taken.acquire(Deadline(min(_MOMENT, deadline.remaining))):
                if deadline.expired:
                    raise CatalogError(f"timed out after {deadline.seconds:.0f} s waiting for {label}: {records.describe_holder(holder)}")
                if reminder.due():
                    waiting(f"waiting for {label}, {reminder.elapsed:.0f} s: {records.describe_holder(holder)}")
            self.ledger.locks.add(name)
            since = time.time()
            records.note_holder(holder, since=since)
            yield lambda step: records.note_holder(holder, since=since, step=step)
        finally:
            taken.release()

    @contextmanager
    def rundir(self, machine_id: str, *, ending: Callable[[Path], Sequence[str]] = lambda _: ()) -> Iterator[Path]:
        """Make a private folder for one machine, and remove it at the end of the block.

        The folder's parent says which process it belongs to.

        The machine's record is written before anything is started, and deleted last.

        Args:
            machine_id: An identifier that is unique in the catalog.
            ending: Function that returns, for the folder, the command that ends a machine which outlives its owner.
        """
        owner = self._living_owner()
        folder = owner.folder / machine_id
        # Written before the folder is made and before anything is started: a crash at any point leaves a record for the supervisor.
        owner.write(folder, Record(owner=owner.identity, ending=tuple(ending(folder))))
        self.ledger.folders += 1
        with owner.holding(folder):
            yield folder

    def note_process(self, folder: Path, pid: int) -> None:
        """Record the process that runs the machine in this folder, for a later clean-up."""
        with suppress(OSError, ValueError):  # without it, the process is still found by its mark
            record = Record.read(folder.with_name(f"{folder.name}.json"))
            self._living_owner().write(folder, record._replace(process=Identity.of(pid)))

    def _living_owner(self) -> _Owner:
        """Return this process's entry in the catalog, with a running supervisor."""
        with self._owning:
            # A forked child has its parent's entry, but not the right to it: it closes its copy and gets an entry of its own.
            if self._owner is not None and not self._owner.is_us:
                self._owner.close()
                self._owner = None
            if self._owner is None:
                self._owner = _Owner(private_dir(self.root / "run"))
            self._owner.supervise()
            return self._owner

    def close(self) -> None:
        """Remove this process's folder of machines, which must have ended.

        May be called again; the catalog can still be used.
        """
        with self._owning:
            if self._owner is not None:
                self._owner.close()
                if self._owner.is_us:
                    self.ledger.leave(self._owner.folder, self._owner.lock)
                self._owner = None

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Make a private folder for a build; remove it at the end of the block if it is still there."""
        # Below the owner's folder, so that its supervisor removes it if this process dies.
        owner = self._living_owner()
        self.ledger.folders += 1
        with owner.holding(owner.folder / f"staging-{secrets.token_hex(6)}") as folder:
            yield folder

    def publish(self, built: Path, key: str) -> Path:
        """Publish a folder as the pack of a key, atomically, and return its path.

        An older pack of the key stays as long as somebody holds it.
        """
        # The content before the rename: after a power failure the name must not refer to blocks that were never written.
        for path in built.iterdir():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_dir(built)
        final = generations.add(built, private_dir(self.packs), key)
        self.ledger.packs.add(key)
        generations.sweep(self.packs)
        return final

    def pack(self, key: str) -> Path:
        """Return the folder of the pack of a key, which need not exist."""
        there = generations.every(self.packs, key)
        return there[-1] if there else self.packs / key

    def quarantine(self, path: Path) -> Path | None:
        """Move something damaged to the quarantine and return its path.

        None if somebody holds it; then it stays.
        """
        # A random end, because the same thing may be damaged again.
        aside = private_dir(self.root / "quarantine") / f"{path.name}-{secrets.token_hex(4)}"
        # Only folders are held; a file, such as a name's record, can be moved at any time.
        if not path.is_dir():
            return path.rename(aside)
        return aside if generations.remove(path, aside=aside) else None

    def quarantined(self) -> tuple[Path, ...]:
        """Return everything in the quarantine."""
        aside = self.root / "quarantine"
        return tuple(aside.iterdir()) if aside.is_dir() else ()

    def discard(self, pack: Path) -> bool:
        """Remove a published pack, with those that it replaced, unless one of them is held.

        Return whether it is gone.
        """
        # All of them, because a replaced one that is left would count again.
        return generations.remove_all(self._generations(pack))

    def lease(self, folder: Path) -> int:
        """Lease a pack, an image or a snapshot, so that it is not removed.

        Return the descriptor; closing it ends the lease.

        Raises:
            FileNotFoundError: The folder is gone.
        """
        # Shared, because any number of users hold a folder; a remover asks for it exclusively.
        return locks.lock(folder, shared=True)

    def in_use(self, pack: Path) -> bool:
        """Tell whether somebody holds a pack now, or one that it has replaced."""
        return any(map(locks.is_locked, self._generations(pack)))

    def _generations(self, pack: Path) -> list[Path]:
        return generations.every(pack.parent, generations.name_of(pack))

    def gc(self, *, dry_run: bool = False) -> tuple[Reaped, ...]:
        """End and remove the machines and builds of dead processes.

        Locks prove that a process is dead. Return what was removed, and what had to be kept.

        Args:
            dry_run: Whether to report only what would be done.
        """
        found = []
        if not dry_run:
            self._sweep()
        # Whoever gets the lock knows that neither owner nor supervisor lives: both hold it.
        for path in sorted((self.root / "run").glob("*.lock")):
            with suppress(OSError), locks.tried(path) as is_ours:  # else that one lives, or its supervisor does
                if is_ours:
                    reaped = supervisor.reap(path.with_suffix(""), aside=self.root / "quarantine", dry_run=dry_run)
                    # Last, and only if nothing was kept: the next run tries the rest again.
                    if not dry_run and not reaped.kept:
                        path.unlink()
                    found.append(reaped)
        if not dry_run:
            self._note(found)
        return tuple(found)

    def strays(self) -> list[Identity]:
        """Return processes of machines whose records are gone, which nobody ends.

        This happens if the catalog was removed under them.
        """
        return supervisor.strays(self.root / "run")

    def _sweep(self) -> None:
        """Remove temporary files and probe folders of killed processes, and replaced packs that nobody holds.

        Young files and folders are left alone, because their process may still live.
        """
        generations.sweep(self.packs)
        for place in self.proofs.glob("proving-*"):
            with suppress(OSError), locks.tried(place) as is_free:
                if is_free and time.time() - place.lstat().st_mtime > _STALE:
                    shutil.rmtree(place, ignore_errors=True)
        for folder in ("locks", "proofs", "images/names", "images/seen", "machines/*"):
            with suppress(OSError):  # a machine's folder may go while it is looked for
                # Only hidden files: those that `atomic_file` had not renamed yet.
                for path in self.root.glob(f"{folder}/.*"):
                    _remove_stale(path)

    def _note(self, found: Iterable[Reaped]) -> None:
        for reaped in found:
            self.ledger.reclaim(run=1, machine=len(reaped.machines), process=len(reaped.processes))
            for sentence in reaped.kept:
                what, _, why = sentence.partition(": ")
                self.ledger.keep(what, why)
            for sentence in reaped.damaged:
                self.ledger.keep(sentence.partition(": ")[0], "a damaged record, moved to quarantine")


def _remove_stale(path: Path) -> None:
    with suppress(OSError):
        if _TEMPORARY.fullmatch(path.name) and time.time() - path.lstat().st_mtime > _STALE:
            path.unlink()


class _Owner:
    """This process's entry in the catalog: a folder for its machines, a lock and a supervisor.

    The kernel frees the lock when the process dies.
    """

    def __init__(self, run: Path) -> None:
        identity = Identity.of(os.getpid())
        if identity is None:
            raise CatalogError("this process has no entry in /proc, so its machines cannot be told from those of others: mount /proc")
        self.identity = identity
        self.lock = run / f"{identity.pid}-{secrets.token_hex(6)}.lock"
        # A bare descriptor: it is to stay open for as long as the process lives, whatever becomes of this object.
        self._fd = locks.new(self.lock)
        self.folder = self.lock.with_suffix("")
        self._supervisor: Supervisor | None = None
        self._ended: set[Path] = set()
        # Machines may end in several threads at once.
        self._ending = threading.Lock()
        try:
            self.supervise()  # before there is anything that it would have to remove
            private_dir(self.folder)
        except OSError:
            self.close()
            raise

    @property
    def is_us(self) -> bool:
        """Tell whether this process made the entry, and not a parent that forked it."""
        return self.identity.pid == os.getpid()

    def supervise(self) -> None:
        """Start the supervisor if it does not run."""
        # A supervisor that was killed, by the OOM killer or by hand, is replaced.
        if self._supervisor is not None and not self._supervisor.is_running:
            self._supervisor.close()
            self._supervisor = None
        if self._supervisor is None:
            self._supervisor = Supervisor(self.folder, self._fd)
            weakref.finalize(self, self._supervisor.close).atexit = False  # at our end it is what stays

    def write(self, folder: Path, record: Record) -> None:
        """Write a machine's record, beside its folder."""
        with atomic_file(folder.with_name(f"{folder.name}.json")) as file:
            file.write(record.dump())

    @contextmanager
    def holding(self, folder: Path) -> Iterator[Path]:
        """Make a folder, and remove it at the end of the block, before its record.

        A forked child leaves it alone.

        While another machine runs from a snapshot in it, the folder stays, until the next machine ends.
        """
        private_dir(folder)
        try:
            yield folder
        finally:
            if self.is_us:
                with self._ending:
                    # Not this folder alone: one that stayed for a snapshot's user may be free by now.
                    self._ended.add(folder)
                    self._ended = {each for each in self._ended if not _removed(each)}

    def close(self) -> None:
        """Remove folder and lock.

        A forked child only closes its copy of the descriptor.
        """
        if self.is_us:
            # The lock's file last: by it `gc` finds what a crash in between leaves. It is still locked, so that nobody takes us for dead.
            shutil.rmtree(self.folder, ignore_errors=True)
            self.lock.unlink(missing_ok=True)
        if self._supervisor is not None:
            self._supervisor.close()
        os.close(self._fd)


def _removed(folder: Path) -> bool:
    """Remove the folder of an ended machine, unless a snapshot in it is held; return whether it is gone."""
    snapshots = folder / generations.SNAPSHOTS
    if snapshots.is_dir() and not generations.remove_all(snapshots.iterdir()):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    # The record last, because a crash in between leaves the rest to the supervisor.
    folder.with_name(f"{folder.name}.json").unlink(missing_ok=True)
    return True


def _check(root: Path) -> None:
    hint = "choose another folder with --vm-catalog or VMBOTTLE_CATALOG"
    try:
        # Somebody else could have put the link there, and led our files to a place of his.
        if root.is_symlink():
            raise CatalogError(f"the catalog {root} is a symbolic link: {hint}")
        private_dir(root)
        status = root.lstat()
    except (FileExistsError, NotADirectoryError):
        raise CatalogError(f"the catalog {root} cannot be a folder, because a file is there: {hint}") from None
    except OSError as error:
        raise CatalogError(f"the catalog {root} cannot be made: {error.strerror}; {hint}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise CatalogError(f"the catalog {root} is not a folder: {hint}")
    _check_ours(root, status, hint)
    if host.is_network_file_system(root):
        raise CatalogError(f"the catalog {root} is on a network file system ({host.file_system(root)}), where locks are unsafe: {hint}")
    _check_locks(root, hint)


def _check_ours(root: Path, status: os.stat_result, hint: str) -> None:
    if status.st_uid != os.geteuid():
        raise CatalogError(f"the catalog {root} belongs to user {status.st_uid}: it cannot be shared between users; {hint}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        _close_to_others(root, stat.S_IMODE(status.st_mode), hint)
    if not os.access(root, os.W_OK | os.X_OK):
        raise CatalogError(f"the catalog {root} cannot be written: {hint}")


def _close_to_others(root: Path, mode: int, hint: str) -> None:
    """Make a new folder private; refuse one that was open to others and is not empty.

    Others may have changed or read its content.
    """
    if not any(root.iterdir()):
        root.chmod(0o700)
    # Checked again after the change of mode: somebody may have put a file in between the two looks.
    if stat.S_IMODE(root.lstat().st_mode) & 0o077 or any(root.iterdir()):
        raise CatalogError(
            f"the catalog {root} is open to other users (mode {mode:04o}), who may have changed its content: "
            f"if you know that they have not, make it private with `chmod 700 {shlex.quote(str(root))}`; else {hint}"
        )


def _check_locks(root: Path, hint: str) -> None:
    """Refuse a file system without locks, on which two processes could build the same."""
    try:
        # Tried, because the type of a file system does not tell whether it has locks.
        with locks.tried(root, shared=True):
            pass
    except OSError as error:
        raise CatalogError(f"the catalog {root} is on a file system without locks ({error.strerror}): {hint}") from error
