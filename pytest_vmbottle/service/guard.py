"""Admission of requests: names of the service, its own origin, and the token."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Iterable
from http import HTTPStatus
from urllib.parse import urlsplit

import attrs
from starlette.types import ASGIApp, Receive, Scope, Send

from pytest_vmbottle.service.options import Options, is_loopback
from pytest_vmbottle.service.problems import Problem, problem_of

__all__ = ["BEARER", "Guard", "Refusals", "send_problem"]

BEARER = "vmbottle.bearer."
"""Beginning of the subprotocol by which a browser, which cannot send headers with a WebSocket, sends the token."""
_PUBLIC = ("/", "/docs", "/health")
_PUBLIC_FOLDER = "/page/"
"""Files of the pages, which hold nothing of the catalog."""
_REALM = 'Bearer realm="vmbottle"'


@attrs.define
class Refusals:
    """Wrong tokens by the address that they came from, in bounded memory.

    An address has a number of attempts, which come back one by one with time. A right token is never refused, since somebody else at the
    same address, such as another user of this computer, could lock its owner out; and no number of attempts finds 128 bits.
    """

    attempts: int = 10
    seconds: float = 6.0
    """Seconds until one attempt comes back."""
    addresses: int = 4096
    _spent: OrderedDict[str, tuple[float, float]] = attrs.field(factory=OrderedDict, init=False)

    def wait(self, address: str, now: float | None = None) -> float:
        """Count a wrong token; return the seconds until the next one is looked at, 0 if this one was."""
        now = time.monotonic() if now is None else now
        spent, then = self._spent.pop(address, (0.0, now))
        spent = max(0.0, spent - (now - then) / self.seconds)
        late = spent + 1 > self.attempts
        self._spent[address] = (spent if late else spent + 1, now)
        # The address that was seen the longest ago goes: of all it is the most likely to have its attempts back.
        while len(self._spent) > self.addresses:
            self._spent.popitem(last=False)
        return (spent + 1 - self.attempts) * self.seconds if late else 0.0


class Guard:
    """Middleware that refuses requests which do not come from a holder of the token."""

    def __init__(self, app: ASGIApp, options: Options) -> None:
        """Take the application behind it."""
        self._app, self._options = app, options
        self._digest = _digest(options.token.encode())
        self._refusals = Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except Problem as problem:
            await send_problem(problem, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        host = _header(scope, b"host")
        if not self._is_ours(host):
            # A page of a foreign name that resolves to 127.0.0.1 (DNS rebinding) would be of our origin for the browser.
            raise Problem(HTTPStatus.FORBIDDEN, f"the host {host!r} is none of this service: --allow-host adds a name")
        origin = _header(scope, b"origin")
        if origin and not self._is_own_origin(origin, host):
            raise Problem(HTTPStatus.FORBIDDEN, f"pages of {origin!r} may not use this service")
        path = scope["path"]
        if path in _PUBLIC or path.startswith(_PUBLIC_FOLDER):
            return
        self._check_token(scope)

    def _is_ours(self, host: str) -> bool:
        name = _name(host)
        if name in self._options.allowed_hosts:
            return True
        # Elsewhere than on loopback the service cannot know its names, unless it was told.
        return is_loopback(name) if is_loopback(self._options.host) or self._options.allowed_hosts else bool(name)

    def _is_own_origin(self, origin: str, host: str) -> bool:
        there = origin.partition("://")[2]
        return bool(there) and (there == host or _name(there) in self._options.allowed_hosts)

    def _check_token(self, scope: Scope) -> None:
        given = list(_tokens(scope))
        # Digests have one length, so the time tells nothing of the token; all are compared, so it does not tell which one was right.
        if sum(hmac.compare_digest(_digest(token), self._digest) for token in given):
            return
        if not given:
            # RFC 6750, 3.1: who sent nothing is told no error.
            raise Problem(HTTPStatus.UNAUTHORIZED, "this takes the bearer token of the service", headers={"WWW-Authenticate": _REALM})
        wait = self._refusals.wait(self._peer(scope))
        if wait:
            later = {"Retry-After": str(math.ceil(wait))}
            raise Problem(HTTPStatus.TOO_MANY_REQUESTS, "too many wrong tokens came from this address", headers=later)
        wrong = f'{_REALM}, error="invalid_token", error_description="the token is wrong"'
        raise Problem(HTTPStatus.UNAUTHORIZED, "the token is wrong", headers={"WWW-Authenticate": wrong})

    def _peer(self, scope: Scope) -> str:
        if self._options.behind_proxy:
            # The last one is what the proxy has added, perhaps on a line of its own; what is before it the client may have made up.
            lines = [value.decode("latin-1") for key, value in scope["headers"] if key == b"x-forwarded-for"]
            forwarded = ",".join(lines).rpartition(",")[2].strip()
            if forwarded:
                return forwarded[:64]
        client = scope.get("client")
        return client[0] if client else ""


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _name(host: str) -> str:
    """Return the name in `name:port`, without the brackets of IPv6."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _tokens(scope: Scope) -> Iterable[bytes]:
    scheme, _, token = _header(scope, b"authorization").partition(" ")
    if scheme.lower() == "bearer" and token:
        yield token.strip().encode("latin-1")
    if scope["type"] == "websocket":
        yield from (each.removeprefix(BEARER).encode() for each in scope.get("subprotocols", ()) if each.startswith(BEARER))


async def send_problem(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    """Send a refusal, for a WebSocket as the answer to its handshake."""
    response = problem_of(problem).response()
    if scope["type"] == "http":
        await response(scope, receive, send)
        return
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": problem.detail[:100]})
        return
    headers = [(key.lower(), value) for key, value in response.raw_headers]
    await send({"type": "websocket.http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": problem.body})
