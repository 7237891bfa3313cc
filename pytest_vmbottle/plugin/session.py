"""What one pytest process has for its tests: a catalog, backends, and what gives out machines."""

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

from pytest_vmbottle.backend import Selective
from pytest_vmbottle.errors import SpecError, VMBottleError
from pytest_vmbottle.infra import Infra
from pytest_vmbottle.interruption import Interruption
from pytest_vmbottle.ledger import Ledger
from pytest_vmbottle.shown import printable

if TYPE_CHECKING:
    from pytest_vmbottle.backend import Backend
    from pytest_vmbottle.catalog import Catalog
    from pytest_vmbottle.images import DeclaredImage
    from pytest_vmbottle.machine import Machine
    from pytest_vmbottle.plugin.options import Options
    from pytest_vmbottle.provision import Provisioner
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["SESSION", "Interrupted", "Session"]

_CUT_SECONDS = 2.0


class Session:
    """What one pytest process knows: its provisioners, made when the first machine is asked for."""

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self._config = config
        self.options = options
        self._provisioners: dict[str, Provisioner] = {}
        self._backends: dict[str, Backend] = {}
        self._catalog: Catalog | None = None
        self._began = time.time()
        self.has_machines = False
        self.interruption = Interruption()
        self._flag = -1
        self.problems: dict[str, None] = {}
        self.told: dict[str, None] = {}
        self.tallies: list[dict[str, float]] = []
        self.infra = Infra()
        self.ledger = Ledger()
        self.machines: list[Machine] = []
        self.blamed: set[str] = set()
        self.unable: dict[str, int] = {}
        self.wanted: set[str] = set()
        self.test: pytest.Item | None = None
        self._used: WeakSet[Machine] = WeakSet()

    @property
    def catalog(self) -> Catalog:
        """The folder that holds images and packs; opened when it is first asked for."""
        # Imported here and not above: a suite without machines pays nothing for what they need (psutil, paramiko, asyncio).
        from pytest_vmbottle.catalog import Catalog, default_root

        if self._catalog is None:
            given = self.options.catalog
            self._catalog = Catalog(Path(given).expanduser() if given else default_root())
        return self._catalog

    def flag(self) -> str:
        """The path of a file without a name; workers write to it if they have tests with machines, since their controller collects none."""
        if self._flag < 0:
            self._flag = os.memfd_create("vmbottle", os.MFD_CLOEXEC)
        return f"/proc/{os.getpid()}/fd/{self._flag}"

    @property
    def is_flagged(self) -> bool:
        """Whether a worker has tests with machines."""
        return self._flag >= 0 and os.fstat(self._flag).st_size > 0

    def clean_up(self) -> None:
        """Sees to what processes left that are dead, workers and their supervisors among them; does nothing in a run without machines."""
        if self._catalog is not None or self.is_flagged:
            with suppress(VMBottleError):  # of a catalog that cannot be used, all that needed it has been told
                self.catalog.gc()

    def cut(self) -> None:
        """Ends all machines at once, beside each other."""

        def end(machine: Machine) -> None:
            with suppress(VMBottleError):
                machine.power_cut()

        threads = [threading.Thread(target=end, args=(machine,), daemon=True) for machine in self.machines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_CUT_SECONDS)

    @cached_property
    def declared(self) -> dict[str, DeclaredImage]:
        """The images that the project declares."""
        from pytest_vmbottle.images import find_declared_images

        # Without an ini file pytest may take a folder for its root that has little to do with the project.
        return find_declared_images(self._config.rootpath) or find_declared_images(self._config.invocation_params.dir)

    stand_in = "any"
    """A source for who only wants to know whether the rest of a spec can be."""

    def backend_name(self, wanted: str) -> str:
        """The backend that is meant; `"auto"` is what the option says, and by default QEMU."""
        asked = self.options.backend if wanted == "auto" else wanted
        return "qemu" if asked == "auto" else asked

    def _backend(self, name: str) -> Backend:
        if name not in self._backends:
            backend: Backend | None = self._config.hook.pytest_vmbottle_make_backend(config=self._config, name=name)
            if backend is None:
                raise SpecError(f"there is no backend {name!r}: choose qemu or smolvm, or install the plugin that brings it")
            self._backends[name] = backend
        return self._backends[name]

    def refusal(self, spec: MachineSpec) -> str | None:
        """Why the backend of a spec makes no machine like that, whatever the host; None if it does."""
        backend = self._backend(self.backend_name(spec.backend))
        return backend.refusal(spec) if isinstance(backend, Selective) else None

    def provisioner(self, wanted: str) -> Provisioner:
        """What gives out machines of a backend."""
        from pytest_vmbottle.provision import Provisioner, Settings

        name = self.backend_name(wanted)
        if name not in self._provisioners:
            backend = self._backend(name)
            settings = Settings(
                timeout_factor=self.options.timeout_factor,
                rebuild_before=self._began if self.options.rebuild else None,
                report=self.say,
                warn=self.say,
                ready=lambda machine: self._config.hook.pytest_vmbottle_machine_ready(machine=machine),
                stopping=lambda machine: self._config.hook.pytest_vmbottle_machine_stopping(machine=machine),
                declared=self.declared,
                memory_budget=self.options.memory_budget,
                retries=self.options.infra_retries,
            )
            self._provisioners[name] = Provisioner(self.catalog, backend, name=name, settings=settings)
        return self._provisioners[name]

    def freshen(self, machine: Machine) -> None:
        """Takes a shared machine that an earlier test had back to where it began, if its spec says so."""
        if machine.spec.reset == "test" and machine in self._used:
            try:
                machine.restore()
            except VMBottleError as error:
                error.infra = True
                raise
            self.blamed.discard(machine.id)
        self._used.add(machine)

    def say(self, line: str) -> None:
        """Writes a line to the terminal at once, also from a worker, whatever is being captured."""
        line = printable(f"vmbottle: {line}")
        capture = self._config.pluginmanager.getplugin("capturemanager")
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        worker = getattr(self._config, "workerinput", None)
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            if worker is not None:
                # A worker's own streams lead nowhere, so it is told where the controller's terminal is.
                with suppress(OSError), open(worker.get("vmbottle_terminal", os.devnull), "a") as stream:  # noqa: PTH123
                    stream.write(f"\n{line}\n")
            elif reporter is not None:
                reporter.ensure_newline()
                reporter.write_line(line)

    def describe_hosts(self) -> dict[str, None]:
        """One line for each backend that is asked for: what machines run on, and why."""
        return {self._describe_host(name): None for name in sorted(self.wanted or {self.backend_name("auto")})}

    def _describe_host(self, name: str) -> str:
        from pytest_vmbottle.catalog import default_reason

        try:
            able = self.provisioner(name).capabilities
        except (VMBottleError, pytest.UsageError) as error:
            return f"vmbottle: no machine can be run here: {error}"
        runs_on = f"{able.backend} ({able.version}), {able.accelerator} [{able.reason}]"
        why = "" if self.options.catalog else default_reason()
        return f"vmbottle: {runs_on}, {able.pack_kind} packs, catalog {self.catalog.root}{f' ({why})' if why else ''}"

    def misuse(self) -> pytest.UsageError:
        """What is wrong with the marks of all tests, or with the project's images."""
        return pytest.UsageError("\n".join(self.problems))

    def collect(self) -> None:
        """Adds up what this process did, and ends its provisioners."""
        for provisioner in self._provisioners.values():
            provisioner.close()
            self.tallies.append(attrs.asdict(provisioner.tally))
            self.told.update(self.describe_hosts())
        self._provisioners.clear()
        if self._catalog is not None:
            self._catalog.close()
            self.ledger.add(self._catalog.ledger.sent())
            self._catalog = None


SESSION: pytest.StashKey[Session] = pytest.StashKey()


@pytest.hookimpl(trylast=True)
def pytest_vmbottle_make_backend(config: pytest.Config, name: str) -> Backend | None:
    """Makes the backends of this package."""
    from pytest_vmbottle.backends.make import make

    session = config.stash[SESSION]
    told = session.options
    return make(
        name,
        folder=session.catalog.root,
        accelerator=told.accelerator,
        pack_kind=told.pack_kind,
        account=told.account,
        images=told.smolvm_images,
        warn=session.say,
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Notes which test it is that shared fixtures are asked by: they only know their class, module or session."""
    item.config.stash[SESSION].test = item


class Interrupted:
    """Ends the machines of a run that was interrupted before anything is told or torn down: there may be little time for that."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        """Ends them; to describe where the run was interrupted takes pytest a while."""
        self._session.cut()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Ends them; a teardown that still uses one is told that it is off."""
        if session.exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR):
            self._session.cut()
