"""The shared directory: its layout, its locks, the folders of running machines, and the holds on what is in use.

::

    images/      the image store                 packs/KEY/   published packs, never changed; KEY.2/ has replaced one
    run/OWNER/   machines of one process         staging/     packs being built
    locks/       one file per lock, never deleted  quarantine/  what was found damaged
    proofs/      what was proved about this host  machines/NAME/  machines that run without pytest
    budget/      the shares of memory that machines have
"""

from __future__ import annotations

import fcntl
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

import filelock
import platformdirs

from pytest_vmbottle import generations, host, records, supervisor
from pytest_vmbottle._os import Deadline, Reminder, atomic_file, private_dir, sync_dir
from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.ledger import Ledger
from pytest_vmbottle.supervisor import Identity, Reaped, Record, Supervisor

__all__ = ["Catalog", "default_reason", "default_root"]

_LONG_WAIT = 2.0
"""Seconds after which somebody who waits for a lock is told so, for the first time."""
_MOMENT = 0.5
"""Seconds after which it is looked again whether to tell."""
_STALE = 600.0
"""Seconds after which a file that was to be renamed belongs to somebody who was killed."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}")


_LASTING = (Path("/var/tmp"), Path("/tmp"))  # noqa: S108 - a folder there is only used if it is ours alone: see _check_ours
"""Where everybody may write, what outlasts a boot first."""


def default_root() -> Path:
    """Where the catalog is unless said otherwise: in the user's cache folder or, where that cannot be written, in a public one."""
    usual, name = _usual(), f"pytest-vmbottle-{os.geteuid()}"
    if usual is not None and _can_be_made(usual):
        return usual
    return next((folder / name for folder in _LASTING if _can_be_made(folder)), usual or _LASTING[0] / name)


def default_reason() -> str:
    """Why the catalog is not in the user's cache folder by default, as in containers whose home is read-only; empty where it is."""
    usual = _usual()
    if usual is None:
        return "this user has no home"
    return "" if _can_be_made(usual) else f"{usual.parent} cannot be written"


def _usual() -> Path | None:
    """The place in the user's cache folder; None for who has none: a container's user without a name and without HOME."""
    try:
        folder = platformdirs.user_cache_path("pytest-vmbottle")
    except RuntimeError:
        return None
    return folder if folder.is_absolute() else None


def _can_be_made(folder: Path) -> bool:
    """Whether a folder is writable or could be made, with those above it that are missing."""
    there = next(each for each in (folder, *folder.parents) if os.path.exists(each))  # noqa: PTH110 - where we may not look, Path raises
    return os.access(there, os.W_OK | os.X_OK)


class Catalog:
    """The directory that all workers and runs of one user share. Making this object checks it; folders appear when they are needed."""

    def __init__(self, root: Path, *, make: bool = True) -> None:
        """Opens it.

        Args:
            root: Its folder.
            make: Whether the folder is made if it is not there; without, there is nothing in it.

        Raises:
            CatalogError: It lies on a network file system, belongs to somebody else, or cannot be written.
        """
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 - resolve() would follow the symlink that is to be refused
        if make or os.path.lexists(self.root):
            _check(self.root)
        self.ledger = Ledger()
        self._owner: _Owner | None = None
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
        """The folder of what was proved about this host."""
        return self.root / "proofs"

    @property
    def budget(self) -> Path:
        """The folder of the shares of memory that machines have."""
        return self.root / "budget"

    @property
    def machines(self) -> Path:
        """The folder of machines that run without pytest."""
        return self.root / "machines"

    @contextmanager
    def lock(self, name: str, *, deadline: Deadline, waiting: Callable[[str], None], label: str = "") -> Iterator[Callable[[str], None]]:
        """Holds the lock `name` against all other processes and threads that use this catalog.

        The block gets a function that takes a line about how far it is: those who wait are told the last one.

        Args:
            name: What is locked; part of a file name.
            deadline: When to give up.
            waiting: Told now and then, in a sentence, how long it has been, who holds it, and how far that is.
            label: What people call it; by default its name.

        Raises:
            CatalogError: Another process has held it until the deadline; the message names that process.
        """
        folder, label = private_dir(self.root / "locks"), label or name
        path, holder = folder / f"{name}.lock", folder / f"{name}.holder"
        before = _inode(path)
        lock = filelock.FileLock(path, mode=0o600, poll_interval=0.01)
        reminder = Reminder(_LONG_WAIT)

        def free(check: Callable[[], bool]) -> None:
            while not check():
                if deadline.expired:
                    raise CatalogError(f"{label} was not to be had within {deadline.seconds:.0f} s: {records.describe_holder(holder)}")
                if reminder.due():
                    waiting(f"waiting for {label}, {reminder.elapsed:.0f} s: {records.describe_holder(holder)}")

        try:
            free(lambda: _acquired(lock, min(_MOMENT, deadline.remaining)))
            if _inode(path) != before:  # a new file: somebody may hold one that was removed under him
                free(lambda: bool(Deadline(min(_MOMENT, deadline.remaining)).poll(lambda: not _is_held_without_name(path))))
            self.ledger.locks.add(name)
            since = time.time()
            records.note_holder(holder, since=since)
            yield lambda step: records.note_holder(holder, since=since, step=step)
        finally:
            lock.release()

    @contextmanager
    def rundir(self, machine_id: str, *, ending: Callable[[Path], Sequence[str]] = lambda _: ()) -> Iterator[Path]:
        """A private folder for one machine, gone at the end of the block; its parent says which process it belongs to.

        Before there is anything to be ended, it is written down that this process has such a machine. That is deleted last.

        Args:
            machine_id: What nothing else in the catalog is called.
            ending: Gives, for the folder, the command that ends the machine where it outlives who started it.
        """
        owner = self._living_owner()
        folder = owner.folder / machine_id
        owner.write(folder, Record(owner=owner.identity, ending=tuple(ending(folder))))
        self.ledger.folders += 1
        with owner.holding(folder):
            yield folder

    def note_process(self, folder: Path, pid: int) -> None:
        """Writes down which process runs the machine with this folder: who cleans up after us then knows it."""
        with suppress(OSError, ValueError):  # without it, the process is still found by its mark
            record = Record.read(folder.with_name(f"{folder.name}.json"))
            self._living_owner().write(folder, record._replace(process=Identity.of(pid)))

    def _living_owner(self) -> _Owner:
        """This process in the catalog, with a supervisor that lives."""
        with self._owning:
            if self._owner is not None and not self._owner.is_us:
                self._owner.close()
                self._owner = None
            if self._owner is None:
                self._owner = _Owner(private_dir(self.root / "run"))
            self._owner.supervise()
            return self._owner

    def close(self) -> None:
        """Removes this process's folder of machines, which must have ended; may be called again, and the catalog can still be used."""
        with self._owning:
            if self._owner is not None:
                self._owner.close()
                if self._owner.is_us:
                    self.ledger.leave(self._owner.folder, self._owner.lock)
                self._owner = None

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder to build something in; what is still there at the end of the block is removed."""
        owner = self._living_owner()
        self.ledger.folders += 1
        with owner.holding(owner.folder / f"staging-{secrets.token_hex(6)}") as folder:
            yield folder

    def publish(self, built: Path, key: str) -> Path:
        """Makes a folder of files the pack of a key, all at once; returns where it is.

        What was there before stays for as long as somebody holds it.
        """
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
        """The folder of the pack of a key, which need not be there."""
        there = generations.every(self.packs, key)
        return there[-1] if there else self.packs / key

    def quarantine(self, path: Path) -> Path | None:
        """Moves something damaged out of the way and returns where it is now; None if somebody holds it, and it stays."""
        aside = private_dir(self.root / "quarantine") / f"{path.name}-{secrets.token_hex(4)}"
        if not path.is_dir():
            return path.rename(aside)
        return aside if generations.remove(path, aside=aside) else None

    def set_aside(self) -> tuple[Path, ...]:
        """What `quarantine` has moved out of the way."""
        aside = self.root / "quarantine"
        return tuple(aside.iterdir()) if aside.is_dir() else ()

    def discard(self, pack: Path) -> bool:
        """Removes a published pack, with those that it replaced, unless somebody holds one of them; returns whether it is gone."""
        return generations.remove_all(self._generations(pack))

    def lease(self, folder: Path) -> int:
        """Holds a pack, an image or a snapshot so that it is not removed; returns the descriptor whose closing ends the hold.

        Raises:
            FileNotFoundError: It is gone.
        """
        return generations.hold(folder)

    def in_use(self, pack: Path) -> bool:
        """Whether somebody holds a pack at this moment, or one that it has replaced."""
        return any(map(generations.is_held, self._generations(pack)))

    def _generations(self, pack: Path) -> list[Path]:
        return generations.every(pack.parent, generations.name_of(pack))

    def gc(self, *, dry_run: bool = False) -> tuple[Reaped, ...]:
        """Ends and removes what processes left that are dead, which their locks prove; returns what that was, and what had to be kept.

        Args:
            dry_run: Whether to tell only what would be done.
        """
        found = []
        if not dry_run:
            self._sweep()
        for lock in sorted((self.root / "run").glob("*.lock")):
            with suppress(OSError), _held_at_once(lock) as is_ours:
                if is_ours:
                    reaped = supervisor.reap(lock.with_suffix(""), aside=self.root / "quarantine", dry_run=dry_run)
                    if not dry_run and not reaped.kept:
                        lock.unlink()
                    found.append(reaped)
        if not dry_run:
            self._note(found)
        return tuple(found)

    def strays(self) -> list[Identity]:
        """Processes of machines whose records are gone, as when somebody removed the catalog under them: nobody ends them."""
        return supervisor.strays(self.root / "run")

    def _sweep(self) -> None:
        """Removes files that were to be renamed, and folders that something was proved in, by who was killed before that.

        So are packs that others have replaced and nobody holds any more.
        """
        generations.sweep(self.packs)
        for place in self.proofs.glob("proving-*"):
            with suppress(OSError), _held_at_once(place) as is_free:
                if is_free and time.time() - place.lstat().st_mtime > _STALE:
                    shutil.rmtree(place, ignore_errors=True)
        for folder in ("locks", "proofs", "images/names", "images/seen", "machines/*"):
            with suppress(OSError):  # a machine's folder may go while it is looked for
                for path in self.root.glob(f"{folder}/.*"):
                    _remove_stale(path)

    def _note(self, found: Iterable[Reaped]) -> None:
        for reaped in found:
            self.ledger.reclaim(run=1, machine=len(reaped.machines), process=len(reaped.processes))
            for sentence in reaped.kept:
                what, _, why = sentence.partition(": ")
                self.ledger.keep(what, why)
            for sentence in reaped.damaged:
                self.ledger.keep(sentence.partition(": ")[0], "a damaged record, set aside")


def _remove_stale(path: Path) -> None:
    with suppress(OSError):
        if _TEMPORARY.fullmatch(path.name) and time.time() - path.lstat().st_mtime > _STALE:
            path.unlink()


@contextmanager
def _held_at_once(lock: Path) -> Iterator[bool]:
    """Holds the lock of an owner, unless somebody has it: that one lives, or its supervisor does."""
    fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


class _Owner:
    """This process in the catalog: a folder for its machines, a lock beside it that the kernel frees when it dies, and a supervisor."""

    def __init__(self, run: Path) -> None:
        identity = Identity.of(os.getpid())
        if identity is None:
            raise CatalogError("this process is not to be found in /proc, without which nobody could tell whose machines are whose")
        self.identity = identity
        # A bare descriptor: it is to stay open for as long as the process lives, whatever becomes of this object.
        self.lock, self._fd = self._claim(run)
        self.folder = self.lock.with_suffix("")
        self._supervisor: Supervisor | None = None
        self._ended: set[Path] = set()
        try:
            self.supervise()  # before there is anything that it would have to remove
            private_dir(self.folder)
        except OSError:
            self.close()
            raise

    def _claim(self, run: Path) -> tuple[Path, int]:
        while True:
            lock = run / f"{self.identity.pid}-{secrets.token_hex(6)}.lock"
            fd = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if lock.exists():
                return lock, fd
            os.close(fd)  # before we had it, somebody took it for a dead process's and removed it

    @property
    def is_us(self) -> bool:
        """Whether it is this process: not in a forked child."""
        return self.identity.pid == os.getpid()

    def supervise(self) -> None:
        """Sees to it that the supervisor lives."""
        if self._supervisor is not None and not self._supervisor.is_running:
            self._supervisor.close()
            self._supervisor = None
        if self._supervisor is None:
            self._supervisor = Supervisor(self.folder, self._fd)
            weakref.finalize(self, self._supervisor.close).atexit = False  # at our end it is what stays

    def write(self, folder: Path, record: Record) -> None:
        """Writes a machine's record, beside its folder."""
        with atomic_file(folder.with_name(f"{folder.name}.json")) as file:
            file.write(record.dump())

    @contextmanager
    def holding(self, folder: Path) -> Iterator[Path]:
        """Makes a folder, and removes it at the end of the block, before its record; in a forked child it is left alone.

        While another machine runs from a snapshot in it, it stays, until the next one ends.
        """
        private_dir(folder)
        try:
            yield folder
        finally:
            if self.is_us:
                self._ended.add(folder)
                self._ended = {each for each in self._ended if not _removed(each)}

    def close(self) -> None:
        """Removes folder and lock; in a forked child only gives up its copy of the hold on them."""
        if self.is_us:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.lock.unlink(missing_ok=True)
        if self._supervisor is not None:
            self._supervisor.close()
        os.close(self._fd)


def _removed(folder: Path) -> bool:
    """Removes the folder of a machine that has ended, unless somebody holds a snapshot in it; returns whether it is gone."""
    snapshots = folder / generations.SNAPSHOTS
    if snapshots.is_dir() and not generations.remove_all(snapshots.iterdir()):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(f"{folder.name}.json").unlink(missing_ok=True)
    return True


def _acquired(lock: filelock.BaseFileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except filelock.Timeout:
        return False
    except OSError as error:
        raise CatalogError(f"the lock {lock.lock_file} cannot be taken: {error.strerror}") from error
    return True


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except OSError:
        return None


def _is_held_without_name(path: Path) -> bool:
    """Whether a process of this user has a file open that had this name and was removed, as those who tidy up /tmp do."""
    return any(f"{path} (deleted)" in _open_files(process) for process in Path("/proc").glob("[0-9]*"))


def _open_files(process: Path) -> Iterator[str]:
    """The names of what a process has open, as its folder in /proc tells: nothing of one that has ended, or is another user's."""
    with suppress(OSError):
        for link in (process / "fd").iterdir():
            with suppress(OSError):
                yield os.readlink(link)  # noqa: PTH115 - Path would take the end for a suffix


def _check(root: Path) -> None:
    hint = "choose another folder with --vm-catalog or VMBOTTLE_CATALOG"
    try:
        if root.is_symlink():
            raise CatalogError(f"the catalog {root} is a symbolic link: {hint}")
        private_dir(root)
        status = root.lstat()
    except (FileExistsError, NotADirectoryError):
        raise CatalogError(f"the catalog {root} cannot be a folder, because a file stands there: {hint}") from None
    except OSError as error:
        raise CatalogError(f"the catalog {root} cannot be made: {error.strerror}; {hint}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise CatalogError(f"the catalog {root} is not a folder: {hint}")
    _check_ours(root, status, hint)
    if host.is_network_file_system(root):
        raise CatalogError(f"the catalog {root} lies on a network file system ({host.file_system(root)}), where locks do not hold: {hint}")
    _check_locks(root, hint)


def _check_ours(root: Path, status: os.stat_result, hint: str) -> None:
    if status.st_uid != os.geteuid():
        raise CatalogError(f"the catalog {root} belongs to user {status.st_uid}: it cannot be shared between users; {hint}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        _close_to_others(root, stat.S_IMODE(status.st_mode), hint)
    if not os.access(root, os.W_OK | os.X_OK):
        raise CatalogError(f"the catalog {root} cannot be written: {hint}")


def _close_to_others(root: Path, mode: int, hint: str) -> None:
    """Makes a new folder private; what others may have put into one that has something in it, or read there, cannot be told."""
    if not any(root.iterdir()):
        root.chmod(0o700)
    if stat.S_IMODE(root.lstat().st_mode) & 0o077 or any(root.iterdir()):
        raise CatalogError(
            f"the catalog {root} is open to other users (mode {mode:04o}), and what is in it may be theirs: "
            f"if you know that it is not, make it private with `chmod 700 {shlex.quote(str(root))}`; else {hint}"
        )


def _check_locks(root: Path, hint: str) -> None:
    """Refuses a file system without locks; a pretence of them would let two build the same."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    except OSError as error:
        raise CatalogError(f"the catalog {root} lies on a file system that has no locks ({error.strerror}): {hint}") from error
    finally:
        os.close(fd)
