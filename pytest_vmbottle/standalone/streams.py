"""A guest command whose three streams are open files of the host, as in a shell."""

from __future__ import annotations

import os
import select
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_vmbottle.channels.port import Channel, Command, Running
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host.deadline import FOREVER, Deadline
from pytest_vmbottle.machine.machine import Machine
from pytest_vmbottle.result import CommandTimeout, Result

__all__ = ["Piped", "connect"]

_ATOMIC = 4096
"""Bytes that a ready pipe takes without blocking (PIPE_BUF)."""
_CHUNK = 1 << 16
_PACE = 0.1
# Seconds for a killed command to be gone.
_GRACE = 10.0
_OPENING = 60.0


class _Sink:
    """Writer to another process's open file, which stops as soon as it is told to.

    The file's reader may never read.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # Small pieces to a pipe: POLLOUT promises room for PIPE_BUF bytes, and a larger write could block.
        self._step = _CHUNK if stat.S_ISREG(os.fstat(fd).st_mode) else _ATOMIC
        self._ready = select.poll()
        # The descriptor may block, and must stay so: its open file is the client's as well, which has not asked for O_NONBLOCK.
        self._ready.register(fd, select.POLLOUT)
        self._watched = select.poll()
        self._watched.register(fd, 0)
        self.given_up = False
        self.ended = threading.Event()

    def look(self) -> None:
        """Give up if nobody can read any more what is written: a command that says nothing would not notice."""
        # Asked for nothing: poll(2) reports errors in any case. Of a pipe that is the end of its readers.
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in self._watched.poll(0)):
            self.given_up = True

    def write(self, data: bytes) -> None:
        """Write all of `data`; no data is the end."""
        if not data:
            self.ended.set()
        # Asked again after each piece, since the block may be over while the reader does not read.
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
    """A guest command whose output goes to open files of the host."""

    def __init__(self, running: Running, sinks: Sequence[_Sink], argv: Sequence[str], kill: Callable[[], object]) -> None:
        """Take a command that was started."""
        self._running, self._sinks, self._argv, self._kill = running, sinks, argv, kill

    def wait(self, *, cancelled: Callable[[], bool], deadline: Deadline | None) -> int:
        """Wait until the command and everything that holds its output has ended, and return its status.

        Args:
            cancelled: Function that tells whether nobody waits for the command any more; then it is killed.
            deadline: Deadline at which it is killed.

        Raises:
            CommandTimeout: The command was killed at the deadline.
            MachineError: The guest is gone.
        """
        while True:
            status = self._running.wait(deadline=Deadline(_PACE))
            # The end of the command is not the end of its output, part of which may not be written yet.
            if status is not None and all(sink.ended.is_set() or sink.given_up for sink in self._sinks):
                return status
            for sink in self._sinks:
                sink.look()
            late = deadline is not None and deadline.expired
            # In each of these cases nobody can take the output any more, or wants to.
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
    """Run a command for a block, with three open files as its input, output and error.

    Raises:
        MachineError: The guest is gone, or its backend has no channel for this.
    """
    command = machine.guest.command(tuple(argv), env=env, cwd=cwd, user=user)
    source, *targets = descriptors
    # A command without input need not wait for a login, which takes 10 s without KVM.
    channel = machine.lifecycle.channel if _is_null(source) else machine.lifecycle.stream_channel(Deadline(_OPENING))
    sinks = [_Sink(target) for target in targets]
    running = _started(channel, command, sinks)
    # A pipe whose end wakes the feeder at once, however long its source says nothing.
    over, end = os.pipe()
    feeder = threading.Thread(target=_feed, args=(running, source, over), daemon=True)
    feeder.start()
    try:
        yield Piped(running, sinks, argv, lambda: machine.guest.kill(command))
    finally:
        os.close(end)
        for sink in sinks:
            sink.given_up = sink.given_up or not sink.ended.is_set()
        running.close()
        feeder.join()  # whose descriptors may mean other files when this block is over
        os.close(over)


def _started(channel: Channel, command: Command, sinks: Sequence[_Sink]) -> Running:
    out, err = sinks
    return channel.start(command, stdout=out.write, stderr=err.write, deadline=Deadline(_OPENING))


def _is_null(fd: int) -> bool:
    return os.fstat(fd).st_rdev == Path(os.devnull).stat().st_rdev


def _feed(running: Running, source: int, over: int) -> None:
    """Copy the source to the command's input until either ends, or `over` is a pipe without writers.

    Nothing is read from the source that the command does not get.
    """
    ready = select.poll()
    ready.register(source, select.POLLIN)
    ready.register(over, 0)
    with suppress(OSError, MachineError):  # it takes no more
        while over not in (fd for fd, _ in ready.poll()):
            with suppress(BlockingIOError):
                data = os.read(source, _CHUNK)
                if not data:
                    break
                running.write(data, deadline=Deadline(FOREVER))
    with suppress(MachineError):
        running.close_input()
