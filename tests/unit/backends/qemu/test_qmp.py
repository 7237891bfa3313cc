"""What is kept of QEMU's events."""

from __future__ import annotations

import asyncio

from qemu.qmp import Message

from pytest_vmbottle.backends.qemu.qmp import _Latest


def test_however_many_events_a_guest_causes_each_saying_is_kept_once() -> None:
    latest = _Latest()

    async def feed() -> None:
        for number in range(3000):
            await latest.put(Message({"event": "GUEST_PANICKED", "data": {"action": "run", "info": {"n": number}}}))
            await latest.put(Message({"event": "RESET", "data": {"guest": True}}))

    asyncio.run(feed())
    assert latest.resets == 3000
    assert len(latest.said) == 2
    assert len(latest.history) == 0
