"""Hosts that are reached by ssh: this one, by an sshd of its own on loopback, with a folder and a catalog of its own."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import pytest

from pytest_vmbottle.host.deadline import Deadline

__all__ = ["SshServer", "ssh_server"]


@attrs.frozen
class SshServer:
    """An sshd, and the configuration by which ssh reaches it."""

    folder: Path
    catalog: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def runs(self) -> Path:
        """The folder with the copies of projects."""
        return self.folder / "runs"

    def address(self, **options: str) -> str:
        given = {"python": sys.executable, "catalog": str(self.catalog), "config": str(self.folder / "client"), **options}
        return f"ssh://{self.folder.name}{self.runs}?{'&'.join(f'{name}={value}' for name, value in given.items() if value)}"


@contextmanager
def ssh_server(folder: Path, catalog: Path | None = None) -> Iterator[SshServer]:
    """An sshd that lets this user in by a key; the name of the folder is the host's alias, and its catalog is in there if none is given."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("there is no sshd here: apt-get install openssh-server")
    if os.geteuid() == 0:
        # Where root's sshd locks up what has not logged in yet. A service manager makes it, and there may be none.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    folder.mkdir()
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copyfile(folder / "user_key.pub", folder / "authorized")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    known = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {known}")
    server = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "authorized",
        "UsePAM": "no",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "PidFile": "none",
    }
    (folder / "server").write_text("".join(f"{name} {value}\n" for name, value in server.items()))
    client = {
        "HostName": "127.0.0.1",
        "Port": port,
        "User": getpass.getuser(),
        "IdentityFile": folder / "user_key",
        "IdentitiesOnly": "yes",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": folder / "known_hosts",
        "GlobalKnownHostsFile": "/dev/null",
    }
    (folder / "client").write_text(f"Host {folder.name}\n" + "".join(f"    {name} {value}\n" for name, value in client.items()))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "-D", "-e", "-f", folder / "server"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        assert Deadline(20).poll(lambda: _answers(port) or process.poll() is not None), "sshd did not answer"
        assert process.poll() is None, (folder / "log").read_text()
        yield SshServer(folder, catalog or folder / "catalog", port, process)
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        return connection.recv(4) == b"SSH-"
    return False
