"""A command in a guest whose three streams are open files of the host: pipes, files or terminals, as a shell joins them."""

from __future__ import annotations

import os
import select
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backend import Channel, Command, Running, Spawning
from pytest_vmbottle.errors import CommandTimeout, MachineError
from pytest_vmbottle.machine import Machine
from pytest_vmbottle.result import Result

__all__ = ["Piped", "connect"]

_ATOMIC = 4096
"""Bytes that a pipe which is ready takes without a wait (PIPE_BUF)."""
_CHUNK = 1 << 16
_PACE = 0.1
_GRACE = 10.0
_OPENING = 60.0
_FOREVER = 1e8


class _Sink:
    """Writes into an open file of somebody else's, and gives up as soon as it is told to: its reader may take forever."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._step = _CHUNK if stat.S_ISREG(os.fstat(fd).st_mode) else _ATOMIC
        self._ready = select.poll()
        self._ready.register(fd, select.POLLOUT)
        self.given_up = False
        self.ended = threading.Event()

    def write(self, data: bytes) -> None:
        """Writes all of it; nothing is the end."""
        if not data:
            self.ended.set()
        while data and not self.given_up:
            if self._ready.poll(_PACE * 1000):
                data = data[self._write(data[: self._step]) :]

    def _write(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError:  # nobody reads it any more
            self.given_up = True
            raise


class Piped:
    """A command that runs so."""

    def __init__(self, running: Running, sinks: Sequence[_Sink], argv: Sequence[str], kill: Callable[[], object]) -> None:
        """Takes a command that was started."""
        self._running, self._sinks, self._argv, self._kill = running, sinks, argv, kill

    def wait(self, *, cancelled: Callable[[], bool], deadline: Deadline | None) -> int:
        """Waits until the command has ended and nothing holds its output any more; returns its status.

        Args:
            cancelled: Asked now and then whether nobody waits for it any more; then it is killed.
            deadline: When it is killed anyway.

        Raises:
            CommandTimeout: It was killed at the deadline.
            MachineError: The guest is gone.
        """
        while True:
            status = self._running.wait(deadline=Deadline(_PACE))
            if status is not None and all(sink.ended.is_set() or sink.given_up for sink in self._sinks):
                return status
            late = deadline is not None and deadline.expired
            if late or cancelled() or any(sink.given_up for sink in self._sinks):
                self._end()
            if late and deadline is not None:
                raise CommandTimeout(Result(argv=tuple(self._argv), returncode=-9, stdout="", stderr=""), deadline.seconds)
            if status is None and any(sink.given_up for sink in self._sinks):
                return -13  # as SIGPIPE would have it
            if cancelled():
                return -1

    def _end(self) -> None:
        with suppress(MachineError):
            self._kill()
            self._running.wait(deadline=Deadline(_GRACE))


@contextmanager
def connect(  # noqa: PLR0913 - the keywords are those of exec
    machine: Machine,
    argv: Sequence[str],
    descriptors: Sequence[int],
    *,
    env: Mapping[str, str],
    cwd: str | None,
    user: str | None,
) -> Iterator[Piped]:
    """A command that runs with three open files as its standard input, output and error, for the length of a block.

    Raises:
        MachineError: The guest is gone, or its backend has no channel for this.
    """
    command = machine.command(argv, env=env, cwd=cwd, user=user)
    channel = machine.bulk(Deadline(_OPENING))
    source, *targets = descriptors
    sinks = [_Sink(target) for target in targets]
    running = _started(channel, command, sinks)
    over = threading.Event()
    feeder = threading.Thread(target=_feed, args=(running, source, over), daemon=True)
    feeder.start()
    try:
        yield Piped(running, sinks, argv, lambda: machine.kill(command))
    finally:
        over.set()
        for sink in sinks:
            sink.given_up = sink.given_up or not sink.ended.is_set()
        running.close()
        feeder.join()  # whose descriptors may mean other files when this block is over


def _started(channel: Channel, command: Command, sinks: Sequence[_Sink]) -> Running:
    if not isinstance(channel, Spawning):
        raise MachineError("the backend of this machine runs no command whose streams are open files")
    out, err = sinks
    return channel.start(command, stdout=out.write, stderr=err.write, deadline=Deadline(_OPENING))


def _feed(running: Running, source: int, over: threading.Event) -> None:
    """Passes on what is to be read, until its end or that of the command, of which nothing is taken that it does not get."""
    ready = select.poll()
    ready.register(source, select.POLLIN)
    with suppress(OSError, MachineError):  # it takes no more
        while not over.is_set():
            if not ready.poll(_PACE * 1000):
                continue
            with suppress(BlockingIOError):
                data = os.read(source, _CHUNK)
                if not data:
                    break
                running.write(data, deadline=Deadline(_FOREVER))
    running.close_input()
