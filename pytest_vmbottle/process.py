"""A command that runs in a guest while the test goes on: `subprocess.Popen`'s feel, with output as it is made."""

from __future__ import annotations

import signal as signals
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backend import MAX_OUTPUT, Channel, Command, Finished, Running, Spawning, not_run
from pytest_vmbottle.errors import CommandTimeout, MachineError
from pytest_vmbottle.ownership import Owner
from pytest_vmbottle.result import Result, printable

__all__ = ["Input", "Process", "Stream"]

_MAX_LINE = 1 << 20
"""Bytes of a line; a longer one is given in pieces."""
_PATIENCE = 15.0
"""Seconds in which a signal must find the command, which may only just have been started, and in which a killed one must be gone."""
_TICK = 0.5
_OWN_TIME = 60.0
_FOREVER = float("inf")


class Stream:
    """The standard output or error of a process: iterating gives each line as it comes, with its end, and waits for the next one.

    Each line is given once, as by a file. `text` is everything again. Of a very long stream the last 16 MiB are kept, and a line says how
    much was left out. Bytes that are not UTF-8 are kept as surrogate escapes. It may be used from several threads.

    Example:
        >>> for line in process.stdout:  # doctest: +SKIP
        ...     if "ready" in line:
        ...         break
    """

    def __init__(self, news: threading.Condition, *, check: Callable[[], object]) -> None:
        """Takes what is notified of new output, and what raises when none can come any more."""
        self._news, self._check = news, check
        self._kept = bytearray()
        self._dropped = 0  # bytes before those that are kept
        self._read = 0  # bytes that have been given as lines
        self._searched = 0  # bytes that have no line's end in them after what was given
        self.ended = False

    def feed(self, data: bytes) -> None:
        """Takes new output, or with `b""` the end."""
        with self._news:
            self._kept += data
            excess = len(self._kept) - MAX_OUTPUT
            if excess > 0:
                del self._kept[:excess]
                self._dropped += excess
            self.ended = self.ended or not data
            self._news.notify_all()

    @property
    def text(self) -> str:
        """What it has said so far, whether it was read or not."""
        with self._news:
            return self._kept.decode("utf-8", "surrogateescape")

    def take(self) -> bytes | None:
        """The next line that is there, `b""` at the end, None if there is none yet. To be called with the condition held."""
        if self._read < self._dropped:
            left_out, self._read = self._dropped - self._read, self._dropped
            return f"[vmbottle: {left_out} bytes left out]\n".encode()
        start = self._read - self._dropped
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
        __tracebackhide__ = True
        while (line := self._next()) is None:
            self._check()
        if not line:
            raise StopIteration
        return line.decode("utf-8", "surrogateescape")

    def _next(self) -> bytes | None:
        """The next line, or None if it has not come for a while."""
        with self._news:
            self._news.wait_for(lambda: self.ended or self._dropped + len(self._kept) > max(self._read, self._searched), _TICK)
            return self.take()

    def __repr__(self) -> str:
        return f"<Stream {printable(self.text[-200:])!r}>"


class Input:
    """The standard input of a process."""

    def __init__(self, running: Callable[[], Running], factor: float) -> None:
        """Takes what returns the command."""
        self._running, self._factor = running, factor

    def write(self, data: str | bytes, *, timeout: float = 60) -> None:
        """Gives the process text or bytes to read.

        Raises:
            BrokenPipeError: It has ended, or its input was closed.
            MachineTimeout: It did not take all of it within `timeout` seconds.
        """
        self._running().write(data.encode() if isinstance(data, str) else data, deadline=Deadline(timeout * self._factor))

    def close(self) -> None:
        """Ends it: the process reads an end of file. May be called again."""
        self._running().close_input()


class Process:
    """A command that runs in a guest, made by `Machine.spawn`. As a context manager it is killed at the end of the block.

    It ends with its machine. A process that it leaves behind runs on, unless it is killed before it ends.

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

    def __init__(self, channel: Channel, command: Command, *, argv: tuple[str, ...], killer: Channel, factor: float = 1.0) -> None:
        """Starts it.

        Args:
            channel: What it runs over.
            command: What to run; its input stays open if it gives none.
            argv: What the test calls it.
            killer: What signals are sent by.
            factor: What all time-outs are multiplied with.

        Raises:
            MachineError: The channel cannot run commands beside others, or the guest cannot be reached.
        """
        if not isinstance(channel, Spawning):
            raise MachineError("this backend's channel runs no commands in the background: use exec, or systemd-run in the guest")
        self.argv = argv
        self._command, self._killer, self._factor = command, killer, factor
        self._began = time.monotonic()
        self._news = threading.Condition()
        self.stdout = Stream(self._news, check=self.poll)
        self.stderr = Stream(self._news, check=self.poll)
        deadline = Deadline(_OWN_TIME * factor)
        self._owner = Owner()
        self._started = channel.start(command, stdout=self.stdout.feed, stderr=self.stderr.feed, deadline=deadline)
        self.stdin = Input(lambda: self._running, factor)
        if command.input:
            threading.Thread(target=self._give, args=(command.input,), daemon=True).start()

    @property
    def _running(self) -> Running:
        """The command, in the process that has the threads which read its output."""
        self._owner.check(f"the machine in which {self.argv[0]!r} runs")
        return self._started

    def _give(self, content: bytes) -> None:
        with suppress(OSError, MachineError):  # it may end without reading all of it
            self.stdin.write(content, timeout=_FOREVER)
            self.stdin.close()

    @property
    def returncode(self) -> int | None:
        """Its status, -N if signal N ended it, or None while it runs; 127 if there is no such program, 126 if it cannot be executed.

        Raises:
            MachineError: The guest is gone, or the connection to it.
        """
        return self._running.returncode

    def poll(self) -> int | None:
        """The same as `returncode`, by subprocess's word for asking."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end and returns its status.

        Args:
            timeout: Seconds to wait at most; by default as long as the machine lives.

        Raises:
            CommandTimeout: It has not ended; it runs on, as with subprocess.
            MachineError: The guest is gone.
        """
        __tracebackhide__ = True
        limit = _FOREVER if timeout is None else timeout * self._factor
        status = self._wait(Deadline(limit))
        if status is None:
            raise CommandTimeout(self._so_far(), limit, killed=False)
        return status

    def _wait(self, deadline: Deadline) -> int | None:
        while (status := self._running.wait(deadline=Deadline(min(_TICK, deadline.remaining)))) is None and not deadline.expired:
            continue
        return status

    def kill(self, signal: str | int = "KILL") -> None:
        """Sends a signal to the process and to all that it has started; by SIGKILL they are gone when this returns.

        Does nothing if it has ended.

        Args:
            signal: Its name, such as `"TERM"`, or its number.

        Raises:
            ValueError: There is no such signal.
            CommandTimeout: It was not to be found, or has survived SIGKILL.
            MachineError: The guest is gone.
        """
        __tracebackhide__ = True
        name = _signal_name(signal)
        deadline = Deadline(_PATIENCE * self._factor)

        def sent() -> bool:
            found = self._killer.run(self._command.killer(name), deadline=deadline).returncode == 0
            return self._running.wait(deadline=Deadline(1.0)) is not None if name == "KILL" else found or self.returncode is not None

        if self.returncode is None and not deadline.poll(sent, every=0.2):
            raise CommandTimeout(self._so_far(), deadline.seconds, killed=False)

    def _so_far(self) -> Result:
        duration = time.monotonic() - self._began
        return Result(argv=self.argv, returncode=-9, stdout=self.stdout.text, stderr=self.stderr.text, duration=duration)

    def lines(self, deadline: Deadline) -> Iterator[tuple[Stream, bytes]]:
        """The lines of both streams as they come, until both have ended or the deadline."""
        streams = [self.stdout, self.stderr]
        while streams and not deadline.expired:
            with self._news:
                found = [(stream, line) for stream in streams if (line := stream.take()) is not None]
                idle = not found and not self._news.wait(min(_TICK, deadline.remaining))
            if idle:
                self.poll()
            streams = [stream for stream in streams if (stream, b"") not in found]
            yield from ((stream, line) for stream, line in found if line)

    def relay(self, stream: Callable[[str], object], seconds: float) -> Finished:
        """Passes all output on to a function, line by line, to the end of the command; after so many seconds it is killed."""
        deadline = Deadline(seconds)
        kept = {self.stdout: bytearray(), self.stderr: bytearray()}

        def pass_on(until: Deadline) -> None:
            for source, line in self.lines(until):
                kept[source] += line[: max(0, MAX_OUTPUT + 1 - len(kept[source]))]
                stream(printable(line.decode("utf-8", "replace")))

        with self:
            if not self._command.input:
                self.stdin.close()
            pass_on(deadline)
            status = self._wait(deadline)
            outlived = status is not None
            if status is None or not (self.stdout.ended and self.stderr.ended):  # what it has left behind counts, too
                self._killer.run(self._command.killer(), deadline=Deadline(_PATIENCE))
                pass_on(Deadline(_PATIENCE))
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
        """Kills it if it runs, and gives up the connection to it; may be called again."""
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
    known = {each.value: each.name.removeprefix("SIG") for each in signals.Signals}
    name = known.get(signal) if isinstance(signal, int) else signal.upper().removeprefix("SIG")
    if name not in known.values():
        raise ValueError(f"there is no signal {signal!r}: write a name such as 'TERM', or a number")
    return str(name)
