"""The provisioner, which starts machines from packs or cold.

Each has a reservation of memory, and is retried if it could not be started.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle.catalog.memory_budget import Budget
from pytest_vmbottle.errors import BackendUnavailable, CatalogError, LaunchError, MachineError, SpecError, VMBottleError
from pytest_vmbottle.host import records
from pytest_vmbottle.provision.context import Context, Settings, Tally
from pytest_vmbottle.provision.image_resolver import ImageResolver
from pytest_vmbottle.provision.launcher import Launcher
from pytest_vmbottle.provision.pack_builder import SPEC, PackBuilder
from pytest_vmbottle.provision.spares import Spares
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.spec.pack_kind import PackKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from pytest_vmbottle.backends.port import Backend, Capabilities, Start
    from pytest_vmbottle.catalog.catalog import Catalog
    from pytest_vmbottle.catalog.packs import Pack
    from pytest_vmbottle.machine.lan import Lan, LanTable
    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.provision.origins import Origin

__all__ = ["Provisioner"]

_TEXT = 4 << 10
"""Characters of an error in the timeline."""


class Provisioner:
    """Source of machines, for one backend and one catalog."""

    def __init__(self, catalog: Catalog, backend: Backend, *, name: str, settings: Settings) -> None:
        """Sweep up after dead processes, and start nothing."""
        # What is left of a spare that nobody got belongs to no test.
        context = attrs.evolve(settings, ended=lambda remains: None if self._spares.is_unasked else settings.ended(remains))
        self._context = Context(catalog, backend, name=name, settings=context)
        self._settings = settings
        self._images = ImageResolver(self._context)
        self._launcher = Launcher(self._context)
        self._builder = PackBuilder(self._context, self._launcher)
        # Machines of all backends of a process are of one owner: it must not wait for what it holds itself.
        self._budget = Budget(catalog.budget, limit=settings.memory_budget, owner=catalog.token)
        self._fallback: PackKind | None = None
        self._spares = Spares(self._launched, self._budget.is_wanted)
        # On every start, so that machines of a killed run do not hold memory that this one needs.
        catalog.gc()

    @property
    def tally(self) -> Tally:
        """Counts of machines and packs so far."""
        return self._context.tally

    @property
    def capabilities(self) -> Capabilities:
        """The backend's capabilities on this host."""
        return self._context.capabilities

    def close(self) -> None:
        """Release the held packs, and end spares; may be called again."""
        self._spares.give_up()
        self._context.close()

    @contextmanager
    def machine(
        self,
        spec: MachineSpec,
        *,
        start: Start | None = None,
        origin: Origin | None = None,
        lans: LanTable | None = None,
        joins: bool = True,
    ) -> Iterator[Machine]:
        """Start a machine for a block, and yield it when it is ready.

        Args:
            spec: The machine's spec.
            start: The boot source, if it is not a pack of the catalog.
            origin: The image that this boot source stands on, if it need not be there any more.
            lans: The private LANs that it may join, by name.
            joins: Whether it joins its LANs before anybody gets it.

        Raises:
            SpecError: This host, or the memory budget, is too small for it.
            MachineError: The machine could not be started.
            BackendUnavailable: The backend does not work here.
            CatalogError: There is no such image, or the catalog cannot be used.
        """
        began = time.monotonic()
        # Before anything is waited for, such as memory.
        self._check_able(spec)
        joined = _lans(spec, lans)
        with ExitStack() as stack:
            with _infra(), self._context.explained():
                machine = None if start else self._spare(spec, stack)
                if machine is None:
                    # The share is for the machine that builds its pack too: that one has ended before this one begins.
                    stack.enter_context(self._share(spec))
                    machine = self._provide(spec, partial(self._started, spec, start, origin), stack)
                self._connect(machine, joined, stack, joins=joins)
                machine.lifecycle.share_folders()
            # Forks end first: their disks stand on files in this machine's folder.
            forks = stack.enter_context(ExitStack())
            machine.launch_fork = lambda spec, start, ended: _fork(
                self.machine(spec, start=start, origin=origin, lans=lans, joins=False), forks, ended
            )
            self.tally.waited += time.monotonic() - began
            # Outside of `_infra`: an error of a hook or of the test is not the machine's.
            self._settings.ready(machine)
            try:
                yield machine
            finally:
                self._stopping(machine)

    def expect(self, specs: Sequence[MachineSpec]) -> None:
        """Make machines beforehand of which the next ones will be asked for, as many as may be; end those that were for others.

        Only machines that are cloned from a pack that is in use already are made: nothing is built for what may not come.
        """
        starts = [(spec, start) for spec in specs if (start := self._known_start(spec)) is not None][: self._settings.spares]
        for spec, start in self._spares.keep(starts):
            with ExitStack() as stack:
                if not stack.enter_context(self._budget.reserve_spare(spec.memory)):
                    return
                self.tally.spares += 1
                self._spares.prepare(spec, start, stack.pop_all())

    def _known_start(self, spec: MachineSpec) -> Start | None:
        """Return the boot source of a machine that is cloned from a pack in use; None for another one."""
        if spec.fresh == "boot" or self._context.backend.unsupported_reason(spec) is not None:
            return None
        origin = self._images.known(spec)
        pack = self._builder.used(spec, self._kind, origin) if origin is not None else None
        return self._builder.start(spec, pack, origin) if pack is not None and origin is not None else None

    def _spare(self, spec: MachineSpec, stack: ExitStack) -> Machine | None:
        """Return the spare of a spec, if there is one that is as a new machine would be."""
        if not self._spares.has_any:
            return None
        start = self._known_start(spec)
        found = self._spares.take(spec, start) if start is not None else None
        if found is None:
            return None
        machine, held = found
        stack.enter_context(held)
        self.tally.spared += 1
        return machine

    def _launched(self, spec: MachineSpec, start: Start) -> AbstractContextManager[Machine]:
        return self._launcher.machine(spec.name, spec, start, self._images.origin(spec))

    @staticmethod
    def _connect(machine: Machine, lans: Sequence[Lan], stack: ExitStack, *, joins: bool) -> None:
        """Connect a machine to its LANs, now or when it is told to."""
        if not lans:
            return

        def join() -> None:
            machine.lifecycle.join = None
            for lan in lans:
                stack.enter_context(machine.lifecycle.on(lan))

        if joins:
            join()
        else:
            machine.lifecycle.join = join

    def origin(self, spec: MachineSpec) -> Origin:
        """Return the image at the bottom of machines of a spec, made or fetched if need be."""
        return self._images.origin(spec)

    def fingerprint(self, spec: MachineSpec) -> str:
        """Return a digest of what the saved RAM of such a machine depends on (see `Backend.fingerprint`)."""
        return self._context.backend.fingerprint(spec)

    def pack(self, spec: MachineSpec) -> Pack:
        """Return the pack for machines of a spec, and build it if need be."""
        with self._share(spec):
            return self._builder.pack(spec, self._kind, self._images.origin(spec))

    def prepare(self, spec: MachineSpec) -> Pack | None:
        """Make what machines of a spec start from, if need be; return their pack, or None where they boot from the image itself."""
        with _infra(), self._context.explained(), self._share(spec):
            origin = self._images.origin(spec)
            if spec.fresh == "boot":
                return self._builder.pack(spec, PackKind.DISK, origin) if spec.steps else None
            return self._builder.pack(spec, self._kind, origin) if spec.steps or not origin.is_quick else None

    def pack_of_key(self, key: str) -> tuple[Pack, MachineSpec]:
        """Return a pack by its key, verified and held, and the spec of its machine.

        Raises:
            CatalogError: It is damaged, or an earlier version made it, which did not write the spec down.
        """
        pack = self._builder.checked(key)
        try:
            return pack, MachineSpec(**records.read(pack.path / SPEC))
        except FileNotFoundError:
            raise CatalogError(f"the pack {key[:12]} was made by an earlier version: start {pack.manifest.name} in place of it") from None

    def start(self, spec: MachineSpec, pack: Pack) -> Start:
        """Return the boot source for machines of a spec, from their pack."""
        return self._builder.start(spec, pack, self._images.origin(spec))

    @property
    def _kind(self) -> PackKind:
        return self._fallback or self.capabilities.pack_kind

    def _check_able(self, spec: MachineSpec) -> None:
        reason = self._context.backend.unsupported_reason(spec)
        if reason is not None:
            raise BackendUnavailable(reason, "Run this on another backend: --vm-backend")

    @contextmanager
    def _share(self, spec: MachineSpec) -> Iterator[None]:
        """Reserve memory for a block, and count the time of waiting for it."""
        began, deadline = time.monotonic(), self._context.deadline(self._settings.memory_seconds)
        if self._spares.has_any and not self._budget.is_free(spec.memory):
            self._spares.give_up()
        with ExitStack() as stack:
            with self._context.explained():
                stack.enter_context(self._budget.reserve(spec.memory, name=spec.name, deadline=deadline, waiting=self._settings.report))
            self.tally.queued += time.monotonic() - began
            yield

    def _provide(self, spec: MachineSpec, started: Callable[[], AbstractContextManager[Machine]], stack: ExitStack) -> Machine:
        """Start a machine, and retry as often as the settings say.

        Retries happen only here, before anybody has the machine.
        """
        failures: list[VMBottleError] = []
        while True:
            try:
                machine = stack.enter_context(started())
            except VMBottleError as error:
                # An error that a second try cannot change, such as a wrong spec, is raised at once.
                if error.lasting or len(failures) == self._settings.retries:
                    raise
                failures.append(error)
                self._try_again(spec, error)
            else:
                # The machines that failed are gone, and their timelines with them.
                for failure in failures:
                    machine.lifecycle.timeline.note("infra", text=f"{type(failure).__name__}: {failure}"[:_TEXT])
                return machine

    def _try_again(self, spec: MachineSpec, error: VMBottleError) -> None:
        self._builder.forgive(error)
        self.tally.retried += 1
        first = str(error).splitlines()[0]
        self._settings.warn(f"the machine {spec.name!r} could not be provided and is tried again: {type(error).__name__}: {first}")

    def _started(self, spec: MachineSpec, start: Start | None, origin: Origin | None) -> AbstractContextManager[Machine]:
        origin = origin or self._images.origin(spec)
        if start:
            return self._launcher.machine(spec.name, spec, start, origin)
        cold = spec.fresh == "boot" or (not spec.steps and origin.is_quick)
        return self._cold(spec, origin) if cold else self._cloned(spec, origin)

    @contextmanager
    def _cold(self, spec: MachineSpec, origin: Origin) -> Iterator[Machine]:
        with ExitStack() as stack:
            if spec.steps:
                # A boot needs what the layer wrote to the disk, and no saved RAM.
                start = self._builder.start(spec, self._builder.pack(spec, PackKind.DISK, origin), origin)
            else:
                # It stays as long as the machine, which has the seed in it as a disk.
                folder = stack.enter_context(self._context.catalog.staging())
                start = origin.cold(spec, folder)
            yield stack.enter_context(self._launcher.machine(spec.name, spec, start, origin))

    @contextmanager
    def _cloned(self, spec: MachineSpec, origin: Origin) -> Iterator[Machine]:
        with ExitStack() as stack:
            yield self._clone(spec, origin, stack)

    def _clone(self, spec: MachineSpec, origin: Origin, stack: ExitStack) -> Machine:
        while True:
            pack = self._builder.pack(spec, self._kind, origin)
            try:
                start = self._builder.start(spec, pack, origin)
                return stack.enter_context(self._launcher.machine(spec.name, spec, start, origin))
            except LaunchError:
                raise  # QEMU itself does not run: no other pack would help
            except MachineError as error:
                if pack.manifest.kind == PackKind.DISK:
                    raise
                # A failed restore condemns the pack: each further test would fail in the same way.
                self._quarantine(pack, error)

    def _quarantine(self, pack: Pack, error: MachineError) -> None:
        """Quarantine a pack that could not be restored, and go on with the next kind of packs."""
        self._fallback = PackKind(pack.manifest.kind).next
        self._builder.quarantine(pack)
        self._settings.warn(
            f"the {pack.manifest.kind} pack of {pack.manifest.name} could not be restored and was quarantined; "
            f"{self._fallback} packs are used from now on: {error}"
        )

    def _stopping(self, machine: Machine) -> None:
        try:
            self._settings.stopping(machine)
        # A hook's error must not hide the test's own, which may be on its way.
        except Exception as error:
            self._settings.warn(f"a hook failed while the machine {machine.name!r} was ending: {error!r}")


def _fork(started: AbstractContextManager[Machine], forks: ExitStack, ended: Callable[[], object]) -> Machine:
    """Start a fork, which ends with the others at the latest."""
    with ExitStack() as stack:
        stack.callback(ended)
        machine = stack.enter_context(started)
        machine.end = stack.pop_all().close
    forks.callback(machine.end)
    return machine


@contextmanager
def _infra() -> Iterator[None]:
    """Mark errors that keep a test from its machine as INFRA.

    Errors of the test's own description of a machine are not marked.
    """
    try:
        yield
    except VMBottleError as error:
        error.infra = not isinstance(error, SpecError)
        raise


def _lans(spec: MachineSpec, lans: LanTable | None) -> list[Lan]:
    if lans is None and spec.lans:
        raise SpecError(
            f"network={spec.network!r}: a private LAN belongs to one test; use the fixtures vm and vms, or a factory, for {spec.name!r}"
        )
    return [lans[name] for name in spec.lans] if lans is not None else []
