"""Bounds of requests: their number, the size of a body, and the time that a client may take."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pytest_vmbottle.service.guard import send_problem
from pytest_vmbottle.service.problems import Problem
from pytest_vmbottle.shown import printable

__all__ = ["MAX_JSON", "Bounds"]

MAX_JSON = 1 << 20
"""Bytes of a body, but of one that has files in it."""
_MAX_FILES = 64 << 20
"""Bytes of a JSON body with files: it is held in memory several times."""
_LINGER, _DRAINED = 2.0, 16 << 20
"""Seconds and bytes of a body that are taken after it was refused."""
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
# For all but our own pages: what a guest wrote is never run as a page of this service.
_POLICY = (b"content-security-policy", b"default-src 'none'; sandbox; frame-ancestors 'none'")
_log = logging.getLogger(__name__)


class Bounds:
    """Middleware that holds requests to their bounds, and gives every answer the headers that make it harmless in a browser."""

    def __init__(self, app: ASGIApp, *, max_upload: int, requests: int = 256, idle: float = 30.0) -> None:
        """Take the application behind it.

        Args:
            app: The application.
            max_upload: Bytes of a raw body at most.
            requests: Requests at the same time.
            idle: Seconds in which a client must send or take the next piece.
        """
        self._app, self._max_upload, self._requests, self._idle = app, max_upload, requests, idle
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on within its bounds."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, most=self._most(scope), idle=self._idle)
        self._open += 1
        try:
            if self._open > self._requests:
                raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "the service is busy: try again later", headers={"Retry-After": "1"})
            _check_length(scope, exchange.most)
            await self._app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            # The server cancels what is still there when its time to end is over.
            exchange.refusal = Problem(HTTPStatus.SERVICE_UNAVAILABLE, "the service has ended", headers={"Connection": "close"})
        except Exception as error:
            exchange.failed(error)
        finally:
            self._open -= 1
        await exchange.refuse(scope)

    def _most(self, scope: Scope) -> int:
        if scope["method"] == "PUT":
            return self._max_upload
        return min(self._max_upload, _MAX_FILES) if scope["path"].endswith("/upload-files") else MAX_JSON


class _Exchange:
    """One request and its answer, within their bounds."""

    def __init__(self, receive: Receive, send: Send, *, most: int, idle: float) -> None:
        self.most = most
        self.refusal: Problem | None = None
        self._receive, self._send, self._idle = receive, send, idle
        self._size, self._ended, self._begun = 0, False, False

    async def receive(self) -> Message:
        """Receive a piece of the body."""
        if self._ended:  # all that can come now is that the client hangs up, for which there is no time
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._idle)
        except TimeoutError:
            late = f"nothing came for {self._idle:.0f} s"
            raise self._refused(Problem(HTTPStatus.REQUEST_TIMEOUT, late, headers={"Connection": "close"})) from None
        self._size += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self._size > self.most:
            raise self._refused(_too_large(self.most))
        return message

    def _refused(self, problem: Problem) -> Problem:
        # Kept: whoever reads the body may take the error for one of parsing it.
        self.refusal = problem
        return problem

    async def send(self, message: Message) -> None:
        """Send a piece of the answer, unless the request is refused by now."""
        if self.refusal is not None and not self._begun:
            return
        await self._sent(message)

    async def _sent(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            message = {**message, "headers": _with_defaults(list(message.get("headers", ())))}
        # A client that takes nothing would hold what makes the answer for ever.
        await asyncio.wait_for(self._send(message), self._idle)

    def failed(self, error: Exception) -> None:
        """Take the error of a request for its refusal.

        An answer that has begun is broken off, which the server does if there is no more of it: so its client knows that it is not whole.

        Raises:
            Exception: The error, if nobody has made an answer of it.
        """
        if self._begun:
            _log.warning("an answer was broken off: %s", printable(str(error.__cause__ or error) or type(error).__name__))
        elif isinstance(error, Problem):
            self.refusal = self.refusal or error
        else:
            raise error

    async def refuse(self, scope: Scope) -> None:
        """Send the refusal, if there is one and it is not too late for that."""
        if self.refusal is not None and not self._begun:
            # A client that waits for "100 Continue" sends nothing, and would begin to.
            if not any(key == b"expect" for key, _ in scope["headers"]):
                await self._drain()
            await send_problem(self.refusal, scope, self._receive, self._sent)

    async def _drain(self) -> None:
        """Take a bit more of the body: most clients read no answer before they have sent it all, and get none if the line breaks."""
        taken = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while not self._ended and taken < _DRAINED:
                    message = await self._receive()
                    taken += len(message.get("body", b""))
                    self._ended = not message.get("more_body", False)


def _check_length(scope: Scope, most: int) -> None:
    length = next((value for key, value in scope["headers"] if key == b"content-length"), b"0")
    # Before the first byte is read: a client that waits for "100 Continue" sends nothing then.
    if length.isdigit() and int(length[:20]) > most:
        raise _too_large(most)


def _too_large(most: int) -> Problem:
    return Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {most} bytes", headers={"Connection": "close"})


def _with_defaults(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    there = {key.lower() for key, _ in headers}
    return headers + [each for each in (*_HEADERS, _POLICY) if each[0] not in there]
