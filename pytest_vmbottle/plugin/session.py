"""State of one pytest process: its catalog, backends and provisioners."""

from __future__ import annotations

import os
import threading
import time
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

import attrs
import pytest

from pytest_vmbottle.catalog.ledger import Ledger
from pytest_vmbottle.errors import SpecError, VMBottleError
from pytest_vmbottle.host.signals import Interruption
from pytest_vmbottle.plugin.infra import Infra
from pytest_vmbottle.shown import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_vmbottle.backends.port import Backend
    from pytest_vmbottle.catalog.catalog import Catalog
    from pytest_vmbottle.images import DeclaredImage
    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.plugin.artifacts import Artifacts, TestFolder
    from pytest_vmbottle.plugin.evidence import Evidence
    from pytest_vmbottle.plugin.hosted import Hosted
    from pytest_vmbottle.plugin.options import Options
    from pytest_vmbottle.provision import Provisioner
    from pytest_vmbottle.provision.context import Remains
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["DURATIONS", "SESSION", "Interrupted", "Session"]

DURATIONS = "vmbottle/durations"
"""Key of pytest's cache for the seconds of each test."""

_ONLY_ASKED = ("collectonly", "setupplan", "showfixtures", "show_fixtures_per_test")
"""Options with which no test is run."""
# Seconds that are waited for each machine. One that is not off by then ends with its fixture, or by its supervisor.
_CUT_SECONDS = 2.0


class Session:
    """State of one pytest process; provisioners are made when the first machine is asked for."""

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self.config = config
        self.options = options
        self._provisioners: dict[str, Provisioner] = {}
        self._backends: dict[str, Backend] = {}
        self._catalog: Catalog | None = None
        self._began = time.time()
        self.has_machines = False
        # A list of tests needs no machines, so nothing is made and the host is not probed.
        self.only_asked = any(config.getoption(name, default=False) for name in _ONLY_ASKED)
        # Not installed yet: a run without machines leaves the process's handlers alone.
        self.interruption = Interruption()
        self._flag = -1
        # As keys of dictionaries: the same message comes from several hooks and workers, and is shown once.
        self.problems: dict[str, None] = {}
        self.told: dict[str, None] = {}
        self.tallies: list[dict[str, float]] = []
        self.infra = Infra()
        self.ledger = Ledger()
        self.machines: list[Machine] = []
        self.reported_panics: set[str] = set()
        self.unable: dict[str, int] = {}
        self.wanted: set[str] = set()
        self.test: pytest.Item | None = None
        self.phase = ""
        self.began_at = 0.0
        # Machines that ended since the test began, and its folder once something of it is kept.
        self.ended: list[Evidence] = []
        self.opened: TestFolder | None = None
        # Ids and not names: machines of one test may have the same name.
        self.failed: set[str] = set()
        self.kept: list[str] = []
        self.capsules: list[str] = []
        # A worker has the id of its controller's run.
        self.run = getattr(config, "workerinput", {}).get("vmbottle_run") or os.urandom(16).hex()
        self.hosted = _hosted(config)
        # Weak, so that the session keeps no machine after its fixture.
        self._used: WeakSet[Machine] = WeakSet()

    @property
    def catalog(self) -> Catalog:
        """The catalog, opened on first use."""
        # Imported here and not above: a suite without machines pays nothing for what they need (psutil, paramiko, asyncio).
        from pytest_vmbottle.catalog.catalog import Catalog
        from pytest_vmbottle.catalog.location import default_root

        if self._catalog is None:
            given = self.options.catalog
            self._catalog = Catalog(Path(given).expanduser() if given else default_root())
        return self._catalog

    def flag(self) -> str:
        """Return the path of a worker's flag file.

        A worker writes to it if it has tests with machines, since the controller collects none.
        """
        if self._flag < 0:
            # A file in memory: it is gone with this process, however that ends.
            self._flag = os.memfd_create("vmbottle", os.MFD_CLOEXEC)
        return f"/proc/{os.getpid()}/fd/{self._flag}"

    @property
    def is_flagged(self) -> bool:
        """Tell whether a worker has tests with machines."""
        return self._flag >= 0 and os.fstat(self._flag).st_size > 0

    def clean_up(self) -> None:
        """Clean up after dead processes, such as workers and their supervisors.

        Does nothing in a run without machines.
        """
        # With workers on other hosts, none of them has a machine here.
        if self._catalog is not None or (self.is_flagged and not self.options.hosts):
            with suppress(VMBottleError):  # of a catalog that cannot be used, all that needed it has been told
                self.catalog.gc()

    def note_phase(self, phase: str, state: str) -> None:
        """Record a phase of the test in the timelines of all machines, and in the events of those that have ended in it."""
        self.phase = phase
        fields = {"phase": phase, "state": state, "nodeid": self.test.nodeid if self.test else ""}
        for machine in self.machines:
            machine.lifecycle.timeline.note("phase", **fields)
        for evidence in self.ended:
            evidence.note("phase", **fields)

    def begin(self, test: pytest.Item) -> None:
        """Begin a test, or another run of one."""
        self.test, self.began_at = test, time.monotonic()
        self.forget()

    def forget(self) -> None:
        """Forget what is known of the test for its artifacts, which are complete."""
        self.ended, self.opened = [], None

    def take_remains(self, remains: Remains) -> None:
        """Keep what a machine leaves, since the phase that fails may end after the machine's folder has gone."""
        # A machine that has built a pack is none of the test's. One that failed to is why the test has no machine.
        is_builder = remains.source is not None and remains.source.building
        if self.options.artifacts == "never" or (is_builder and not remains.failed):
            return
        from pytest_vmbottle.plugin.evidence import read_remains

        try:
            self.ended.append(read_remains(remains, since=self.began))
            # Now, since files that are copied go with the folder.
            if self.opened is not None:
                self.opened.add(self.ended[-1])
        # It must not hide the test's own error.
        except (OSError, VMBottleError) as error:
            self.say(f"what the machine {remains.spec.name!r} left could not be kept: {error}")

    @property
    def began(self) -> float:
        """Start of the test, in seconds since 1970, on the clock of timelines."""
        from pytest_vmbottle.timeline import since_epoch

        # By the monotonic clock, as timelines are: a clock that is set during a run must not lose events.
        return since_epoch(self.began_at)

    @property
    def artifacts_folder(self) -> Path:
        """The folder for artifacts."""
        return self._path(self.options.output, "vmbottle-artifacts")

    @property
    def baselines_file(self) -> Path:
        """The file of the instruction counts that tests are compared with."""
        return self._path(self.options.baselines, "vm-baselines.json")

    def _path(self, given: str, default: str) -> Path:
        """Return a path of the options, by default one in pytest's root folder."""
        return self.config.invocation_params.dir / Path(given).expanduser() if given else self.config.rootpath / default

    @cached_property
    def artifacts(self) -> Artifacts:
        """The writer of this run's artifacts."""
        from pytest_vmbottle.plugin.artifacts import Artifacts

        # Two hosts may each have a folder of the same name, so those of workers on other hosts have the worker's name.
        suffix = f"-{os.environ.get('PYTEST_XDIST_WORKER', '')}" if self.hosted else ""
        return Artifacts(self.artifacts_folder, self.run, suffix=suffix)

    @property
    def host(self) -> str:
        """The address of this process's host, if its controller is on another one, or an empty text."""
        return str(self.hosted) if self.hosted else ""

    def by_hand(self, command: str) -> str:
        """Return a command of this host as a person runs it who sees the report."""
        return self.hosted.by_hand(command) if self.hosted else command

    def shown_path(self, path: Path) -> str:
        """Return a path as reports show it: below pytest's root folder if it is there."""
        if self.hosted is not None and path.is_relative_to(self.artifacts_folder):
            # Where the controller writes them.
            return str(Path(self.hosted.facts["shown"], path.relative_to(self.artifacts_folder)))
        return str(path.relative_to(self.config.rootpath) if path.is_relative_to(self.config.rootpath) else path)

    def cut(self) -> None:
        """End all machines at once, in parallel."""

        def end(machine: Machine) -> None:
            with suppress(VMBottleError):
                machine.power_cut()

        # Beside each other: each may take seconds, and CI kills a job soon after it has asked for its end.
        threads = [threading.Thread(target=end, args=(machine,), daemon=True) for machine in self.machines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_CUT_SECONDS)

    @cached_property
    def declared(self) -> dict[str, DeclaredImage]:
        """Images that the project declares."""
        from pytest_vmbottle.images import find_declared_images

        # Without an ini file pytest may take a folder for its root that has little to do with the project.
        return find_declared_images(self.config.rootpath) or find_declared_images(self.config.invocation_params.dir)

    placeholder = "any"
    """Placeholder source, to check the rest of a spec."""

    def _backend(self, name: str) -> Backend:
        # Asked of the hook once: a plugin's backend may have state, and probing it may take seconds.
        if name not in self._backends:
            backend: Backend | None = self.config.hook.pytest_vmbottle_make_backend(config=self.config, name=name)
            if backend is None:
                raise SpecError(f"there is no backend {name!r}: choose qemu or smolvm, or install the plugin that provides it")
            self._backends[name] = backend
        return self._backends[name]

    def default_source(self, wanted: str) -> str | None:
        """Return what machines of a backend start from where nobody says it, if it has such an image."""
        return self._backend(self.options.backend_for(wanted)).default_source

    def unsupported_reason(self, spec: MachineSpec) -> str | None:
        """Return the reason that the backend makes no such machine on any host; None if it does."""
        backend = self._backend(self.options.backend_for(spec.backend))
        return backend.unsupported_reason(spec)

    def provisioner(self, wanted: str) -> Provisioner:
        """Return the provisioner of a backend."""
        from pytest_vmbottle.provision import Provisioner, Settings

        name = self.options.backend_for(wanted)
        if name not in self._provisioners:
            backend = self._backend(name)
            settings = Settings(
                timeout_factor=self.options.timeout_factor,
                rebuild_before=self._began if self.options.rebuild else None,
                report=self.say,
                warn=self.say,
                # Functions, so that provisioners know nothing of pytest's hooks.
                ready=self._ready,
                stopping=self._stopping,
                ended=self.take_remains,
                declared=self.declared,
                memory_budget=self.options.memory_budget,
                retries=self.options.infra_retries,
                registry=self.options.registry,
                registry_push=self.options.registry_push,
                spares=self.spares,
            )
            self._provisioners[name] = Provisioner(self.catalog, backend, name=name, settings=settings)
        return self._provisioners[name]

    @cached_property
    def spares(self) -> int:
        """The number of machines that this process may have made before they are asked for."""
        workers = self.hosted.facts["workers"] if self.hosted else int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        return self.options.spares_of(workers)

    @property
    def provisioners(self) -> Mapping[str, Provisioner]:
        """The provisioners that there are, by backend."""
        return self._provisioners

    def _ready(self, machine: Machine) -> None:
        self.config.hook.pytest_vmbottle_machine_ready(machine=machine)
        self.machines.append(machine)

    def _stopping(self, machine: Machine) -> None:
        # First, so that no report asks a machine that is ending.
        self.machines.remove(machine)
        self.config.hook.pytest_vmbottle_machine_stopping(machine=machine, failed=machine.id in self.failed)

    def reset(self, machine: Machine) -> None:
        """Restore a used shared machine to its initial state, if its spec says so."""
        # Not before its first test: the machine is new then.
        if machine.spec.reset == "test" and machine in self._used:
            try:
                machine.restore()
            except VMBottleError as error:
                # A reset that fails keeps the test from its machine, so the test was not judged.
                error.infra = True
                raise
            # After a restore it is a kernel that has not panicked yet.
            self.reported_panics.discard(machine.id)
        self._used.add(machine)

    def say(self, line: str) -> None:
        """Write a line to the terminal at once, also from a worker, whatever is being captured."""
        line = printable(f"vmbottle: {line}")
        capture = self.config.pluginmanager.getplugin("capturemanager")
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        worker = getattr(self.config, "workerinput", None)
        if self.hosted is not None:
            self.hosted.say(line)
            return
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            if worker is not None:
                # A worker's own streams lead nowhere, so it is told where the controller's terminal is.
                with suppress(OSError), open(worker.get("vmbottle_terminal", os.devnull), "a") as stream:  # noqa: PTH123
                    # The controller's terminal may be in the middle of a line of dots.
                    stream.write(f"\n{line}\n")
            elif reporter is not None:
                reporter.ensure_newline()
                reporter.write_line(line)

    def describe_hosts(self) -> dict[str, None]:
        """Return one line for each backend in use: hypervisor, accelerator, and the reason."""
        return {self._describe_host(name): None for name in sorted(self.wanted or {self.options.backend_for()})}

    def _describe_host(self, name: str) -> str:
        from pytest_vmbottle.catalog.location import default_reason

        try:
            able = self.provisioner(name).capabilities
        except (VMBottleError, pytest.UsageError) as error:
            return f"vmbottle: no machine can be run {f'on {self.host}' if self.hosted else 'here'}: {error}"
        runs_on = f"{f'{self.host}: ' if self.hosted else ''}{able.backend} ({able.version}), {able.accelerator} [{able.reason}]"
        why = "" if self.options.catalog else default_reason()
        return f"vmbottle: {runs_on}, {able.pack_kind} packs, catalog {self.catalog.root}{f' ({why})' if why else ''}"

    def usage_error(self) -> pytest.UsageError:
        """Return the error about all wrong marks, or about the project's images."""
        return pytest.UsageError("\n".join(self.problems))

    def collect(self) -> None:
        """Add up this process's counts, and end its provisioners."""
        if self._provisioners:
            # Before `_provisioners` is cleared: later this would make them again. It may make one more, so it is not done while they are
            # gone through.
            self.told.update(self.describe_hosts())
        for provisioner in self._provisioners.values():
            provisioner.close()
            self.tallies.append(attrs.asdict(provisioner.tally))
        self._provisioners.clear()
        if self._catalog is not None:
            # After the provisioners, which hold packs in it; and before its ledger is read, since closing counts what is left.
            self._catalog.close()
            self.ledger.add(self._catalog.ledger.sent())
            self._catalog = None


def _hosted(config: pytest.Config) -> Hosted | None:
    """Return the connection of this process to a controller on another host, if it has one."""
    inputs = getattr(config, "workerinput", {})
    if "vmbottle_channel" not in inputs:
        return None
    # Imported here and not above: most runs are on one host.
    from pytest_vmbottle.plugin.hosted import Hosted

    return Hosted(inputs)


SESSION: pytest.StashKey[Session] = pytest.StashKey()


@pytest.hookimpl(trylast=True)
# Last, so that a plugin can replace a backend of ours.
def pytest_vmbottle_make_backend(config: pytest.Config, name: str) -> Backend | None:
    """Make the backends of this package."""
    from pytest_vmbottle.backends.make import make

    session = config.stash[SESSION]
    return make(name, session.options, folder=session.catalog.root, warn=session.say)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note the test that asks for shared fixtures: they know only their class, module or session."""
    session = item.config.stash[SESSION]
    session.begin(item)
    session.note_phase("setup", "began")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Record that the test begins to use its machines."""
    item.config.stash[SESSION].note_phase("call", "began")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Record that the test has ended."""
    item.config.stash[SESSION].note_phase("teardown", "began")


class Interrupted:
    """Hook that ends the machines of an interrupted run before any report or teardown.

    There may be little time for that.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        """End the machines; pytest needs a while to describe the interruption."""
        self._session.cut()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """End the machines; a teardown that still uses one is told that it is off."""
        # Not after a failure with `-x` or `--maxfail`: those teardowns may still use their machines.
        if session.exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR):
            self._session.cut()
