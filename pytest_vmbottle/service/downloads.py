"""Answers that a daemon writes: files and archives of a guest, in pieces."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import AsyncGenerator, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fastapi.responses import StreamingResponse

from pytest_vmbottle.service.streams import asking, pieces

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from pytest_vmbottle.service.threads import Threads
    from pytest_vmbottle.standalone.client import Kept

__all__ = ["Streamed", "disposition", "download", "read_bounded", "type_of"]

_PLAIN = re.compile(r"[^A-Za-z0-9._ +-]")


class Streamed(StreamingResponse):
    """An answer in pieces, which ends what makes it as soon as the client hangs up."""

    def __init__(self, content: AsyncGenerator[bytes, None], *, media_type: str, headers: Mapping[str, str] | None = None) -> None:
        """Take the pieces."""
        super().__init__(content, media_type=media_type, headers=headers)
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Not left to the garbage collector, which comes when it likes.
            await self._content.aclose()


async def download(kept: Kept, request: Mapping[str, Any], threads: Threads, *, name: str, media_type: str) -> Streamed:
    """Return what a daemon writes as a file to be saved, once it has written something.

    Raises:
        OSError: The file cannot be read.
        MachineError: The machine is not running, or was lost.
    """
    content = _from_daemon(kept, request, threads)
    try:
        # Before the answer has begun, an error still has a status.
        first = await anext(content, b"")
    except BaseException:
        await content.aclose()
        raise
    return Streamed(_after(first, content), media_type=media_type, headers={"Content-Disposition": disposition(name)})


async def _from_daemon(kept: Kept, request: Mapping[str, Any], threads: Threads) -> AsyncGenerator[bytes, None]:
    async with asking(kept, request, threads) as asked:
        async for data in pieces(asked):
            yield data


async def _after(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        yield first
        async for data in rest:
            yield data
    finally:
        await rest.aclose()


async def read_bounded(kept: Kept, path: str, threads: Threads, most: int) -> bytes | None:
    """Return the content of a file in a guest; None if it has more than a number of bytes.

    Raises:
        OSError: It cannot be read.
        MachineError: The machine is not running, or was lost.
    """
    data = bytearray()
    async with asking(kept, {"verb": "read", "path": path}, threads) as asked:
        async for piece in pieces(asked):
            data += piece
            if len(data) > most:
                return None
    return bytes(data)


def type_of(path: str) -> str:
    """Return the media type of a file by its name."""
    kind, encoding = mimetypes.guess_type(PurePosixPath(path).name)
    return kind if kind is not None and encoding is None else "application/octet-stream"


def disposition(name: str) -> str:
    r"""Return the header that has a browser save an answer as a file (RFC 6266).

    >>> disposition('a"b\n.txt')
    'attachment; filename="a_b_.txt"; filename*=UTF-8\'\'a%22b%0A.txt'
    """
    plain = _PLAIN.sub("_", name) or "download"
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name.encode('utf-8', 'surrogatepass'), safe='')}"
