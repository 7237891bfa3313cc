"""A web server in a layer: it is started once, and every test gets a clone of the machine in which it already runs."""

from __future__ import annotations

from http.client import HTTPConnection

import pytest

from pytest_vmbottle import Machine, layer


@layer("debian-12")
def web(vm: Machine) -> None:
    vm.path("/srv/index.html").write_text("hello\n")
    vm.exec("systemd-run --unit=web --property=Restart=always python3 -m http.server --directory /srv 80")
    vm.wait_for_port(80)


def fetch(vm: Machine, path: str) -> tuple[int, str]:
    """Asks for a page from the host, through the forwarded port."""
    connection = HTTPConnection(*vm.forward(80), timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


pytestmark = pytest.mark.vm(web, ports=[80])


def test_page_is_served_to_the_host(vm: Machine) -> None:
    assert fetch(vm, "/") == (200, "hello\n")


def test_new_content_is_served_at_once(vm: Machine) -> None:
    vm.path("/srv/index.html").write_text("good bye\n")
    assert fetch(vm, "/") == (200, "good bye\n")


def test_page_that_was_removed_is_not_found(vm: Machine) -> None:
    vm.path("/srv/index.html").unlink()
    status, _ = fetch(vm, "/index.html")
    assert status == 404


def test_server_answers_again_after_a_crash(vm: Machine) -> None:
    vm.exec(["systemctl", "kill", "--signal=KILL", "web"])
    vm.wait_until("test $(systemctl show --value --property=NRestarts web) -eq 1")
    vm.wait_for_port(80)
    assert fetch(vm, "/") == (200, "hello\n")
