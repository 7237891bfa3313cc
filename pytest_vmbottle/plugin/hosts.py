"""Runs whose workers are on other hosts, as the controller sees them."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vmbottle.errors import BackendUnavailable, SpecError
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.hosts.remote import HOST
from pytest_vmbottle.hosts.ssh import SshHost
from pytest_vmbottle.plugin.hosted import FILE, FLAG, SAY
from pytest_vmbottle.shown import printable

if TYPE_CHECKING:
    from types import ModuleType

    from pytest_vmbottle.plugin.session import Session

__all__ = ["Hosts"]

_OURS = (
    *("VMBOTTLE_CATALOG", "VMBOTTLE_OUTPUT", "VMBOTTLE_BASELINES", "VMBOTTLE_DURATIONS", "VMBOTTLE_HOSTS"),
    *("PYTEST_CURRENT_TEST", "PYTEST_DEBUG_TEMPROOT"),
)
"""Variables with paths of this host, or about this process."""


class Hosts:
    """Hooks that have the workers of pytest-xdist run on other hosts."""

    def __init__(self, session: Session) -> None:
        """Check that pytest-xdist has workers; nothing is connected yet.

        Raises:
            pytest.UsageError: It has none, or the project is not where pytest was started.
        """
        config = session.config
        if not config.pluginmanager.hasplugin("xdist"):
            raise pytest.UsageError("--vm-hosts needs pytest-xdist: pip install 'pytest-vmbottle[xdist]'")
        if config.getoption("dist") == "no" or not config.getoption("tx"):
            raise pytest.UsageError("--vm-hosts needs the number of workers as well, for all hosts together, such as -n 4")
        if not config.invocation_params.dir.is_relative_to(config.rootpath):
            raise pytest.UsageError(f"--vm-hosts copies the project in {config.rootpath}: start pytest there, or in a folder below")
        self._session = session
        self._hosts = [SshHost(address) for address in session.options.hosts]
        self._by_program: dict[str, SshHost] = {}
        self._lost: set[SshHost] = set()
        self._counts: Counter[SshHost] = Counter()
        # A duplicate, which no capturing replaces.
        capture = config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            self._terminal = os.dup(2)

    @pytest.hookimpl(trylast=True)
    # After pytest's header; pytest-xdist, whose hook is registered later, comes last.
    def pytest_sessionstart(self) -> None:
        """Copy the project to all hosts, and divide the workers among them before pytest-xdist starts them."""
        config = self._session.config
        try:
            with ThreadPoolExecutor(len(self._hosts)) as pool:
                try:
                    list(pool.map(self._open, self._hosts))
                except BaseException:
                    # Else the pool would wait for the copies to end.
                    for host in self._hosts:
                        host.cut()
                    raise
        except (BackendUnavailable, OSError) as error:
            raise pytest.UsageError(f"--vm-hosts: {printable(str(error))}") from None
        self._by_program = {host.program: host for host in self._hosts}
        divided = list(islice(cycle(self._hosts), len(config.option.tx)))
        config.option.tx = [f"popen//python={host.program}" for host in divided]
        self._counts.update(divided)
        for host in self._hosts:
            workers = f"{self._counts[host]} {'worker' if self._counts[host] == 1 else 'workers'}"
            self._session.say(f"{host}: {workers}, Python {host.python}, project ({format_size(host.size)}) in {host.project}")

    def _open(self, host: SshHost) -> None:
        config = self._session.config
        given = {name: value for name, value in os.environ.items() if name.startswith(("VMBOTTLE_", "PYTEST_")) or name == "CI"}
        environment = {name: value for name, value in given.items() if name not in _OURS and not name.startswith("PYTEST_XDIST_")}
        directory = str(config.invocation_params.dir.relative_to(config.rootpath))
        host.open(config.rootpath, directory=directory, environment=environment, without=[self._session.artifacts_folder])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_getremotemodule(self) -> ModuleType:
        """Return the module that workers run."""
        # Imported here: it needs pytest-xdist.
        from pytest_vmbottle.hosts import remote

        return remote

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker its host, and listen to what it sends beside its reports."""
        host = self._by_program[node.gateway.spec.python]
        node.workerinput[HOST] = {
            "address": str(host),
            "root": str(self._session.config.rootpath),
            "project": host.project,
            "shown": self._session.shown_path(self._session.artifacts_folder),
            "ssh": ["ssh", "-t", *host.address.options, host.address.host],
            "python": host.address.python,
            "workers": self._counts[host],
        }
        channel = node.gateway.newchannel()
        channel.setcallback(self._take)
        node.workerinput["vmbottle_channel"] = channel

    def _take(self, message: tuple[Any, ...]) -> None:
        """Take a message of a worker; called by the thread that receives its reports, in the order in which all was sent."""
        kind, *values = message
        if kind == SAY:
            self._write(str(values[0]))
        elif kind == FLAG:
            Path(self._session.flag()).write_text("machines")
        elif kind == FILE:
            try:
                self._session.artifacts.receive(*values)
            except (OSError, SpecError) as error:
                self._write(f"vmbottle: artifacts of a worker could not be written: {error}")

    def _write(self, line: str) -> None:
        # The terminal may be in the middle of a line of dots.
        with suppress(OSError):
            os.write(self._terminal, f"\n{printable(line)}\n".encode())

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Have the worker that replaces a crashed one run on another host, if its own cannot be reached any more.

        Raises:
            pytest.exit.Exception: No host can be reached.
        """
        host = self._by_program[node.gateway.spec.python]
        if not error or (host not in self._lost and host.is_alive):
            return
        self._lost.add(host)
        self._session.say(f"{host} cannot be reached any more: {node.gateway.id} is lost")
        left = [each for each in self._hosts if each not in self._lost and each.is_alive]
        if not left:
            pytest.exit("vmbottle: no host is left", pytest.ExitCode.INTERNAL_ERROR)
        # pytest-xdist starts the new worker by the specification of the old one.
        other = min(left, key=lambda each: self._counts[each])
        self._counts[other] += 1
        node.gateway.spec.python = other.program

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Have all hosts remove what they hold; pytest-xdist has ended the workers."""
        self.close()

    def pytest_unconfigure(self) -> None:
        """The same for a run that has not begun."""
        self.close()

    def close(self) -> None:
        """Disconnect from all hosts; may be called again."""
        with ThreadPoolExecutor(len(self._hosts)) as pool:
            list(pool.map(SshHost.close, self._hosts))
