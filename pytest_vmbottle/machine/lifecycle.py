"""Lifecycle of a machine: power, snapshots and restores.

A machine's name, folder and console stay; a start or a restore replaces the instance behind them.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import attrs

from pytest_vmbottle.backends.port import DataDisk, Disk, Instance, Loss, Start, State
from pytest_vmbottle.channels.port import GUEST_PATH, Channel, Command
from pytest_vmbottle.errors import CatalogError, MachineDied, MachineError, MachineTimeout
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.host.generations import SNAPSHOTS
from pytest_vmbottle.host.ownership import Owner
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.machine import pcap
from pytest_vmbottle.machine.bulk import Bulk
from pytest_vmbottle.machine.disks import await_disks
from pytest_vmbottle.machine.lan import Lan, LanGuest, LanMember
from pytest_vmbottle.machine.shares import Share
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.spec.pack_kind import PackKind
from pytest_vmbottle.timeline import Timeline

if TYPE_CHECKING:
    from pytest_vmbottle.catalog.packs import Manifest
    from pytest_vmbottle.machine.snapshot import Snapshot

__all__ = ["CAPTURE", "CAPTURES", "Lifecycle", "Relauncher"]

CAPTURES = "captures"
"""Folder in a machine's folder for recorded traffic."""
CAPTURE = "network"
"""Beginning of the names of the files there with the traffic of a machine's own card."""

# The kernel draws this id at random once in each boot (random(4)). A guest that only answers again may be the old boot, which has not gone
# down yet.
_BOOT_ID = Command(argv=("cat", "/proc/sys/kernel/random/boot_id"), env=(("PATH", GUEST_PATH),))


@attrs.frozen(kw_only=True)
class Relauncher:
    """Everything needed to start a machine again, given by its creator.

    Attributes:
        start: The boot source of the first start.
        folder: The machine's folder.
        patience: Seconds that a boot may take.
        launch: Function that starts the machine in its folder and returns when it is ready.
        await_boot: Function that waits until a guest whose channel has answered has finished booting.
        image: The sha256 of the machine's image.
        backend: The backend's name, version and accelerator.
    """

    start: Start
    folder: Path
    patience: float
    launch: Callable[[Start, Deadline], tuple[Instance, Channel]]
    await_boot: Callable[[Instance, Channel, Deadline], None]
    image: str
    backend: str


class Lifecycle:
    """Current instance of a machine, if it is on, and its replacement by another.

    Attributes:
        join: Function that connects the machine to the private LANs of its spec, until it ends; None if it is connected, or has none.
        timeline: The record of what happens to the machine.
    """

    def __init__(  # noqa: PLR0913
        self,
        instance: Instance,
        channel: Channel,
        *,
        spec: MachineSpec,
        factor: float = 1.0,
        relauncher: Relauncher | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        """Take a machine that is ready.

        Args:
            instance: The VM as its backend sees it.
            channel: The channel for commands.
            spec: The machine's spec.
            factor: Factor of all time-outs.
            relauncher: The means to start it again; without it, that is impossible.
            timeline: The record of what happens to it; without it, nothing is recorded.
        """
        self.timeline = timeline or Timeline(None)
        self._instance: Instance | None = None
        self._uncaptured: Instance | None = None
        self._last_panic: str | None = None
        self._adopt(instance, channel)
        self._spec = spec
        self._owner = Owner()
        self._relauncher = relauncher
        self._current = None if relauncher is None else relauncher.start
        self._forwards: dict[int, int] = {}
        self._overlay: Path | None = None
        self._factor = factor
        # Functions, because a start or a restore replaces both.
        self._shares = [
            Share(
                machine=spec.name,
                path=path,
                folder=folder,
                tag=f"share{number}",
                instance=lambda: self.instance,
                channel=lambda: self.channel,
                factor=factor,
            )
            for number, (path, folder) in enumerate(spec.shares)
        ]
        self._lan_guest = LanGuest(instance=lambda: self.instance, channel=lambda: self.channel, factor=factor)
        self._is_sharing = False
        self.join: Callable[[], object] | None = None

    @property
    def captures(self) -> list[Path]:
        """Files with the traffic of its network cards, if it is recorded."""
        return sorted(self._relauncher.folder.glob(f"{CAPTURES}/*.pcap")) if self._relauncher else []

    def bound_capture(self) -> None:
        """Stop recording network traffic if that has filled its file."""
        if self._spec.capture and self._instance is not None and self._instance is not self._uncaptured:
            # The LAN's file, which is beside them, has a limit of its own.
            own = [path for path in self.captures if path.name.startswith(CAPTURE)]
            if own and max(own, key=lambda path: path.stat().st_mtime).stat().st_size >= pcap.LIMIT:
                # Set first: a recording that cannot be ended is not tried again each second. QEMU's filter has no limit for its file.
                self._uncaptured = self._instance
                self._instance.end_capture()

    def bound_logs(self) -> None:
        """End logs of what is written to disks that have become too long."""
        if self._instance is not None:
            for text in self._instance.bound_logs():
                self.timeline.note("disk", text=text)

    def _adopt(self, instance: Instance, channel: Channel) -> None:
        # All four belong together: a channel or a disk port of the instance before leads to a process that has ended.
        self._instance = instance
        self._channel = channel
        self._bulk = Bulk(instance)
        self._paused, self._last_panic = False, None

    @property
    def instance(self) -> Instance:
        """Return the running instance.

        Raises:
            MachineError: The machine is off, or belongs to another process.
        """
        self.check_owner()
        return self._on

    def runs_on(self, instance: Instance) -> bool:
        """Tell whether the machine is on, and still the same instance."""
        return self._instance is instance and instance.exitcode is None

    @property
    def pid(self) -> int:
        """Return the hypervisor's process id; raise if the machine is off."""
        return self._on.pid

    @property
    def _on(self) -> Instance:
        if self._instance is None:
            raise self._error("is off: vm.start() boots it, and vm.restore() resets it to its first state")
        return self._instance

    @property
    def channel(self) -> Channel:
        """Return the channel for commands.

        Raises:
            MachineError: The machine is off or paused.
        """
        self.check_owner()
        if self._instance is not None and self._paused:
            raise self._error("is paused: vm.resume() continues it")
        # The property raises if the machine is off.
        _ = self.instance
        return self._channel

    @property
    def folder(self) -> Path:
        """The machine's folder, which goes with it; raise `MachineError` if it is unknown."""
        return self._relaunchable().folder

    @property
    def boot_source(self) -> Start:
        """The boot source of the current instance: what the machine's own disk stands on."""
        return self._current or self._relaunchable().start

    @property
    def image(self) -> str:
        """The sha256 of the machine's image; empty if it is unknown."""
        return self._relauncher.image if self._relauncher else ""

    @property
    def source(self) -> Start | None:
        """The boot source of its first start; None if it is unknown."""
        return self._relauncher.start if self._relauncher else None

    @property
    def made_by(self) -> str:
        """Name, version and accelerator of what runs the machine; empty if they are unknown."""
        return self._relauncher.backend if self._relauncher else ""

    def alive(self) -> None:
        """Return if the guest can still answer (see `Instance.alive`)."""
        self.instance.alive()

    @property
    def bulk(self) -> Bulk:
        """Return the transport for large data; raise as `channel` does."""
        _ = self.channel
        return self._bulk

    def bulk_channel(self, deadline: Deadline) -> Channel:
        """Return the channel with the most throughput (see `Instance.channel`); raise as `channel` does."""
        _ = self.channel
        return self.instance.channel(deadline=deadline, bulk=True)

    def stream_channel(self, deadline: Deadline, *, terminals: bool = False) -> Channel:
        """Return a channel for commands that take input while they run, or also for terminals; raise as `channel` does."""
        # A login takes long, so it is made only where nothing else has streams.
        return self.channel.streaming(deadline=deadline, terminals=terminals) or self.bulk_channel(deadline)

    @property
    def panic(self) -> str | None:
        """The kernel's report of trouble, also after the machine went off; see `Instance.panic`."""
        return self._last_panic if self._instance is None else self._instance.panic

    @property
    def is_silent(self) -> bool:
        """Tell whether the console has ended, until the machine is started again."""
        return self._instance is None or self._instance.console.ended

    @property
    def state(self) -> State:
        """Return the machine's state.

        A forked child sees whether the instance that ran at the fork still runs.
        """
        if self._instance is None:
            return State.OFF
        if not self._owner.is_us and self._instance.exitcode is not None:
            return State.OFF
        # A hypervisor process of a parent cannot be asked by a fork: its monitor belongs to the parent.
        found = self._instance.state() if self._owner.is_us else State.RUNNING
        return State.PAUSED if self._paused and found is State.RUNNING else found

    def check_owner(self) -> None:
        """Raise `MachineError` in a forked child, which does not own the machine."""
        self._owner.check(f"the machine {self._spec.name}")

    def _error(self, message: str) -> MachineError:
        return MachineError(f"the machine {self._spec.name} {message}", machine=self._spec.name)

    def _powered(self, *, dead: bool = False) -> Instance:
        """Return the instance if the machine is on; a dead instance only if allowed."""
        instance = self.instance
        state = instance.state()
        # One that powered itself off is retired first, so that the error says "is off" and not what its monitor said.
        if state is State.OFF:
            self._retire()
        # Raises if it was retired just now.
        _ = self.instance
        if state is State.DIED and not dead:
            raise self._died("has died: vm.start() boots it again, and vm.restore() resets it to its first state")
        return instance

    def _died(self, message: str) -> MachineDied:
        tail = self.instance.console.tail(20)
        return MachineDied(f"the machine {self._spec.name} {message}", machine=self._spec.name, console_tail=tail)

    def plug_disk(self, disk: DataDisk, deadline: Deadline) -> None:
        """Plug in a disk, and wait until the guest has it."""
        channel = self.channel
        self.instance.plug_disk(disk)
        self._current = attrs.evolve(self.boot_source, data=self.instance.data)
        await_disks(channel, [disk.name], deadline)

    def unplug_disk(self, name: str, deadline: Deadline) -> None:
        """Remove a disk."""
        self.instance.unplug_disk(name, deadline=deadline)
        self._current = attrs.evolve(self.boot_source, data=self.instance.data)

    def release_disk(self, name: str, deadline: Deadline) -> bool:
        """Have the guest unmount a disk, which `change_disk` may then change (see `Instance.release_disk`)."""
        # Raises if it is off or paused.
        _ = self.channel
        return self.instance.release_disk(name, deadline=deadline)

    def change_disk(self, disk: DataDisk, deadline: Deadline) -> None:
        """Put a disk in the place of another one (see `Instance.change_disk`)."""
        self.instance.change_disk(disk, deadline=deadline)
        self._current = attrs.evolve(self.boot_source, data=self.instance.data)

    def _relaunchable(self) -> Relauncher:
        self.check_owner()
        if self._relauncher is None:
            raise self._error("cannot be started again: it was made without a way to do that")
        return self._relauncher

    def _late(self, what: str, deadline: Deadline) -> MachineTimeout:
        message = f"the machine {self._spec.name} did not {what} within {deadline.seconds:g} s; vm.power_cut() ends it in any case"
        return MachineTimeout(message, machine=self._spec.name, console_tail=self.instance.console.tail(20))

    # -- one and the same instance ---------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop the processors."""
        self._powered()
        self.instance.pause()
        self._paused = True

    def resume(self) -> None:
        """Continue the processors."""
        self._powered()
        self.instance.resume()
        self._paused = False

    def reboot(self, deadline: Deadline | None) -> None:
        """Reboot the guest in order, and wait until it is ready again."""
        relauncher, powered = self._relaunchable(), self._powered()
        deadline = deadline or Deadline(relauncher.patience)
        # Asked first, because only the comparison proves the reboot.
        before = self._boot_id(deadline)
        if not powered.reboot(deadline=deadline):
            off = powered.state() is State.OFF
            raise self._died("powered off instead of rebooting") if off else self._late("reboot", deadline)
        # The old channel ended with the old system: the instance forgets its channels when it sees the reset.
        self._channel = self.instance.channel(deadline=deadline)
        if self._boot_id(deadline) == before:
            raise self._error(f"was reset and is still in the boot {before}")
        relauncher.await_boot(self.instance, self._channel, deadline)
        # The address of the LAN's card is in no file of the guest, so each boot needs it again.
        self._settle()

    def _boot_id(self, deadline: Deadline) -> str:
        return self.channel.run(_BOOT_ID, deadline=deadline).stdout.decode("ascii", "replace").strip()

    # -- off and on ------------------------------------------------------------------------------------------------------------------

    def off(self, deadline: Deadline) -> None:
        """Have the guest shut down in order."""
        powered = self._powered()
        # Raises if it is paused: a guest whose processors stand still cannot shut down.
        _ = self.channel
        if not powered.shut_down(deadline=deadline):
            raise self._late("power off", deadline)
        self._retire()

    def cut(self, lose: Loss | None) -> None:
        """Cut the power at once, and take from tracked disks what is to be lost."""
        # A machine that has died can be cut too: it may be a guest that panicked, in a QEMU that still runs.
        powered = self._powered(dead=True)
        if lose is None:
            powered.cut()
        else:
            powered.cut_losing(lose)
        self._retire()

    def start(self, deadline: Deadline | None) -> None:
        """Boot the machine from its own disk."""
        self.check_owner()
        if self.state not in (State.OFF, State.DIED):
            raise self._error(f"is not off, it is {self.state}")
        # From its disk alone: a saved RAM belongs to the disk of the moment when it was saved.
        self._relaunch(self._set_aside(attrs.evolve(self.boot_source, saved=None, ram=None, kept=True)), deadline)

    def _set_aside(self, start: Start) -> Start:
        """Return a boot source with the overlays of tracked disks as images, so that logs of writes begin with empty overlays."""
        folder = self._relaunchable().folder

        def aside(name: str) -> Disk:
            moved = folder / f"{name.removesuffix('.qcow2')}-{secrets.token_hex(4)}.qcow2"
            (folder / name).rename(moved)
            return Disk(path=moved)

        data = tuple(attrs.evolve(disk, disks=(*disk.disks, aside(disk.file)), overlay=None) for disk in start.data)
        root = (aside(self._overlay.name),) if self._spec.track_writes and self._overlay is not None else ()
        return attrs.evolve(start, data=data, disks=(*start.disks, *root), overlay=None if root else start.overlay)

    def stop(self) -> None:
        """End the machine for good; may be called again.

        A forked child, which does not own the machine, leaves it alone.
        """
        if self._owner.is_us:
            self._retire()

    def _retire(self) -> None:
        """Stop the instance and remember its forwarded ports, so that the next instance gets the same ones."""
        if self._instance is not None:
            # Before the instance is stopped: afterwards nobody can ask it for its ports or its panic.
            self._forwards.update(self._instance.forwards)
            self._overlay = self._instance.overlay
            self._last_panic = self.panic
            self._instance.stop()
            self._instance, self._paused = None, False

    def _relaunch(self, start: Start, deadline: Deadline | None) -> None:
        relauncher = self._relaunchable()
        # First the old instance: two must never write to the same disk and console.
        self._retire()
        self._current = start  # from here on this is what the disk in its folder stands on, whatever happens
        # Only for this launch and not in `_current`, since the ports may change with each retirement.
        wanted = attrs.evolve(start, forwards=tuple(self._forwards.items()))
        self._adopt(*relauncher.launch(wanted, deadline or Deadline(relauncher.patience)))
        self._settle()

    # -- private LANs ----------------------------------------------------------------------------------------------------------------

    @contextmanager
    def on(self, lan: Lan) -> Iterator[None]:
        """Connect the machine to a private LAN for the length of a block, beside those that it is on.

        The fixtures do so if the spec says `network="name"`.
        """
        # QEMU records the first card only. The frames of a LAN all pass its switch, which so records them once.
        if self._spec.capture and self._relauncher is not None:
            lan.switch.capture(private_dir(self._relauncher.folder / CAPTURES) / f"lan-{lan.name}.pcap")
        with lan.joined(self._spec.name, self._lan_guest):
            yield

    @property
    def places(self) -> Sequence[LanMember]:
        """The machine's places on private LANs, in the order of its mark."""
        return tuple(self._lan_guest.places)

    def place(self, lan: str | None = None) -> LanMember:
        """Return the machine's place on a private LAN, which has to be named if it is on several.

        Raises:
            MachineError: It is on none, or belongs to another process.
            ValueError: It is on others, or on several.
        """
        # A forked child has a copy of the switch without its thread: it would set what nobody looks at.
        self.check_owner()
        places = {place.lan: place for place in self.places}
        if not places:
            raise MachineError('it is not on a private LAN: write network="lan" in its mark', machine=self._spec.name)
        if lan is None and len(places) == 1:
            return self.places[0]
        if lan not in places:
            said = f"{self._spec.name} is on the private LANs {', '.join(places)}"
            raise ValueError(f"{said}: say which one, lan={self.places[0].lan!r}" if lan is None else f"lan={lan!r}: {said}")
        return places[lan]

    def share_folders(self) -> None:
        """Share the folders of the spec with the guest; later boots and instances have them, too."""
        self._is_sharing = True
        for share in self._shares:
            share.settle()

    def _settle(self) -> None:
        """Connect the machine to its LANs again, and share its folders, after a boot or as another instance."""
        # No boot and no restore has these devices, so they are plugged in each time.
        for plugged in self._plugged:
            plugged.settle()

    @property
    def _plugged(self) -> Sequence[LanMember | Share]:
        return (*self._lan_guest.places, *(self._shares if self._is_sharing else ()))

    @contextmanager
    def _unshared(self) -> Iterator[None]:
        """Take the shared folders away for the length of a block: QEMU saves no machine that has one."""
        shares = self._shares if self._is_sharing else ()
        try:
            for share in shares:
                share.unplug()
            yield
        finally:
            for share in shares:
                share.settle()

    # -- there and back --------------------------------------------------------------------------------------------------------------

    def snapshot(self, name: str, *, whole: bool = False) -> Snapshot:
        """Write a snapshot of the running machine, RAM included; all of it if it has to be a pack of its own."""
        # Imported here and not above: whoever only names `Machine` pays nothing for what manifests need (cattrs).
        from pytest_vmbottle.catalog import packs
        from pytest_vmbottle.machine.snapshot import Snapshot

        with self.written(name, whole=whole) as start:
            folder = cast("Path", start.saved)
            packs.seal(folder, self._manifest(folder.name, name))
            return Snapshot(path=folder, manifest=packs.read(folder).manifest, spec=self._spec, start=start)

    @contextmanager
    def written(self, name: str, *, whole: bool = False) -> Iterator[Start]:
        """Write the running machine into a new folder, and yield the boot source for machines like it; nothing is left after an error."""
        # `boot_source`, not `relauncher.start`: a snapshot stands on the disks that the machine runs on now, which may be those of another
        # snapshot.
        relauncher, origin = self._relaunchable(), self.boot_source
        self._powered()
        _ = self.channel
        # Named as a pack is, because it is read and held as one: the name is the key in its manifest.
        folder = relauncher.folder / SNAPSHOTS / secrets.token_hex(32)
        try:
            private_dir(folder)
            with self._unshared():
                whole = self.instance.snapshot(folder, whole=whole, deadline=Deadline(relauncher.patience))
            # A backend with images of its own has no disks in the start, and finds its own in the folder.
            disks = (*origin.disks, Disk(path=folder / "disk.qcow2")) if origin.disks else ()
            data = tuple(
                attrs.evolve(disk, disks=(*disk.disks, Disk(path=folder / disk.file)), saved=True, overlay=None) for disk in origin.data
            )
            ram = None if whole else origin.ram or origin.saved
            yield attrs.evolve(origin, disks=disks, data=data, saved=folder, ram=ram, kept=False, building=False)
        # Ctrl-C too: half a snapshot may be a gigabyte that nobody would remove before the machine ends.
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            # The file system's own sentence has no remedy; a machine's error has one already.
            if isinstance(error, OSError) and not isinstance(error, MachineError):
                raise self._unwritten(name, str(error.strerror), relauncher.folder) from error
            raise

    @staticmethod
    def last_of(machines: int, start: Start) -> Callable[[], None]:
        """Return a function to be called at the end of each of so many machines: the last call removes what `written` has made for them."""
        left = iter(range(machines - 1))

        def ended() -> None:
            if next(left, None) is None and start.saved is not None:
                shutil.rmtree(start.saved, ignore_errors=True)

        return ended

    def _unwritten(self, name: str, reason: str, folder: Path) -> CatalogError:
        free = format_size(shutil.disk_usage(folder).free)
        hint = "make room (vmbottle pack prune), or choose another folder with --vm-catalog"
        return CatalogError(
            f"the snapshot {name!r} of the machine {self._spec.name} could not be written, and the machine runs on: {reason}; "
            f"{free} are free in {folder}: {hint}"
        )

    def _manifest(self, key: str, name: str) -> Manifest:
        from pytest_vmbottle.catalog.packs import Manifest

        relauncher = self._relaunchable()
        return Manifest(
            key=key,
            kind=PackKind.STREAM,
            name=name,
            parent=relauncher.start.saved.name if relauncher.start.saved else None,
            image=relauncher.image,
            backend=relauncher.backend,
            memory=self._spec.memory,
            disk_size=relauncher.start.disk_size,
            disks={disk.name: disk.size for disk in self.boot_source.data},
        )

    def restore(self, snapshot: Snapshot | None) -> None:
        """Replace the running instance by a snapshot, or by the state the machine was started from."""
        from pytest_vmbottle.machine.snapshot import Snapshot

        relauncher = self._relaunchable()
        # The pack would get the state of another moment, without what the layer has done so far.
        if relauncher.start.building:
            raise self._error("is being built: a layer cannot restore it")
        if snapshot is None:
            # Not `_current`: after restoring a snapshot that would be this snapshot, and not the first state.
            start = relauncher.start
        elif isinstance(snapshot, Snapshot):
            snapshot.check()
            snapshot.check_fits(self._spec)
            start = snapshot.start
        else:
            raise TypeError(f"restore() takes what snapshot() returned, not {snapshot!r}")
        self._relaunch(start, None)
