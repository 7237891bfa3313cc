"""From a spec to a running machine: images, packs, instances, and who closes what.

Here the catalog and the backend meet; neither knows of the other.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle import images, packs
from pytest_vmbottle._os import Deadline, atomic_file, format_size
from pytest_vmbottle.backend import (
    GUEST_PATH,
    Backend,
    Capabilities,
    Channel,
    Command,
    Detached,
    Disk,
    Instance,
    Keeping,
    Keys,
    OwnImage,
    OwnImages,
    PackKind,
    Selective,
    Start,
    Unwakeable,
)
from pytest_vmbottle.budget import Budget
from pytest_vmbottle.catalog import Catalog
from pytest_vmbottle.channels.ssh import new_keys
from pytest_vmbottle.errors import (
    BackendUnavailable,
    CatalogError,
    LaunchError,
    MachineDied,
    MachineError,
    MachineTimeout,
    PackCorrupt,
    SpecError,
    VMBottleError,
)
from pytest_vmbottle.images import DeclaredImage, Image, ImageStore
from pytest_vmbottle.lan import Lan, Lans
from pytest_vmbottle.machine import Machine
from pytest_vmbottle.packs import Manifest, Pack
from pytest_vmbottle.power import Supply
from pytest_vmbottle.seed import write_seed
from pytest_vmbottle.spec import BOOT, Layer, MachineSpec, digest, host_arch

__all__ = ["Provisioner", "Settings", "Tally"]

log = logging.getLogger(__name__)

_SEED_FORMAT = 2
"""Part of the key of every pack of an image: what our cloud-init seed does to a guest."""
_EMULATED_FACTOR = 4.0
_FOREIGN_FACTOR = 2.0
"""Images that were not made for us have a boot loader, a big initial RAM disk and much to start."""
_BUILD_TIMEOUT = 1800.0
# cloud-init has ended, well or badly, when it has written its result; where it is not there or switched off there is nothing to wait for.
# A guest that is otherwise in a sorry state is still the one that was asked for.
_CLOUD_INIT_ENDED = r"""
[ -e /run/cloud-init/result.json ] || [ -e /run/cloud-init/disabled ] || [ -e /etc/cloud/cloud-init.disabled ] ||
! command -v cloud-init >/dev/null ||
systemctl is-failed --quiet cloud-final.service
"""
_INSTALL = r"""
export DEBIAN_FRONTEND=noninteractive
if command -v apt-get >/dev/null; then apt-get -qq update && apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=60 -- "$@"
elif command -v dnf >/dev/null; then dnf install -y -- "$@"
elif command -v apk >/dev/null; then apk add -- "$@"
elif command -v zypper >/dev/null; then zypper --non-interactive install -- "$@"
else echo "no package manager is known in this guest" >&2; exit 1; fi
"""
# What a machine is woken and spoken to by, where an image was not made with it: Debian, Fedora, Alpine and openSUSE name it alike.
_EQUIP = rf"""
set --
command -v python3 >/dev/null || set -- python3
command -v qemu-ga >/dev/null || set -- "$@" qemu-guest-agent
[ $# -gt 0 ] || exit 0
({_INSTALL}) || exit
if command -v systemctl >/dev/null; then
  udevadm control --reload && udevadm trigger --settle --subsystem-match=virtio-ports
  systemctl start qemu-guest-agent
else rc-update add qemu-guest-agent && rc-service qemu-guest-agent start; fi
"""


@attrs.frozen(kw_only=True)
class Settings:
    """What a run was told.

    Attributes:
        timeout_factor: What every time-out is multiplied with.
        rebuild_before: Packs made before this moment, in seconds since 1970, are made again.
        report: Takes a line about long work.
        warn: Takes a sentence that somebody should read.
        ready: Called with a machine before anybody gets it.
        stopping: Called with a machine before it is ended.
        declared: The images that the project declares, by name; they go before those of the catalog.
        memory_budget: Bytes of RAM that all machines of the catalog may have together; by default a share of what this host can spare.
        retries: How often a machine that could not be provided is tried again, on a fresh one.
    """

    timeout_factor: float = 1.0
    rebuild_before: float | None = None
    report: Callable[[str], None] = log.info
    warn: Callable[[str], None] = log.warning
    ready: Callable[[Machine], None] = lambda _: None
    stopping: Callable[[Machine], None] = lambda _: None
    declared: Mapping[str, DeclaredImage] = attrs.field(factory=dict)
    memory_budget: int | None = None
    retries: int = 0


@attrs.define
class Tally:
    """What was done: counts, and seconds spent waiting for machines, and those of them in which they waited for memory."""

    poured: int = 0
    booted: int = 0
    built: int = 0
    reused: int = 0
    waited: float = 0.0
    queued: float = 0.0
    retried: int = 0


@attrs.frozen(kw_only=True)
class _Plan:
    """One pack to be: what it is made of, and what it goes by."""

    key: str
    kind: PackKind
    spec: MachineSpec
    image: Image
    steps: tuple[Layer, ...]
    parent: _Plan | None

    @property
    def name(self) -> str:
        return self.steps[-1].name if self.steps else self.image.name


class Provisioner:
    """Gives out machines of one backend from one catalog."""

    def __init__(self, catalog: Catalog, backend: Backend, *, name: str, settings: Settings) -> None:
        """Sweeps up after dead processes and starts nothing."""
        self._catalog, self._backend, self._name, self._settings = catalog, backend, name, settings
        self._images = ImageStore(catalog.images)
        self._budget = Budget(catalog.budget, limit=settings.memory_budget)
        self._usable: dict[str, tuple[object, Pack]] = {}
        self._failed: dict[str, VMBottleError] = {}
        self._counted: set[str] = set()
        self._fallback: PackKind | None = None
        self._leases: list[int] = []
        self._held: set[Path] = set()
        self.tally = Tally()
        catalog.gc()

    @property
    def capabilities(self) -> Capabilities:
        """What the backend can do here."""
        return self._backend.probe()

    def close(self) -> None:
        """Gives up the holds on packs; may be called again."""
        self._held.clear()
        while self._leases:
            os.close(self._leases.pop())
        if isinstance(self._backend, Keeping):
            self._backend.close()

    # -- machines --------------------------------------------------------------------------------------------------------------------

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
            with _infra(), self._explained():
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

    @contextmanager
    def _share(self, spec: MachineSpec) -> Iterator[None]:
        """Holds a share of the memory budget, and counts how long it was waited for."""
        began, deadline = time.monotonic(), Deadline(_BUILD_TIMEOUT * self._settings.timeout_factor)
        with ExitStack() as stack:
            with self._explained():
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

    def _started(self, spec: MachineSpec, start: Start | None) -> AbstractContextManager[Machine]:
        if start:
            return self._launched(spec, start)
        cold = spec.fresh == "boot" or (not spec.steps and self._image(spec).quick)
        return self._cold(spec) if cold else self._poured(spec)

    def _try_again(self, spec: MachineSpec, error: VMBottleError) -> None:
        self._failed = {key: each for key, each in self._failed.items() if each is not error}
        self.tally.retried += 1
        first = str(error).splitlines()[0]
        self._settings.warn(f"the machine {spec.name!r} could not be provided and is tried again: {type(error).__name__}: {first}")

    def _check_able(self, spec: MachineSpec) -> None:
        refusal = self._backend.refusal(spec) if isinstance(self._backend, Selective) else None
        if refusal is not None:
            raise BackendUnavailable(refusal, "Run this on another backend: --vm-backend")

    def _stopping(self, machine: Machine) -> None:
        try:
            self._settings.stopping(machine)
        except Exception as error:
            self._settings.warn(f"a hook failed while the machine {machine.name!r} was being ended: {error!r}")

    @contextmanager
    def _poured(self, spec: MachineSpec) -> Iterator[Machine]:
        with ExitStack() as stack:
            yield self._pour(spec, stack)

    def _pour(self, spec: MachineSpec, stack: ExitStack) -> Machine:
        while True:
            pack = self._pack(self._plan(spec, self._kind()))
            try:
                return stack.enter_context(self._launched(spec, self._start(spec, pack)))
            except LaunchError:
                raise  # QEMU itself does not run: no other pack would help
            except MachineError as error:
                if pack.manifest.kind == PackKind.DISK:
                    raise
                self._condemn(pack, error)

    def _condemn(self, pack: Pack, error: MachineError) -> None:
        """Puts a pack aside that could not be poured, and goes on with packs of the next kind."""
        self._fallback = PackKind(pack.manifest.kind).next
        self._usable.pop(pack.key, None)
        with suppress(OSError):
            self._catalog.ledger.keep(self._catalog.quarantine(pack.path), "a pack that could not be poured")
        self._settings.warn(
            f"the {pack.manifest.kind} pack of {pack.manifest.name} could not be poured and was put aside; "
            f"{self._fallback} packs are used from now on: {error}"
        )

    @contextmanager
    def _cold(self, spec: MachineSpec) -> Iterator[Machine]:
        if spec.steps:
            pack = self._pack(self._plan(spec, PackKind.DISK))
            with self._launched(spec, self._start(spec, pack)) as machine:
                yield machine
            return
        with self._catalog.staging() as folder, self._launched(spec, self._cold_start(spec, self._image(spec), folder)) as machine:
            yield machine

    @contextmanager
    def _launched(self, spec: MachineSpec, start: Start) -> Iterator[Machine]:
        machine_id = f"{spec.name}-{secrets.token_hex(4)}"
        with self._rundir(machine_id) as rundir:
            machine = self._furnish(spec, start, rundir, Deadline(self._patience(spec)))
            try:
                yield machine
            finally:
                machine.close()

    @contextmanager
    def _rundir(self, machine_id: str) -> Iterator[Path]:
        """A machine's folder. What ends the machine if we do not is written down before; what the backend keeps elsewhere goes with it."""
        backend = self._backend
        ending = {"ending": backend.ending} if isinstance(backend, Detached) else {}
        with self._catalog.rundir(machine_id, **ending) as rundir:
            try:
                yield rundir
            finally:
                if isinstance(backend, Keeping):
                    backend.discard(rundir)

    def _furnish(self, spec: MachineSpec, start: Start, rundir: Path, deadline: Deadline) -> Machine:
        """Starts a machine in a folder and gives it what it can be started again with."""
        instance, channel = self._launch(spec, start, rundir, deadline)
        supply = Supply(
            start=start,
            folder=rundir,
            patience=self._patience(spec),
            launch=lambda source, deadline: self._launch(spec, source, rundir, deadline),
            await_boot=lambda instance, channel, deadline: self._await_boot(instance, channel, spec, deadline),
            image=self._image(spec).sha256,
            backend=self._label(spec),
        )
        factor = self._settings.timeout_factor
        return Machine(instance, spec, id=rundir.name, backend=self._name, channel=channel, factor=factor, supply=supply)

    def _launch(self, spec: MachineSpec, start: Start, rundir: Path, deadline: Deadline) -> tuple[Instance, Channel]:
        with self._explained():
            instance = self._backend.launch(spec, source=start, rundir=rundir, deadline=deadline)
        self._catalog.ledger.machines += 1
        try:
            self._catalog.note_process(rundir, instance.pid)
            channel = instance.channel(deadline=deadline)
            if start.saved is None:
                self._await_boot(instance, channel, spec, deadline)
            elif not start.building:
                self.tally.poured += 1
        except BaseException:
            instance.stop()
            raise
        return instance, channel

    def _await_boot(self, instance: Instance, channel: Channel, spec: MachineSpec, deadline: Deadline) -> None:
        if self._image(spec).readiness == "cloud-init":
            _await_cloud_init(instance, channel, spec, deadline)
        self.tally.booted += 1

    def _patience(self, spec: MachineSpec) -> float:
        emulated = spec.arch != host_arch() or self.capabilities.emulated
        factor = (_EMULATED_FACTOR if emulated else 1.0) * (1.0 if self._image(spec).prepared else _FOREIGN_FACTOR)
        return spec.timeout * self._settings.timeout_factor * factor

    def _label(self, spec: MachineSpec) -> str:
        able = self.capabilities
        return f"{self._name} {able.version} {able.accelerator if spec.arch == host_arch() else f'{spec.arch} emulated'}"

    def _kind(self) -> PackKind:
        return self._fallback or self.capabilities.pack_kind

    # -- packs -----------------------------------------------------------------------------------------------------------------------

    def pack(self, spec: MachineSpec) -> Pack:
        """The pack that machines of a spec are poured from, made if need be."""
        with self._share(spec):
            return self._pack(self._plan(spec, self._kind()))

    def _plan(self, spec: MachineSpec, kind: PackKind) -> _Plan:
        image = self._image(spec)
        # An image that was not made for us gets what it lacks, if its machines reach the network anyway.
        base = MachineSpec(source=spec.image, network=spec.nat and not image.prepared, **_boots(spec))
        key = digest(packs.FORMAT, _SEED_FORMAT, kind, image.key, base.network, spec.boot_digest(), self._backend.fingerprint(spec))
        plan = _Plan(key=key, kind=kind, spec=base, image=image, steps=(), parent=None)
        for step in spec.steps:
            build = _build_spec(spec, step)
            key = digest(plan.key, step.recipe(), build.network, build.env, build.user)
            parent = plan if plan.steps or not image.quick else None
            plan = _Plan(key=key, kind=kind, spec=build, image=image, steps=(*plan.steps, step), parent=parent)
        return plan

    def _pack(self, plan: _Plan) -> Pack:
        if plan.key in self._failed:
            raise _once_more(plan.name, self._failed[plan.key], machine=plan.spec.name)
        try:
            with self._explained():
                return self._find(plan) or self._build_once(plan)
        except VMBottleError as error:
            self._failed.setdefault(plan.key, error)
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says what a failure of the file system means here."""
        try:
            yield
        except VMBottleError:
            raise
        except OSError as error:
            root = self._catalog.root
            hint = "make room (vmbottle pack prune), or choose another folder with --vm-catalog"
            raise CatalogError(f"the catalog {root} cannot be used: {error.strerror or error}; {hint}") from error

    def _check_room(self, plan: _Plan) -> None:
        free, needed = shutil.disk_usage(self._catalog.root).free, plan.spec.memory // 4
        if free < needed:
            raise CatalogError(
                f"the disk of the catalog {self._catalog.root} is full: {format_size(free)} are free, and the pack of {plan.name} "
                f"takes about {format_size(needed)}; make room (vmbottle pack prune), or choose another folder with --vm-catalog"
            )

    def _find(self, plan: _Plan) -> Pack | None:
        """The published pack, or None. One that seems damaged may be being made anew right now: who holds its lock judges it."""
        try:
            return self._current(plan)
        except PackCorrupt:
            return None

    def _current(self, plan: _Plan) -> Pack | None:
        """The published pack if it is there and recent enough.

        Raises:
            PackCorrupt: It is damaged.
        """
        try:
            pack = self._checked(plan.key)
        except FileNotFoundError:
            return None
        if self._settings.rebuild_before is not None and pack.manifest.created < self._settings.rebuild_before:
            return None
        if plan.key not in self._counted:
            self._counted.add(plan.key)
            self.tally.reused += 1
        return pack

    def _checked(self, key: str) -> Pack:
        """The pack of this key and, beneath it, the very packs it was made on: read wholly the first time, afterwards by a glance.

        Raises:
            FileNotFoundError: There is none.
            PackCorrupt: Its files, or those of a pack beneath it, are not what they were.
        """
        known = self._usable.pop(key, None)
        with suppress(PackCorrupt):  # made anew meanwhile, perhaps
            if known is not None and known[0] == known[1].stamp():
                self._usable[key] = known
                return known[1]
        folder = self._catalog.packs / key
        self._leases.append(self._catalog.lease(folder))
        pack = packs.read(folder)
        pack.verify()
        if pack.manifest.parent is not None:
            self._check_parent(pack, pack.manifest.parent)
        pack.note_use()
        self._usable[key] = (pack.stamp(), pack)
        return pack

    def _check_parent(self, pack: Pack, parent: str) -> None:
        # A disk is only right on top of the very one it was written on. One made again by the same recipe has the same key, other content.
        try:
            same = self._checked(parent).seal == pack.manifest.parent_seal
        except (FileNotFoundError, PackCorrupt):
            same = False
        if not same:
            raise PackCorrupt(f"the pack {pack.key[:12]} ({pack.manifest.name}) stands on a pack that is gone or was made again")

    def _current_or_aside(self, plan: _Plan) -> Pack | None:
        """The published pack; a damaged one is moved out of the way. To be called with its lock held."""
        try:
            return self._current(plan)
        except PackCorrupt as error:
            with suppress(OSError):
                aside = self._catalog.quarantine(self._catalog.packs / plan.key)
                self._catalog.ledger.keep(aside, "a damaged pack")
                self._settings.warn(f"{error}; it was moved to {aside} and is built again")
            return None

    def _build_once(self, plan: _Plan) -> Pack:
        parent = self._pack(plan.parent) if plan.parent is not None else None
        with self._alone(f"pack-{plan.key[:24]}", f"the {plan.kind} pack of {plan.name}") as tell:
            already = self._current_or_aside(plan)
            if already is not None:
                return already
            self._catalog.discard(self._catalog.packs / plan.key, held=True)
            self._build(plan, parent, tell)
            self._counted.add(plan.key)
            self.tally.built += 1
            return self._checked(plan.key)

    def _build(self, plan: _Plan, parent: Pack | None, tell: Callable[[str], None]) -> None:
        began = time.monotonic()
        self._check_room(plan)
        tell(f"building the {plan.kind} pack of {plan.name}" + (" (this boots a machine once)" if parent is None else ""))
        with self._catalog.staging() as staged:
            if parent is None:
                start = self._cold_start(plan.spec, plan.image, staged, building=plan.image.is_own)
            else:
                start = self._start(plan.spec, parent, building=True)
            packs_itself = plan.image.is_own and not plan.steps
            kind = self._pack_image(plan, staged) if packs_itself else self._prepare(plan, start, staged)
            manifest = Manifest(
                key=plan.key,
                kind=kind,
                name=plan.name,
                parent=parent.key if parent else None,
                parent_seal=parent.seal if parent else "",
                image=plan.image.sha256,
                backend=self._label(plan.spec),
                memory=plan.spec.memory,
                disk_size=start.disk_size,
            )
            packs.seal(staged, manifest)
            # Held before anybody else sees it, so that it cannot be pruned before it was ever used.
            self._leases.append(self._catalog.lease(staged))
            final = self._catalog.publish(staged, plan.key)
        size = format_size(packs.read(final).size)
        self._settings.report(f"built the {kind} pack of {plan.name} in {time.monotonic() - began:.0f} s, {size}")

    def _pack_image(self, plan: _Plan, staged: Path) -> PackKind:
        """Has the backend pack an image of its own, for which no machine has to run."""
        if isinstance(self._backend, OwnImages):
            deadline = Deadline(_BUILD_TIMEOUT * self._settings.timeout_factor)
            self._backend.pack_image(plan.image.own, staged, deadline=deadline)
        return PackKind.DISK

    def _prepare(self, plan: _Plan, start: Start, staged: Path) -> PackKind:
        """Runs a machine, has the step done to it, and saves it; as what kind of pack."""
        deadline = Deadline(_BUILD_TIMEOUT * self._settings.timeout_factor)
        with self._rundir(f"build-{secrets.token_hex(4)}") as rundir:
            machine = self._furnish(plan.spec, start, rundir, Deadline(self._patience(plan.spec)))
            try:
                if not plan.steps and plan.spec.nat:
                    self._equip(plan, machine.instance.channel(deadline=deadline))
                if plan.steps:
                    self._do(plan.steps[-1], machine)
                return self._save(machine.instance, plan, staged, deadline)
            finally:
                machine.close()

    def _save(self, instance: Instance, plan: _Plan, staged: Path, deadline: Deadline) -> PackKind:
        try:
            instance.save(staged, kind=plan.kind, deadline=deadline)
        except Unwakeable as error:
            self._settings.warn(f"every machine of {plan.name} has to boot, from a disk pack: {error}")
            instance.save(staged, kind=PackKind.DISK, deadline=deadline)
            return PackKind.DISK
        return plan.kind

    def _equip(self, plan: _Plan, channel: Channel) -> None:
        """Installs what a machine is woken and best spoken to by, if the guest reaches its packages; without, it is done by SSH."""
        script = Command(argv=("/bin/sh", "-c", _EQUIP), env=(("PATH", GUEST_PATH), ("HOME", "/root")))
        done = channel.run(script, deadline=Deadline(self._patience(plan.spec)))
        if done.returncode:
            reason = "it took too long" if done.timed_out else " ".join(done.stderr.decode(errors="replace").split()[-40:])
            self._settings.warn(f"the guest agent or Python could not be installed in {plan.name}, which goes on with SSH: {reason}")

    def _do(self, step: Layer, machine: Machine) -> None:
        try:
            _apply(step, machine)
        except Exception as error:
            told = str(error) if isinstance(error, VMBottleError) else f"{type(error).__name__}: {error}"
            message = f"the layer {step.name} could not be built: {told}"
            failed = MachineError(message, machine=machine.name, console_tail=machine.console.tail(20))
            failed.lasting = not _is_crash(error)
            raise failed from error

    def _start(self, spec: MachineSpec, pack: Pack, *, building: bool = False) -> Start:
        """How a machine starts from a pack: the chain of disks down to the image, and the seed and keys of its first boot."""
        image = self._image(spec)
        if image.is_own:
            return Start.own(saved=pack.path, building=building)
        disks = [Disk(path=pack.path / "disk.qcow2")]
        base = pack
        while base.manifest.parent is not None:
            base = self._checked(base.manifest.parent)
            disks.append(Disk(path=base.path / "disk.qcow2"))
        return Start(
            disks=(Disk(path=image.disk, format=image.format), *reversed(disks)),
            disk_size=pack.manifest.disk_size,
            kernel=image.kernel,
            initrd=image.initrd,
            cmdline=image.cmdline,
            firmware=image.firmware,
            seed=base.path / "seed.iso",
            keys=_read_keys(base.path / "keys.json"),
            saved=None if pack.manifest.kind == PackKind.DISK else pack.path,
            building=building,
        )

    def _cold_start(self, spec: MachineSpec, image: Image, folder: Path, *, building: bool = False) -> Start:
        if image.is_own:
            return Start.own(image=image.own, building=building)
        keys = new_keys()
        write_seed(folder / "seed.iso", hostname=spec.name, keys=keys, user_data=spec.user_data)
        _write_keys(folder / "keys.json", keys)
        return Start(
            disks=(Disk(path=image.disk, format=image.format),),
            disk_size=_disk_size(spec, image),
            kernel=image.kernel,
            initrd=image.initrd,
            cmdline=image.cmdline,
            firmware=image.firmware,
            seed=folder / "seed.iso",
            keys=keys,
        )

    # -- images ----------------------------------------------------------------------------------------------------------------------

    def _image(self, spec: MachineSpec) -> Image:
        source = spec.image
        if isinstance(self._backend, OwnImages):
            return _own_image(self._backend.find_image(source), spec)
        if isinstance(source, Path) or "/" in source:
            return self._images.import_path(Path(source), arch=spec.arch)
        declared = self._settings.declared.get(source)
        found = self._named_image(source, spec.arch) if declared is None else declared.get(self._images) or self._make_declared(declared)
        self._hold(found)
        if found.arch != spec.arch:
            raise SpecError(
                f"the image {found.name!r} is for {found.arch}, and the machine {spec.name!r} was to be {spec.arch}: "
                f"say arch={found.arch!r} in the mark, or get the image for {spec.arch} as {source}-{spec.arch}"
            )
        return found

    def _hold(self, image: Image) -> None:
        """Keeps a stored image from being removed for as long as it may be needed."""
        folder = image.disk.parent
        if folder not in self._held:
            with suppress(FileNotFoundError):
                self._leases.append(self._catalog.lease(folder))
                self._held.add(folder)

    def _named_image(self, name: str, arch: str) -> Image:
        names = (name,) if arch == host_arch() else (f"{name}-{arch}", name)
        return next((image for each in names if (image := self._sound(each, again=images.can_build(name)))), None) or self._build_image(
            name
        )

    def _sound(self, name: str, *, again: bool) -> Image | None:
        """The image of a name, if there is one; a damaged one that can be made again is moved out of the way."""
        try:
            return self._images.get(name)
        except CatalogError as error:
            if not again:
                raise
            self._images.put_aside(name, self._catalog.quarantine)
            self._settings.warn(f"{str(error).partition('. Remove it')[0]}; it was moved to {self._catalog.root / 'quarantine'}")
            return None

    def _build_image(self, name: str) -> Image:
        if not images.can_build(name):
            there = ", ".join(sorted({*(image.name for image in self._images.list()), *self._settings.declared})) or "none"
            official = name in images.CLOUD_IMAGES
            how = f"Download it: vmbottle image pull {name}" if official else f"Add one: vmbottle image add FILE --name {name}"
            raise CatalogError(
                f"there is no image {name!r} in the catalog (there: {there}; can be built: {', '.join(sorted(images.RECIPES))}). {how}"
            )
        with self._making(name) as tell:
            return self._sound(name, again=True) or images.build(self._images, name, progress=tell)

    def _make_declared(self, declared: DeclaredImage) -> Image:
        with self._making(declared.stored_name, images.PULL_SECONDS if declared.kind == "url" else _BUILD_TIMEOUT) as tell:
            return declared.get(self._images) or declared.make(self._images, progress=tell)

    def _making(self, name: str, seconds: float = _BUILD_TIMEOUT) -> AbstractContextManager[Callable[[str], None]]:
        return self._alone(f"image-{name}", f"the image {name}", seconds)

    @contextmanager
    def _alone(self, lock: str, label: str, seconds: float = _BUILD_TIMEOUT) -> Iterator[Callable[[str], None]]:
        """Does something as the only one; the block gets what takes a line about how far it is, for this run and for those who wait."""
        deadline, report = Deadline(seconds * self._settings.timeout_factor), self._settings.report
        with self._catalog.lock(lock, deadline=deadline, waiting=report, label=label) as tell:

            def both(line: str) -> None:
                report(line)
                tell(line)

            yield both


@contextmanager
def _infra() -> Iterator[None]:
    """Marks what keeps a test from its machine, unless the test itself describes a machine that cannot be."""
    try:
        yield
    except VMBottleError as error:
        error.infra = not isinstance(error, SpecError)
        raise


def _once_more(name: str, error: VMBottleError, *, machine: str) -> MachineError:
    """In one line what was told in full already."""
    again = MachineError(f"the pack of {name} could not be built earlier in this run: {str(error).splitlines()[0]}", machine=machine)
    again.lasting = True
    return again


def _is_crash(error: Exception) -> bool:
    """Whether it was the hypervisor that failed, which a step of a layer cannot help: all else may be the step's own doing."""
    return isinstance(error, MachineDied) and not error.lasting and error.exitcode not in (None, 0)


def _own_image(found: OwnImage, spec: MachineSpec) -> Image:
    """An image of the backend's as one of the catalog, of which there is no disk."""
    return Image(
        name=found.name,
        sha256=found.digest,
        key=found.digest,
        disk=Path(),
        format="raw",
        virtual_size=0,
        arch=spec.arch,
        readiness="channel",
        prepared=True,
        own=found.reference,
        is_own=True,
        quick=found.quick,
    )


def _lan(spec: MachineSpec, lans: Lans | None) -> Lan | None:
    if spec.lan is None:
        return None
    if lans is None:
        raise SpecError(f"network={spec.lan!r}: a private LAN is of one test; use the fixtures vm, vms or vm_factory for {spec.name!r}")
    return lans[spec.lan]


def _disk_size(spec: MachineSpec, image: Image) -> int:
    if spec.disk is not None and spec.disk < image.virtual_size:
        raise SpecError(f"disk={format_size(spec.disk)} is less than the image {image.name} needs: {format_size(image.virtual_size)}")
    return spec.disk or image.virtual_size


def _boots(spec: MachineSpec) -> dict[str, Any]:
    return {key: getattr(spec, key) for key in (*BOOT, "timeout")}


def _build_spec(spec: MachineSpec, step: Layer) -> MachineSpec:
    """What the machine is that a step is done on: it boots with what the final one does, and all else is the step's own."""
    boots = _boots(spec)
    own = {key: value for key, value in step.keywords.items() if key not in {*boots, "packages", "files", "run", "fresh", "name"}}
    inherited = MachineSpec.resolve(step.source, {}) if isinstance(step.source, Layer) else MachineSpec(source=step.source)
    launch = {key: getattr(inherited, key) for key in ("network", "user")} | {"env": dict(inherited.env), "ports": inherited.ports}
    if step.keywords.get("packages"):
        launch["network"] = True  # where packages come from
    keywords = {**launch, **own, **boots}
    keywords["network"] = keywords["network"] is True  # a LAN is what a machine joins when it is poured
    return MachineSpec(source=step.source, **keywords)


def _apply(step: Layer, machine: Machine) -> None:
    packages = tuple(step.keywords.get("packages", ()))
    if packages:
        machine.exec(["sh", "-c", _INSTALL, "sh", *packages], timeout=_BUILD_TIMEOUT)
    machine.write_files(dict(step.keywords.get("files", {})))
    for script in step.keywords.get("run", ()):
        machine.exec(script, timeout=_BUILD_TIMEOUT)
    if step.function is not None:
        step.function(machine)


def _await_cloud_init(instance: Instance, channel: Channel, spec: MachineSpec, deadline: Deadline) -> None:
    question = Command(argv=("/bin/sh", "-c", _CLOUD_INIT_ENDED), env=(("PATH", GUEST_PATH),))

    def ended() -> bool:
        return channel.run(question, deadline=Deadline(30)).returncode == 0

    # Each question is work for a guest that is busy booting.
    if not deadline.poll(ended, every=1.5, first=0.5):
        raise MachineTimeout(
            f"cloud-init had not ended after {deadline.seconds:.0f} s",
            machine=spec.name,
            console_tail=instance.console.tail(30),
            argv=getattr(instance, "argv", ()),
        )


def _write_keys(path: Path, keys: Keys) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(attrs.asdict(keys)).encode())


def _read_keys(path: Path) -> Keys:
    return Keys(**json.loads(path.read_bytes()))
