"""Pipes between a daemon and a client: what a guest sends goes through in pieces, however much it is."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any, BinaryIO

from pytest_vmbottle.service.threads import Threads
from pytest_vmbottle.standalone.client import Kept

__all__ = ["CHUNK", "Asked", "asking", "pieces"]

CHUNK = 1 << 18
_PIPE = 1 << 20
"""Bytes of a pipe: the most that an ordinary user may ask for (pipe-max-size in proc(5))."""


class Asked:
    """A request to a daemon that is under way, with the streams that it writes.

    Attributes:
        answer: The daemon's answer, or its error.
        streams: What it writes, in the order of its descriptors.
    """

    def __init__(self, answer: asyncio.Task[Any], streams: Sequence[asyncio.StreamReader]) -> None:
        """Take a request that was sent."""
        self.answer, self.streams = answer, streams


@asynccontextmanager
async def asking(
    kept: Kept, request: Mapping[str, Any], threads: Threads, *, source: BinaryIO | None = None, outputs: int = 1
) -> AsyncIterator[Asked]:
    """Send a request to a daemon for a block, which reads what it writes.

    At the end of the block the pipes are closed, by which the daemon knows that nobody wants more.

    Args:
        kept: The machine.
        request: The request, with its verb.
        threads: The threads, of which it takes one.
        source: A file for the daemon to read from, as its first descriptor.
        outputs: Pipes for the daemon to write to.
    """
    with ExitStack() as stack:
        given = [os.dup(source.fileno())] if source is not None else []
        readers = []
        for _ in range(outputs):
            ours, its = os.pipe()
            with suppress(OSError):  # this user has enough of them: a small one does as well
                fcntl.fcntl(its, fcntl.F_SETPIPE_SZ, _PIPE)
            given.append(its)
            readers.append(os.fdopen(ours, "rb", buffering=0))
        ends = _Ends(given)
        streams = [await _reader(stack, each) for each in readers]
        answer = asyncio.create_task(_answered(kept, request, threads, ends))
        try:
            yield Asked(answer, streams)
        finally:
            answer.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await answer


class _Ends:
    """Descriptors for a daemon, which are closed once: by the thread that sends them or, if it never does, by whoever made them."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self.descriptors = tuple(descriptors)
        self._lock, self._owned = threading.Lock(), False

    def take(self) -> bool:
        """Make the caller the one who closes them; return false if somebody else does."""
        with self._lock:
            taken, self._owned = not self._owned, True
        return taken

    def close(self) -> None:
        for each in self.descriptors:
            os.close(each)


async def _answered(kept: Kept, request: Mapping[str, Any], threads: Threads, ends: _Ends) -> Any:
    def ask() -> Any:
        if not ends.take():
            return None
        try:
            return kept.ask(request, ends.descriptors)
        finally:
            # The end of the streams: the daemon's own copies are closed by now.
            ends.close()

    try:
        return await threads.run(ask)
    finally:
        # It may be cancelled or refused before it has a thread.
        if ends.take():
            ends.close()


async def _reader(stack: ExitStack, file: BinaryIO) -> asyncio.StreamReader:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=CHUNK)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    stack.callback(transport.close)
    return reader


async def pieces(asked: Asked) -> AsyncIterator[bytes]:
    """Yield what a request writes to its only stream, and raise its error.

    Raises:
        Exception: The error of the request, at the beginning if nothing was written, else in the middle.
    """
    (stream,) = asked.streams
    while data := await stream.read(CHUNK):
        yield data
    await asked.answer
