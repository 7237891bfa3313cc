"""Work that is shared by those who ask for it at once."""

from __future__ import annotations

import asyncio

import pytest

from pytest_vmbottle.service.shared import Shared


def test_nobody_gets_a_result_that_is_older_than_the_question_and_many_share_one() -> None:
    async def work() -> tuple[list[int], int]:
        begun = 0

        async def look() -> int:
            nonlocal begun
            begun += 1
            number = begun
            await asyncio.sleep(0.05)
            return number

        shared = Shared(look)
        first = asyncio.create_task(shared.get())
        await asyncio.sleep(0.01)
        later = [asyncio.create_task(shared.get()) for _ in range(10)]
        await asyncio.sleep(0.01)
        later[0].cancel()
        results = [await first, *(await asyncio.gather(*later[1:]))]
        return [*results, await shared.get()], begun

    assert asyncio.run(work()) == ([1, *[2] * 9, 3], 3)


def test_an_error_is_for_those_who_asked_and_for_nobody_after_them() -> None:
    async def work() -> list[object]:
        outcomes: list[object] = [OSError("once"), 7]

        async def look() -> object:
            outcome = outcomes.pop(0)
            await asyncio.sleep(0.01)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        shared = Shared(look)
        asked = [asyncio.create_task(shared.get())]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asked.append(asyncio.create_task(shared.get()))
        return await asyncio.gather(*asked, return_exceptions=True)

    failed, fine = asyncio.run(work())
    assert isinstance(failed, OSError)
    assert fine == 7


def test_who_leaves_does_not_end_the_work() -> None:
    async def work() -> None:
        shared = Shared(lambda: asyncio.sleep(0.05, "done"))
        asked = [asyncio.create_task(shared.get()) for _ in range(2)]
        await asyncio.sleep(0.01)
        asked[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked[0]
        assert await asked[1] == "done"

    asyncio.run(work())
