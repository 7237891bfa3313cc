"""Machines that run without pytest: what one process knows of those that others keep, and how it talks to their keepers.

Each has a folder `machines/NAME` in the catalog, with a record, a socket, the console and the keeper's log. Its keeper holds a lock on
that folder for as long as it lives, so that nobody takes a dead one for running.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle import records
from pytest_vmbottle._os import Deadline, is_locked, private_dir
from pytest_vmbottle.errors import BackendUnavailable, CatalogError, CommandTimeout, MachineError, SpecError, VMBottleError
from pytest_vmbottle.result import Result, printable
from pytest_vmbottle.supervisor import Identity

__all__ = ["Kept", "Line", "Record", "all_kept", "find", "listen", "peer_is_us"]

_STARTING, _RUNNING, _STOPPED, _OFF, _ERROR = "starting", "running", "stopped", "off", "error"
_RECORD, _SOCKET, _LOG, _CONSOLE = "record.json", "socket", "keeper.log", "console.log"
_MOMENT = 1.0
"""Seconds in which somebody who only looks at a folder has let go of it."""
_UNWIND = 30.0
"""Seconds that a keeper may take to end a machine that was not wanted after all."""
_MAX_MESSAGE = 8 << 20
_KINDS: dict[str, type[VMBottleError]] = {kind.__name__: kind for kind in (BackendUnavailable, CatalogError, MachineError, SpecError)}


@attrs.frozen(kw_only=True)
class Record:
    """What is known of a kept machine.

    Attributes:
        name: What it is called.
        source: What it was made of.
        state: `"starting"`, `"running"`, `"stopped"`, `"off"`: the guest powered itself off, or `"error"`: it is lost, or came to another
            end than was asked for.
        reason: Why it is not running, or what is wrong with it; empty where nothing is.
        since: When it got into this state, or was found dead, in seconds since 1970.
        keeper: The process that holds it.
        spec: What it is: `arch`, `cpus`, `memory`, `disk`, `network`, `user`.
        backend: What runs it.
        id: What nothing else on this host is called.
        pid: The hypervisor's process.
        ports: Ports of the guest, and the host's on 127.0.0.1 that lead to them.
        argv: The hypervisor's command line.
    """

    name: str
    source: str
    state: str = _STARTING
    reason: str = ""
    since: float = attrs.field(factory=time.time)
    keeper: Identity | None = None
    spec: Mapping[str, Any] = attrs.field(factory=dict)
    backend: str = ""
    id: str = ""
    pid: int | None = None
    ports: Mapping[str, int] = attrs.field(factory=dict)
    argv: tuple[str, ...] = ()

    @property
    def is_on(self) -> bool:
        """Whether there is a machine."""
        return self.state in (_STARTING, _RUNNING)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Reads what `write` has written.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It makes no sense.
        """
        try:
            facts = records.read(path)
            keeper = Identity(**facts["keeper"]) if facts["keeper"] else None
            return cls(**{**facts, "keeper": keeper, "argv": tuple(facts["argv"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(str(error)) from error

    def write(self, path: Path) -> None:
        """Writes it, all at once."""
        keeper = None if self.keeper is None else self.keeper._asdict()
        records.write(path, attrs.asdict(self) | {"keeper": keeper})


class Line:
    """A conversation between two processes: JSON objects, one a line; descriptors may come with the first."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes a connected unix socket."""
        self._sock = sock
        self._buffer = bytearray()
        self.descriptors: list[int] = []

    def fileno(self) -> int:
        """Readable when the other side has said something, or is gone."""
        return self._sock.fileno()

    def send(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Says something."""
        data = json.dumps(message).encode() + b"\n"
        sent = socket.send_fds(self._sock, [data], list(descriptors)) if descriptors else 0
        if sent < len(data):  # whoever has got it all may have answered and gone, and then even nothing is a broken pipe
            self._sock.sendall(data[sent:])

    def receive(self) -> dict[str, Any] | None:
        """What the other side says next; None if it is gone.

        Raises:
            ValueError: It makes no sense.
        """
        while b"\n" not in self._buffer:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._sock, 1 << 16, 3)
            except ConnectionResetError:
                return None
            self.descriptors += descriptors
            if not data:
                return None
            self._buffer += data
            if len(self._buffer) > _MAX_MESSAGE:
                raise ValueError("the message has no end")
        text, _, rest = self._buffer.partition(b"\n")
        self._buffer = bytearray(rest)
        message = json.loads(text)
        if not isinstance(message, dict):
            raise ValueError("the message is no object")  # noqa: TRY004 - it is a value that came from outside
        return message

    @property
    def is_cut(self) -> bool:
        """Whether the other side is gone; it must have nothing more to say."""
        try:
            return self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Ends the conversation, and closes the descriptors that came with it."""
        self._sock.close()
        while self.descriptors:
            os.close(self.descriptors.pop())


def peer_is_us(sock: socket.socket) -> bool:
    """Whether the other end of a unix socket belongs to this user."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return bool(uid == os.geteuid())


@contextmanager
def _address(folder: int) -> Iterator[str]:
    """The address of the socket in an open folder, which is short enough however deep that lies: there is room for 107 bytes."""
    yield f"/proc/self/fd/{folder}/{_SOCKET}"


def listen(folder: int) -> socket.socket:
    """A socket in an open folder, to which other processes of this user can connect."""
    sock = socket.socket(socket.AF_UNIX)
    with _address(folder) as address:
        sock.bind(address)
    sock.listen(16)
    return sock


class Kept:
    """A machine that a keeper holds, or held, seen from any process."""

    def __init__(self, folder: Path) -> None:
        """Takes its folder, which need not be there."""
        self.folder = folder
        self.name = folder.name

    @property
    def console(self) -> Path:
        """The file of its serial console, which stays when it ends."""
        return self.folder / _CONSOLE

    @property
    def log(self) -> Path:
        """What its keeper had to say."""
        return self.folder / _LOG

    # -- its record ------------------------------------------------------------------------------------------------------------------

    def record(self) -> Record:
        """What is known of it, whatever its keeper came to.

        Raises:
            FileNotFoundError: There is no such machine.
        """
        held = self.is_held  # asked first: a keeper writes its record before it goes
        try:
            record = Record.read(self.folder / _RECORD)
        except FileNotFoundError:
            if not self.folder.is_dir():
                raise
            return Record(name=self.name, source="", state=_STARTING if held else _STOPPED, reason="" if held else "it never ran")
        except ValueError as error:
            return Record(name=self.name, source="", state=_ERROR, reason=f"its record {self.folder / _RECORD} cannot be read: {error}")
        if record.is_on and not held:
            return self._found_dead(record)
        return record

    def _found_dead(self, record: Record) -> Record:
        """What a record says from now on whose keeper died before it could write another.

        Nobody knows when that was; when it was found is written down, so that all who ask later are told the same.
        """
        found = attrs.evolve(
            record, state=_STOPPED, reason="its keeper died, and the machine with it", since=time.time(), ports={}, pid=None
        )
        with suppress(OSError, ValueError):  # it is claimed anew or removed this moment, or cannot be written: then it is told all the same
            fd = self._open()
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # others may look meanwhile, and none can claim it
                now = Record.read(self.folder / _RECORD)
                if not now.is_on:
                    return now
                if now == record:
                    found.write(self.folder / _RECORD)
            finally:
                os.close(fd)
        return found

    def note(self, record: Record) -> Record:
        """Writes its record; for its keeper."""
        record.write(self.folder / _RECORD)
        return record

    @property
    def is_held(self) -> bool:
        """Whether its keeper lives."""
        return is_locked(self.folder, fcntl.LOCK_SH)

    def _open(self) -> int:
        return os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def _lock(self) -> int | None:
        """Its folder, open and locked; None if somebody holds it."""
        fd = self._open()

        def locked() -> bool:
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            return False

        if Deadline(_MOMENT).poll(locked, every=0.05):
            return fd
        os.close(fd)
        return None

    def claim(self) -> int:
        """Makes its folder, empty, and holds it; returns the descriptor with which the hold is passed on.

        Raises:
            CatalogError: There is such a machine already.
        """
        while True:
            private_dir(self.folder)
            try:
                fd = self._lock()
                if fd is None:
                    raise self._taken()
                if os.path.samestat(os.fstat(fd), self.folder.stat()):
                    break
            except FileNotFoundError:  # it is just being removed
                continue
            os.close(fd)
        for left in self.folder.iterdir():
            left.unlink()
        return fd

    def _taken(self) -> CatalogError:
        return CatalogError(
            f"there is a machine {self.name!r} already: take another --name, or stop that one with `vmbottle machine stop {self.name}`"
        )

    def discard(self) -> bool:
        """Removes all that is left of it; false if its keeper lives."""
        try:
            fd = self._lock()
        except FileNotFoundError:
            return True
        if fd is None:
            return False
        try:
            aside = self.folder.with_name(f".{self.name}-{secrets.token_hex(4)}")
            with suppress(FileNotFoundError):
                shutil.rmtree(self.folder.rename(aside), ignore_errors=True)
        finally:
            os.close(fd)
        return True

    def wait(self, deadline: Deadline) -> bool:
        """Waits until its keeper has ended; whether it has by the deadline."""
        return bool(deadline.poll(lambda: not self.is_held, every=0.1, first=0.01))

    # -- its keeper ------------------------------------------------------------------------------------------------------------------

    def start(self, order: Mapping[str, Any], say: Callable[[str], None]) -> Record:
        """Has a keeper start it, and returns when it is ready. It stays when this process ends.

        Args:
            order: What the keeper is to do, as `keeper` takes it.
            say: Takes a line about long work.

        Raises:
            CatalogError: There is such a machine already.
            VMBottleError: It could not be started; nothing is left of it.
        """
        hold = self.claim()
        try:
            Record(name=self.name, source=str(order["keywords"].get("source", ""))).write(self.folder / _RECORD)
            process, line = self._spawn(hold)
        except BaseException:
            os.close(hold)
            self.discard()
            raise
        try:
            os.close(hold)  # the keeper has it
            line.send(order)
            record = self._await_ready(line, say)
            line.send({"keep": True})
        except BaseException:
            line.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_UNWIND)
            process.kill()
            process.wait()
            self.discard()
            raise
        line.close()
        process.returncode = 0  # it is on its own from now on, and nobody is to be warned that it still runs
        return record

    def _spawn(self, hold: int) -> tuple[subprocess.Popen[bytes], Line]:
        ours, its = socket.socketpair()
        with its, os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as log:
            process = subprocess.Popen(  # noqa: S603 - argv list, no shell
                [sys.executable, "-P", "-m", "pytest_vmbottle.keeper", str(self.folder), str(hold), str(its.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(hold, its.fileno()),
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
        raise MachineError(f"the keeper of the machine {self.name!r} ended: {self._last_words() or 'it said nothing'}", machine=self.name)

    def _last_words(self) -> str:
        with suppress(OSError):
            return printable(self.log.read_text(errors="replace")[-4000:].strip())
        return ""

    def ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> Any:
        """Asks its keeper for something, and returns the answer.

        Args:
            request: `verb` and what that takes, as `keeper` lists them.
            descriptors: Open files that the keeper is to use.

        Raises:
            MachineError: The machine is not running, or ended meanwhile.
            VMBottleError: What was asked for failed.
        """
        line = self._connect()
        try:
            line.send(request, descriptors)
            message = line.receive()
        except (BrokenPipeError, ConnectionResetError):
            message = None
        finally:
            line.close()
        if message is None:
            # The line breaks a moment before whoever ends has let go of the machine, and only then is it known why.
            self.wait(Deadline(_MOMENT))
            raise self._ended("ended meanwhile")
        return _checked(message)

    def _connect(self) -> Line:
        sock = socket.socket(socket.AF_UNIX)
        try:
            folder = self._open()
            try:
                with _address(folder) as address:
                    sock.connect(address)
            finally:
                os.close(folder)
        except OSError as error:
            sock.close()
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                raise
            raise self._ended("is not running") from None
        return Line(sock)

    def _ended(self, what: str) -> MachineError:
        try:
            record = self.record()
        except FileNotFoundError:
            return MachineError(f"the machine {self.name!r} is gone", machine=self.name)
        what = "is off" if record.state == _OFF else what
        why = f": {record.reason}" if record.reason else ": it is still starting" if record.state == _STARTING else ""
        return MachineError(f"the machine {self.name!r} {what}{why}", machine=self.name)

    def kill(self) -> None:
        """Kills its keeper, and with it the machine, where it does not answer."""
        record = self.record()
        if record.keeper is not None and self.is_held:
            record.keeper.kill()


def _checked(message: Mapping[str, Any]) -> Any:
    """The answer in a message, or the error."""
    if "error" not in message:
        return message.get("answer")
    kind, text = message["error"], str(message.get("message", ""))
    if kind == CommandTimeout.__name__:
        raise CommandTimeout(Result(argv=tuple(message["argv"]), returncode=-9, stdout="", stderr=""), float(message["seconds"]))
    raise _KINDS.get(kind, VMBottleError)(text)


def all_kept(machines: Path) -> tuple[Kept, ...]:
    """The machines in a folder of them, by name."""
    folders = machines.iterdir() if machines.is_dir() else ()
    return tuple(Kept(folder) for folder in sorted(folders) if not folder.name.startswith(".") and folder.is_dir())


def find(machines: Path, name: str) -> Kept:
    """A machine by its name.

    Raises:
        CatalogError: There is none.
    """
    there = {kept.name: kept for kept in all_kept(machines)}
    if name not in there:
        known = f"there are {', '.join(there)}" if there else "there are none"
        raise CatalogError(f"there is no machine {name!r} ({known}): start one with `vmbottle machine start IMAGE --name {name}`")
    return there[name]
