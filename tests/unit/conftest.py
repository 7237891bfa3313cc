"""An https server and a proxy on loopback, with a certificate authority of their own: image servers as they are, faults included.

And shells that run here what is written for guests.
"""

from __future__ import annotations

import datetime as dt
import re
import select
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, TCPServer, ThreadingTCPServer
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import settings

from pytest_vmbottle.guest.path import Shell, with_any_bytes
from pytest_vmbottle.images import CLOUD_IMAGES
from pytest_vmbottle.result import Result

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
BUNDLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")

Key = ec.EllipticCurvePrivateKey


@attrs.frozen
class Authority:
    """A certificate authority's certificate, and a server's that it signed: files."""

    certificate: Path
    server: Path


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _sign(subject: str, key: Key, issuer: str, signer: Key, names: list[str]) -> x509.Certificate:
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=not names, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=bool(names),
                key_cert_sign=not names,
                crl_sign=not names,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
    return builder.sign(signer, hashes.SHA256())


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Vouches for this computer under the names of all servers that publish images."""
    folder = tmp_path_factory.mktemp("authority")
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = _sign("test authority", ca_key, "test authority", ca_key, [])
    hosts = {str(urlsplit(recipe.folder).hostname) for recipe in CLOUD_IMAGES.values()}
    certificate = _sign("test server", key, "test authority", ca_key, ["localhost", *sorted(hosts)])
    (folder / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return Authority(folder / "ca.pem", folder / "server.pem")


class Handler(BaseHTTPRequestHandler):
    """Answers one request in the way that the `Web` says: a word, and perhaps what it needs."""

    protocol_version = "HTTP/1.1"
    web: Web
    share = 1.0

    def do_GET(self) -> None:
        """Serves a file."""
        self.web.asked.append((self.headers["Host"].partition(":")[0], self.path, dict(self.headers.items())))
        ways = self.web.answers.get(self.path, ["serve" if self.path in self.web.files else "status 404"])
        way, _, argument = (ways[0] if len(ways) == 1 else ways.pop(0)).partition(" ")
        getattr(self, f"_{way}")(self.web.files.get(self.path, b""), *([argument] if argument else []))

    def _answer(self, number: int, body: bytes | None, **headers: str) -> None:
        """Writes an answer; without a body its head alone."""
        self.send_response(number)
        length = {"Content-Length": str(len(body))} if body is not None else {}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Type": "application/octet-stream", "Connection": "close"} | length | given).items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        if body:
            self.wfile.write(body[: int(len(body) * self.share)])

    def _serve(self, content: bytes) -> None:
        """As image servers do: with lengths, ranges and ETags."""
        etag, asked = f'"{hash(content)}"', self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.headers["If-Range"] == etag else 0
        if start >= len(content) > 0:
            self._answer(416, b"", Content_Range=f"bytes */{len(content)}")
        elif start:
            self._answer(206, content[start:], ETag=etag, Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self._answer(200, content, ETag=etag)

    def _cut(self, content: bytes, share: str) -> None:
        """Promises all of it, sends a share and hangs up."""
        self.share = float(share)
        self._serve(content)

    def _beyond(self, content: bytes) -> None:
        """Says that the range begins after the end, whatever it is."""
        self._answer(416, b"", Content_Range=f"bytes */{len(content)}")

    def _other_part(self, content: bytes) -> None:
        """Not the part that was asked for."""
        self._answer(206, content[:10], Content_Range=f"bytes 0-9/{len(content)}")

    def _same(self, content: bytes, etag: str) -> None:
        """Calls every content by the same name."""
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        ranges = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self._answer(206 if start else 200, content[start:], ETag=etag, **ranges)

    def _html(self, _: bytes) -> None:
        """As a network does that wants one to log in first."""
        self._answer(200, b"<!doctype html><title>Log in</title>", Content_Type="text/html; charset=utf-8")

    def _whole(self, content: bytes) -> None:
        """As a server that knows no ranges."""
        self._answer(200, content, ETag='"1"')

    def _length(self, _: bytes, length: str) -> None:
        """Promises more than there is anywhere."""
        self._answer(200, None, Content_Length=length)

    def _endless(self, _: bytes) -> None:
        """No length, and no end."""
        self._answer(200, None, Transfer_Encoding="chunked")
        while not self.web.ended.is_set():
            self.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")

    def _silent(self, content: bytes) -> None:
        """Half of it, and then nothing."""
        self._answer(200, None, Content_Length=str(len(content)), ETag='"1"')
        self.wfile.write(content[: len(content) // 2])
        self.web.ended.wait(30)

    def _hang(self, content: bytes) -> None:
        """The same, by a server that can go on with the rest."""
        self._answer(200, None, Content_Length=str(len(content)), ETag=f'"{hash(content)}"')
        self.wfile.write(content[: len(content) // 2])
        self.web.ended.wait(30)

    def _halt(self, content: bytes) -> None:
        """Send everything, with a moment's pause in the middle."""
        self._answer(200, None, Content_Length=str(len(content)))
        self.wfile.write(content[:1000])
        self.web.ended.wait(0.5)
        self.wfile.write(content[1000 : len(content) // 2])
        self.web.ended.wait(0.5)
        self.wfile.write(content[len(content) // 2 :])

    def _drip(self, content: bytes) -> None:
        """A few bytes at a time, for very long."""
        self._answer(200, None, Content_Length=str(len(content)), ETag='"1"')
        for start in range(0, len(content), 64):
            self.wfile.write(content[start : start + 64])
            if self.web.ended.wait(0.02):
                return

    def _repeat(self, begin: bytes, line: bytes) -> None:
        """Says something, and then the same line again and again, a moment apart."""
        self.close_connection = True
        self.wfile.write(begin)
        while not self.web.ended.wait(0.02):
            self.wfile.write(line)

    def _heads(self, _: bytes) -> None:
        """An answer whose headers have no end."""
        self._repeat(b"HTTP/1.1 200 OK\r\nX-Drip: ", b"x")

    def _continue(self, _: bytes) -> None:
        """Says that it is about to answer, for ever."""
        self._repeat(b"", b"HTTP/1.1 100 Continue\r\n\r\n")

    def _trailers(self, content: bytes) -> None:
        """Send everything, followed by headers without end."""
        chunk = f"{len(content):x}\r\n".encode() + content + b"\r\n0\r\n"
        self._repeat(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk, b"X: y\r\n")

    def _range(self, _: bytes, given: str) -> None:
        """Says where it begins in its own words."""
        self._answer(206, b"x", Content_Range=given)

    def _status(self, _: bytes, number: str) -> None:
        self._answer(int(number), b"")

    def _redirect(self, _: bytes, location: str) -> None:
        self._answer(302, b"", Location=location)

    def log_message(self, *_: Any) -> None:
        """Keeps quiet."""


class Web(ThreadingHTTPServer):
    """An https server: what files it has by their path, and in which ways it answers if it does not just serve them; the last stays."""

    def __init__(self, authority: Authority) -> None:
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.ended = threading.Event()
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(authority.server)
        super().__init__(("127.0.0.1", 0), type("Bound", (Handler,), {"web": self}))

    @property
    def url(self) -> str:
        """The URL of the root."""
        return f"https://localhost:{self.server_port}"

    @property
    def paths(self) -> list[str]:
        """Paths that were requested."""
        return [path for _, path, _ in self.asked]

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Speaks TLS, in a connection's own thread."""
        with suppress(OSError), self._tls.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what is tested."""


class Proxy(ThreadingTCPServer):
    """An http proxy that connects every host to one server."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.target = port
        self.hosts: list[str] = []
        self.logins: list[str] = []
        self.refusal = ""
        self.drips = False
        self.ended = threading.Event()
        super().__init__(("127.0.0.1", 0), _Tunnel)

    @property
    def address(self) -> str:
        """Its host and port."""
        return f"127.0.0.1:{self.server_address[1]}"


class _Tunnel(StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        head = self._head()
        match = re.match(r"CONNECT ([^ :]+):", head)
        assert match is not None
        self.server.hosts.append(match[1])
        self.server.logins += re.findall(r"(?im)^proxy-authorization: (.*)$", head)
        if self.server.refusal:
            self.wfile.write(f"HTTP/1.1 {self.server.refusal}\r\nContent-Length: 0\r\n\r\n".encode())
            return
        if self.server.drips:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            with suppress(OSError):
                while not self.server.ended.wait(0.02):
                    self.wfile.write(b"x")
            return
        with socket.create_connection(("127.0.0.1", self.server.target)) as there:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            self._pump(there)

    def _head(self) -> str:
        lines = []
        while line := self.rfile.readline(4096).decode().strip():
            lines.append(line)
        return "\n".join(lines)

    def _pump(self, there: socket.socket) -> None:
        other = {self.connection: there, there: self.connection}
        with suppress(OSError):
            while True:
                for end in select.select(list(other), [], [])[0]:
                    data = end.recv(1 << 16)
                    if not data:
                        return
                    other[end].sendall(data)


def _running(server: TCPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def web(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server that is trusted, and an environment that names no proxy and no other certificates."""
    for name in (*PROXIES, *(name.upper() for name in PROXIES), *BUNDLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    server = Web(authority)
    for _ in _running(server):
        yield server
        server.ended.set()


@pytest.fixture
def proxy(web: Web, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Proxy that sends all requests to `web`."""
    server = Proxy(web.server_port)
    monkeypatch.setenv("HTTPS_PROXY", f"http://{server.address}")
    for _ in _running(server):
        yield server
        server.ended.set()


settings.register_profile("any speed", deadline=None)  # a busy computer is no fault of an example's
settings.load_profile("any speed")

# -- scripts for guests, run here ---------------------------------------------------------------------------------------------------------


class LocalShell(Shell):
    """Runs scripts here; as a channel does, it keeps the first part of a long output, and takes UTF-8 alone.

    To them all of this computer but one folder is read-only, so that a wrong script of ours cannot do harm.
    """

    def __init__(self, folder: Path, sh: str = "/bin/sh", path: str = "/usr/bin:/bin", limit: int = 1 << 20) -> None:
        self.path, self.limit, self.folder = path, limit, str(folder)
        self.argv = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--bind", self.folder, self.folder, "--", sh]
        self.runs = 0

    def _run(self, text: str, words: tuple[str, ...], content: bytes = b"") -> tuple[bytes, Result]:
        self.runs += 1
        text, words = with_any_bytes(text, words)
        argv = [*self.argv, "-c", text, "sh", *[word.encode().decode() for word in words]]
        env = {"PATH": self.path, "LC_ALL": "C", "TMPDIR": self.folder}
        done = subprocess.run(argv, input=content, capture_output=True, check=False, env=env, executable=shutil.which("bwrap"))
        out, err = (stream.decode("utf-8", "surrogateescape") for stream in (done.stdout[: self.limit], done.stderr))
        truncated = len(done.stdout) > self.limit
        return done.stdout, Result(argv=("sh",), returncode=done.returncode, stdout=out, stderr=err, truncated=truncated)

    def script(self, text: str, *words: str) -> Result:
        return self._run(text, words)[1]

    def feed(self, text: str, *words: str, source: BinaryIO, size: int, framed: bool = False) -> Result:
        del framed
        return self._run(text, words, source.read(size))[1]

    def fetch(self, text: str, *words: str, sink: BinaryIO, size: int) -> Result:
        assert size > 0
        out, result = self._run(text, words)
        sink.write(out)
        return result


@pytest.fixture(scope="session")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of BusyBox's programs, which are Alpine's."""
    program = shutil.which("busybox")
    assert program, "busybox is not installed here: .ci/prepare installs it"
    folder = tmp_path_factory.mktemp("busybox")
    subprocess.run([program, "--install", "-s", str(folder)], check=True)
    return folder


@pytest.fixture
def local_shell() -> type[LocalShell]:
    """Shell that runs scripts on this computer."""
    return LocalShell


@pytest.fixture(params=["sh", "busybox"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> LocalShell:
    """Debian's shell (or another by its name) with GNU's programs, and BusyBox."""
    if request.param == "busybox":
        folder = request.getfixturevalue("busybox")
        return LocalShell(tmp_path, f"{folder}/sh", str(folder))
    return LocalShell(tmp_path, f"/bin/{request.param}")
