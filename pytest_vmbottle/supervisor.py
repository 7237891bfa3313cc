"""Ends machines whose owner died: a small process beside each process that has machines, and what it does, which a later run does too.

An owner has a folder in the catalog, `run/PID-NONCE`, and holds the lock `run/PID-NONCE.lock`, with its supervisor, for as long as one of
them lives. A machine has a folder in there, and beside it a record, which is written before anything is started and deleted last.

A process is ended only if it is proven to be a machine's: it carries the machine's folder, which no other machine ever has, in its
environment, as only a backend puts it there; or its record names it, by pid, start and boot, and its command line names the folder.

This module is also run as a program, by a Python that has nothing but its standard library: that starts quickly and takes 14 MB. So
nothing else is imported here, and values are named tuples.
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
_HARMLESS = ("PATH", "LANG", "LC_ALL", "TZ")
_VERSION = 1
_LARGEST = 1 << 20
"""Bytes beyond which a file is no record."""
_LATE = 1.0
"""Seconds in which a process may still show up that was being started when its owner died."""
_UNKILLABLE = 5.0
"""Seconds in which a process ends that was killed."""
_ENDING = 20.0
"""Seconds that a machine's own command may take to end it."""


class Identity(NamedTuple):
    """A process that cannot be mistaken for another one with the same number: when it began, in which boot of this computer."""

    pid: int
    ticks: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """The process that has this number now, if any."""
        try:
            words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if words[0] in "ZX" else cls(pid=pid, ticks=int(words[19]), boot=boot)

    @property
    def is_running(self) -> bool:
        """Whether it is still there."""
        return Identity.of(self.pid) == self

    def kill(self) -> None:
        """Kills the process if it is still this one."""
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:
            return
        try:
            if self.is_running:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        finally:
            os.close(fd)

    def names(self, folder: Path) -> bool:
        """Whether it is still there, and its command line names a folder or something in it."""
        until = time.monotonic() + _UNKILLABLE
        with suppress(OSError):
            # It has none while it begins to run another program, and while it ends, which takes the longer the more memory it had.
            while not (words := Path(f"/proc/{self.pid}/cmdline").read_bytes()) and self.is_running and time.monotonic() < until:
                time.sleep(0.001)
            return os.fsencode(folder) in words and self.is_running
        return False


class Record(NamedTuple):
    """What is known of a machine that somebody has.

    Attributes:
        owner: Who has it.
        process: The hypervisor's process, once there is one.
        ending: The command that ends the machine, where it goes on without its owner.
    """

    owner: Identity
    process: Identity | None = None
    ending: tuple[str, ...] = ()

    def dump(self) -> bytes:
        """As it is written down, with a checksum."""
        body = {"version": _VERSION, "owner": self.owner, "process": self.process, "ending": self.ending}
        return json.dumps({"sha256": _digest(body), "record": body}).encode()

    @classmethod
    def read(cls, path: Path) -> Record:
        """Reads what `dump` wrote.

        Raises:
            ValueError: It is damaged, or of another version.
            OSError: It cannot be read.
        """
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
                raise ValueError(f"it is of version {body['version']}, and this is version {_VERSION}")
            process = Identity(*body["process"]) if body["process"] else None
            return cls(owner=Identity(*body["owner"]), process=process, ending=tuple(body["ending"]))
        except (TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"it makes no sense: {error!r}") from error


def _digest(body: Any) -> str:
    import hashlib  # noqa: PLC0415 - a supervisor mostly has nothing to read

    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Reaped(NamedTuple):
    """What was found of an owner that is dead, and what became of it.

    Attributes:
        owner: Its folder's name: the number of the process, and a nonce.
        machines: The names of machines and builds of which nothing is left now.
        processes: Those that were killed.
        kept: What is still there and why, in sentences.
        damaged: Records that could not be read, and are in quarantine now, in sentences.
    """

    owner: str
    machines: tuple[str, ...] = ()
    processes: tuple[int, ...] = ()
    kept: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()


# -- proof -----------------------------------------------------------------------------------------------------------------------------


def environment(folder: Path) -> dict[str, str]:
    """The environment for a process of the machine with this folder: ours, and the mark by which the process is known."""
    return {**os.environ, _MARK: str(folder)}


def bare_environment(folder: Path) -> dict[str, str]:
    """The same for a process of another user, who is to see nothing of ours that may be secret."""
    kept = {name: os.environ[name] for name in _HARMLESS if name in os.environ}
    return {**kept, _MARK: str(folder)}


def _carriers(folder: Path) -> dict[Identity, str]:
    """The processes that carry the mark of a machine in a folder, each with the first name on the way to that."""
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
    """The processes that carry the mark of a machine of an owner of which nothing is left in the folder of all owners."""
    return [process for process, owner in _carriers(run).items() if not (run / f"{owner}.lock").exists()]


def _environment_of(entry: Path) -> bytes:
    try:
        if entry.stat().st_uid != os.geteuid():
            return b""
        return b"\0" + (entry / "environ").read_bytes()
    except OSError:
        return b""


def _proven(folder: Path, records: dict[str, Record]) -> tuple[dict[Identity, str], dict[str, str]]:
    """The processes that are proven to be an owner's machines, and for which machines there is one without proof."""
    found, doubts = _carriers(folder), {}
    for name, record in records.items():
        process = record.process
        if process is None or process in found:
            continue
        if process.names(folder / name):
            found[process] = name
        elif process.is_running and not record.ending:  # else it is left to that
            doubts[name] = f"process {process.pid} was its hypervisor, and does not name its folder any more"
    return found, doubts


# -- what is done ----------------------------------------------------------------------------------------------------------------------


def kill(processes: Iterable[Identity], *, seconds: float = _UNKILLABLE) -> list[Identity]:
    """Kills processes, all at once, and waits until they are gone; returns those that are not."""
    left = list(processes)
    for process in left:
        process.kill()
    until = time.monotonic() + seconds
    while (left := [process for process in left if process.is_running]) and time.monotonic() < until:
        time.sleep(0.002)
    return left


def reap(folder: Path, *, aside: Path, dry_run: bool = False) -> Reaped:
    """Ends the machines of an owner that is dead, as far as they are proven to be its own, and removes their folders, and last the records.

    Args:
        folder: The owner's.
        aside: Where records go that cannot be read.
        dry_run: Whether to tell only what would be done.
    """
    if folder.is_symlink():
        return Reaped(owner=folder.name, kept=(f"{folder}: it is a symbolic link, which nobody here makes",))
    records, damaged = _read(folder)
    found, kept = _proven(folder, records)
    machines = sorted({path.name.removesuffix(".json") for path in _listed(folder) if not path.name.startswith(".")})
    if not dry_run:
        kept |= {found[process]: f"process {process.pid} does not end" for process in kill(found)}
        kept |= _run_endings({name: record for name, record in records.items() if record.ending and name not in kept})
        for name in damaged:
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
    """The records in a folder, and what is wrong with the others, by the names of the machines."""
    records, damaged = {}, {}
    for path in _listed(folder):
        if path.suffix == ".json" and not path.name.startswith("."):
            try:
                records[path.stem] = Record.read(path)
            except (OSError, ValueError) as error:
                damaged[path.stem] = str(error)
    return records, damaged


def _move_aside(path: Path, aside: Path) -> None:
    folder = aside / f"{path.parent.name}-{path.stem}"
    with suppress(OSError):
        for each in (aside, folder):
            each.mkdir(mode=0o700, exist_ok=True)
        path.rename(folder / path.name)


def _remove(folders: list[Path]) -> dict[str, str]:
    """Removes folders; returns which are still there."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return {folder.name: "its folder cannot be removed" for folder in folders if os.path.lexists(folder)}


def _run_endings(records: dict[str, Record]) -> dict[str, str]:
    """Runs the commands that end machines, all at once; returns which did not, and why."""
    failed, running = {}, {}
    for name, record in records.items():
        try:
            running[name] = subprocess.Popen(  # noqa: S603 - argv list, no shell
                record.ending, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
            )
        except OSError as error:
            failed[name] = f"`{' '.join(record.ending)}` cannot be run: {error.strerror}"
    until = time.monotonic() + _ENDING
    for name, command in running.items():
        problem = _outcome(command, records[name].process, until)
        if problem:
            failed[name] = f"`{' '.join(records[name].ending)}` {problem}"
    return failed


def _outcome(command: subprocess.Popen[bytes], process: Identity | None, until: float) -> str:
    """What went wrong with a command that was to end a process, if anything."""
    try:
        status = command.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()
        return f"took longer than {_ENDING:.0f} s"
    while process is not None and process.is_running and time.monotonic() < until:
        time.sleep(0.01)
    if status:
        return f"ended with status {status}"
    return f"ended, and process {process.pid} still runs" if process is not None and process.is_running else ""


def _end_late(folder: Path, intents: list[Path]) -> None:
    """Waits for processes that were being started when their owner died a moment ago, and do not carry their mark before they run."""
    written = [path.stat().st_mtime for path in intents if path.exists()]
    # The clock may have been set meanwhile, to either side.
    until = time.monotonic() + min(_LATE, max(written, default=0.0) + _LATE - time.time())
    while time.monotonic() < until:
        kill(_carriers(folder))
        time.sleep(0.05)


# -- the process -----------------------------------------------------------------------------------------------------------------------


class Supervisor:
    """The process that sees to the machines of this one when this one dies, in whatever way."""

    def __init__(self, folder: Path, lock: int) -> None:
        """Starts it.

        Args:
            folder: This process's folder.
            lock: The descriptor of the lock beside it, which it holds with us.
        """
        self._starter = os.getpid()
        theirs, self._line = os.pipe()
        ours = _pidfd()
        self._process = subprocess.Popen(  # noqa: S603 - argv list, no shell
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
        """Its process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it is there."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends it: there must be nothing left for it to do. In a forked child, whose it is not, only lets go of it. May be called again."""
        if self._line < 0:
            return
        if self._starter == os.getpid():
            self._process.kill()
            self._process.wait()
        else:
            self._process.returncode = 0  # nobody is to wait for it
        os.close(self._line)
        self._line = -1


def _pidfd() -> int:
    """A descriptor that tells of our end even if a child of ours, forked and gone on, holds the pipe; -1 where there is no such thing."""
    try:
        return os.pidfd_open(os.getpid())
    except (AttributeError, OSError):
        return -1


def _supervise(folder: Path, owner: int) -> None:
    """Waits for the end of the owner, and does what it left to be done."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # it ends when its owner does; not ignored, which its children would inherit
    end = select.poll()
    for fd in (0, owner):
        if fd >= 0:
            end.register(fd, select.POLLIN)
    end.poll()
    if not reap(folder, aside=folder.parent.parent / "quarantine").kept:
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)


if __name__ == "__main__":
    _supervise(Path(sys.argv[1]), int(sys.argv[2]))
