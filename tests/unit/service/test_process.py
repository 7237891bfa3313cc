"""The service as a process, on a catalog without machines."""

from __future__ import annotations

import http.client
import signal
import socket
import ssl
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.service.running import COMMAND, environment, serving

if TYPE_CHECKING:
    from tests.unit.conftest import Authority


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_serves_until_a_signal_and_tells_by_its_status_which_one(tmp_path: Path, number: int, status: int) -> None:
    with serving(tmp_path / "catalog", tmp_path) as service:
        assert service.get("/health").status == 200
        assert service.get("/vms/").json == []
        assert service.ask("POST", "/vms/", b"x" * 2_000_000).status == 413
        assert service.end(number) == status


def test_it_speaks_tls(tmp_path: Path, authority: Authority) -> None:
    with serving(tmp_path / "catalog", tmp_path, "--tls-cert", str(authority.server), "--allow-host", "localhost") as service:
        assert service.url.startswith("https://")
        context = ssl.create_default_context(cafile=authority.certificate)
        with closing(http.client.HTTPSConnection("localhost", urlsplit(service.url).port, context=context, timeout=60)) as connection:
            connection.request("GET", "/vms/", headers=service.bearer)
            assert connection.getresponse().read() == b"[]"


def test_several_requests_take_one_connection_and_what_is_no_http_takes_none(tmp_path: Path) -> None:
    with serving(tmp_path / "catalog", tmp_path) as service:
        with closing(service.connect()) as connection:
            for _ in range(3):
                connection.request("GET", "/vms/", headers=service.bearer)
                answer = connection.getresponse()
                assert (answer.status, answer.read()) == (200, b"[]")
        where = urlsplit(service.url)
        with socket.create_connection((where.hostname, where.port), timeout=60) as broken:
            broken.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            assert broken.recv(1000).startswith(b"HTTP/1.1 400")


def test_without_a_token_file_it_makes_a_token_and_tells_where_it_is(tmp_path: Path) -> None:
    argv = [sys.executable, "-P", "-c", COMMAND, "--catalog", str(tmp_path / "catalog"), "serve", "--port", "0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.terminate()
        _, told = process.communicate(timeout=60)
    path = tmp_path / "catalog" / "serve.token"

    assert told == f"The token is in {path}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
