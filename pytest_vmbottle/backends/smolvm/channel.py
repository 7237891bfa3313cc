"""Commands in a guest by `smolvm machine exec`.

smolvm gives the status of a command as its own, with 137 for one that was killed and for one that ended with 137 alike, and 1 for its own
failures too. So a line of shell in the guest says how the command ended, behind a mark on stderr that no command knows.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import secrets
import shlex
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from typing import IO, BinaryIO

from pytest_vmbottle.backends.smolvm.engine import Engine, failure, plain
from pytest_vmbottle.channels.outputs import Outputs
from pytest_vmbottle.channels.port import GUEST_PATH, Channel, Command, Finished, Running, Terminal
from pytest_vmbottle.errors import MachineTimeout
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script

__all__ = ["Outcome", "SmolvmChannel", "SmolvmProcess", "SmolvmTerminal"]

_CHUNK = 1 << 16
_GRACE = 10.0
_CUT_OFF, _DYING = b"connection closed", 3.0
"""Message of smolvm when its machine ends meanwhile, and seconds for which that machine's process may still be seen."""
_EVIDENCE = 8192
"""Bytes of the end of stderr to keep, in case smolvm itself failed."""
_WRAP = read_script(__package__, "wrap.sh")
_ENDING = re.compile(rb"(.*?) (\d{1,3})\n", re.DOTALL)
_BY_SIGNAL = 128
_UNSAID = frozenset({signal.SIGINT, signal.SIGPIPE})
"""Signals that a shell does not report."""
_LOGIN = read_script(__package__, "login.sh")


class Outcome:
    """Filter that takes the mark and the command's status out of its stderr."""

    def __init__(self, mark: str, sink: Callable[[bytes], object]) -> None:
        """Take the mark, and the sink for the rest."""
        self._mark = b"\x1e" + mark.encode()
        self._sink = sink
        self._held = b""
        self._begun = False
        self.returncode: int | None = None
        self.evidence = b""

    def feed(self, data: bytes) -> None:
        """Take output, or `b""` at its end."""
        self._held += data
        self.evidence = (self.evidence + data)[-_EVIDENCE:]
        if not self._begun and data and b"\n" not in self._held and b"note: no packed".startswith(self._held[:15]):
            return  # it may become smolvm's own note
        if not self._begun:
            self._begun, self._held = True, plain(self._held)
        before, found, after = self._held.partition(self._mark)
        # In front of the number stands what the guest's shell says of a signal, such as `Killed`. The line may still be incomplete.
        ending = _ENDING.match(after) if found else None
        if ending:
            self.returncode = _status(int(ending[2]), killed=bool(ending[1].strip()))
            self._pass(before + after[ending.end() :])
        elif found and data:
            self._pass(before)
            self._held = self._mark + after
        else:
            self._hold_back(data)
        if not data:
            self._sink(b"")

    def _pass(self, data: bytes) -> None:
        self._held = b""
        if data:
            self._sink(data)

    def _hold_back(self, data: bytes) -> None:
        """Pass on all but a possible beginning of the mark."""
        # The longest end of the text that the mark begins with: output is cut anywhere, in the middle of the mark too.
        kept = next((n for n in range(min(len(self._mark), len(self._held)), 0, -1) if self._mark.startswith(self._held[-n:])), 0)
        split = len(self._held) - (kept if data else 0)
        held = self._held[split:]
        self._pass(self._held[:split])
        self._held = held


def _status(number: int, *, killed: bool) -> int:
    # So a command that itself ends with 130 or 141 is taken for one that SIGINT or SIGPIPE ended.
    return _BY_SIGNAL - number if killed or number - _BY_SIGNAL in _UNSAID else number


class SmolvmProcess(Running):
    """A command in a guest, with the smolvm that holds its streams (see `Running`).

    Killing that smolvm kills the command.

    Attributes:
        unwritten: The reason that output could not be written.
    """

    def __init__(  # noqa: PLR0913 - as Channel.start, and what it is told by
        self,
        argv: list[str],
        mark: str,
        words: str,
        *,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        alive: Callable[[], None],
        closed: Callable[[SmolvmProcess], object],
    ) -> None:
        """Start the command.

        Args:
            argv: The command line of smolvm.
            mark: The mark before the command's status on stderr.
            words: The command, as a shell reads it.
            stdout: Sink for its output, with `b""` at the end.
            stderr: Sink for its stderr, likewise.
            alive: Function that raises if the machine is gone.
            closed: Function called when the command is given up.
        """
        self._argv, self._alive, self._closed = argv, alive, closed
        self._verdict = Outcome(mark, stderr)
        self._writing = threading.Lock()
        self.unwritten: list[OSError] = []
        self._process = subprocess.Popen(  # noqa: S603 - argv list, no shell
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C on this terminal is not for it, and `close` can kill it with all that is in its group.
            start_new_session=True,
        )
        streams = ((self._process.stdout, stdout), (self._process.stderr, self._verdict.feed))
        self._readers = [
            threading.Thread(target=_drain, args=(stream, sink, self.unwritten), daemon=True) for stream, sink in streams if stream
        ]
        # Arguments that are no UTF-8 came in as surrogates (PEP 383), and go out as the bytes that they were.
        # A thread writes them, because more than a pipe holds waits for the guest to read it.
        text = words.encode(errors="surrogateescape")
        self._opening = threading.Thread(target=self._open, args=(f"{mark} {len(text)}\n".encode() + text,), daemon=True)
        for thread in (*self._readers, self._opening):
            thread.start()

    def _open(self, data: bytes) -> None:
        if self._process.stdin is not None:
            with suppress(OSError):  # smolvm has ended, and says why
                self._process.stdin.write(data)
                self._process.stdin.flush()

    @property
    def returncode(self) -> int | None:
        """The status, or -N for signal N; None while the command runs."""
        if self._process.poll() is None:
            return None
        for reader in self._readers:
            # smolvm is gone, but its pipes may still hold output, and the status is the last part of it.
            reader.join(_GRACE)
        # Without a verdict smolvm itself failed, or its machine ended; the latter is seen in the process a moment later.
        if self._verdict.returncode is None:
            Deadline(_DYING if _CUT_OFF in self._verdict.evidence else 0).poll(self._alive)
            raise failure(self._argv, self._process.returncode, self._verdict.evidence)
        return self._verdict.returncode

    def wait(self, *, deadline: Deadline) -> int | None:
        """Wait for the status."""
        # In steps, so that a panic or the machine's end is noticed even if smolvm still waits.
        while not self._ended(min(0.5, deadline.remaining)):
            if deadline.expired:
                return None
            self._alive()
        return self.returncode

    def _ended(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
            return True
        return False

    def feed(self, source: BinaryIO) -> None:
        """Feed a whole file to the command's input, in a thread."""

        def copy() -> None:
            with suppress(OSError):  # the command ended without reading all of it
                while chunk := source.read(_CHUNK):
                    self._write(chunk)
            self.close_input()

        threading.Thread(target=copy, daemon=True).start()

    def _write(self, data: bytes) -> None:
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            raise BrokenPipeError("its input was closed")
        # The command comes before its input, on the same stream.
        self._opening.join()
        stdin.write(data)
        stdin.flush()

    def write(self, data: bytes, *, deadline: Deadline) -> None:
        """Write to the command's input (see `Running.write`)."""
        failures: list[OSError] = []

        def send() -> None:
            try:
                with self._writing:
                    self._write(data)
            except (OSError, ValueError) as error:
                failures.append(BrokenPipeError(f"the command reads no more input, because it has ended or its input was closed: {error}"))

        # A thread, because a pipe that nobody reads blocks without a limit.
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        sender.join(min(deadline.remaining, threading.TIMEOUT_MAX))  # no end at all is more than threads understand
        if sender.is_alive():
            raise MachineTimeout(f"the command did not read its input within {deadline.seconds:g} s")
        if failures:
            raise failures[0]

    def close_input(self) -> None:
        """End the input; may be called again."""
        self._opening.join(_GRACE)
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def close(self) -> None:
        """End the smolvm that holds the command, and so the command; may be called again."""
        self._closed(self)
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.close_input()
        for reader in self._readers:
            reader.join(_GRACE)


def _drain(stream: IO[bytes], sink: Callable[[bytes], object], unwritten: list[OSError]) -> None:
    chunk = b"the first"
    with stream:
        while chunk:
            # Not `stream.read`, which would wait until a whole chunk is there.
            chunk = os.read(stream.fileno(), _CHUNK)
            try:
                if not unwritten:  # else it is read to its end all the same, so that the command is not held up
                    sink(chunk)
            except OSError as error:
                unwritten.append(error)


class SmolvmChannel(Channel):
    """Channel that runs each command by a smolvm of its own; safe to use from several threads."""

    def __init__(self, engine: Engine, name: str, *, alive: Callable[[], None]) -> None:
        """Take the machine, and a function that raises if it is gone."""
        self._engine, self._name, self._alive = engine, name, alive
        self._running: set[SmolvmProcess] = set()

    def _begin(self, command: Command, stdout: Callable[[bytes], object], stderr: Callable[[bytes], object]) -> SmolvmProcess:
        # A mark that no command knows: otherwise a command could write a status of its own to stderr.
        mark = secrets.token_hex(8)
        environment = [f"{name}={value}" for name, value in command.env]
        # `env -i`, as over SSH: all channels give a command the same environment.
        words = f"env -i VMBOTTLE_EXEC={command.tag} {shlex.join((*environment, *command.argv))}"
        argv = self._engine.exec_argv(self._name, ("/bin/sh", "-c", _WRAP))
        closed = self._running.discard
        process = SmolvmProcess(argv, mark, words, stdout=stdout, stderr=stderr, alive=self._alive, closed=closed)
        self._running.add(process)
        return process

    def start(
        self,
        command: Command,
        *,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        deadline: Deadline,  # noqa: ARG002 - it begins at once
    ) -> SmolvmProcess:
        """Start a command (see `Channel.start`)."""
        return self._begin(command, stdout, stderr)

    def run(self, command: Command, *, deadline: Deadline) -> Finished:
        """Run a command to its end (see `Channel.run`)."""
        return self._execute(command, BytesIO(command.input), None, deadline)

    def put(self, source: BinaryIO, command: Command, *, deadline: Deadline) -> Finished:
        """Run a command with a host file as its input."""
        return self._execute(command, source, None, deadline)

    def get(self, command: Command, sink: BinaryIO, *, deadline: Deadline) -> Finished:
        """Run a command and write its standard output to a host file."""
        return self._execute(command, None, sink, deadline)

    def _execute(self, command: Command, source: BinaryIO | None, sink: BinaryIO | None, deadline: Deadline) -> Finished:
        outputs = Outputs()
        process = self._begin(command, (sink or outputs.stdout).write, outputs.stderr.write)
        try:
            process.feed(source or BytesIO())
            status = process.wait(deadline=deadline)
            timed_out = status is None
            if timed_out:
                # In the guest first, with all that it has started: the end of smolvm on this side reaches only the command.
                self._kill(command)
                process.wait(deadline=Deadline(_GRACE))
        finally:
            process.close()
        if process.unwritten:
            raise process.unwritten[0]
        return outputs.finished(command, status=status, timed_out=timed_out)

    def _kill(self, command: Command) -> None:
        """End a command and all its descendants, by the tag in their environments."""
        process = self._begin(command.killer(), lambda _: None, lambda _: None)
        try:
            process.close_input()
            process.wait(deadline=Deadline(_GRACE))
        finally:
            process.close()

    def terminal(
        self,
        *,
        user: str,
        kind: str,
        size: tuple[int, int],
        deadline: Deadline,  # noqa: ARG002
        command: Command | None = None,
    ) -> SmolvmTerminal:
        """Start a user's login shell or a command on a terminal (see `Channel.terminal`)."""
        environment: tuple[str, ...] = (f"PATH={GUEST_PATH}", f"TERM={kind}", "LANG=C.UTF-8")
        words: tuple[str, ...] = ("/bin/sh", "-c", _LOGIN, "sh", user)
        if command is not None:
            environment, words = tuple(f"{name}={value}" for name, value in command.environment), command.argv
        words = ("env", "-i", *environment, *words)
        return SmolvmTerminal(self._engine.exec_argv(self._name, words, terminal=True), size)

    def close(self) -> None:
        """End the commands that still run; others can be run."""
        # A copy: each `close` removes an entry.
        for process in list(self._running):
            process.close()


class SmolvmTerminal(Terminal):
    """A program on a terminal in the guest, by a smolvm on a terminal here (see `Terminal`)."""

    def __init__(self, argv: list[str], size: tuple[int, int]) -> None:
        """Start the program in a window of this many columns and lines."""
        self._master, slave = pty.openpty()
        try:
            self._resize(*size)
            self._process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)  # noqa: S603
        except BaseException:
            os.close(self._master)
            raise
        finally:
            # The child alone keeps the other end, so that its end is seen here as EIO.
            os.close(slave)

    def fileno(self) -> int:
        """Return the descriptor, readable when there is output."""
        return self._master

    def receive(self) -> bytes:
        """Return new output; nothing at its end."""
        with suppress(OSError):  # EIO: nobody has the other end open
            while data := os.read(self._master, _CHUNK):
                if said := plain(data):  # smolvm's own note, which may come by itself, is not the end
                    return said
        return b""

    def send(self, data: bytes) -> None:
        """Type into the terminal, if the program is still there."""
        with suppress(OSError):
            while data:
                data = data[os.write(self._master, data) :]

    def resize(self, columns: int, lines: int) -> None:
        """Resize the terminal; smolvm tells the guest."""
        with suppress(OSError):
            self._resize(columns, lines)
            # By hand: the kernel tells a terminal's foreground group, and this terminal controls no session.
            os.killpg(self._process.pid, signal.SIGWINCH)

    def _resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    @property
    def status(self) -> int | None:
        """Exit status of the program, or None if it is not known."""
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(2)
            # Below 0 a signal ended smolvm, which says nothing about the program in the guest.
            return None if code < 0 else code
        return None

    def close(self) -> None:
        """Hang up; may be called again."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1
