"""Real registries on loopback, and what stands between them and us when something is to go wrong."""

from __future__ import annotations

import base64
import datetime as dt
import json
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import attrs
import bcrypt
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from pytest_vmbottle.host.deadline import Deadline

LOGIN = ("somebody", "secret")


@attrs.frozen
class DockerRegistry:
    """Debian's docker-registry."""

    host: str
    folder: Path

    @property
    def blobs(self) -> dict[str, Path]:
        """Files of its blobs, by digest."""
        return {f"sha256:{path.parent.name}": path for path in self.folder.glob("docker/registry/v2/blobs/sha256/*/*/data")}

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@contextmanager
def docker_registry(folder: Path, *, auth: dict[str, Any] | None = None, tls: Path | None = None) -> Iterator[DockerRegistry]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    http: dict[str, Any] = {"addr": f"127.0.0.1:{port}"}
    if tls is not None:
        http["tls"] = {"certificate": str(tls), "key": str(tls)}
    facts = {"version": 0.1, "storage": {"filesystem": {"rootdirectory": str(folder)}}, "http": http, **({"auth": auth} if auth else {})}
    (folder / "config.yml").write_text(yaml.safe_dump(facts))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(["docker-registry", "serve", folder / "config.yml"], stdout=log, stderr=log)
    try:

        def listens() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                return True
            return False

        assert Deadline(60).poll(listens)
        yield DockerRegistry(f"{'localhost' if tls else '127.0.0.1'}:{port}", folder)
    finally:
        process.terminate()
        process.wait(timeout=30)


def passwords(folder: Path) -> dict[str, Any]:
    """Settings of a registry that only lets in who has the login."""
    name, password = LOGIN
    path = folder / "htpasswd"
    path.write_text(f"{name}:{bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()}\n")
    return {"htpasswd": {"realm": "test", "path": str(path)}}


def log_in(folder: Path, host: str) -> Path:
    """Store the login as `docker login` does; returns the folder for DOCKER_CONFIG."""
    auth = base64.b64encode(":".join(LOGIN).encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return folder


class _Tokens(BaseHTTPRequestHandler):
    """A token server whose tokens are good for reading, and for writing as well if it is told so."""

    key: rsa.RSAPrivateKey
    certificate: x509.Certificate
    writers: bool
    asked: list[str]

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        scope = query["scope"][0] if "scope" in query else ""
        self.asked.append(scope)
        kind, name, actions = scope.split(":") if scope else ("", "", "")
        allowed = [action for action in actions.split(",") if action == "pull" or self.writers]
        body = json.dumps({"token": self._token([{"type": kind, "name": name, "actions": allowed}])}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _token(self, access: list[dict[str, Any]]) -> str:
        def encoded(value: bytes) -> str:
            return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

        der = self.certificate.public_bytes(serialization.Encoding.DER)
        head = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        now = int(time.time())
        claims = {"iss": "test", "sub": "", "aud": "registry", "exp": now + 60, "nbf": now - 60, "iat": now, "jti": "1", "access": access}
        text = ".".join(encoded(json.dumps(part).encode()) for part in (head, claims))
        return f"{text}.{encoded(self.key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))}"

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def token_server(folder: Path, *, writers: bool) -> Iterator[dict[str, Any]]:
    """Yield the settings of a registry that takes the tokens of a server."""
    key = rsa.generate_private_key(65537, 2048)
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tokens")]), dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
    certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    (folder / "tokens.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    handler = type("Tokens", (_Tokens,), {"key": key, "certificate": certificate, "writers": writers, "asked": []})
    with served(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        realm = f"http://127.0.0.1:{server.server_address[1]}/token"
        yield {"token": {"realm": realm, "service": "registry", "issuer": "test", "rootcertbundle": str(folder / "tokens.pem")}}


@contextmanager
def served(server: ThreadingHTTPServer) -> Iterator[ThreadingHTTPServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Between(BaseHTTPRequestHandler):
    """Passes requests on to a registry, but cuts the first answers that are long after a part of them."""

    host: str
    cuts: list[int]
    """Bytes that each of the next long answers gets."""
    sent: list[int]

    def do_GET(self) -> None:
        self._pass_on()

    def do_HEAD(self) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
        request = urllib.request.Request(f"http://{self.host}{self.path}", headers=headers, method=self.command)
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            body = answer.read()
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                if key.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(key, value)
            self.end_headers()
            whole = len(body)
            if self.command == "GET" and "/blobs/" in self.path:
                if self.cuts:
                    body = body[: self.cuts.pop(0)]
                self.sent.append(len(body))
            self.wfile.write(body)
        self.close_connection = len(body) < whole

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def cut_off(registry: DockerRegistry, *cuts: int) -> Iterator[tuple[str, list[int]]]:
    """Yield a host that passes on to a registry, and how many bytes of each blob it has sent."""
    sent: list[int] = []
    handler = type("Cut", (Between,), {"host": registry.host, "cuts": list(cuts), "sent": sent})
    with served(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        yield f"127.0.0.1:{server.server_address[1]}", sent
