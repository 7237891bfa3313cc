"""The guard: the token, names of the service, origins, and wrong tokens that come often."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from pytest_vmbottle.service.guard import Guard, Refusals
from pytest_vmbottle.service.options import Options
from tests.unit.service.asgi import BEARER, TOKEN, Answer, http_scope, request


async def _app(_: Any, __: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(root=tmp_path, token=TOKEN)


def ask(guard: Guard, path: str = "/vms/", headers: Mapping[str, str] | None = None, client: str = "127.0.0.1") -> Answer:
    return asyncio.run(request(guard, http_scope(path, headers=headers, client=client)))


def socket(options: Options, headers: Mapping[str, str], subprotocols: list[str]) -> list[dict[str, Any]]:
    """Messages that are sent to a WebSocket's handshake; nothing if it is passed on."""
    sent: list[dict[str, Any]] = []

    async def app(*_: Any) -> None:
        sent.clear()

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    scope = http_scope("/vms/web/tty", headers=headers) | {"type": "websocket", "subprotocols": subprotocols}
    scope["extensions"] = {"websocket.http.response": {}}
    asyncio.run(Guard(app, options)(scope, receive, send))
    return sent


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_right_token_comes_in(options: Options, scheme: str) -> None:
    assert ask(Guard(_app, options), headers={"Authorization": f"{scheme} {TOKEN}"}).status == 204


@pytest.mark.parametrize("path", ["/health", "/", "/docs", "/page/page.js"])
def test_health_and_the_empty_pages_take_no_token(options: Options, path: str) -> None:
    assert ask(Guard(_app, options), path).status == 204


@pytest.mark.parametrize("path", ["/vms/", "/vms", "/metrics", "/openapi.json", "/health/", "//health", "/nothing"])
def test_everything_else_takes_it_and_says_so_as_rfc_6750_wants(options: Options, path: str) -> None:
    answer = ask(Guard(_app, options), path)

    assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Bearer realm="vmbottle"')
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json["status"] == 401


@pytest.mark.parametrize("token", [TOKEN[:-1], TOKEN + "0", TOKEN.upper(), "x", "\xff" * 32])
def test_a_wrong_token_is_told_to_be_wrong_and_not_shown(options: Options, token: str) -> None:
    answer = ask(Guard(_app, options), headers={"Authorization": f"Bearer {token}"})

    assert answer.status == 401
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    assert TOKEN[:16] not in answer.body.decode()


def test_another_scheme_is_no_token(options: Options) -> None:
    answer = ask(Guard(_app, options), headers={"Authorization": f"Basic {TOKEN}"})

    assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Bearer realm="vmbottle"')


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080", "vm.localhost", "localhost."])
def test_on_loopback_names_of_this_computer_are_ours(options: Options, host: str) -> None:
    assert ask(Guard(_app, options), headers={**BEARER, "Host": host}).status == 204


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "0.0.0.0", "localhost@evil.example"])
def test_a_name_that_resolves_to_this_computer_is_not(options: Options, host: str) -> None:
    assert ask(Guard(_app, options), "/health", {"Host": host}).status == 403


def test_a_name_that_was_allowed_is_ours(options: Options) -> None:
    named = attrs.evolve(options, allowed_hosts=("vm.example",))

    assert ask(Guard(_app, named), headers={**BEARER, "Host": "vm.example:8080"}).status == 204
    assert ask(Guard(_app, named), headers={**BEARER, "Host": "other.example"}).status == 403


def test_elsewhere_every_name_is_ours_until_one_is_given(options: Options) -> None:
    public = attrs.evolve(options, host="0.0.0.0", behind_proxy=True)

    assert ask(Guard(_app, public), headers={**BEARER, "Host": "any.example"}).status == 204
    assert ask(Guard(_app, attrs.evolve(public, allowed_hosts=("vm.example",))), headers={**BEARER, "Host": "any.example"}).status == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://127.0.0.1:8080", 204), ("http://127.0.0.1:8081", 403), ("https://evil.example", 403), ("null", 403), ("http://[", 403)],
)
def test_only_the_services_own_pages_may_use_it(options: Options, origin: str, status: int) -> None:
    assert ask(Guard(_app, options), headers={**BEARER, "Origin": origin}).status == status


def test_a_websocket_gets_in_by_the_header_or_by_a_subprotocol(options: Options) -> None:
    assert socket(options, BEARER, []) == []
    assert socket(options, {}, ["vmbottle.tty", f"vmbottle.bearer.{TOKEN}"]) == []


def test_a_websocket_without_the_token_or_of_a_foreign_page_gets_an_answer_to_its_handshake(options: Options) -> None:
    missing = socket(options, {}, ["vmbottle.tty"])
    wrong = socket(options, {}, [f"vmbottle.bearer.{TOKEN[:-1]}"])
    foreign = socket(options, {**BEARER, "Origin": "https://evil.example"}, [])

    assert [sent[0]["status"] for sent in (missing, wrong, foreign)] == [401, 401, 403]
    assert b"evil.example" in foreign[1]["body"]


def test_wrong_tokens_are_looked_at_a_few_times_and_the_right_one_always(options: Options) -> None:
    guard, wrong = Guard(_app, options), {"Authorization": "Bearer wrong"}
    answers = [ask(guard, headers=wrong) for _ in range(12)]

    assert [answer.status for answer in answers] == [401] * 10 + [429] * 2
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 6
    assert ask(guard, headers=BEARER).status == 204
    assert ask(guard, headers=wrong, client="192.0.2.1").status == 401


def test_behind_a_proxy_the_address_is_the_one_that_the_proxy_added(options: Options) -> None:
    guard = Guard(_app, attrs.evolve(options, behind_proxy=True))
    for number in range(10):
        ask(guard, headers={"Authorization": "Bearer wrong", "X-Forwarded-For": f"198.51.100.{number}, 192.0.2.1"})

    assert ask(guard, headers={"Authorization": "Bearer wrong", "X-Forwarded-For": "198.51.100.99, 192.0.2.1"}).status == 429
    assert ask(guard, headers={"Authorization": "Bearer wrong", "X-Forwarded-For": "192.0.2.2"}).status == 401


def test_of_several_lines_the_proxy_has_added_the_last_one(options: Options) -> None:
    guard = Guard(_app, attrs.evolve(options, behind_proxy=True))

    def status(made_up: str, added: str) -> int:
        scope = http_scope("/vms/", headers={"Authorization": "Bearer wrong"})
        scope["headers"] += [(b"x-forwarded-for", each.encode()) for each in (made_up, added)]
        return asyncio.run(request(guard, scope)).status

    assert [status(f"198.51.100.{number}", "192.0.2.1") for number in range(11)] == [401] * 10 + [429]
    assert status("192.0.2.1", "192.0.2.2") == 401


def test_attempts_come_back_with_time_and_addresses_take_bounded_memory() -> None:
    refusals = Refusals(attempts=2, seconds=10, addresses=3)
    assert [refusals.wait("a", now) for now in (0, 0, 0, 5)] == [0, 0, 10, 5]
    assert refusals.wait("a", 10) == 0
    assert refusals.wait("a", 10.5) == pytest.approx(9.5)
    for number in range(1000):
        refusals.wait(f"address {number}", 11)

    assert len(refusals._spent) == 3
