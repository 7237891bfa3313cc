"""Makes packs, each once for all who need it at the same time."""

from __future__ import annotations

import shutil
import time
from copy import copy
from typing import TYPE_CHECKING

from pytest_vmbottle import packs
from pytest_vmbottle._os import Deadline, format_size
from pytest_vmbottle.backend import OwnImages, PackKind, Unwakeable
from pytest_vmbottle.errors import CatalogError, PackCorrupt, SpecError, VMBottleError
from pytest_vmbottle.generations import Holds
from pytest_vmbottle.packs import Manifest
from pytest_vmbottle.provision import steps
from pytest_vmbottle.provision.plan import plan as plan_of
from pytest_vmbottle.provision.shelf import Shelf
from pytest_vmbottle.provision.starts import cold_start, start

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_vmbottle.backend import Instance, Start
    from pytest_vmbottle.packs import Pack
    from pytest_vmbottle.provision.context import Context
    from pytest_vmbottle.provision.launcher import Launcher
    from pytest_vmbottle.provision.plan import Plan
    from pytest_vmbottle.provision.sources import Sources
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["Bottler"]


class Bottler:
    """Gives out packs, and makes those that are not there."""

    def __init__(self, context: Context, sources: Sources, launcher: Launcher) -> None:
        self._context, self._sources, self._launcher = context, sources, launcher
        self._shelf = Shelf(context)
        self._failed: dict[str, VMBottleError] = {}
        self._skipped: set[Path] = set()

    def pack(self, spec: MachineSpec, kind: PackKind) -> Pack:
        """The pack that machines of a spec are poured from, made if need be; what failed once in this process is not tried again.

        Raises:
            MachineError: It could not be made.
            CatalogError: There is no such image, or the catalog cannot be used.
        """
        fingerprint = self._context.backend.fingerprint(spec)
        image = self._sources.image(spec)
        return self._get(plan_of(spec, kind, image=image, fingerprint=fingerprint, skipped=self._skip))

    def _skip(self, path: Path) -> None:
        """Says once that something which a layer depends on does not count."""
        if path not in self._skipped:
            self._skipped.add(path)
            self._context.settings.warn(f"{path} is a socket, a FIFO or a device: no layer that depends on it is built again because of it")

    def start(self, spec: MachineSpec, pack: Pack, *, building: bool = False) -> Start:
        """How a machine starts from a pack."""
        image = self._sources.image(spec)
        if image.sha256 != pack.manifest.image:
            raise CatalogError(f"the disk {image.disk} was changed since the pack of {pack.manifest.name} was made of it: try again")
        return start(spec, image, pack, self._shelf.checked, building=building)

    def condemn(self, pack: Pack) -> None:
        """Puts a pack aside that could not be poured."""
        self._shelf.condemn(pack)

    def forgive(self, error: VMBottleError) -> None:
        """Has what failed by this error be tried again."""
        self._failed = {key: each for key, each in self._failed.items() if each is not error}

    def _get(self, plan: Plan) -> Pack:
        if plan.key in self._failed:
            raise _once_more(self._failed[plan.key])
        try:
            with self._context.explained():
                return self._find(plan) or self._make_once(plan)
        except SpecError:
            raise  # a mistake of each test that describes such a machine
        except VMBottleError as error:
            error.origin = error.origin or plan.key
            self._failed.setdefault(plan.key, error)
            raise

    def _find(self, plan: Plan) -> Pack | None:
        try:
            return self._shelf.get(plan.key)
        except PackCorrupt:
            return None  # judged below, with its lock held

    def _make_once(self, plan: Plan) -> Pack:
        parent = self._get(plan.parent) if plan.parent is not None else None
        with self._context.alone(f"pack-{plan.key[:24]}", f"the {plan.kind} pack of {plan.name}") as tell:
            already = self._shelf.get_or_put_aside(plan.key)
            if already is not None:
                return already
            self._make(plan, parent, tell)
            return self._shelf.made(plan.key)

    def _make(self, plan: Plan, parent: Pack | None, tell: Callable[[str], None]) -> None:
        began, context = time.monotonic(), self._context
        self._check_room(plan)
        tell(f"building the {plan.kind} pack of {plan.name}" + (" (this boots a machine once)" if parent is None else ""))
        with context.catalog.staging() as staged:
            if parent is None:
                source = cold_start(plan.spec, plan.image, staged, building=plan.image.is_own)
            else:
                source = self.start(plan.spec, parent, building=True)
            packs_itself = plan.image.is_own and not plan.steps
            kind = self._pack_image(plan, staged) if packs_itself else self._prepare(plan, source, staged)
            manifest = Manifest(
                key=plan.key,
                kind=kind,
                name=plan.name,
                parent=parent.key if parent else None,
                parent_seal=parent.seal if parent else "",
                image=plan.image.sha256,
                backend=context.label(plan.spec),
                memory=plan.spec.memory,
                disk_size=source.disk_size,
            )
            packs.seal(staged, manifest)
            with Holds() as holds:
                holds.take(staged)  # before anybody else sees it, so that it cannot be pruned before it was ever used
                final = context.catalog.publish(staged, plan.key)
                context.holds.take(final)
        size = format_size(packs.read(final).size)
        context.settings.report(f"built the {kind} pack of {plan.name} in {time.monotonic() - began:.0f} s, {size}")

    def _check_room(self, plan: Plan) -> None:
        root = self._context.catalog.root
        free, needed = shutil.disk_usage(root).free, plan.spec.memory // 4
        if free < needed:
            raise CatalogError(
                f"the disk of the catalog {root} is full: {format_size(free)} are free, and the pack of {plan.name} "
                f"takes about {format_size(needed)}; make room (vmbottle pack prune), or choose another folder with --vm-catalog"
            )

    def _pack_image(self, plan: Plan, staged: Path) -> PackKind:
        """Has the backend pack an image of its own, for which no machine has to run."""
        if isinstance(self._context.backend, OwnImages):
            self._context.backend.pack_image(plan.image.own, staged, deadline=self._context.deadline())
        return PackKind.DISK

    def _prepare(self, plan: Plan, source: Start, staged: Path) -> PackKind:
        """Runs a machine, has the step done to it, and saves it; as what kind of pack."""
        deadline = self._context.deadline()
        with self._launcher.machine("build", plan.spec, source) as machine:
            if plan.steps:
                steps.do(plan.steps[-1], machine)
            elif plan.spec.nat:
                trouble = steps.equip(machine.instance.channel(deadline=deadline), Deadline(self._launcher.patience(plan.spec)))
                if trouble:
                    self._context.settings.warn(
                        f"the guest agent or Python could not be installed in {plan.name}, which goes on with SSH: {trouble}"
                    )
            return self._save(machine.instance, plan, staged, deadline)

    def _save(self, instance: Instance, plan: Plan, staged: Path, deadline: Deadline) -> PackKind:
        try:
            instance.save(staged, kind=plan.kind, deadline=deadline)
        except Unwakeable as error:
            self._context.settings.warn(f"every machine of {plan.name} has to boot, from a disk pack: {error}")
            instance.save(staged, kind=PackKind.DISK, deadline=deadline)
            return PackKind.DISK
        return plan.kind


def _once_more(error: VMBottleError) -> VMBottleError:
    """An error for one more who meets it, who need not try again; the error itself would gather the stacks of all of them."""
    again = copy(error)
    again.lasting = True
    return again
