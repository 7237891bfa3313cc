"""A host that is reached by OpenSSH's client: the copy of the project on it, and workers in that copy."""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
import threading
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import IO, TYPE_CHECKING, Any

from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.host.commands import run_tool
from pytest_vmbottle.hosts.holder import GOODBYE, PACKAGES
from pytest_vmbottle.hosts.project import write_archive
from pytest_vmbottle.hosts.relay import relay

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from pytest_vmbottle.spec.host_address import HostAddress

__all__ = ["SshHost", "client", "command", "refusal"]

_CONNECT = 15
"""Seconds in which a connection must be made."""
_ANSWER = 60.0
"""Seconds in which the host's Python must answer."""
_COPY = 600.0
"""Seconds in which a project must be copied."""
_GOODBYE = 15.0
"""Seconds in which the copy must be removed."""


def client(address: HostAddress) -> tuple[str, ...]:
    """Return the command line of ssh to a host, without a command.

    It asks for nothing, forwards nothing, and ends some 15 s after the host has fallen silent.
    """
    # Whatever the user's configuration says: workers have no terminal to answer at, and nothing may listen for them.
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": _CONNECT,
        "ServerAliveInterval": 5,
        "ServerAliveCountMax": 3,
        "ClearAllForwardings": "yes",
        "RemoteCommand": "none",
        "LogLevel": "ERROR",
    }
    return (
        "ssh",
        "-T",
        *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
        *address.options,
        "--",
        address.host,
    )


def command(address: HostAddress, module: str) -> tuple[str, ...]:
    """Return the words of a command on a host: a module of this package, with the catalog there."""
    catalog = (f"VMBOTTLE_CATALOG={address.catalog}",) if address.catalog else ()
    # Without the current folder in its path, which is the user's home folder.
    return ("env", *catalog, address.python, "-P", "-m", f"pytest_vmbottle.hosts.{module}")


def refusal(address: HostAddress, output: str, errors: str) -> BackendUnavailable:
    """Return the error of a host that has not answered as it should, in the words of ssh or of the host.

    Args:
        address: The host.
        output: What it has written to stdout.
        errors: What it, or ssh, has written to stderr.
    """
    words = errors.strip()
    if "No module named" in words:
        remedy = f"install it there: {address.python} -m pip install 'pytest-vmbottle[xdist]=={version('pytest-vmbottle')}'"
        return BackendUnavailable(f"{address}: {address.python} has no pytest-vmbottle: {words.splitlines()[-1]}", remedy)
    if output:
        told = f"the login shell writes {output.partition(chr(10))[0]!r} to its standard output, which is the workers' own"
        return BackendUnavailable(f"{address}: {told}", "let the shell's start-up files write nothing if there is no terminal")
    return BackendUnavailable(f"{address}: {words or 'ssh has ended, and the host said nothing'}")


class SshHost:
    """A host, from the moment at which it has a copy of the project."""

    def __init__(self, address: HostAddress) -> None:
        """Take its address; nothing is connected yet."""
        self.address = address
        self.folder = self.project = self.python = ""
        self.size = 0
        self._holder: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - of the process, and closed with it

    def __str__(self) -> str:
        """Return its address, for messages."""
        return str(self.address)

    def open(self, root: Path, *, directory: str, environment: Mapping[str, str], without: Collection[Path]) -> None:
        """Connect to the host and copy the project there.

        Args:
            root: The project's folder.
            directory: The folder in it in which workers run.
            environment: Variables for workers.
            without: Folders in it that are not copied.

        Raises:
            BackendUnavailable: The host cannot be reached, or has not what workers need.
        """
        argv = [*client(self.address), shlex.join(command(self.address, "holder"))]
        # In a session of its own: an interruption at the terminal is for the controller, which then says goodbye.
        self._holder = subprocess.Popen(  # noqa: S603 - argv list; the host's shell gets quoted words
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
        )
        with self._limited(_ANSWER):
            self._check(self._answer())
        order = {"name": root.name, "folder": self.address.folder, "directory": directory, "environment": dict(environment)}
        stream = self._holder.stdin
        assert stream is not None  # noqa: S101 - as it was asked for
        with self._limited(_COPY):
            with suppress(BrokenPipeError):  # the answer, or ssh's words, say why
                stream.write(json.dumps(order).encode() + b"\n")
                self.size = write_archive(root, stream, without=without)
                stream.flush()
            answer = self._answer()
        self.folder, self.project = answer["folder"], answer["project"]

    @property
    def program(self) -> str:
        """The program that execnet runs as the interpreter of a worker on this host, as a shell's words."""
        return relay(client(self.address), [*command(self.address, "worker"), self.folder])

    @property
    def is_alive(self) -> bool:
        """Tell whether the host still holds the project and can be reached."""
        if self._holder is None or self._holder.poll() is not None:
            return False
        return run_tool([*client(self.address), "true"], timeout=2.0 * _CONNECT).ok

    def cut(self) -> None:
        """Cut the connection at once; `close` is still to be called."""
        if self._holder is not None:
            self._holder.kill()

    def close(self) -> None:
        """Let the host remove the project, after its workers have ended; may be called again."""
        if self._holder is None:
            return
        holder, self._holder = self._holder, None
        with suppress(OSError, subprocess.TimeoutExpired):
            holder.communicate(GOODBYE, timeout=_GOODBYE)
        holder.kill()
        holder.wait()
        self._errors.close()

    @contextmanager
    def _limited(self, seconds: float) -> Iterator[None]:
        """End the connection if a block takes longer: a host that says nothing, or takes nothing, must not hold up the run for ever."""
        assert self._holder is not None  # noqa: S101 - it was started
        timer = threading.Timer(seconds, self._holder.kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _answer(self) -> dict[str, Any]:
        """Read a line of the holder.

        Raises:
            BackendUnavailable: It has none, or another program says something.
        """
        assert self._holder is not None  # noqa: S101 - it was started
        assert self._holder.stdout is not None  # noqa: S101 - as it was asked for
        line = self._holder.stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise self._refusal(line.decode(errors="replace")) from None
        if "error" in answer:
            raise BackendUnavailable(f"{self}: the project could not be copied: {answer['error']}")
        return answer

    def _refusal(self, line: str) -> BackendUnavailable:
        """Return the error of a host that has not answered."""
        assert self._holder is not None  # noqa: S101 - it was started
        if not line:
            self._holder.wait()
        self._errors.seek(0)
        return refusal(self.address, line, self._errors.read().decode(errors="replace"))

    def _check(self, greeting: Mapping[str, Any]) -> None:
        """Refuse a host that has other versions than this one."""
        self.python = greeting["python"]
        for package in PACKAGES:
            here, there = version(package), greeting["packages"].get(package, "")
            # Of the others, versions that differ a little get on.
            if not there or (package == "pytest-vmbottle" and there != here):
                remedy = f"install it there: {self.address.python} -m pip install {package}=={here}"
                raise BackendUnavailable(f"{self} has {package} {there or 'not at all'}, and this run {here}", remedy)
