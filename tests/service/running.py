"""A service in a process of its own, and clients of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs

from pytest_vmbottle.host.deadline import Deadline

COMMAND = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from pytest_vmbottle.cli import main; main()"
FACTOR = "3"
PATIENCE = 300.0


@attrs.frozen
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@attrs.frozen
class Service:
    """A service that runs."""

    url: str
    token: str
    process: subprocess.Popen[str]

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def connect(self) -> http.client.HTTPConnection:
        where = urlsplit(self.url)
        return http.client.HTTPConnection(where.hostname or "", where.port, timeout=PATIENCE)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Sends a request: an object as JSON, bytes and files as they are."""
        kind = {"Content-Type": "application/json"} if isinstance(body, dict) else {}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        with closing(self.connect()) as connection:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, data, {**self.bearer, **kind, **given})
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any, status: int = 200, **headers: str) -> Any:
        """Sends a request that must have this answer, and returns that."""
        answer = self.ask("POST", path, body, **headers)
        assert answer.status == status, answer
        return answer.json

    def sh(self, name: str, command: str) -> str:
        ended = self.post(f"/vms/{name}/execute-sh", {"command": command, "timeout": PATIENCE})
        assert ended["returncode"] == 0, ended
        return str(ended["stdout"])

    def state(self, name: str) -> str:
        answer = self.get(f"/vms/{name}")
        return str(answer.json["state"]) if answer.status == 200 else str(answer.status)

    def wait(self, name: str, *states: str) -> str:
        """Waits for a machine to leave `provisioning`; it must be in one of these states then."""
        assert Deadline(PATIENCE).poll(lambda: self.state(name) != "provisioning", every=0.2), self.get(f"/vms/{name}")
        assert self.state(name) in states, self.get(f"/vms/{name}")
        return self.state(name)

    def create(self, name: str, **keywords: Any) -> None:
        self.post("/vms/", {"base_image": "debian-12", "name": name, **keywords}, 202)
        self.wait(name, "running")

    def end(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)


def environment() -> dict[str, str]:
    paths = os.pathsep.join(str(Path(each).absolute()) for each in sys.path if each)
    return {**os.environ, "PYTHONPATH": paths, "VMBOTTLE_TIMEOUT_FACTOR": FACTOR}


@contextmanager
def serving(root: Path, folder: Path, *words: str) -> Iterator[Service]:
    """A service of a catalog on a free port, with a token in a folder."""
    path = folder / "token"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(os.urandom(32).hex())
    argv = [sys.executable, "-P", "-c", COMMAND, "--catalog", str(root), "serve", "--port", "0", "--token-file", str(path), *words]
    with (
        (folder / "log").open("a") as log,
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True, env=environment()) as process,
    ):
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url, (folder / "log").read_text()
            yield Service(url, path.read_text(), process)
        finally:
            process.terminate()
            process.wait(90)
    assert "Traceback" not in (folder / "log").read_text(), (folder / "log").read_text()
