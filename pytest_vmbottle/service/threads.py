"""Calls that block, in threads of a bounded number."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import TypeVar

from pytest_vmbottle.service.problems import Problem

__all__ = ["Threads"]

_T = TypeVar("_T")


class Threads:
    """A bounded number of threads for calls that block.

    They are daemon threads: a call that hangs in a guest does not keep the service from ending.
    """

    def __init__(self, most: int, *, waiting: int) -> None:
        """Make a pool without a thread.

        Args:
            most: Calls at the same time.
            waiting: Calls that wait for their turn at most; further ones are refused.
        """
        self._free = asyncio.Semaphore(most)
        self._waiting, self._most = 0, waiting

    async def run(self, call: Callable[[], _T]) -> _T:
        """Make a call in a thread, and return its result.

        The call goes on if this is cancelled, and counts until it ends.

        Raises:
            Problem: Too many calls are waiting.
        """
        if self._waiting >= self._most:
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "the service is busy: try again later", headers={"Retry-After": "1"})
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def finish(result: _T | None, error: BaseException | None) -> None:
            self._free.release()
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type] # None is a result too

        def work() -> None:
            result: _T | None = None
            failed: BaseException | None = None
            try:
                result = call()
            except BaseException as error:
                failed = error
            # The loop is closed if the service has ended meanwhile: nobody waits for the result any more.
            if not loop.is_closed():
                loop.call_soon_threadsafe(finish, result, failed)

        threading.Thread(target=work, daemon=True).start()
        return await future
