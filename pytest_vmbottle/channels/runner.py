"""The channel of a program of our own in the guest, which is part of a pack: one round trip for a command, many at once, with streams.

It is the quickest channel: nothing is asked for again and again, and no program is started but the command itself. The program is
`scripts/runner.py`, on a serial port of its own. The guest's root could put another one in its place, so whatever comes from there is
bounded, and nothing but bytes and numbers.
"""

from __future__ import annotations

import logging
import secrets
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import BinaryIO

import attrs

from pytest_vmbottle.channels.guest_agent import AgentEnded
from pytest_vmbottle.channels.outputs import Outputs
from pytest_vmbottle.channels.port import GUEST_PATH, Channel, Command, Finished, Running, Terminal, not_run
from pytest_vmbottle.errors import MachineDied, MachineError, MachineTimeout
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.digests import digest
from pytest_vmbottle.host.package_data import read_script

__all__ = ["RUNNER", "Runner"]

_SCRIPT, _START = read_script(__package__, "runner.py"), read_script(__package__, "start_runner.sh")
RUNNER = digest(_SCRIPT, _START)
"""Digest of the program in the guest: it is part of a pack."""
_HEAD = struct.Struct(">IBI")
_RUN, _INPUT, _TAKEN, _SYNC, _LEFT, _FILE, _KILL, _TERMINAL, _SIZE = 1, 2, 3, 4, 5, 6, 7, 8, 9
_OUT, _ERR, _END, _REFUSED, _SYNCED, _WRITTEN, _LEVEL = 17, 18, 19, 20, 21, 22, 23
_WITH_FILES, _WITH_TERMINALS = 2, 3
"""Levels from which on a runner has operations on files, and terminals; those in older snapshots have none."""
_SHELL = 'command -v runuser >/dev/null && exec runuser -l "$1"; exec su -l "$1"'
_LAST_WORDS = 2.0
"""Seconds that a program's status may come after the end of its output."""
_MAX_FRAME = 1 << 17
"""Bytes of one frame from the guest; it sends 64 KiB at most."""
_WINDOW = 1 << 20
"""Bytes of input that a command may have unread."""
_PIECE = 1 << 16
_PIECES = 1000
"""Pieces of output that wait for their reader, each of the other stream than the one before."""
_REPLIES = 1000
"""Frames that wait to be sent for a guest that writes for nobody: it could go on for ever."""
_GRACE = 10.0
_LOOK = 0.5
"""Seconds between two looks whether the guest is still there."""
_STUCK = 60.0
"""Seconds that a guest may take to read what is sent to it; its runner always reads."""
_TIME = struct.Struct("@ll")
_EACCES = 13
log = logging.getLogger(__name__)


class _Waiting:
    """Output that waits for its readers, in the order in which it came, and bounded whatever the guest sends."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[int, bytearray]] = deque()
        self._ended: list[int] = []
        self._news = threading.Condition()
        self._size = 0

    def put(self, kind: int, content: bytes) -> None:
        """Add output; `b""` is the end of a stream.

        Raises:
            ValueError: It is more than the guest may send.
        """
        with self._news:
            self._size += len(content)
            # Both streams may fill their windows.
            if content and self._size > 2 * _WINDOW + _MAX_FRAME:
                raise ValueError("it sent more than was taken")
            if not content:
                self._ended.append(kind)
            elif not self._joined(kind, content):
                self._pieces.append((kind, bytearray(content)))
            self._news.notify_all()

    def _joined(self, kind: int, content: bytes) -> bool:
        # Neighbours are of different streams, so the last two are all that there is to look at. Of very many pieces the order counts less
        # than the memory that each takes.
        for back in range(1, 1 + min(len(self._pieces), 1 if len(self._pieces) < _PIECES else 2)):
            if self._pieces[-back][0] == kind:
                self._pieces[-back][1].extend(content)
                return True
        return False

    def get(self) -> Sequence[tuple[int, bytes]]:
        """Wait for output, and return it."""
        with self._news:
            self._news.wait_for(lambda: self._pieces or self._ended)
            found = [*((kind, bytes(piece)) for kind, piece in self._pieces), *((kind, b"") for kind in self._ended)]
            self._pieces.clear()
            self._ended.clear()
            return found

    def delivered(self, size: int) -> None:
        """Make room for so many bytes, which their reader has taken."""
        with self._news:
            self._size -= size


class _Job(Running):
    """A command that runs.

    Attributes:
        number: Its number in frames.
    """

    def __init__(
        self, runner: Runner, number: int, command: Command, sinks: tuple[Callable[[bytes], object], Callable[[bytes], object]]
    ) -> None:
        self._runner, self.number, self._command = runner, number, command
        self._sinks = dict(zip((_OUT, _ERR), sinks, strict=True))
        self._status: int | None = None
        self._error: MachineError | None = None
        self._changed = threading.Condition()
        self._room, self._reads = _WINDOW, True
        self._owed = {_OUT: 0, _ERR: 0}
        self._waiting: _Waiting | None = None
        self._is_closed = False

    # -- what comes from the guest; called by the thread that reads ------------------------------------------------------------------

    def take(self, kind: int, content: bytes) -> None:
        """Take a frame."""
        if kind in self._owed:
            if self._waiting is None:
                self._deliver(kind, content)
            else:
                self._waiting.put(kind, content)
            return
        with self._changed:
            if kind == _END:
                self._status = _number(content, -255, 255)
            elif kind == _WRITTEN:
                written = _number(content, -1, _WINDOW)
                self._reads, self._room = self._reads and written >= 0, self._room + max(written, 0)
            elif kind == _REFUSED:
                self._status = 126 if _number(content, 1, 4095) == _EACCES else 127
            self._changed.notify_all()
        if kind == _REFUSED:
            self.take(_ERR, not_run(Finished(returncode=self._status or 0, stderr=b"env: "), self._command).stderr)
            self._end_streams()
        self._forget_if_over()

    def _deliver(self, kind: int, content: bytes) -> None:
        sink = self._sinks.get(kind)
        if sink is None:
            return
        try:
            sink(content)
        except OSError:  # nobody takes it any more: the command need not be held up
            self._sinks[kind] = lambda _: None
        if content:
            self._owed[kind] += len(content)
            # Seldom: each of these costs the guest time.
            if self._owed[kind] >= _WINDOW // 4:
                self._runner.owe(_TAKEN, self.number, bytes([kind]) + b"%d" % self._owed[kind])
                self._owed[kind] = 0
            return
        with self._changed:
            self._sinks.pop(kind, None)
            self._changed.notify_all()
        self._forget_if_over()

    def deliver_beside(self) -> None:
        """Have what comes delivered by a thread of its own: a sink that takes its time holds up no other command."""
        waiting = self._waiting = _Waiting()

        def deliver() -> None:
            while self._sinks:
                for kind, content in waiting.get():
                    # Counted before the guest is told that it may send more.
                    waiting.delivered(len(content))
                    with suppress(MachineError, OSError):  # whoever waits for the command hears of it
                        self._deliver(kind, content)

        threading.Thread(target=deliver, name="vmbottle-output", daemon=True).start()

    def _end_streams(self) -> None:
        for kind in self._owed:
            self.take(kind, b"")

    def _forget_if_over(self) -> None:
        if self.is_over:
            self._runner.forget(self.number)

    def fail(self, error: MachineError) -> None:
        """End it, because its runner has ended."""
        with self._changed:
            if self.is_over:
                return
            self._error = error
            self._changed.notify_all()
        self._end_streams()

    # -- what its user asks ----------------------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Tell whether nothing comes any more."""
        return self._is_closed or self._error is not None or (self._status is not None and not self._sinks)

    @property
    def has_ended(self) -> bool:
        """Tell whether the command itself has ended; something that it left behind may hold its output."""
        return self._status is not None

    @property
    def returncode(self) -> int | None:
        """The status (see `Running.returncode`)."""
        with self._changed:
            is_over = self.is_over
        # While output can still come, a guest that is gone must not pass for a silent one.
        if not is_over:
            self._runner.check()
        with self._changed:
            if self._error is not None:
                raise self._error
            return self._status if not self._sinks else None

    def wait(self, *, deadline: Deadline) -> int | None:
        """Wait for the status (see `Running.wait`)."""
        self._until(lambda: self.is_over, deadline)
        return self.returncode

    def _until(self, done: Callable[[], bool], deadline: Deadline) -> bool:
        while True:
            with self._changed:
                if self._changed.wait_for(done, min(_LOOK, deadline.remaining)):
                    return True
            # Before the deadline is looked at: who waits in many short turns is to learn of a machine that has died, too.
            self._runner.check()
            if deadline.expired:
                return False

    def write(self, data: bytes, *, deadline: Deadline) -> None:
        """Write to the command's input (see `Running.write`)."""
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            if not self._until(lambda: self._room >= _PIECE or not self._reads or self.is_over, deadline):
                raise MachineTimeout(f"the command {self._command.argv[0]!r} did not read its input within {deadline.seconds:g} s")
            with self._changed:
                if not self._reads or self._is_closed or self._status is not None or self._error is not None:
                    raise BrokenPipeError
                self._room -= len(piece)
            self._runner.send(_INPUT, self.number, piece)

    def close_input(self) -> None:
        """End the input."""
        self._runner.send(_INPUT, self.number, b"")

    def close(self) -> None:
        """Take no more of its output; a command runs on, as with an output that is /dev/null, and an operation ends."""
        with self._changed:
            runs, self._is_closed = not self.is_over, True
            self._changed.notify_all()
        self._runner.forget(self.number)
        self._end_streams()
        if runs:
            with suppress(MachineError):
                self._runner.send(_KILL if self._command.operation else _LEFT, self.number, b"")


class Runner(Channel):
    """A connection to the runner of a guest; safe to use from several threads."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        alive: Callable[[], None],
        changes: Callable[[], int],
        is_there: Callable[[], bool],
        emulated: bool = False,
    ) -> None:
        """Take a connected socket; nothing is asked yet.

        Args:
            sock: The host's end of the runner's port.
            alive: Function that raises `MachineDied` if the guest can no longer answer.
            changes: Function that returns how often the port was opened or closed in the guest.
            is_there: Function that tells whether a runner has the port open.
            emulated: Whether the guest's processor is emulated.
        """
        self._sock, self._alive, self._changes, self._is_there = sock, alive, changes, is_there
        self._emulated = emulated
        # For writing alone: the thread that reads waits as long as it takes.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIME.pack(0, round(_LOOK * 1e6)))
        self._jobs: dict[int, _Job] = {}
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._owed: deque[bytes] = deque()
        self._last = secrets.randbits(30)
        self._known: int | None = None
        self._level = 1
        self._failed: int | None = None
        self._is_missed = False
        self._starting = threading.Lock()
        self._token = b""
        self._synced = threading.Event()
        self._reader: threading.Thread | None = None

    # -- whether it is there ---------------------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Tell whether the runner that answered is still the one that has the port open."""
        return self._known is not None and self._known == self._changes()

    def warn_if_lost(self) -> None:
        """Log a warning, once, if the runner that was there has ended or does not answer any more."""
        if self._is_missed and not self.is_ready:
            self._is_missed = False
            log.warning("the guest's runner was ended, or does not answer any more: commands go by the guest agent, and take longer")

    def expect_none(self) -> None:
        """Miss no runner: the guest has booted."""
        self._is_missed = False

    @property
    def has_files(self) -> bool:
        """Tell whether it is there and has operations on files (see `Channel.has_files`)."""
        return self.is_ready and self._level >= _WITH_FILES

    @property
    def has_terminals(self) -> bool:
        """Tell whether it is there and has terminals."""
        return self.is_ready and self._level >= _WITH_TERMINALS

    def start_in(self, channel: Channel, *, deadline: Deadline, again: bool = True) -> bool:
        """Have another channel start the runner in the guest if it does not run; return whether it answers.

        Args:
            channel: The other channel.
            deadline: Deadline of all that.
            again: Whether to try it also where it has failed before and the guest is still the same.
        """
        with self._starting:
            if self.is_ready:
                return True
            if not again and self._failed == self._changes():
                return False
            started = self._start_in(channel, deadline)
            self._failed = None if started else self._changes()
            return started

    def _start_in(self, channel: Channel, deadline: Deadline) -> bool:
        if not self._is_there():
            # The program is the input, so nothing is written to the guest's disk.
            words = ("/bin/sh", "-c", _START, "sh", "1" if self._emulated else "0")
            script = Command(argv=words, env=(("PATH", GUEST_PATH),), input=_SCRIPT.encode())
            if channel.run(script, deadline=deadline).returncode:
                return False
        return self.adopt(deadline=deadline)

    def adopt(self, *, deadline: Deadline) -> bool:
        """Take up a runner that runs; return whether it answers."""
        known, self._level = self._changes(), 1
        if not self._is_there() or not self._answers(deadline, lambda token: self.send(_SYNC, 0, token)):
            return False
        self._known = known
        self._is_missed = True
        return True

    def _answers(self, deadline: Deadline, ask: Callable[[bytes], object]) -> bool:
        if self._reader is None:
            self._reader = threading.Thread(target=self._read, name="vmbottle-runner", daemon=True)
            self._reader.start()
        self._synced.clear()
        self._token = secrets.token_bytes(16)
        ask(self._token)
        return self._synced.wait(deadline.remaining)

    @contextmanager
    def quiet(self, deadline: Deadline) -> Iterator[None]:
        """Send nothing for a block, after the guest has read what was sent: no frame is cut in two where the machine is written down."""
        with self._sending:
            if self.is_ready:
                self._answers(deadline, lambda token: self._put(_frame(_SYNC, 0, token)))
            yield
        self._pay()

    def check(self) -> None:
        """Raise an error if a command that runs can no longer be heard of."""
        self._alive()
        if not self.is_ready:
            self._end("it was stopped, or the guest reboots")
            self._known = None

    def _end(self, reason: str, error: MachineError | None = None) -> None:
        with self._lock:
            jobs, self._jobs = self._jobs, {}
        lost = f"the guest's runner ended while a command ran: {reason}; the command may still run there, but its status is lost"
        for job in jobs.values():
            job.fail(error or AgentEnded(lost))

    def _end_with_the_machine(self, reason: str) -> None:
        """End all commands by the reason of the machine's end, which is known a moment after its ports are closed."""
        try:
            if self._jobs:
                Deadline(2.0).poll(self._alive, every=0.05)
        except MachineError as error:
            self._end(reason, error)
        self._end(reason)

    # -- frames ----------------------------------------------------------------------------------------------------------------------

    def send(self, kind: int, number: int, content: bytes) -> None:
        """Send a frame.

        Raises:
            MachineDied: The connection is closed.
        """
        try:
            with self._sending:
                self._put(_frame(kind, number, content))
        except MachineError:
            raise
        except OSError as error:
            Deadline(2.0).poll(self._alive, every=0.05)
            raise MachineDied(f"the connection to the guest's runner is closed: {error}") from error
        self._pay()

    def _put(self, frame: bytes) -> None:
        """Write a whole frame; the caller has the lock.

        Raises:
            MachineDied: The guest can no longer answer.
            MachineTimeout: It takes nothing. What it took of the frame is lost, and the runner is not asked again.
        """
        left, limit = memoryview(frame), Deadline(_STUCK)
        while left:
            try:
                left = left[self._sock.send(left) :]
            except BlockingIOError:  # the time of SO_SNDTIMEO is over, as for a guest that hangs
                self._alive()
                if limit.expired:
                    self._known = None
                    reason = f"it has taken nothing for {_STUCK:g} s"
                    self._end(reason)
                    raise MachineTimeout(f"the guest's runner does not answer: {reason}") from None

    def owe(self, kind: int, number: int, content: bytes) -> None:
        """Send a frame at once or, while others send, after theirs; the thread that reads waits for nobody."""
        self._owed.append(_frame(kind, number, content))
        self._pay()

    def _pay(self) -> None:
        # After each sending: what was added meanwhile by those who found the lock taken is seen here.
        while self._owed and self._sending.acquire(blocking=False):
            try:
                while self._owed:
                    self._put(self._owed.popleft())
            finally:
                self._sending.release()

    def _read(self) -> None:
        buffer = bytearray()
        try:
            while data := self._sock.recv(1 << 18):
                buffer += data
                self._parse(buffer)
            self._known = None
            self._end_with_the_machine("the hypervisor closed its port")
        except (OSError, ValueError, MachineError) as error:
            self._known = None
            self._end(str(error))

    def _parse(self, buffer: bytearray) -> None:
        if self._known is None and not self._synced.is_set() and not self._begins(buffer):
            return
        while len(buffer) >= _HEAD.size:
            size, kind, number = _HEAD.unpack_from(buffer)
            if size > _MAX_FRAME:
                raise ValueError("it sent too long a frame")
            if len(buffer) < _HEAD.size + size:
                return
            content = bytes(buffer[_HEAD.size : _HEAD.size + size])
            del buffer[: _HEAD.size + size]
            self._take(kind, number, content)

    def _begins(self, buffer: bytearray) -> bool:
        """Drop all before the answer to our first frame: there may be the end of something that was meant for another host."""
        answer = _frame(_SYNCED, 0, self._token)
        found = buffer.find(answer)
        del buffer[: found if found >= 0 else max(0, len(buffer) - len(answer))]
        return found >= 0

    def _take(self, kind: int, number: int, content: bytes) -> None:
        if kind == _SYNCED and content == self._token:
            self._synced.set()
        elif kind == _LEVEL:
            self._level = _number(content, 1, 1 << 20)
        elif (job := self._jobs.get(number)) is not None:
            job.take(kind, content)
        # Of a command that was left, or that another machine had started from which this one was cloned.
        elif kind in (_OUT, _ERR) and content and len(self._owed) < _REPLIES:
            self.owe(_LEFT, number, b"")

    def forget(self, number: int) -> None:
        """Take no more frames for a command."""
        with self._lock:
            self._jobs.pop(number, None)

    # -- commands --------------------------------------------------------------------------------------------------------------------

    def _job(
        self,
        command: Command,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        *,
        has_input: bool,
        beside: bool = False,
    ) -> _Job:
        job = self._new(command, stdout, stderr)
        if beside:
            job.deliver_beside()
        kind, words = (_FILE, command.operation) if self._operates(command) else (_RUN, _words(command))
        self.send(kind, job.number, _joined("1" if has_input else "0", *words))
        return job

    def _new(self, command: Command, stdout: Callable[[bytes], object], stderr: Callable[[bytes], object]) -> _Job:
        with self._lock:
            self._last = (self._last + 1) % (1 << 32)
            job = self._jobs[self._last] = _Job(self, self._last, command, (stdout, stderr))
        return job

    def _operates(self, command: Command) -> bool:
        return bool(command.operation) and self.has_files

    def run(self, command: Command, *, deadline: Deadline) -> Finished:
        """Run a command to its end (see `Channel.run`)."""
        outputs = Outputs()
        job = self._job(command, outputs.stdout.write, outputs.stderr.write, has_input=bool(command.input))
        try:
            if len(command.input) > _WINDOW:
                threading.Thread(target=self._feed, args=(job, command.input), name="vmbottle-input", daemon=True).start()
            elif command.input:
                self._feed(job, command.input)
            status = job.wait(deadline=deadline)
            if status is not None:
                return outputs.finished(command, status=status, timed_out=False)
            ended = job.has_ended
            if command.operation:  # it has started nothing
                self.send(_KILL, job.number, b"")
            if not self._operates(command):
                self.run(command.killer(), deadline=Deadline(_GRACE))
            job.wait(deadline=Deadline(_GRACE))
            return attrs.evolve(outputs.finished(command, status=None, timed_out=True), outlived=ended)
        finally:
            job.close()

    @staticmethod
    def _feed(job: _Job, content: bytes) -> None:
        try:
            job.write(content, deadline=Deadline(1e9))
            job.close_input()
        except (BrokenPipeError, MachineError):
            return  # whoever waits for the command hears of it

    def start(
        self, command: Command, *, stdout: Callable[[bytes], object], stderr: Callable[[bytes], object], deadline: Deadline
    ) -> Running:
        """Start a command beside others (see `Channel.start`)."""
        del deadline  # it takes no time
        return self._job(command, stdout, stderr, has_input=True, beside=True)

    def terminal(self, *, user: str, kind: str, size: tuple[int, int], deadline: Deadline, command: Command | None = None) -> Terminal:
        """Start a login shell or a command on a terminal (see `Channel.terminal`)."""
        del deadline  # it takes no time
        shell = Command(argv=("/bin/sh", "-c", _SHELL, "sh", user), env=(("PATH", GUEST_PATH), ("TERM", kind)))
        tag, name, path, *words = _words(command or shell)
        screen = _Screen(self, lambda stdout, stderr: self._new(command or shell, stdout, stderr))
        self.send(_TERMINAL, screen.job.number, _joined(tag, name, path, f"{size[0]} {size[1]}", *words))
        return screen

    def put(self, source: BinaryIO, command: Command, *, deadline: Deadline) -> Finished:
        """Run a command with a host file as its input (see `Channel.put`)."""
        outputs = Outputs()
        job = self._job(command, outputs.stdout.write, outputs.stderr.write, has_input=True)
        try:
            while piece := source.read(_PIECE):
                job.write(piece, deadline=deadline)
            job.close_input()
        except BrokenPipeError:
            pass  # its status says why
        try:
            status = job.wait(deadline=deadline)
            if status is None:
                self.run(command.killer(), deadline=Deadline(_GRACE))
            return outputs.finished(command, status=status, timed_out=status is None)
        finally:
            job.close()

    def close(self) -> None:
        """Close the connection; may be called again."""
        # Before it is closed: a thread that waits in `recv` would not notice.
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class _Screen(Terminal):
    """A terminal in the guest (see `Terminal`).

    Attributes:
        job: The command on it.
    """

    def __init__(self, runner: Runner, made: Callable[[Callable[[bytes], object], Callable[[bytes], object]], _Job]) -> None:
        self._runner = runner
        # A program can wait for output together with other things.
        self._ours, self._theirs = socket.socketpair()
        self.job = made(self._shown, self._said)
        self.job.deliver_beside()

    def _shown(self, data: bytes) -> None:
        if data:
            self._theirs.sendall(data)
        else:
            self._theirs.close()

    def _said(self, data: bytes) -> None:
        # Of a program that cannot be started; else there is one stream, and this one is at its end.
        self._theirs.sendall(data)

    def fileno(self) -> int:
        return self._ours.fileno()

    def receive(self) -> bytes:
        with suppress(ConnectionResetError):
            return self._ours.recv(_PIECE)
        return b""

    def send(self, data: bytes) -> None:
        with suppress(OSError, MachineError):  # the program may be gone, or read nothing
            self.job.write(data, deadline=Deadline(_GRACE))

    def resize(self, columns: int, lines: int) -> None:
        with suppress(MachineError):
            self._runner.send(_SIZE, self.job.number, b"%d %d" % (columns, lines))

    @property
    def status(self) -> int | None:
        with suppress(MachineError):
            return self.job.wait(deadline=Deadline(_LAST_WORDS))
        return None

    def close(self) -> None:
        # First, so that nobody waits for room for what nobody reads.
        self._ours.close()
        self.job.close()
        # Whatever was to be shown still finds nobody.
        self._theirs.close()


def _words(command: Command) -> tuple[str, ...]:
    path = dict(command.env).get("PATH", GUEST_PATH)
    environment = (f"{name}={value}" for name, value in command.environment)
    return (command.tag, command.tag if command.gets_group else "", path, str(len(command.argv)), *command.argv, *environment)


def _joined(*words: str) -> bytes:
    return "\0".join(words).encode("utf-8", "surrogateescape")


def _frame(kind: int, number: int, content: bytes) -> bytes:
    return _HEAD.pack(len(content), kind, number) + content


def _number(content: bytes, least: int, most: int) -> int:
    if len(content) > 20:  # noqa: PLR2004 - more is no number that counts here
        raise ValueError("it sent a number that is none")
    number = int(content)
    if not least <= number <= most:
        raise ValueError(f"it sent {number}, which is not between {least} and {most}")
    return number
