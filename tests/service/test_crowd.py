"""Many clients at once, slow ones among them, and a machine's whole life over HTTP."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import websocket

from pytest_vmbottle.host.deadline import Deadline
from tests.service.running import PATIENCE, Service, serving

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vmbottle.catalog.catalog import Catalog


@pytest.fixture(scope="module")
def web(service: Service) -> Iterator[str]:
    name = f"crowd{os.getpid()}"
    service.create(name)
    yield name
    service.ask("DELETE", f"/vms/{name}")


@pytest.mark.timeout(1800)
def test_fifty_clients_at_once_each_get_their_own_answer(service: Service, web: str) -> None:
    def client(number: int) -> str:
        if number % 2:
            return service.sh(web, f"sleep 0.5; echo {number}").strip()
        path = f"/srv/client-{number}"
        assert service.ask("PUT", f"/vms/{web}/files?path={path}", str(number).encode() * 1000).status == 200
        got = service.get(f"/vms/{web}/download-file?path={path}").body
        assert got == str(number).encode() * 1000
        return str(number)

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(client, range(50))) == [str(number) for number in range(50)]


def test_slow_clients_hold_nobody_up(service: Service, web: str) -> None:
    where = urlsplit(service.url)
    with ExitStack() as stack:
        # Heads and bodies that never come, downloads and terminals that nobody reads.
        for number in range(40):
            slow = stack.enter_context(socket.create_connection((where.hostname, where.port)))
            head = f"Host: {where.netloc}\r\nAuthorization: Bearer {service.token}\r\n"
            asked = (
                "GET /vms/ HTTP/1.1\r\nX-Slow: ",
                f"PUT /vms/{web}/files?path=/srv/slow HTTP/1.1\r\n{head}Content-Length: 1000000\r\n\r\nx",
                f"GET /vms/{web}/download-file?path=/dev/zero HTTP/1.1\r\n{head}\r\n",
            )[number % 3]
            slow.sendall(asked.encode())
        url = f"{service.url.replace('http', 'ws', 1)}vms/{web}/tty"
        for _ in range(5):
            tty = stack.enter_context(closing(websocket.create_connection(url, timeout=PATIENCE, header=service.bearer)))
            tty.send("yes\n")
        began = time.monotonic()
        assert service.sh(web, "echo here") == "here\n"
        quick = [service.get("/vms/").status for _ in range(20)]
        seconds = time.monotonic() - began

    assert quick == [200] * 20
    assert seconds < 30


def test_a_head_that_never_ends_and_a_body_that_never_comes_are_given_up(service: Service) -> None:
    where = urlsplit(service.url)
    head = f"POST /vms/ HTTP/1.1\r\nHost: {where.netloc}\r\nAuthorization: Bearer {service.token}\r\nContent-Length: 100\r\n\r\n"
    for text, answer in (("GET / HTTP/1.1\r\nX: ", b""), ("", b""), (head, b"HTTP/1.1 408")):
        with socket.create_connection((where.hostname, where.port), timeout=60) as slow:
            slow.sendall(text.encode())
            assert slow.recv(1000).startswith(answer)


def test_two_services_serve_one_catalog_at_the_same_time(service: Service, vm_catalog: Catalog, tmp_path: Path) -> None:
    name = f"shared{os.getpid()}"
    with serving(vm_catalog.root, tmp_path) as other:
        statuses: list[int] = []

        def create(each: Service) -> None:
            statuses.append(each.ask("POST", "/vms/", {"base_image": "debian-12", "name": name}).status)

        threads = [threading.Thread(target=create, args=(each,)) for each in (service, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Whoever came second is told so, at once or by a start that fails; there is one machine.
        assert Deadline(PATIENCE).poll(lambda: {service.state(name), other.state(name)} == {"running"}, every=0.3)
        assert [each["name"] for each in other.get("/vms/").json].count(name) == 1
        assert other.sh(name, "uname") == "Linux\n"
        assert other.ask("DELETE", f"/vms/{name}").status == 204
        assert service.get(f"/vms/{name}").json.get("state", "gone") in ("gone", "error")


@pytest.mark.timeout(1800)
def test_a_machine_is_stopped_started_again_from_its_disk_and_cleaned(service: Service) -> None:
    name = f"life{os.getpid()}"
    service.create(name)
    service.sh(name, "echo kept > /srv/kept; sync")
    assert service.post(f"/vms/{name}/actions", {"action": "stop"})["state"] == "stopped"
    assert service.post(f"/vms/{name}/actions", {"action": "start"})["state"] == "provisioning"
    service.wait(name, "running")
    assert service.sh(name, "cat /srv/kept") == "kept\n"
    assert service.post(f"/vms/{name}/actions", {"action": "reboot"})["state"] == "running"
    stopped = service.post(f"/vms/{name}/actions", {"action": "stop", "now": True, "cleanup_disks": True})
    again = service.ask("POST", f"/vms/{name}/actions", {"action": "start"})

    assert stopped["state"] == "stopped"
    assert (again.status, "no disk of its own" in again.json["detail"]) == (409, True)
    assert service.ask("DELETE", f"/vms/{name}").status == 204
