"""The shared directory: its layout, its locks, the folders of running machines, and the holds on what is in use.

::

    images/      the image store                 packs/KEY/   published packs, never changed
    run/OWNER/   machines of one process         staging/     packs being built
    locks/       one file per lock, never deleted  quarantine/  what was found damaged
    proofs/      what was proved about this host  machines/NAME/  machines that run without pytest
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import platformdirs

from pytest_vmbottle import host
from pytest_vmbottle._os import Deadline, atomic_file, is_locked, private_dir, sync_dir
from pytest_vmbottle.errors import CatalogError

__all__ = ["Catalog", "default_reason", "default_root"]

_LONG_WAIT = 2.0
"""Seconds after which somebody who waits for a lock is told so."""


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

    def __init__(self, root: Path) -> None:
        """Opens it.

        Raises:
            CatalogError: It lies on a network file system, belongs to somebody else, or cannot be written.
        """
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 - resolve() would follow the symlink that is to be refused
        _check(self.root)
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
    def machines(self) -> Path:
        """The folder of machines that run without pytest."""
        return self.root / "machines"

    @contextmanager
    def lock(self, name: str, *, deadline: Deadline, waiting: Callable[[str], None], label: str = "") -> Iterator[None]:
        """Holds the lock `name` against all other processes and threads that use this catalog.

        Args:
            name: What is locked; part of a file name.
            deadline: When to give up.
            waiting: Told once, in a sentence, when this takes long.
            label: What people call it; by default its name.

        Raises:
            CatalogError: Another process has held it until the deadline; the message names that process.
        """
        folder = private_dir(self.root / "locks")
        holder = folder / f"{name}.holder"
        lock = filelock.FileLock(folder / f"{name}.lock", mode=0o600)
        try:
            try:
                lock.acquire(timeout=min(_LONG_WAIT, deadline.remaining))
            except filelock.Timeout:
                waiting(f"waiting for {label or name}: {_who(holder)}")
                lock.acquire(timeout=deadline.remaining)
        except filelock.Timeout:
            raise CatalogError(f"{label or name} was not to be had within {deadline.seconds:.0f} s: {_who(holder)}") from None
        except OSError as error:
            raise CatalogError(f"the lock {folder / name} cannot be taken: {error.strerror}") from error
        try:
            with atomic_file(holder) as record:
                record.write(json.dumps({"pid": os.getpid(), "since": time.time()}).encode())
            yield
        finally:
            lock.release()

    @contextmanager
    def rundir(self, machine_id: str) -> Iterator[Path]:
        """A private folder for one machine, gone at the end of the block; its parent says which process it belongs to."""
        with self._owning:
            if self._owner is not None and self._owner.pid != os.getpid():
                self._owner.close()
                self._owner = None
            if self._owner is None:
                self._owner = _Owner(private_dir(self.root / "run"))
            folder = self._owner.folder / machine_id
        private_dir(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Removes this process's folder of machines, which must have ended; may be called again, and the catalog can still be used."""
        with self._owning:
            if self._owner is not None:
                self._owner.close()
                self._owner = None

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder to build something in; what is still there at the end of the block is removed."""
        with self.rundir(f"staging-{secrets.token_hex(6)}") as folder:
            yield folder

    def publish(self, built: Path, key: str) -> Path:
        """Gives a folder of files its final name, all at once; returns that. What had the name before is kept if it is there."""
        final = private_dir(self.packs) / key
        for path in built.iterdir():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_dir(built)
        try:
            built.rename(final)
        except OSError:
            if not final.is_dir():
                raise
        sync_dir(self.packs)
        return final

    def quarantine(self, path: Path) -> Path:
        """Moves something damaged out of the way and returns where it is now."""
        aside = private_dir(self.root / "quarantine") / f"{path.name}-{secrets.token_hex(4)}"
        path.rename(aside)
        return aside

    def set_aside(self) -> tuple[Path, ...]:
        """What `quarantine` has moved out of the way."""
        aside = self.root / "quarantine"
        return tuple(aside.iterdir()) if aside.is_dir() else ()

    def discard(self, pack: Path, *, held: bool = False) -> bool:
        """Removes a published pack; returns whether it is gone.

        Args:
            pack: Its folder.
            held: Whether it goes even if somebody holds it: machines that run keep the files they have open.
        """
        try:
            fd = os.open(pack, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            if not held:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Out of sight first: nobody finds half a pack.
            shutil.rmtree(self.quarantine(pack))
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def lease(self, pack: Path) -> int:
        """Holds a pack so that it is not removed; returns the descriptor whose closing ends the hold, as the end of the process does.

        Raises:
            FileNotFoundError: It is gone.
        """
        fd = os.open(pack, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH)
        try:
            if os.path.samestat(os.fstat(fd), pack.stat()):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # removed, or made anew, while we waited
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(pack))

    def in_use(self, pack: Path) -> bool:
        """Whether somebody holds a pack at this moment."""
        return is_locked(pack, fcntl.LOCK_EX)

    def sweep(self) -> int:
        """Removes the folders of machines whose process is dead, which its lock proves; returns how many processes that were."""
        swept = 0
        run = self.root / "run"
        for lock in run.glob("*.lock") if run.is_dir() else ():
            with suppress(OSError), lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
                swept += 1
        return swept


class _Owner:
    """This process in the catalog: a folder for its machines, and a lock on a file beside it that the kernel frees when it dies."""

    def __init__(self, run: Path) -> None:
        self.pid = os.getpid()
        self.folder = run / f"{self.pid}-{secrets.token_hex(6)}"
        self._lock = self.folder.with_suffix(".lock")
        # A bare descriptor: it is to stay open for as long as the process lives, whatever becomes of this object.
        self._fd = os.open(self._lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        private_dir(self.folder)

    def close(self) -> None:
        """Removes folder and lock; in a forked child only gives up its copy of the hold on them."""
        if self.pid == os.getpid():
            shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.unlink(missing_ok=True)
        os.close(self._fd)


def _who(holder: Path) -> str:
    try:
        record = json.loads(holder.read_bytes())
        return f"process {int(record['pid'])} has been at it for {time.time() - float(record['since']):.0f} s"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process is at it"


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


def _check_ours(root: Path, status: os.stat_result, hint: str) -> None:
    if status.st_uid != os.geteuid():
        raise CatalogError(f"the catalog {root} belongs to user {status.st_uid}: it cannot be shared between users; {hint}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        root.chmod(0o700)
    if not os.access(root, os.W_OK | os.X_OK):
        raise CatalogError(f"the catalog {root} cannot be written: {hint}")
