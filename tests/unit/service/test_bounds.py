"""Bounds of requests: size, number, and time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pytest_vmbottle.service.bounds import MAX_JSON, Bounds
from tests.unit.service.asgi import Answer, http_scope, request


async def _reading(_: Any, receive: Any, send: Any) -> None:
    """An application that reads a body to its end, and takes every error for one of parsing it."""
    size, more = 0, True
    status = 200
    try:
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    except Exception:
        status = 400
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(app: Any, path: str, pieces: list[bytes], method: str = "POST", length: int | None = None) -> Answer:
    headers = {} if length is None else {"Content-Length": str(length)}
    return asyncio.run(request(app, http_scope(path, method, headers), pieces))


def test_a_body_within_its_bound_is_passed_on() -> None:
    assert ask(Bounds(_reading, max_upload=10), "/vms/a/files", [b"12345", b"67890"], "PUT").body == b"10"


@pytest.mark.parametrize("length", [None, 11, 10**30])
def test_a_larger_one_is_refused_whether_or_not_it_says_so(length: int | None) -> None:
    answer = ask(Bounds(_reading, max_upload=10), "/vms/a/files", [b"12345", b"678901"], "PUT", length)

    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert "10 bytes" in answer.json["detail"]


def test_json_has_a_bound_of_its_own_but_for_files() -> None:
    large = [bytes(MAX_JSON), b"x"]

    assert ask(Bounds(_reading, max_upload=1 << 30), "/vms/", large).status == 413
    assert ask(Bounds(_reading, max_upload=1 << 30), "/vms/a/upload-files", large).status == 200


def test_a_client_that_sends_nothing_is_given_up() -> None:
    async def silent() -> Answer:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(60)
            return {}

        async def send(message: Any) -> None:
            sent.append(message)

        await Bounds(_reading, max_upload=10, idle=0.05)(http_scope("/vms/", "POST"), receive, send)
        return Answer(sent[0]["status"], {}, sent[1]["body"])

    answer = asyncio.run(silent())
    assert answer.status == 408
    assert "nothing came" in answer.json["detail"]


def test_a_client_that_takes_nothing_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[str] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if len(sent) > 1:
            await asyncio.sleep(60)

    asyncio.run(Bounds(_reading, max_upload=10, idle=0.05)(http_scope("/vms/", "POST"), receive, send))
    assert sent == ["http.response.start", "http.response.body"]
    assert "an answer was broken off: TimeoutError" in caplog.text


def test_a_request_that_is_cancelled_at_the_services_end_is_told_so() -> None:
    async def waiting(*_: Any) -> None:
        await asyncio.Event().wait()

    async def cancelled() -> Answer:
        asked = asyncio.create_task(request(Bounds(waiting, max_upload=10), http_scope("/vms/")))
        await asyncio.sleep(0.05)
        asked.cancel()
        return await asked

    answer = asyncio.run(cancelled())
    assert (answer.status, answer.json["detail"]) == (503, "the service has ended")


def test_no_more_requests_than_so_many_are_served_at_once() -> None:
    async def crowd() -> list[int]:
        enough = asyncio.Event()

        async def waiting(_: Any, __: Any, send: Any) -> None:
            await enough.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        bounds = Bounds(waiting, max_upload=10, requests=2)
        asked = [asyncio.create_task(request(bounds, http_scope("/vms/"))) for _ in range(3)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        enough.set()
        statuses = sorted([(await each).status for each in asked])
        return [*statuses, (await request(bounds, http_scope("/vms/"))).status]

    assert asyncio.run(crowd()) == [200, 200, 503, 200]


def test_answers_are_harmless_in_a_browser() -> None:
    headers = ask(Bounds(_reading, max_upload=10), "/vms/", [b""]).headers

    assert headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"
