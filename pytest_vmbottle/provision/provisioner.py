"""Gives out machines: each with its share of the memory, from a pack or cold, and tried again where it could not be had."""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

from pytest_vmbottle.backend import PackKind, Selective
from pytest_vmbottle.budget import Budget
from pytest_vmbottle.errors import BackendUnavailable, LaunchError, MachineError, SpecError, VMBottleError
from pytest_vmbottle.provision.bottler import Bottler
from pytest_vmbottle.provision.context import Context, Settings, Tally
from pytest_vmbottle.provision.launcher import Launcher
from pytest_vmbottle.provision.sources import Sources
from pytest_vmbottle.provision.starts import cold_start

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from pytest_vmbottle.backend import Backend, Capabilities, Start
    from pytest_vmbottle.catalog import Catalog
    from pytest_vmbottle.lan import Lan, Lans
    from pytest_vmbottle.machine import Machine
    from pytest_vmbottle.packs import Pack
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["Provisioner"]


class Provisioner:
    """Gives out machines of one backend from one catalog."""

    def __init__(self, catalog: Catalog, backend: Backend, *, name: str, settings: Settings) -> None:
        """Sweeps up after dead processes and starts nothing."""
        self._context = Context(catalog, backend, name=name, settings=settings)
        self._settings = settings
        self._sources = Sources(self._context)
        self._launcher = Launcher(self._context, self._sources)
        self._bottler = Bottler(self._context, self._sources, self._launcher)
        self._budget = Budget(catalog.budget, limit=settings.memory_budget)
        self._fallback: PackKind | None = None
        catalog.gc()

    @property
    def tally(self) -> Tally:
        """What was done so far."""
        return self._context.tally

    @property
    def capabilities(self) -> Capabilities:
        """What the backend can do here."""
        return self._context.capabilities

    def close(self) -> None:
        """Gives up the holds on packs; may be called again."""
        self._context.close()

    @contextmanager
    def machine(self, spec: MachineSpec, *, start: Start | None = None, lans: Lans | None = None) -> Iterator[Machine]:
        """A running, ready machine for the length of a block.

        Args:
            spec: What it is.
            start: What it starts from, where that is no pack of the catalog.
            lans: The private LANs of its test.

        Raises:
            SpecError: This host, or the memory budget, is too small for it.
            MachineError: It could not be provided.
            BackendUnavailable: The backend does not work here.
            CatalogError: There is no such image, or the catalog cannot be used.
        """
        began = time.monotonic()
        self._check_able(spec)
        lan = _lan(spec, lans)
        with ExitStack() as stack:
            with _infra(), self._context.explained():
                # The share is for the machine that builds its pack too: that one has ended before this one begins.
                stack.enter_context(self._share(spec))
                machine = self._provide(spec, start, stack)
                stack.enter_context(machine.on(lan) if lan else nullcontext())
            self.tally.waited += time.monotonic() - began
            self._settings.ready(machine)
            try:
                yield machine
            finally:
                self._stopping(machine)

    def pack(self, spec: MachineSpec) -> Pack:
        """The pack that machines of a spec are poured from, made if need be."""
        with self._share(spec):
            return self._bottler.pack(spec, self._kind)

    def start(self, spec: MachineSpec, pack: Pack) -> Start:
        """What machines of a spec are poured from, where that pack is theirs."""
        return self._bottler.start(spec, pack)

    @property
    def _kind(self) -> PackKind:
        return self._fallback or self.capabilities.pack_kind

    def _check_able(self, spec: MachineSpec) -> None:
        backend = self._context.backend
        refusal = backend.refusal(spec) if isinstance(backend, Selective) else None
        if refusal is not None:
            raise BackendUnavailable(refusal, "Run this on another backend: --vm-backend")

    @contextmanager
    def _share(self, spec: MachineSpec) -> Iterator[None]:
        """Holds a share of the memory budget, and counts how long it was waited for."""
        began, deadline = time.monotonic(), self._context.deadline()
        with ExitStack() as stack:
            with self._context.explained():
                stack.enter_context(self._budget.share(spec.memory, name=spec.name, deadline=deadline, waiting=self._settings.report))
            self.tally.queued += time.monotonic() - began
            yield

    def _provide(self, spec: MachineSpec, start: Start | None, stack: ExitStack) -> Machine:
        """A running machine, tried again as often as the settings say; only here, before anybody has it, is anything tried again."""
        left = self._settings.retries
        while True:
            try:
                return stack.enter_context(self._started(spec, start))
            except VMBottleError as error:
                if error.lasting or not left:
                    raise
                left -= 1
                self._try_again(spec, error)

    def _try_again(self, spec: MachineSpec, error: VMBottleError) -> None:
        self._bottler.forgive(error)
        self.tally.retried += 1
        first = str(error).splitlines()[0]
        self._settings.warn(f"the machine {spec.name!r} could not be provided and is tried again: {type(error).__name__}: {first}")

    def _started(self, spec: MachineSpec, start: Start | None) -> AbstractContextManager[Machine]:
        if start:
            return self._launcher.machine(spec.name, spec, start)
        cold = spec.fresh == "boot" or (not spec.steps and self._sources.image(spec).quick)
        return self._cold(spec) if cold else self._poured(spec)

    @contextmanager
    def _cold(self, spec: MachineSpec) -> Iterator[Machine]:
        with ExitStack() as stack:
            if spec.steps:
                start = self._bottler.start(spec, self._bottler.pack(spec, PackKind.DISK))
            else:
                folder = stack.enter_context(self._context.catalog.staging())
                start = cold_start(spec, self._sources.image(spec), folder)
            yield stack.enter_context(self._launcher.machine(spec.name, spec, start))

    @contextmanager
    def _poured(self, spec: MachineSpec) -> Iterator[Machine]:
        with ExitStack() as stack:
            yield self._pour(spec, stack)

    def _pour(self, spec: MachineSpec, stack: ExitStack) -> Machine:
        while True:
            pack = self._bottler.pack(spec, self._kind)
            try:
                return stack.enter_context(self._launcher.machine(spec.name, spec, self._bottler.start(spec, pack)))
            except LaunchError:
                raise  # QEMU itself does not run: no other pack would help
            except MachineError as error:
                if pack.manifest.kind == PackKind.DISK:
                    raise
                self._condemn(pack, error)

    def _condemn(self, pack: Pack, error: MachineError) -> None:
        """Puts a pack aside that could not be poured, and goes on with packs of the next kind."""
        self._fallback = PackKind(pack.manifest.kind).next
        self._bottler.condemn(pack)
        self._settings.warn(
            f"the {pack.manifest.kind} pack of {pack.manifest.name} could not be poured and was put aside; "
            f"{self._fallback} packs are used from now on: {error}"
        )

    def _stopping(self, machine: Machine) -> None:
        try:
            self._settings.stopping(machine)
        except Exception as error:
            self._settings.warn(f"a hook failed while the machine {machine.name!r} was being ended: {error!r}")


@contextmanager
def _infra() -> Iterator[None]:
    """Marks what keeps a test from its machine, unless the test itself describes a machine that cannot be."""
    try:
        yield
    except VMBottleError as error:
        error.infra = not isinstance(error, SpecError)
        raise


def _lan(spec: MachineSpec, lans: Lans | None) -> Lan | None:
    if spec.lan is None:
        return None
    if lans is None:
        raise SpecError(f"network={spec.lan!r}: a private LAN is of one test; use the fixtures vm, vms or vm_factory for {spec.name!r}")
    return lans[spec.lan]
