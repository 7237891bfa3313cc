"""Commands in a guest for clients: the answer at the end, or an event stream while they run."""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import attrs

from pytest_vmbottle.channels.port import MAX_OUTPUT
from pytest_vmbottle.result import CommandTimeout
from pytest_vmbottle.service.problems import problem_of
from pytest_vmbottle.service.streams import CHUNK, Asked, asking

if TYPE_CHECKING:
    from pytest_vmbottle.service.schema import Command
    from pytest_vmbottle.service.threads import Threads
    from pytest_vmbottle.standalone.client import Kept

__all__ = ["Executions"]

_STREAMS = ("stdout", "stderr")
_QUIET = 15.0
"""Seconds without output after which an event stream gets a comment: a proxy could take it for dead, or its client be gone."""
_KILLED = -9


@attrs.frozen
class Executions:
    """Runner of commands in one machine."""

    kept: Kept
    threads: Threads

    @asynccontextmanager
    async def _asked(self, command: Command) -> AsyncIterator[Asked]:
        request = {
            "verb": "exec",
            "argv": command.words,
            "env": command.env,
            "cwd": command.cwd,
            "user": command.user,
            "timeout": command.timeout,
        }
        with _input(command.stdin) as source:
            async with asking(self.kept, request, self.threads, source=source, outputs=len(_STREAMS)) as asked:
                yield asked

    async def whole(self, command: Command) -> dict[str, Any]:
        """Run a command to its end, and return its status and the beginnings of both streams.

        Raises:
            MachineError: The machine is not running, or was lost.
        """
        began = time.monotonic()
        async with self._asked(command) as asked:
            outputs = await asyncio.gather(*map(_beginning, asked.streams))
            status, timed_out = await _status(asked)
        texts = {name: data.decode("utf-8", "replace") for name, (data, _) in zip(_STREAMS, outputs, strict=True)}
        about = {"truncated": any(more for _, more in outputs), "timed_out": timed_out, "seconds": round(time.monotonic() - began, 3)}
        return {"returncode": status, **texts, **about}

    async def events(self, command: Command) -> AsyncGenerator[bytes, None]:
        """Run a command, and yield its output as server-sent events while it runs.

        The events are `stdout` and `stderr` with a `text`, then `exit` with `returncode`, `timed_out` and `seconds`, or `error` with a
        problem. If the client hangs up, the command ends too.
        """
        began = time.monotonic()
        try:
            async with self._asked(command) as asked:
                async for name, text in _merged(asked):
                    yield _event(name, {"text": text}) if name else b":\n\n"
                status, timed_out = await _status(asked)
        except Exception as error:  # the answer has begun, so its status cannot tell
            yield _event("error", problem_of(error).members)
        else:
            yield _event("exit", {"returncode": status, "timed_out": timed_out, "seconds": round(time.monotonic() - began, 3)})


@contextmanager
def _input(text: str) -> Iterator[BinaryIO]:
    """Hold the input of a command in a file for a block: unlike a pipe, nobody has to feed it while the output comes."""
    # Its own device if there is none: by that a daemon knows that the command reads nothing.
    with Path(os.devnull).open("rb", buffering=0) if not text else tempfile.TemporaryFile(buffering=0) as file:
        if text:
            file.write(text.encode())
            file.seek(0)
        yield file


async def _status(asked: Asked) -> tuple[int, bool]:
    """Return the status of a command, and whether it was killed at its time-out."""
    try:
        return await asked.answer, False
    except CommandTimeout:
        return _KILLED, True


async def _beginning(stream: asyncio.StreamReader) -> tuple[bytes, bool]:
    """Return the first bytes of a stream, and whether there were more, which are read all the same."""
    kept, size = [], 0
    while data := await stream.read(CHUNK):
        if size < MAX_OUTPUT:
            kept.append(data[: MAX_OUTPUT - size])
        size += len(data)
    return b"".join(kept), size > MAX_OUTPUT


async def _merged(asked: Asked) -> AsyncIterator[tuple[str, str]]:
    """Yield the names and texts of both streams as they come, and empty ones when nothing does."""
    # Bounded: if the client takes nothing more is read, and so the command has to wait.
    queue: asyncio.Queue[tuple[str, str] | None] = asyncio.Queue(4)

    async def follow(name: str, stream: asyncio.StreamReader) -> None:
        # A character may be cut by the end of a piece.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while data := await stream.read(CHUNK):
            await queue.put((name, decoder.decode(data)))
        await queue.put((name, decoder.decode(b"", final=True)))
        await queue.put(None)

    followers = [asyncio.create_task(follow(*each)) for each in zip(_STREAMS, asked.streams, strict=True)]
    try:
        ended = 0
        while ended < len(followers):
            try:
                item = await asyncio.wait_for(queue.get(), _QUIET)
            except TimeoutError:
                yield "", ""
                continue
            if item is None:
                ended += 1
            elif item[1]:
                yield item
    finally:
        for follower in followers:
            follower.cancel()


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    # As JSON, in which nothing that a guest writes can begin a line.
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
