"""Recorded network traffic, read by tshark."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from pytest_vmbottle import Machine

pytestmark = pytest.mark.guests


def read(path: Path, wanted: str, field: str) -> list[str]:
    """Return a field of the frames that a filter of tshark's takes."""
    program = shutil.which("tshark")
    assert program, "tshark is not installed here: .ci/prepare installs it"
    argv = [program, "-n", "-r", str(path), "-Y", wanted, "-T", "fields", "-e", field]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.vm("debian-12", capture=True)
def test_what_reaches_a_forwarded_port_is_recorded_also_after_a_restore(vm: Machine) -> None:
    with socket.create_connection(vm.forward(22), timeout=60) as connection:
        assert connection.recv(4) == b"SSH-"
    vm.restore()
    with socket.create_connection(vm.forward(22), timeout=60) as connection:
        assert connection.recv(4) == b"SSH-"

    one, two = vm.lifecycle.captures
    assert (one.name, two.name) == ("network-2.pcap", "network.pcap")
    for path in (one, two):
        assert "22" in read(path, "tcp.flags.syn == 1 && tcp.flags.ack == 0", "tcp.dstport")


@pytest.mark.vm("debian-12", name="one", network="lan", capture=True)
@pytest.mark.vm("debian-12", name="two", network="lan")
def test_the_traffic_of_a_lan_is_in_one_file(vms: dict[str, Machine]) -> None:
    vms["two"].spawn(["python3", "-um", "http.server", "8000"])
    vms["two"].wait_for_port(8000)
    vms["one"].exec(["python3", "-c", "import urllib.request; urllib.request.urlopen('http://two:8000/missing-page')"], check=False)

    (path,) = [path for path in vms["one"].lifecycle.captures if path.name == "lan-lan.pcap"]
    assert read(path, "http.request", "http.request.uri") == ["/missing-page"]
    assert read(path, "http.response", "http.response.code") == ["404"]
    assert vms["two"].lifecycle.captures == []
