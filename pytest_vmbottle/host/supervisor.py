"""The supervisor, a small process that ends the machines of a dead owner.

Each process with machines has one. A later run does the same for owners whose supervisor died too.

An owner has a folder in the catalog, `run/PID-NONCE`. Owner and supervisor hold the lock `run/PID-NONCE.lock`, as long as one of them
lives. A machine has a folder in there, and beside it a record, which is written before anything is started and deleted last.

A process is ended only if it is proven to be a machine's: its environment has a mark with the machine's folder, which is unique and which
only a backend sets; or the machine's record names the process, by pid, start and boot, and its command line names the folder.

This module is also run as a program, by a Python without site packages, which starts quickly and takes 14 MB. So only the standard library
is imported here, and values are named tuples.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Identity", "Reaped", "Record", "Supervisor", "bare_environment", "environment", "kill", "reap", "strays"]

_MARK = "VMBOTTLE_MACHINE"
# An allow-list, since nobody knows which of a CI system's variables are secrets.
_HARMLESS = ("PATH", "LANG", "LC_ALL", "TZ")
_VERSION = 1
_LARGEST = 1 << 20
"""Bytes beyond which a file is no record."""
_LATE = 1.0
"""Seconds in which a process may still appear that was being started when its owner died."""
_UNKILLABLE = 5.0
"""Seconds for a killed process to end."""
_ENDING = 20.0
"""Seconds for a machine's own command to end it."""


class Identity(NamedTuple):
    """Identity of a process: its id, start and boot.

    It is never confused with another process of the same id.
    """

    pid: int
    ticks: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """Return the identity of the process that has this id now, or None."""
        try:
            # Fields are counted from the last bracket, because a program's name may hold blanks and brackets (proc_pid_stat(5)). The start
            # is in the kernel's ticks since the boot, so it needs the boot's id; a time of day would move whenever the clock is set.
            words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        # A zombie keeps its number, but runs nothing.
        return None if words[0] in "ZX" else cls(pid=pid, ticks=int(words[19]), boot=boot)

    @property
    def is_running(self) -> bool:
        """Tell whether the process still runs."""
        return Identity.of(self.pid) == self

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the process if it is still this one."""
        try:
            # Through a descriptor: between the look and the signal the number could pass to another process.
            fd = os.pidfd_open(self.pid)
        except OSError:
            return
        try:
            if self.is_running:
                signal.pidfd_send_signal(fd, number)
        except (ProcessLookupError, PermissionError):
            pass
        finally:
            os.close(fd)

    def names(self, folder: Path) -> bool:
        """Tell whether the process runs and its command line names a folder or something in it."""
        until = time.monotonic() + _UNKILLABLE
        with suppress(OSError):
            # It has none while it begins to run another program, and while it ends, which takes the longer the more memory it had.
            while not (words := Path(f"/proc/{self.pid}/cmdline").read_bytes()) and self.is_running and time.monotonic() < until:
                time.sleep(0.001)
            return os.fsencode(folder) in words and self.is_running
        return False


class Record(NamedTuple):
    """Record of a machine of an owner.

    Attributes:
        owner: The process that owns it.
        process: The hypervisor's process, once it runs.
        ending: The command that ends a machine which outlives its owner.
    """

    owner: Identity
    process: Identity | None = None
    ending: tuple[str, ...] = ()

    def dump(self) -> bytes:
        """Encode the record as bytes, with a checksum."""
        body = {"version": _VERSION, "owner": self.owner, "process": self.process, "ending": self.ending}
        return json.dumps({"sha256": _digest(body), "record": body}).encode()

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a record that `dump` encoded.

        Raises:
            ValueError: The record is damaged, or of another version.
            OSError: The file cannot be read.
        """
        # As in `records`, which cannot be imported here: neither a link nor a pipe in its place may lead or hold up the supervisor.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:  # noqa: PTH123 - opened already
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError("it is too long")
        try:
            whole = json.loads(text)
            body = whole["record"]
            if whole["sha256"] != _digest(body):
                raise ValueError("its checksum is wrong")
            if body["version"] != _VERSION:
                raise ValueError(f"it has version {body['version']}, and only version {_VERSION} is supported")
            process = Identity(*body["process"]) if body["process"] else None
            return cls(owner=Identity(*body["owner"]), process=process, ending=tuple(body["ending"]))
        except (TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"it is invalid: {error!r}") from error


def _digest(body: Any) -> str:
    import hashlib  # noqa: PLC0415 - a supervisor mostly has nothing to read

    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Reaped(NamedTuple):
    """Report about a dead owner: what was found, and what became of it.

    Attributes:
        owner: The name of its folder: the process id and a nonce.
        machines: The names of machines and builds that were removed completely.
        processes: The ids of processes that were killed.
        kept: Sentences about what is still there, and why.
        damaged: Sentences about records that could not be read, and are in quarantine now.
    """

    owner: str
    machines: tuple[str, ...] = ()
    processes: tuple[int, ...] = ()
    kept: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()


# -- proof -----------------------------------------------------------------------------------------------------------------------------


def environment(folder: Path) -> dict[str, str]:
    """Return the environment for a process of a machine: ours, and the mark with the machine's folder."""
    return {**os.environ, _MARK: str(folder)}


def bare_environment(folder: Path) -> dict[str, str]:
    """Return the environment for a machine's process of another user.

    It has the mark, but nothing of ours that may be secret.
    """
    # Nothing of it that may be secret: QEMU runs as another user, whose processes can read it.
    kept = {name: os.environ[name] for name in _HARMLESS if name in os.environ}
    return {**kept, _MARK: str(folder)}


def _carriers(folder: Path) -> dict[Identity, str]:
    """Return the processes with the mark of a machine below a folder.

    Each comes with the first name below the folder in its mark.
    """
    # With the separator, so that a folder whose name only begins the same is not taken for this one.
    wanted = os.fsencode(f"{_MARK}={folder}{os.sep}")
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or wanted not in _environment_of(entry):
            continue
        process = Identity.of(int(entry.name))
        # Read again: the number may have passed to another process in between.
        words = [word for word in _environment_of(entry).split(b"\0") if word.startswith(wanted)]
        if process is not None and process.is_running and words:
            found[process] = os.fsdecode(words[0].removeprefix(wanted)).partition(os.sep)[0]
    return found


def strays(run: Path) -> list[Identity]:
    """Return the processes with the mark of a machine whose owner has no lock file any more."""
    return [process for process, owner in _carriers(run).items() if not (run / f"{owner}.lock").exists()]


def _environment_of(entry: Path) -> bytes:
    try:
        # Of other users the kernel shows nothing; the mark of another user would prove nothing either.
        if entry.stat().st_uid != os.geteuid():
            return b""
        return b"\0" + (entry / "environ").read_bytes()
    except OSError:
        return b""


def _proven(folder: Path, records: dict[str, Record]) -> tuple[dict[Identity, str], dict[str, str]]:
    """Return the proven processes of an owner's machines, and the machines with an unproven one."""
    found, doubts = _carriers(folder), {}
    for name, record in records.items():
        process = record.process
        if process is None or process in found:
            continue
        if process.names(folder / name):
            found[process] = name
        elif process.is_running and not record.ending:  # else it is left to that
            doubts[name] = f"process {process.pid} was its hypervisor, but its command line does not name the folder any more"
    return found, doubts


# -- what is done ----------------------------------------------------------------------------------------------------------------------


def kill(processes: Iterable[Identity], *, seconds: float = _UNKILLABLE) -> list[Identity]:
    """Kill processes, all at once, and wait for their end; return those that do not end."""
    left = list(processes)
    # All killed first, then awaited: they end beside each other.
    for process in left:
        process.kill()
    until = time.monotonic() + seconds
    while (left := [process for process in left if process.is_running]) and time.monotonic() < until:
        time.sleep(0.002)
    return left


def reap(folder: Path, *, aside: Path, dry_run: bool = False) -> Reaped:
    """End the proven machines of a dead owner, and remove their folders and, last, the records.

    Args:
        folder: The owner's folder.
        aside: The folder for records that cannot be read.
        dry_run: Whether to report only what would be done.
    """
    if folder.is_symlink():
        return Reaped(owner=folder.name, kept=(f"{folder}: it is a symbolic link, and pytest-vmbottle makes none here",))
    records, damaged = _read(folder)
    found, kept = _proven(folder, records)
    machines = sorted({path.name.removesuffix(".json") for path in _listed(folder) if not path.name.startswith(".")})
    # Processes first, because they may still write to their folders. Records last, so that a later run can go on if this one is killed.
    if not dry_run:
        kept |= {found[process]: f"process {process.pid} does not end" for process in kill(found)}
        # Also where a process was just killed: such a backend keeps files and entries elsewhere, which only its own command removes.
        kept |= _run_endings({name: record for name, record in records.items() if record.ending and name not in kept})
        for name in damaged:
            # Kept for inspection, and out of the folder, which could otherwise never be removed.
            _move_aside(folder / f"{name}.json", aside)
        kept |= _remove([folder / name for name in machines if name not in kept])
        _end_late(folder, [folder / f"{name}.json" for name, record in records.items() if record.process is None])
        for name in {*machines} - {*kept}:
            (folder / f"{name}.json").unlink(missing_ok=True)
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
    return Reaped(
        owner=folder.name,
        machines=tuple(name for name in machines if name not in kept),
        processes=tuple(process.pid for process, name in found.items() if name not in kept),
        kept=tuple(f"{folder / name}: {reason}" for name, reason in kept.items()),
        damaged=tuple(f"{folder / name}.json: {reason}" for name, reason in damaged.items()),
    )


def _listed(folder: Path) -> list[Path]:
    with suppress(OSError):
        return list(folder.iterdir())
    return []


def _read(folder: Path) -> tuple[dict[str, Record], dict[str, str]]:
    """Read the records in a folder; return them, and the errors of the others, by machine."""
    records, damaged = {}, {}
    for path in _listed(folder):
        if path.suffix == ".json" and not path.name.startswith("."):
            try:
                records[path.stem] = Record.read(path)
            except (OSError, ValueError) as error:
                damaged[path.stem] = str(error)
    return records, damaged


def _move_aside(path: Path, aside: Path) -> None:
    # With the owner's name: machines of two owners may have the same one.
    folder = aside / f"{path.parent.name}-{path.stem}"
    with suppress(OSError):
        for each in (aside, folder):
            each.mkdir(mode=0o700, exist_ok=True)
        path.rename(folder / path.name)


def _remove(folders: list[Path]) -> dict[str, str]:
    """Remove folders; return those that are still there, with the reason."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return {folder.name: "its folder cannot be removed" for folder in folders if os.path.lexists(folder)}


def _run_endings(records: dict[str, Record]) -> dict[str, str]:
    """Run the commands that end machines, all at once; return those that failed, with the reason."""
    failed, running = {}, {}
    for name, record in records.items():
        try:
            running[name] = subprocess.Popen(  # noqa: S603 - argv list, no shell
                record.ending, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
            )
        except OSError as error:
            failed[name] = f"`{' '.join(record.ending)}` cannot be run: {error.strerror}"
    # One limit for all, as they run beside each other.
    until = time.monotonic() + _ENDING
    for name, command in running.items():
        problem = _outcome(command, records[name].process, until)
        if problem:
            failed[name] = f"`{' '.join(records[name].ending)}` {problem}"
    return failed


def _outcome(command: subprocess.Popen[bytes], process: Identity | None, until: float) -> str:
    """Wait for a command that ends a process; return what went wrong, or an empty string."""
    try:
        status = command.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()
        return f"took longer than {_ENDING:.0f} s"
    # A backend's command may return before the process that it ends is gone.
    while process is not None and process.is_running and time.monotonic() < until:
        time.sleep(0.01)
    if status:
        return f"ended with status {status}"
    return f"ended, and process {process.pid} still runs" if process is not None and process.is_running else ""


def _end_late(folder: Path, intents: list[Path]) -> None:
    """Kill processes that were being started when their owner died a moment ago.

    They carry their mark only once they run, so they are awaited.
    """
    written = [path.stat().st_mtime for path in intents if path.exists()]
    # The clock may have been set meanwhile, to either side.
    until = time.monotonic() + min(_LATE, max(written, default=0.0) + _LATE - time.time())
    while time.monotonic() < until:
        kill(_carriers(folder))
        time.sleep(0.05)


# -- the process -----------------------------------------------------------------------------------------------------------------------


class Supervisor:
    """Handle of the process that cleans up when this process dies, in whatever way."""

    def __init__(self, folder: Path, lock: int) -> None:
        """Start the supervisor.

        Args:
            folder: This process's folder.
            lock: The descriptor of the lock beside the folder, which the supervisor holds together with us.
        """
        self._starter = os.getpid()
        # Nothing is ever written. The kernel closes our end however we die, and the supervisor sees that. Programs that we start do not
        # inherit it (PEP 446), but a child that was only forked has a copy: for that case there is `_pidfd`.
        theirs, self._line = os.pipe()
        ours = _pidfd()
        self._process = subprocess.Popen(  # noqa: S603 - argv list, no shell
            # Isolated (-I, -S): a `sitecustomize` or a module in the working directory must not run in it.
            [sys.executable, "-I", "-S", __file__, str(folder), str(ours)],
            stdin=theirs,
            stdout=subprocess.DEVNULL,  # whoever reads what we print is not to wait for it
            stderr=subprocess.DEVNULL,
            pass_fds=(lock, *([ours] if ours >= 0 else [])),
            start_new_session=True,  # Ctrl-C is not for it
            cwd="/",
        )
        for fd in (theirs, ours):
            if fd >= 0:
                os.close(fd)

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Tell whether the supervisor runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the supervisor, which must have nothing left to do; may be called again.

        A forked child, which does not own it, only closes its copy of the pipe.
        """
        if self._line < 0:
            return
        if self._starter == os.getpid():
            # Killed before the pipe is closed: its end would be the sign to clean up.
            self._process.kill()
            self._process.wait()
        else:
            self._process.returncode = 0  # nobody is to wait for it
        os.close(self._line)
        self._line = -1


def _pidfd() -> int:
    """Return a descriptor that signals this process's end, or -1 if there is none.

    It works even if a forked child that lives on holds the pipe.
    """
    try:
        return os.pidfd_open(os.getpid())
    except (AttributeError, OSError):
        return -1


def _supervise(folder: Path, owner: int) -> None:
    """Wait for the end of the owner, and clean up after it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # it ends when its owner does; not ignored, which its children would inherit
    end = select.poll()
    # Either end: the pipe's, when our last copy of it is closed, or the process's own.
    for fd in (0, owner):
        if fd >= 0:
            end.register(fd, select.POLLIN)
    end.poll()
    # Where something is kept, the lock file stays: by it the next run finds the folder, and tries again.
    if not reap(folder, aside=folder.parent.parent / "quarantine").kept:
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)


if __name__ == "__main__":
    _supervise(Path(sys.argv[1]), int(sys.argv[2]))
