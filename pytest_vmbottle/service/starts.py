"""Starts of machines that are under way, and those that failed."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import attrs

from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.service.problems import Problem
from pytest_vmbottle.shown import printable
from pytest_vmbottle.standalone.record import ERROR, STARTING, Record

__all__ = ["Starts"]

_FAILURES = 100
"""Failed starts that are remembered."""
_QUEUE = 64
"""Starts that are under way or wait at most."""
_UNWIND = 60.0
"""Seconds for a start that was cancelled to end its machine."""
_LINE = 1 << 20


@attrs.define
class _Start:
    """A start that is under way, or waits for its turn."""

    record: Record
    task: asyncio.Task[None] | None = None


class Starts:
    """Starts of machines, each in a process of its own (see `starter`), so many at a time.

    It is the only state of the service: what a machine is once it has started, its folder says.
    """

    def __init__(self, most: int) -> None:
        """Take the number of machines that start at the same time."""
        self._turn = asyncio.Semaphore(most)
        self._under_way: dict[str, _Start] = {}
        # The folder of a machine that could not be started is gone, and with it the reason.
        self._failed: OrderedDict[str, Record] = OrderedDict()

    def __iter__(self) -> Iterator[Record]:
        """Iterate over the records of failed starts, and then of those under way."""
        return iter([*self._failed.values(), *(start.record for start in self._under_way.values())])

    def get(self, name: str) -> Record | None:
        """Return the record of a start by the machine's name."""
        start = self._under_way.get(name)
        return start.record if start is not None else self._failed.get(name)

    def is_under_way(self, name: str) -> bool:
        """Tell whether a machine is being started."""
        return name in self._under_way

    def forget(self, name: str) -> bool:
        """Forget a start that failed; return whether there was one."""
        return self._failed.pop(name, None) is not None

    def begin(self, record: Record, request: Mapping[str, Any]) -> Record:
        """Begin to start a machine, and return its record.

        Args:
            record: What is known of it.
            request: A request as `starter` reads it.

        Raises:
            CatalogError: It is being started already.
            Problem: Too many machines are.
        """
        name = record.name
        if name in self._under_way:
            raise CatalogError(f"the machine {name!r} is being started already")
        if len(self._under_way) >= _QUEUE:
            busy = f"{_QUEUE} machines are being started: try again later"
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, busy, headers={"Retry-After": "10"})
        self.forget(name)
        start = self._under_way[name] = _Start(attrs.evolve(record, state=STARTING, reason="", since=time.time()))
        start.task = asyncio.create_task(self._run(start, request))
        # Not at the end of the task itself: one that is cancelled before its first step never gets there.
        start.task.add_done_callback(lambda _: self._under_way.pop(name))
        return start.record

    async def cancel(self, name: str) -> bool:
        """Cancel a start and wait until nothing is left of it; return whether there was one."""
        start = self._under_way.get(name)
        if start is None or start.task is None:
            return False
        start.task.cancel()
        await asyncio.wait([start.task])
        return True

    async def cancel_all(self) -> None:
        """Cancel all starts, and wait until nothing is left of them."""
        await asyncio.gather(*(self.cancel(name) for name in list(self._under_way)))

    async def _run(self, start: _Start, request: Mapping[str, Any]) -> None:
        name = start.record.name
        try:
            async with self._turn:
                reason = await _started(start, request)
        except OSError as error:  # no process could be made
            reason = str(error)
        if reason:
            self._failed[name] = attrs.evolve(start.record, state=ERROR, reason=printable(reason), since=time.time())
            while len(self._failed) > _FAILURES:
                self._failed.popitem(last=False)


async def _started(start: _Start, request: Mapping[str, Any]) -> str:
    """Run the process of a start to its end; return why it failed, or nothing."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "pytest_vmbottle.service.starter"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # Ctrl-C in the service's terminal reaches the service alone, which ends its starts in order.
        start_new_session=True,
        limit=_LINE,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    try:
        return await _followed(process, start, request)
    except asyncio.CancelledError:
        with suppress(ProcessLookupError):
            process.terminate()
        await asyncio.shield(_ended(process))
        raise


async def _followed(process: asyncio.subprocess.Process, start: _Start, request: Mapping[str, Any]) -> str:
    assert process.stdin is not None  # noqa: S101 - for mypy: it was asked for
    assert process.stdout is not None  # noqa: S101
    with suppress(BrokenPipeError, ConnectionResetError):  # then its status tells
        process.stdin.write(json.dumps(request).encode())
        await process.stdin.drain()
    process.stdin.close()
    reason = ""
    async for line in process.stdout:
        message = json.loads(line)
        if "say" in message:
            start.record = attrs.evolve(start.record, reason=printable(str(message["say"]), 1000))
        else:
            reason = str(message["message"])
    status = await process.wait()
    return reason or (f"the process that starts it ended with status {status}" if status else "")


async def _ended(process: asyncio.subprocess.Process) -> None:
    try:
        await asyncio.wait_for(process.wait(), _UNWIND)
    except TimeoutError:
        process.kill()
        await process.wait()
