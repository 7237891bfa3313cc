"""Building of packs, each once for all who need it at the same time."""

from __future__ import annotations

import shutil
import time
from copy import copy
from typing import TYPE_CHECKING

from pytest_vmbottle.backends.port import CannotSave
from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.packs import Manifest
from pytest_vmbottle.errors import CatalogError, PackCorrupt, SpecError, VMBottleError
from pytest_vmbottle.host import records
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.generations import Holds
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.provision import layer_steps as steps
from pytest_vmbottle.provision.origins import with_own_images
from pytest_vmbottle.provision.pack_cache import PackCache
from pytest_vmbottle.provision.pack_plan import plan as plan_of
from pytest_vmbottle.spec.pack_kind import PackKind

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_vmbottle.backends.port import Instance, Start
    from pytest_vmbottle.catalog.packs import Pack
    from pytest_vmbottle.provision.context import Context
    from pytest_vmbottle.provision.launcher import Launcher
    from pytest_vmbottle.provision.origins import Origin
    from pytest_vmbottle.provision.pack_plan import Plan
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["SPEC", "PackBuilder"]

SPEC = "spec.json"
"""File of a pack with the spec of its machine, for those who know its key only."""

_DISK_ROOM = 64 << 20
"""Bytes that a pack without RAM is estimated to take."""


class PackBuilder:
    """Source of packs, which builds those that are missing."""

    def __init__(self, context: Context, launcher: Launcher) -> None:
        self._context, self._launcher = context, launcher
        self._cache = PackCache(context)
        self._failed: dict[str, VMBottleError] = {}
        self._skipped: set[Path] = set()

    def pack(self, spec: MachineSpec, kind: PackKind, origin: Origin) -> Pack:
        """Return the pack for machines of a spec, and build it if need be.

        A build that failed in this process is not tried again.

        Raises:
            MachineError: The pack could not be made.
            CatalogError: There is no such image, or the catalog cannot be used.
        """
        fingerprint = self._context.backend.fingerprint(spec)
        return self._get(plan_of(spec, kind, origin=origin, fingerprint=fingerprint, skipped=self._skip))

    def used(self, spec: MachineSpec, kind: PackKind, origin: Origin) -> Pack | None:
        """Return the pack for machines of a spec if this process has used it before and it has not changed since; nothing is made."""
        fingerprint = self._context.backend.fingerprint(spec)
        return self._cache.used(plan_of(spec, kind, origin=origin, fingerprint=fingerprint, skipped=self._skip).key)

    def _skip(self, path: Path) -> None:
        """Warn once that something which a layer depends on is ignored."""
        if path not in self._skipped:
            self._skipped.add(path)
            self._context.settings.warn(f"{path} is a socket, a FIFO or a device: it is ignored in the `depends` of layers")

    def start(self, spec: MachineSpec, pack: Pack, origin: Origin, *, building: bool = False) -> Start:
        """Return how a machine starts from a pack."""
        # The disk may be a file in its own place, which anybody may change between two runs.
        if origin.sha256 != pack.manifest.image:
            raise CatalogError(f"the disk {origin.name} was changed after the pack of {pack.manifest.name} was built from it: try again")
        return origin.from_pack(spec, pack, self._cache.checked, building=building)

    def checked(self, key: str) -> Pack:
        """Return a pack by its key, verified and held (see `PackCache.checked`)."""
        return self._cache.checked(key)

    def quarantine(self, pack: Pack) -> None:
        """Quarantine a pack that could not be restored."""
        self._cache.quarantine(pack)

    def forgive(self, error: VMBottleError) -> None:
        """Allow another try of builds that failed with this error."""
        self._failed = {key: each for key, each in self._failed.items() if each is not error}

    def _get(self, plan: Plan) -> Pack:
        if plan.key in self._failed:
            raise _once_more(self._failed[plan.key])
        try:
            with self._context.explained():
                # Without the lock first: most packs are there, and readers must not wait for each other.
                return self._find(plan) or self._make_once(plan)
        except SpecError:
            raise  # a mistake of each test that describes such a machine
        except VMBottleError as error:
            # The pack that failed itself is named, and not those on it, which this error passes through.
            error.origin = error.origin or plan.key
            self._failed.setdefault(plan.key, error)
            raise

    def _find(self, plan: Plan) -> Pack | None:
        try:
            return self._cache.get(plan.key)
        except PackCorrupt:
            return None  # judged below, with its lock held

    def _make_once(self, plan: Plan) -> Pack:
        # Before the lock is taken, so that no process holds two of them at once.
        parent = self._get(plan.parent) if plan.parent is not None else None
        with self._context.alone(f"pack-{plan.key[:24]}", f"the {plan.kind} pack of {plan.name}") as tell:
            # Asked again under the lock: the process that held it has probably made the pack.
            already = self._cache.get_or_quarantine(plan.key)
            if already is not None:
                return already
            registry = self._context.registry
            # A pack that is to be built again is not one that was built before.
            if registry and self._context.settings.rebuild_before is None and registry.pull_pack(plan.key):
                return self._cache.pulled(plan.key)
            self._make(plan, parent, tell)
            made = self._cache.made(plan.key)
        # Without the lock: whoever waits for the pack need not wait until others have it.
        if registry:
            self._context.tally.pushed += registry.push_pack(made)
        return made

    def _make(self, plan: Plan, parent: Pack | None, tell: Callable[[str], None]) -> None:
        began, context = time.monotonic(), self._context
        self._check_room(plan)
        tell(f"building the {plan.kind} pack of {plan.name}" + (" (this boots a machine once)" if parent is None else ""))
        with context.catalog.staging() as staged:
            if parent is None:
                # Seed and keys are made in the pack's folder, because its clones start with them too.
                source = plan.origin.cold(plan.spec, staged, building=True)
            else:
                source = self.start(plan.spec, parent, plan.origin, building=True)
            source = with_own_images(source, staged)
            ready = not plan.steps and plan.origin.pack_without_machine(staged, deadline=context.deadline())
            kind = PackKind.DISK if ready else self._prepare(plan, source, staged)
            manifest = Manifest(
                key=plan.key,
                kind=kind,
                name=plan.name,
                parent=parent.key if parent else None,
                parent_seal=parent.seal if parent else "",
                image=plan.origin.sha256,
                backend=context.label(plan.spec),
                memory=plan.spec.memory,
                disk_size=source.disk_size,
                disks={disk.name: disk.size for disk in source.data},
            )
            # Its disks are in the pack, whatever they were made from.
            records.write(staged / SPEC, plan.spec.plain_keywords() | {"disks": dict(manifest.disks)})
            packs.seal(staged, manifest)
            with Holds() as holds:
                holds.take(staged)  # before anybody else sees it, so that it cannot be pruned before it was ever used
                final = context.catalog.publish(staged, plan.key)
                context.holds.take(final)
        size = format_size(packs.read(final).size)
        context.settings.report(f"built the {kind} pack of {plan.name} in {time.monotonic() - began:.0f} s, {size}")

    def _check_room(self, plan: Plan) -> None:
        root = self._context.catalog.root
        # An estimate: most guests use less than a quarter of their RAM, and holes take no space.
        free = shutil.disk_usage(root).free
        needed = _DISK_ROOM if plan.kind is PackKind.DISK else plan.spec.memory // 4
        if free < needed:
            raise CatalogError(
                f"the disk of the catalog {root} is full: {format_size(free)} are free, and the pack of {plan.name} "
                f"takes about {format_size(needed)}; make room (vmbottle pack prune), or choose another folder with --vm-catalog"
            )

    def _prepare(self, plan: Plan, source: Start, staged: Path) -> PackKind:
        """Run a machine, apply the layer to it, and save it; return the kind of pack."""
        deadline = self._context.deadline()
        with self._launcher.machine("build", plan.spec, source, plan.origin) as machine:
            if plan.steps:
                steps.do(plan.steps[-1], machine)
            # Once, in the image's own pack, on which those of all layers stand. Packages come from the network.
            elif plan.spec.nat:
                patience = Deadline(self._launcher.patience(plan.spec, plan.origin))
                trouble = steps.equip(machine.lifecycle.instance.channel(deadline=deadline), patience)
                if trouble:
                    self._context.settings.warn(
                        f"installing the guest agent or Python in {plan.name} failed, so commands go over SSH: {trouble}"
                    )
            return self._save(machine.lifecycle.instance, plan, staged, deadline)

    def _save(self, instance: Instance, plan: Plan, staged: Path, deadline: Deadline) -> PackKind:
        try:
            instance.save(staged, kind=plan.kind, deadline=deadline)
        except CannotSave as error:
            self._context.settings.warn(f"{plan.name} cannot be saved with its RAM, so each machine boots from a disk pack: {error}")
            # The machine runs on after a refusal, so the work of the layer is not lost.
            instance.save(staged, kind=PackKind.DISK, deadline=deadline)
            return PackKind.DISK
        return plan.kind


def _once_more(error: VMBottleError) -> VMBottleError:
    """Return a copy of an error for another caller, who need not retry.

    The error itself would collect the tracebacks of all callers.
    """
    again = copy(error)
    again.lasting = True
    return again
