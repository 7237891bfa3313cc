"""A terminal in a guest over a WebSocket.

Output comes in binary frames. What a client sends is typed, in text and in binary frames, but for text frames that are exactly `ctrlc` or
`ctrld`, or a JSON object with the type `ctrlc`, `ctrld` or `resize`. When the shell ends, a text frame tells its status.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from pytest_vmbottle.errors import VMBottleError
from pytest_vmbottle.service.problems import Problem
from pytest_vmbottle.service.threads import Threads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from pytest_vmbottle.channels.port import Terminal

__all__ = ["SUBPROTOCOL", "Terminals", "control_of"]

SUBPROTOCOL = "vmbottle.tty"
"""The subprotocol that is agreed on if a client offers any: the token, which may be another one, is never sent back."""
_KEYS = {"ctrlc": b"\x03", "ctrld": b"\x04"}
_MOST = 64
_CELLS = range(1, 1001)
"""Columns and rows that a window may have."""
_NORMAL, _AWAY, _FAILED = 1000, 1001, 1011


class Terminals:
    """Open terminals, of a bounded number."""

    def __init__(self, most: int = _MOST) -> None:
        """Take the number of terminals that may be open."""
        # Their own threads: who waits for a guest that reads nothing must not keep others from typing Ctrl-C.
        self._opening, self._typing = Threads(8, waiting=most), Threads(most, waiting=most)
        self._open, self._most = 0, most

    async def serve(self, socket: WebSocket, open_terminal: Callable[[], Terminal]) -> None:
        """Connect a WebSocket to a terminal until either ends.

        Raises:
            Problem: Too many are open.
            VMBottleError: It cannot be opened.
        """
        if self._open >= self._most:
            raise Problem(
                HTTPStatus.SERVICE_UNAVAILABLE, f"{self._most} terminals are open: close one first", headers={"Retry-After": "10"}
            )
        self._open += 1
        try:
            # Opened first: a refusal is the answer to the handshake, which says more than a socket that is closed.
            async with self._opened(open_terminal) as terminal:
                await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope.get("subprotocols", ()) else None)
                await _Session(socket, terminal, self._typing).run()
        finally:
            self._open -= 1

    @asynccontextmanager
    async def _opened(self, open_terminal: Callable[[], Terminal]) -> AsyncIterator[Terminal]:
        opening = asyncio.ensure_future(self._opening.run(open_terminal))
        try:
            terminal = await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The thread goes on, and nobody else would close what it opens.
            opening.add_done_callback(_close_opened)
            raise
        try:
            yield terminal
        finally:
            terminal.close()


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _close_opened(opening: asyncio.Future[Terminal]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class _Session:
    """A WebSocket and a terminal."""

    def __init__(self, socket: WebSocket, terminal: Terminal, threads: Threads) -> None:
        self._socket, self._terminal, self._threads = socket, terminal, threads

    async def run(self) -> None:
        """Pass on what is shown and what is typed, until the shell or the socket ends."""
        ways = [asyncio.create_task(self._show()), asyncio.create_task(self._type())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        await self._end(ways[0])

    async def _show(self) -> int | None:
        """Send what the terminal shows, and return the shell's status.

        No more is read from it before the client has taken that.
        """
        while data := await self._received():
            await self._socket.send_bytes(data)
        return await self._threads.run(lambda: self._terminal.status)

    async def _received(self) -> bytes:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        descriptor = self._terminal.fileno()
        loop.add_reader(descriptor, partial(_set, ready))
        try:
            await ready
        finally:
            loop.remove_reader(descriptor)
        return self._terminal.receive()

    async def _type(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text, data = message.get("text"), message.get("bytes")
            control = control_of(text) if text is not None else None
            if control is not None and control["type"] == "resize":
                await self._threads.run(partial(self._terminal.resize, control["columns"], control["rows"]))
            else:
                typed = _KEYS[control["type"]] if control is not None else data if data is not None else (text or "").encode()
                await self._threads.run(partial(self._terminal.send, typed))

    async def _end(self, shown: asyncio.Task[int | None]) -> None:
        if self._socket.client_state is not WebSocketState.CONNECTED:
            return
        with suppress(WebSocketDisconnect, RuntimeError, OSError):  # the client went at the same time
            if shown.cancelled():
                await self._socket.close(_AWAY)
            elif (error := shown.exception()) is not None:
                await self._socket.close(_FAILED, str(error).partition("\n")[0][:100] if isinstance(error, VMBottleError) else "")
            else:
                await self._socket.send_text(json.dumps({"type": "exit", "status": shown.result()}))
                await self._socket.close(_NORMAL)


def control_of(text: str) -> Mapping[str, Any] | None:
    """Return the control message that a text frame is; None if it is typed.

    >>> control_of("ctrlc"), control_of("ls"), control_of('{"type": "resize", "columns": 80, "rows": 24}')
    ({'type': 'ctrlc'}, None, {'type': 'resize', 'columns': 80, 'rows': 24})
    """
    if text in _KEYS:
        return {"type": text}
    if not text.startswith("{"):
        return None
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kind = message.get("type")
    if kind in _KEYS:
        return {"type": kind}
    size = (message.get("columns"), message.get("rows"))
    return message if kind == "resize" and all(type(each) is int and each in _CELLS for each in size) else None
