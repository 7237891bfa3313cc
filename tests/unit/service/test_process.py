"""The service as a process, on a catalog without machines."""

from __future__ import annotations

import http.client
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import websocket

from tests.service.running import COMMAND, Answer, Service, environment, serving

if TYPE_CHECKING:
    from tests.unit.conftest import Authority


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_serves_until_a_signal_and_tells_by_its_status_which_one(tmp_path: Path, number: int, status: int) -> None:
    with serving(tmp_path / "catalog", tmp_path) as service:
        assert service.get("/health").status == 200
        assert service.get("/vms/").json == []
        assert service.ask("POST", "/vms/", b"x" * 2_000_000).status == 413
        assert service.end(number) == status


def over_tls(authority: Authority, port: int, headers: Mapping[str, str], *, source: str = "127.0.0.1") -> Answer:
    """Answer to `GET /vms/` under the certificate's name, from an address of this computer."""
    context = ssl.create_default_context(cafile=authority.certificate)
    where = http.client.HTTPSConnection("localhost", port, context=context, timeout=60, source_address=(source, 0))
    with closing(where) as connection:
        connection.request("GET", "/vms/", headers=dict(headers))
        answer = connection.getresponse()
        return Answer(answer.status, dict(answer.getheaders()), answer.read())


def terminal(authority: Authority, port: int, service: Service, **how: object) -> int:
    """Status by which the terminal of a machine is refused, over TLS."""
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        websocket.create_connection(
            f"wss://localhost:{port}/vms/none/tty",
            timeout=60,
            header=service.bearer,
            sslopt={"ca_certs": str(authority.certificate)},
            **how,
        )
    return int(refused.value.status_code)


def port_of(url: str) -> int:
    return urlsplit(url).port or 0


def test_it_speaks_tls(tmp_path: Path, authority: Authority) -> None:
    with serving(tmp_path / "catalog", tmp_path, "--tls-cert", str(authority.server), "--allow-host", "localhost") as service:
        assert service.url.startswith("https://127.0.0.1:")
        assert over_tls(authority, port_of(service.url), service.bearer).body == b"[]"
        assert terminal(authority, port_of(service.url), service) == 404
        with pytest.raises(OSError):  # noqa: PT011 - it hangs up on whoever speaks no TLS, sooner or later
            service.get("/health")


def test_with_a_certificate_and_its_key_other_computers_reach_it_by_the_names_that_it_was_told(
    tmp_path: Path, authority: Authority
) -> None:
    key, begin, certificate = authority.server.read_text().partition("-----BEGIN CERTIFICATE")
    (tmp_path / "key.pem").write_text(key)
    (tmp_path / "cert.pem").write_text(begin + certificate)
    words = ("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"), "--allow-host", "localhost")
    with serving(tmp_path / "catalog", tmp_path, "--host", "0.0.0.0", *words) as service:
        port = port_of(service.url)
        assert service.url == f"https://0.0.0.0:{port}/"
        assert over_tls(authority, port, service.bearer).status == 200
        assert over_tls(authority, port, {}).status == 401
        assert over_tls(authority, port, {**service.bearer, "Host": "elsewhere.example"}).status == 403
        with pytest.raises(ssl.SSLCertVerificationError):
            ssl.create_default_context().wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=60), server_hostname="localhost")


@contextmanager
def tls_proxy(authority: Authority, behind: int) -> Iterator[int]:
    """A proxy that speaks TLS and adds the client's address on a line of its own, as HAProxy does; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.server)

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve(plain: socket.socket, address: str) -> None:
        with (
            suppress(OSError),
            context.wrap_socket(plain, server_side=True) as client,
            socket.create_connection(("127.0.0.1", behind)) as server,
        ):
            head = b""
            while b"\r\n\r\n" not in head and (data := client.recv(65536)):
                head += data
            server.sendall(head.replace(b"\r\n\r\n", f"\r\nX-Forwarded-For: {address}\r\n\r\n".encode(), 1))
            threading.Thread(target=pump, args=(client, server), daemon=True).start()
            pump(server, client)

    def accept() -> None:
        with suppress(OSError):
            while True:
                plain, (address, _) = listener.accept()
                threading.Thread(target=serve, args=(plain, address), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)


def test_behind_a_proxy_on_an_address_of_the_network_it_knows_its_clients_apart(tmp_path: Path, authority: Authority) -> None:
    with (
        serving(tmp_path / "catalog", tmp_path, "--host", "0.0.0.0", "--behind-proxy") as service,
        tls_proxy(authority, port_of(service.url)) as port,
    ):
        assert service.url == f"http://0.0.0.0:{port_of(service.url)}/"
        assert over_tls(authority, port, service.bearer).body == b"[]"

        def guess(number: int, source: str = "127.0.0.1") -> int:
            made_up = {"Authorization": f"Bearer wrong{number}", "X-Forwarded-For": f"198.51.100.{number}"}
            return over_tls(authority, port, made_up, source=source).status

        assert [guess(number) for number in range(12)] == [401] * 10 + [429] * 2
        assert guess(12, source="127.0.0.2") == 401, "a client at another address is not to blame"
        assert over_tls(authority, port, service.bearer).status == 200
        # The page of the service, to which the browser says `https`, and one of somebody else.
        assert over_tls(authority, port, {**service.bearer, "Origin": f"https://localhost:{port}"}).status == 200
        assert over_tls(authority, port, {**service.bearer, "Origin": "https://elsewhere.example"}).status == 403
        assert terminal(authority, port, service, origin=f"https://localhost:{port}") == 404
        assert terminal(authority, port, service, origin="https://elsewhere.example") == 403


def test_behind_a_proxy_only_the_names_are_answered_that_it_was_told(tmp_path: Path, authority: Authority) -> None:
    words = ("--host", "0.0.0.0", "--behind-proxy", "--allow-host", "localhost")
    with serving(tmp_path / "catalog", tmp_path, *words) as service, tls_proxy(authority, port_of(service.url)) as port:
        assert over_tls(authority, port, service.bearer).status == 200
        assert over_tls(authority, port, {**service.bearer, "Host": "elsewhere.example"}).status == 403


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
