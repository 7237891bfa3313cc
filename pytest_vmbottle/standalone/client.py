"""Client side of machines that run without pytest: their records, and requests to their daemons.

Each machine has a folder `machines/NAME` in the catalog, with a record, a socket, the console and the log of its daemon. The
daemon holds a lock on that folder as long as it lives, so that nobody takes a dead one for running.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import pickle
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
from typing import TYPE_CHECKING, Any

import attrs

from pytest_vmbottle.errors import BackendUnavailable, CatalogError, MachineError, SpecError, VMBottleError
from pytest_vmbottle.host import records
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.host.locks import is_locked, tried, try_lock
from pytest_vmbottle.host.supervisor import Identity
from pytest_vmbottle.result import CommandTimeout, Result, printable

if TYPE_CHECKING:
    from pytest_vmbottle.machine.snapshot import Snapshot
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["Kept", "Line", "Record", "all_kept", "find", "listen", "packed", "peer_is_us"]

_STARTING, _RUNNING, _STOPPED, _OFF, _ERROR = "starting", "running", "stopped", "off", "error"
_RECORD, _SOCKET, _LOG, _CONSOLE = "record.json", "socket", "keeper.log", "console.log"
_MOMENT = 1.0
"""Seconds within which a process that only looks at a folder releases it."""
_UNWIND = 30.0
"""Seconds that a daemon may take to end a machine whose start was cancelled."""
# Bytes of a message: far more than any request or answer has.
_MAX_MESSAGE = 8 << 20
# Errors that are raised again by their own kind. Only these, since the name comes from another process.
_KINDS: dict[str, type[VMBottleError]] = {kind.__name__: kind for kind in (BackendUnavailable, CatalogError, MachineError, SpecError)}


@attrs.frozen(kw_only=True)
class Record:
    """Record of a machine that runs, or ran, without pytest.

    Attributes:
        name: The machine's name.
        source: The source that it was started from.
        state: `"starting"`, `"running"`, `"stopped"`, `"off"`: the guest powered itself off, or `"error"`: it was lost, or ended otherwise
            than asked.
        reason: The reason why it does not run, or what is wrong with it; else empty.
        since: The time when it got into this state, or was found dead, in seconds since 1970.
        keeper: The process id of its daemon.
        spec: Its main properties: `arch`, `cpus`, `memory`, `disk`, `network`, `user`.
        backend: The backend that runs it.
        id: An identifier that is unique on this host.
        pid: The hypervisor's process id.
        ports: Forwarded ports of the guest, with the host's ports on 127.0.0.1.
        argv: The hypervisor's command line.
        until: The time when it is ended, in seconds since 1970; None if it runs until it is stopped.
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
    until: float | None = None

    @property
    def is_on(self) -> bool:
        """Tell whether the machine is starting or running."""
        return self.state in (_STARTING, _RUNNING)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read what `write` has written.

        Raises:
            FileNotFoundError: There is no record.
            Damaged: The record is damaged.
        """

        def make(facts: Mapping[str, Any]) -> Record:
            keeper = Identity(**facts["keeper"]) if facts["keeper"] else None
            return cls(**{**facts, "keeper": keeper, "argv": tuple(facts["argv"])})

        return records.read_as(path, make)

    def write(self, path: Path) -> None:
        """Write the record atomically."""
        keeper = None if self.keeper is None else self.keeper._asdict()
        records.write(path, attrs.asdict(self) | {"keeper": keeper})


class Line:
    """A connection between two processes, with one JSON object per line.

    Descriptors may come with the first object.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Take a connected unix socket."""
        self._sock = sock
        self._buffer = bytearray()
        self.descriptors: list[int] = []

    def fileno(self) -> int:
        """Return a descriptor that is readable when the other side has sent something, or is gone."""
        return self._sock.fileno()

    def send(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a message."""
        data = json.dumps(message).encode() + b"\n"
        sent = socket.send_fds(self._sock, [data], list(descriptors)) if descriptors else 0
        if sent < len(data):  # whoever has got it all may have answered and gone, and then even nothing is a broken pipe
            self._sock.sendall(data[sent:])

    def receive(self) -> dict[str, Any] | None:
        """Receive the next message; return None if the other side is gone.

        Raises:
            ValueError: The message is invalid.
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
            # A peer that never ends its message would fill the memory.
            if len(self._buffer) > _MAX_MESSAGE:
                raise ValueError("the message is incomplete")
        text, _, rest = self._buffer.partition(b"\n")
        self._buffer = bytearray(rest)
        message = json.loads(text)
        if not isinstance(message, dict):
            raise ValueError("the message is not an object")  # noqa: TRY004 - it is a value that came from outside
        return message

    @property
    def is_cut(self) -> bool:
        """Tell whether the other side is gone.

        To be asked only when no more messages are expected from it.
        """
        try:
            return self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close the connection, and the descriptors that came with it."""
        self._sock.close()
        while self.descriptors:
            os.close(self.descriptors.pop())


def peer_is_us(sock: socket.socket) -> bool:
    """Tell whether the other end of a unix socket belongs to this user."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return bool(uid == os.geteuid())


@contextmanager
def _address(folder: int) -> Iterator[str]:
    """Yield the address of the socket in an open folder.

    It is short however deep the folder is, because an address holds 107 bytes only.
    """
    yield f"/proc/self/fd/{folder}/{_SOCKET}"


def listen(folder: int) -> socket.socket:
    """Create a socket in an open folder, to which this user's processes can connect."""
    sock = socket.socket(socket.AF_UNIX)
    with _address(folder) as address:
        sock.bind(address)
    sock.listen(16)
    return sock


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
            return Record(name=self.name, source="", state=_STARTING if held else _STOPPED, reason="" if held else "it never ran")
        except records.Damaged as error:
            return Record(name=self.name, source="", state=_ERROR, reason=f"its record {self.folder / _RECORD} cannot be read: {error}")
        if record.is_on and not held:
            return self._found_dead(record)
        return record

    def _found_dead(self, record: Record) -> Record:
        """Correct the record of a machine whose daemon died before it could write the end.

        The time of the death is unknown. So the time when it was found is written down, and all later readers see the same.
        """
        found = attrs.evolve(
            record, state=_STOPPED, reason="its daemon died, and the machine with it", since=time.time(), ports={}, pid=None
        )
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

    def claim(self) -> int:
        """Create the folder and lock it, and return the descriptor that passes the lock on.

        Raises:
            CatalogError: There is a machine of this name already.
        """
        # Until the folder is locked or taken: between its making and the lock somebody may remove it.
        while True:
            private_dir(self.folder)
            with suppress(FileNotFoundError):  # it is just being removed
                fd = try_lock(self.folder, deadline=Deadline(_MOMENT))
                break
        if fd is None:
            raise self._taken()
        # Left behind by a machine of this name whose daemon has ended.
        for left in self.folder.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        return fd

    def _taken(self) -> CatalogError:
        return CatalogError(
            f"there is a machine {self.name!r} already: take another --name, or stop that one with `vmbottle machine stop {self.name}`"
        )

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

    # -- its keeper ------------------------------------------------------------------------------------------------------------------

    def start(self, order: Mapping[str, Any], say: Callable[[str], None]) -> Record:
        """Start a daemon with the machine, and return when it is ready.

        The daemon goes on when this process ends.

        Args:
            order: The daemon's instructions: `catalog`, `folder`, `settings` and `keywords`, and perhaps `snapshot` (see `packed`),
                `seconds`, after which the machine is ended, and `memory_seconds`, which it waits for memory at most.
            say: Function that gets a line about long work.

        Raises:
            CatalogError: There is a machine of this name already.
            VMBottleError: The machine could not be started; nothing is left of it.
        """
        hold = self.claim()
        try:
            # A first record, so that the name is listed while the daemon imports its modules.
            Record(name=self.name, source=str(order["keywords"].get("source", ""))).write(self.folder / _RECORD)
            process, line = self._spawn(hold)
        except BaseException:
            os.close(hold)
            self.discard()
            raise
        try:
            os.close(hold)  # the keeper has it
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
            self.discard()
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
            # By a descriptor, which makes the address short. A link in its place is not followed.
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                with _address(folder) as address:
                    sock.connect(address)
            finally:
                os.close(folder)
        except OSError as error:
            sock.close()
            # No socket yet, or one whose daemon has ended: sockets are not removed with their process.
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
    # As text alone: its attributes stay with the daemon.
    raise _KINDS.get(kind, VMBottleError)(text)


def packed(snapshot: Snapshot) -> str:
    """Return a snapshot for an order. Its layers are left out, because a daemon cannot import their functions."""
    plain = attrs.evolve(snapshot, spec=attrs.evolve(snapshot.spec, source=snapshot.spec.image, **_mutable(snapshot.spec)))
    # In text, because an order is JSON. Who reads it is a child of ours.
    return base64.b64encode(pickle.dumps(plain)).decode()


def _mutable(spec: MachineSpec) -> dict[str, Any]:
    """Return the fields of a spec that it takes in another form than it has."""
    return {"env": dict(spec.env), "files": dict(spec.files)}


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
