"""A command that runs in a guest while the test goes on, like `subprocess.Popen`."""

from __future__ import annotations

import signal as signals
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from pytest_vmbottle.channels.port import MAX_OUTPUT, Channel, Command, Finished, Running, not_run
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host.deadline import FOREVER, Deadline
from pytest_vmbottle.host.ownership import Owner
from pytest_vmbottle.result import CommandTimeout, Result, printable

__all__ = ["Input", "Process", "Stream"]

_MAX_LINE = 1 << 20
"""Bytes of a line; a longer one is returned in pieces."""
_PATIENCE = 15.0
"""Seconds for a signal to reach a command (which may still be starting), and for a killed command to be gone."""
# Seconds after which a wait looks whether the machine is still there: its end is no news of a stream.
_TICK = 0.5
# Seconds for the start of a command.
_OWN_TIME = 60.0


class Stream:
    """The standard output or error of a process.

    Iterating yields each line with its end as it comes, and waits for the next one.

    Each line is yielded once, as by a file; `text` holds everything. Of a very long stream the last 16 MiB are kept, and a line says how
    much was left out. Bytes that are not UTF-8 are kept as surrogate escapes. A stream may be used from several threads.

    Example:
        >>> for line in process.stdout:  # doctest: +SKIP
        ...     if "ready" in line:
        ...         break
    """

    def __init__(self, news: threading.Condition, *, check: Callable[[], object]) -> None:
        """Create a stream.

        `news` is notified of new output; `check` raises when no more output can come.
        """
        self._news, self._check = news, check
        self._kept = bytearray()
        # All three count from the beginning of the output and not of the buffer, from which old output is cut off.
        self._dropped = 0  # bytes before those that are kept
        self._read = 0  # bytes that have been given as lines
        self._searched = 0  # bytes that have no line's end in them after what was given
        self.ended = False

    def feed(self, data: bytes) -> None:
        """Append new output; `b""` is the end."""
        with self._news:
            self._kept += data
            excess = len(self._kept) - MAX_OUTPUT
            if excess > 0:
                # The oldest output goes first: of a process that runs for long, the end is what matters.
                del self._kept[:excess]
                self._dropped += excess
            self.ended = self.ended or not data
            self._news.notify_all()

    @property
    def text(self) -> str:
        """Return all output so far, whether it was read or not."""
        with self._news:
            return self._kept.decode("utf-8", "surrogateescape")

    def take(self) -> bytes | None:
        """Return the next complete line, `b""` at the end, or None if there is none yet.

        The caller holds the condition.
        """
        # The gap is told once, at the place where it is.
        if self._read < self._dropped:
            left_out, self._read = self._dropped - self._read, self._dropped
            return f"[vmbottle: {left_out} bytes left out]\n".encode()
        start = self._read - self._dropped
        # Where the last search ended: a line that grows in small pieces would be searched again and again.
        end = self._kept.find(b"\n", max(start, self._searched - self._dropped)) + 1
        self._searched = self._dropped + len(self._kept)
        if not end and not self.ended and len(self._kept) - start < _MAX_LINE:
            return None
        line = bytes(self._kept[start : min(end or len(self._kept), start + _MAX_LINE)])
        self._read += len(line)
        self._searched = self._read
        return line

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while (line := self._next()) is None:
            self._check()
        if not line:
            raise StopIteration
        return line.decode("utf-8", "surrogateescape")

    def _next(self) -> bytes | None:
        """Wait a moment for the next line; return None if it has not come."""
        with self._news:
            self._news.wait_for(lambda: self.ended or self._dropped + len(self._kept) > max(self._read, self._searched), _TICK)
            return self.take()

    def __repr__(self) -> str:
        return f"<Stream {printable(self.text[-200:])!r}>"


class Input:
    """The standard input of a process."""

    def __init__(self, running: Callable[[], Running], factor: float) -> None:
        """Create the input of a command that `running` returns."""
        self._running, self._factor = running, factor

    def write(self, data: str | bytes, *, timeout: float = 60) -> None:
        """Write text or bytes to the process.

        Raises:
            BrokenPipeError: The process has ended, or its input was closed.
            MachineTimeout: The process did not read all of it within `timeout` seconds.
        """
        self._running().write(data.encode() if isinstance(data, str) else data, deadline=Deadline(timeout * self._factor))

    def close(self) -> None:
        """Close the input, so that the process reads an end of file.

        May be called again.
        """
        self._running().close_input()


class Process:
    """A command that runs in a guest, started by `Machine.spawn`.

    As a context manager it is killed at the end of the block.

    The command ends with its machine. A child that it leaves behind runs on, unless the command is killed before it ends.

    Attributes:
        argv: The command.
        stdin: Its standard input; `write` and `close`.
        stdout: Its standard output, an iterator over lines as they come; `stdout.text` is all of it.
        stderr: Its standard error, likewise.

    Example:
        >>> with vm.spawn("journalctl -f -n 0") as journal:  # doctest: +SKIP
        ...     vm.exec(["logger", "hello"])
        ...     assert "hello" in next(journal.stdout)
    """

    def __init__(  # noqa: PLR0913
        self,
        channel: Channel,
        command: Command,
        *,
        argv: tuple[str, ...],
        killer: Channel,
        factor: float = 1.0,
        ended: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Start the command.

        Args:
            channel: The channel that it runs over.
            command: The command; its input stays open if it has none.
            argv: The words that the test gave.
            killer: The channel that signals are sent over.
            factor: The factor of all time-outs.
            ended: Function that is called with the status when the command is first seen to have ended.

        Raises:
            MachineError: The channel cannot run commands beside others, or the guest cannot be reached.
        """
        self.argv = argv
        self._command, self._killer, self._factor = command, killer, factor
        self._ended, self._told = ended, False
        self._began = time.monotonic()
        # One condition for both streams, so that `lines` can wait for either.
        self._news = threading.Condition()
        self.stdout = Stream(self._news, check=self.poll)
        self.stderr = Stream(self._news, check=self.poll)
        deadline = Deadline(_OWN_TIME * factor)
        # Before the start, which begins the threads that a forked child does not have.
        self._owner = Owner()
        self._started = channel.start(command, stdout=self.stdout.feed, stderr=self.stderr.feed, deadline=deadline)
        # Through `_running`, so that a forked child is refused here too.
        self.stdin = Input(lambda: self._running, factor)
        # In a thread, because a command that does not read its input must not block the test.
        if command.input:
            threading.Thread(target=self._give, args=(command.input,), daemon=True).start()

    @property
    def _running(self) -> Running:
        """Return the command; raise in a forked child, which has no threads to read its output."""
        self._owner.check(f"the machine in which {self.argv[0]!r} runs")
        return self._started

    def _give(self, content: bytes) -> None:
        with suppress(OSError, MachineError):  # it may end without reading all of it
            self.stdin.write(content, timeout=FOREVER)
            # Its input was given as a whole, so the command must read an end after it.
            self.stdin.close()

    @property
    def returncode(self) -> int | None:
        """Return the exit status, -N for signal N, or None while it runs.

        It is 127 if there is no such program, and 126 if it cannot be executed.

        Raises:
            MachineError: The guest or the connection to it is gone.
        """
        return self._seen(self._running.returncode)

    def _seen(self, status: int | None) -> int | None:
        # Told once: the status is asked for by each wait and each line.
        if status is not None and not self._told:
            self._told = True
            self._ended(status)
        return status

    def poll(self) -> int | None:
        """Return `returncode`, as `subprocess.Popen.poll` does."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the command and return its status.

        Args:
            timeout: Seconds to wait at most; by default as long as the machine lives.

        Raises:
            CommandTimeout: The command has not ended in time; it runs on, as with subprocess.
            MachineError: The guest is gone.
        """
        limit = FOREVER if timeout is None else timeout * self._factor
        status = self._wait(Deadline(limit))
        if status is None:
            raise CommandTimeout(self._so_far(), limit, killed=False)
        return status

    def _wait(self, deadline: Deadline) -> int | None:
        while (status := self._running.wait(deadline=Deadline(min(_TICK, deadline.remaining)))) is None and not deadline.expired:
            continue
        return self._seen(status)

    def kill(self, signal: str | int = "KILL") -> None:
        """Send a signal to the process and all its children.

        After SIGKILL they are gone when this returns.

        Does nothing if the process has ended.

        Args:
            signal: The signal's name, such as `"TERM"`, or its number.

        Raises:
            ValueError: There is no such signal.
            CommandTimeout: The process was not found, or survived SIGKILL.
            MachineError: The guest is gone.
        """
        name = _signal_name(signal)
        deadline = Deadline(_PATIENCE * self._factor)

        def sent() -> bool:
            # A command that was only just started may not be found yet: then the signal is sent again.
            found = self._killer.run(self._command.killer(name), deadline=deadline).returncode == 0
            return self._running.wait(deadline=Deadline(1.0)) is not None if name == "KILL" else found or self.returncode is not None

        if self.returncode is None and not deadline.poll(sent, every=0.2):
            raise CommandTimeout(self._so_far(), deadline.seconds, killed=False)

    def _so_far(self) -> Result:
        duration = time.monotonic() - self._began
        return Result(argv=self.argv, returncode=-9, stdout=self.stdout.text, stderr=self.stderr.text, duration=duration)

    def lines(self, deadline: Deadline) -> Iterator[tuple[Stream, bytes]]:
        """Yield the lines of both streams as they come, until both have ended or the deadline."""
        streams = [self.stdout, self.stderr]
        while streams and not deadline.expired:
            with self._news:
                found = [(stream, line) for stream in streams if (line := stream.take()) is not None]
                idle = not found and not self._news.wait(min(_TICK, deadline.remaining))
            # Raises if the guest is gone, whose output would otherwise be awaited for ever.
            if idle:
                self.poll()
            # An empty line is the end of a stream; a line of a file has at least its newline.
            streams = [stream for stream in streams if (stream, b"") not in found]
            yield from ((stream, line) for stream, line in found if line)

    def relay(self, stream: Callable[[str], object], seconds: float) -> Finished:
        """Pass all output to a function, line by line; kill the command after `seconds`."""
        deadline = Deadline(seconds)
        kept = {self.stdout: bytearray(), self.stderr: bytearray()}

        def pass_on(until: Deadline) -> None:
            for source, line in self.lines(until):
                # One byte more than is kept, which tells that there was more.
                kept[source] += line[: max(0, MAX_OUTPUT + 1 - len(kept[source]))]
                # The function may print to a CI log, where a guest's text could be taken for commands.
                stream(printable(line.decode("utf-8", "replace")))

        # The context kills the command if `stream` raises.
        with self:
            # `exec` without input gives an empty one: a command that reads would else wait for ever.
            if not self._command.input:
                self.stdin.close()
            pass_on(deadline)
            status = self._wait(deadline)
            outlived = status is not None
            if status is None or not (self.stdout.ended and self.stderr.ended):  # what it has left behind counts, too
                patience = _PATIENCE * self._factor
                self._killer.run(self._command.killer(), deadline=Deadline(patience))
                # What it printed before it was killed may still be on the way.
                pass_on(Deadline(patience))
                status = None
        out, err = (bytes(text[:MAX_OUTPUT]) for text in kept.values())
        truncated = any(len(text) > MAX_OUTPUT for text in kept.values())
        finished = Finished(
            returncode=-9 if status is None else status,
            stdout=out,
            stderr=err,
            truncated=truncated,
            timed_out=status is None,
            outlived=status is None and outlived,
        )
        return not_run(finished, self._command)

    def close(self) -> None:
        """Kill the process if it runs, and close its connection; may be called again."""
        try:
            with suppress(MachineError):  # it has ended with its machine
                self.kill()
        finally:
            self._running.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Process {printable(' '.join(self.argv))!r}>"


def _signal_name(signal: str | int) -> str:
    # By the host's numbers, which are the guest's too on the architectures that guests have here.
    known = {each.value: each.name.removeprefix("SIG") for each in signals.Signals}
    name = known.get(signal) if isinstance(signal, int) else signal.upper().removeprefix("SIG")
    if name not in known.values():
        raise ValueError(f"there is no signal {signal!r}: write a name such as 'TERM', or a number")
    return str(name)
