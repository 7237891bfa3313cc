"""Work that many ask for at once, done once for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Generic, TypeVar

__all__ = ["Shared"]

_T = TypeVar("_T")


class Shared(Generic[_T]):
    """Results of some work, each for all who asked before the work began: nobody gets one that is older than the question."""

    def __init__(self, work: Callable[[], Awaitable[_T]]) -> None:
        """Take the work."""
        self._work = work
        self._now: asyncio.Task[_T] | None = None
        self._next: asyncio.Task[_T] | None = None

    async def get(self) -> _T:
        """Return the result of work that begins from now on."""
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._now))
        # Shielded: one who leaves is no reason for the others to get nothing.
        return await asyncio.shield(self._next)

    async def _after(self, before: asyncio.Task[_T] | None) -> _T:
        if before is not None:
            with suppress(Exception):  # its own askers are told
                await asyncio.shield(before)
        self._now, self._next = self._next, None
        return await self._work()
