"""A synchronous view of `qemu.qmp`: one background thread runs the protocol for all machines of this process.

That thread also starts the QEMU processes. The kernel sends a parent-death signal when the *thread* that started a process ends, not
when the process does, and this one lives as long as the interpreter.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.errors import VMBottleError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["Qmp", "QmpFailed", "in_background"]

_T = TypeVar("_T")
log = logging.getLogger(__name__)


class QmpFailed(VMBottleError):
    """QEMU refused a command, or is not there to take one."""


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="vmbottle-qemu", daemon=True).start()
    return loop


def _await(coroutine: Coroutine[Any, Any, _T], deadline: Deadline) -> _T:
    future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, deadline.remaining), _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def in_background(function: Callable[[], _T]) -> _T:
    """Calls a short function in the thread that outlives all others, and returns what it returns."""

    async def call() -> _T:
        return function()

    return asyncio.run_coroutine_threadsafe(call(), _loop()).result()


class Qmp:
    """A connection to the monitor of one QEMU process."""

    def __init__(self, sock: socket.socket, *, deadline: Deadline) -> None:
        """Talks over a connected socket, or raises `QmpFailed`."""
        self._client = QMPClient("vmbottle")
        # It logs every lost connection as an error; a machine that ends is an everyday thing here.
        self._client.logger.setLevel(logging.CRITICAL)
        # Only these: the history is kept, and a guest can cause others without end.
        self._events = EventListener(("MIGRATION", "GUEST_PANICKED", "BLOCK_IO_ERROR"))
        self._client.register_listener(self._events)
        self._guard(self._client.connect(sock), deadline, "the greeting")

    def _guard(self, coroutine: Coroutine[Any, Any, _T], deadline: Deadline, what: str) -> _T:
        try:
            return _await(coroutine, deadline)
        except TimeoutError as error:
            raise QmpFailed(f"QEMU did not answer {what} in time") from error
        except ExecuteError as error:
            raise QmpFailed(f"QEMU refused {what}: {error}") from error
        except (QMPError, OSError, EOFError) as error:
            raise QmpFailed(f"QEMU is gone, or its monitor is: {what}: {error}") from error

    def execute(self, command: str, *, deadline: Deadline, **arguments: Any) -> Any:
        """Runs a command and returns its answer; underscores in argument names stand for dashes."""
        return self._guard(
            self._client.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()}), deadline, command
        )

    def send_fd(self, name: str, fd: int, *, deadline: Deadline) -> None:
        """Gives QEMU a copy of an open file, to be named `fd:name` in other commands."""

        async def send() -> None:
            self._client.send_fd_scm(fd)
            await self._client.execute("getfd", {"fdname": name})

        self._guard(send(), deadline, "getfd")

    def wait_for(self, event: str, statuses: frozenset[str], *, deadline: Deadline) -> str:
        """Waits for an event whose data has one of these statuses, and returns that."""

        async def wait() -> str:
            async for message in self._events:
                status = str(message.get("data", {}).get("status", ""))  # type: ignore[attr-defined]
                if message["event"] == event and status in statuses:
                    return status
            raise EOFError(f"no {event} came")

        return self._guard(wait(), deadline, f"with {event}")

    def seen(self, *events: str) -> str | None:
        """The first of these events among those that have come and nobody waited for."""
        for message in self._events.history:
            if message["event"] in events:
                return str(message["event"])
        return None

    def close(self) -> None:
        """Ends the connection; QEMU runs on. May be called again."""
        try:
            _await(self._client.disconnect(), Deadline(2))
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            log.debug("the monitor was closed by the other side: %s", error)
