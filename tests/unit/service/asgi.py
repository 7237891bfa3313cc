"""Requests to an application without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

TOKEN = "0123456789abcdef0123456789abcdef"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@attrs.frozen
class Answer:
    """Answer of an application."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def http_scope(path: str, method: str = "GET", headers: Mapping[str, str] | None = None, client: str = "127.0.0.1") -> dict[str, Any]:
    where, _, query = path.partition("?")
    lines = {"host": "127.0.0.1:8080", **{name.lower(): value for name, value in (headers or {}).items()}}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": where,
        "raw_path": where.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in lines.items()],
        "client": (client, 4711),
        "server": ("127.0.0.1", 8080),
    }


async def request(app: Any, scope: Mapping[str, Any], pieces: Sequence[bytes] = (b"",)) -> Answer:
    """Sends a request; after the last piece the client waits."""
    left = list(pieces)
    sent: list[dict[str, Any]] = []
    ended = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if left:
            body = left.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(left)}
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if message["type"].endswith("response.body") and not message.get("more_body"):
            ended.set()

    await app(scope, receive, send)
    start, *rest = sent
    headers = {name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]}
    return Answer(start["status"], headers, b"".join(each.get("body", b"") for each in rest))


async def living(app: Any) -> tuple[asyncio.Task[None], asyncio.Event]:
    """Begins the life of an application, as a server does; the event ends it."""
    end, begun = asyncio.Event(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not begun.is_set():
            return {"type": "lifespan.startup"}
        await end.wait()
        return {"type": "lifespan.shutdown"}

    async def send(message: dict[str, Any]) -> None:
        assert "failed" not in message["type"], message
        begun.set()

    task = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send))
    await begun.wait()
    return task, end


def call(app: Any, path: str, method: str = "GET", *, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
    """Makes one request in the whole life of an application."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    kind = {} if isinstance(body, bytes) or body is None else {"Content-Type": "application/json"}

    async def all_of_it() -> Answer:
        task, end = await living(app)
        try:
            return await request(app, http_scope(path, method, {**kind, "Content-Length": str(len(data)), **(headers or BEARER)}), [data])
        finally:
            end.set()
            await task

    return asyncio.run(all_of_it())
