"""The power switch of a machine: what it is doing, off and on again, and back to where it once was.

A machine's name, folder and console stay; behind them one instance follows another.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle._os import Deadline, format_size, private_dir
from pytest_vmbottle.backend import GUEST_PATH, Channel, Command, Disk, Instance, PackKind, Powered, Snapshots, Start, State, Watching
from pytest_vmbottle.channels.bulk import Bulk
from pytest_vmbottle.errors import CatalogError, MachineDied, MachineError, MachineTimeout
from pytest_vmbottle.generations import SNAPSHOTS
from pytest_vmbottle.ownership import Owner
from pytest_vmbottle.spec import MachineSpec

if TYPE_CHECKING:
    from pytest_vmbottle.packs import Manifest, Snapshot

__all__ = ["Power", "Supply"]

_BOOT_ID = Command(argv=("cat", "/proc/sys/kernel/random/boot_id"), env=(("PATH", GUEST_PATH),))


@attrs.frozen(kw_only=True)
class Supply:
    """What a machine is started again with, from who made it.

    Attributes:
        start: What it was started from.
        folder: Where its files are.
        patience: Seconds that a boot may take.
        launch: Starts it in its folder, and returns it when it is ready.
        await_boot: Waits until a guest whose channel has answered is done with booting.
        image: The sha256 of its image.
        backend: Who runs it, with version and accelerator.
    """

    start: Start
    folder: Path
    patience: float
    launch: Callable[[Start, Deadline], tuple[Instance, Channel]]
    await_boot: Callable[[Instance, Channel, Deadline], None]
    image: str
    backend: str


class Power:
    """The instance that a machine is at present, if it is on, and what replaces it by another."""

    def __init__(self, instance: Instance, channel: Channel, *, spec: MachineSpec, supply: Supply | None = None) -> None:
        """Takes a machine that is ready.

        Args:
            instance: The VM as its backend sees it.
            channel: What commands go through.
            spec: What it is.
            supply: What it is started again with; without, it cannot be.
        """
        self._instance: Instance | None = None
        self._last_panic: str | None = None
        self._adopt(instance, channel)
        self._spec = spec
        self._owner = Owner()
        self._supply = supply
        self._current = None if supply is None else supply.start
        self._forwards: dict[int, int] = {}

    def _adopt(self, instance: Instance, channel: Channel) -> None:
        self._instance = instance
        self._channel = channel
        self._bulk = Bulk(instance)
        self._paused, self._last_panic = False, None

    @property
    def instance(self) -> Instance:
        """The running VM.

        Raises:
            MachineError: The machine is off, or belongs to another process.
        """
        self.check_owner()
        return self._on

    @property
    def pid(self) -> int:
        """The process that runs it, or the error that it is off."""
        return self._on.pid

    @property
    def _on(self) -> Instance:
        if self._instance is None:
            raise self._error("is off: vm.start() boots it, and vm.restore() takes it back to where it began")
        return self._instance

    @property
    def channel(self) -> Channel:
        """What commands go through.

        Raises:
            MachineError: The machine is off or paused.
        """
        self.check_owner()
        if self._instance is not None and self._paused:
            raise self._error("is paused and answers nothing: vm.resume() lets it go on")
        _ = self.instance
        return self._channel

    @property
    def bulk(self) -> Bulk:
        """What much data goes through, or the same errors."""
        _ = self.channel
        return self._bulk

    def bulk_channel(self, deadline: Deadline) -> Channel:
        """The channel with the most throughput, or the same errors (see `Instance.channel`)."""
        _ = self.channel
        return self.instance.channel(deadline=deadline, bulk=True)

    @property
    def panic(self) -> str | None:
        """What the guest's kernel said of its trouble, also when the machine is off since; see `Watching`."""
        if isinstance(self._instance, Watching):
            return self._instance.panic
        return self._last_panic

    @property
    def is_silent(self) -> bool:
        """Whether the console says nothing more, unless the machine is started again."""
        return self._instance is None or self._instance.console.ended

    @property
    def state(self) -> State:
        """What the machine is doing; a forked child sees whether what ran when it was forked still does."""
        if not self._owner.is_us:
            ended = isinstance(self._instance, Watching) and self._instance.exitcode is not None
            return State.OFF if self._instance is None or ended else State.PAUSED if self._paused else State.RUNNING
        if isinstance(self._instance, Powered):
            return self._instance.state()
        return State.OFF if self._instance is None else State.PAUSED if self._paused else State.RUNNING

    def check_owner(self) -> None:
        """Raises `MachineError` in a forked child, whose it is not."""
        self._owner.check(f"the machine {self._spec.name}")

    def _error(self, message: str) -> MachineError:
        return MachineError(f"the machine {self._spec.name} {message}", machine=self._spec.name)

    def _powered(self, *, dead: bool = False) -> Powered:
        """The instance, which is on and has a power switch; a dead one only if that will do."""
        instance = self.instance
        if not isinstance(instance, Powered):
            raise self._error("has no power switch: its backend offers none")
        state = instance.state()
        if state is State.OFF:
            self._retire()
        _ = self.instance
        if state is State.DIED and not dead:
            raise self._died("has died: vm.start() boots it again, and vm.restore() takes it back to where it began")
        return instance

    def _died(self, message: str) -> MachineDied:
        tail = self.instance.console.tail(20)
        return MachineDied(f"the machine {self._spec.name} {message}", machine=self._spec.name, console_tail=tail)

    def _supplied(self) -> Supply:
        self.check_owner()
        if self._supply is None:
            raise self._error("cannot be started again by who holds it")
        return self._supply

    def _late(self, what: str, deadline: Deadline) -> MachineTimeout:
        message = f"the machine {self._spec.name} did not {what} within {deadline.seconds:g} s; vm.power_cut() ends it whatever it does"
        return MachineTimeout(message, machine=self._spec.name, console_tail=self.instance.console.tail(20))

    # -- one and the same instance ---------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stops the processors."""
        self._powered()
        self.instance.pause()
        self._paused = True

    def resume(self) -> None:
        """Lets them run on."""
        self._powered()
        self.instance.resume()
        self._paused = False

    def reboot(self, deadline: Deadline | None) -> None:
        """Has the guest reboot in order, and waits until it is ready again."""
        supply, powered = self._supplied(), self._powered()
        deadline = deadline or Deadline(supply.patience)
        before = self._boot_id(deadline)
        if not powered.reboot(deadline=deadline):
            off = powered.state() is State.OFF
            raise self._died("powered off instead of rebooting") if off else self._late("reboot", deadline)
        self._channel = self.instance.channel(deadline=deadline)
        if self._boot_id(deadline) == before:
            raise self._error(f"was reset and is still in the boot {before}")
        supply.await_boot(self.instance, self._channel, deadline)

    def _boot_id(self, deadline: Deadline) -> str:
        return self.channel.run(_BOOT_ID, deadline=deadline).stdout.decode("ascii", "replace").strip()

    # -- off and on ------------------------------------------------------------------------------------------------------------------

    def off(self, deadline: Deadline) -> None:
        """Has the guest power itself off in order."""
        powered = self._powered()
        _ = self.channel
        if not powered.shut_down(deadline=deadline):
            raise self._late("power off", deadline)
        self._retire()

    def cut(self) -> None:
        """Pulls the plug."""
        self._powered(dead=True).cut()
        self._retire()

    def start(self, deadline: Deadline | None) -> None:
        """Boots the machine from its own disk."""
        self.check_owner()
        if self.state not in (State.OFF, State.DIED):
            raise self._error(f"is not off, it is {self.state}")
        self._relaunch(attrs.evolve(self._origin(), saved=None, kept=True), deadline)

    def _origin(self) -> Start:
        return self._current or self._supplied().start

    def stop(self) -> None:
        """Ends it for good; may be called again. A forked child, whose it is not, leaves it alone."""
        if self._owner.is_us:
            self._retire()

    def _retire(self) -> None:
        """Frees what the instance held; whoever knows a forwarded port is to find the next one there."""
        if self._instance is not None:
            if isinstance(self._instance, Powered):
                self._forwards.update(self._instance.forwards)
            self._last_panic = self.panic
            self._instance.stop()
            self._instance, self._paused = None, False

    def _relaunch(self, start: Start, deadline: Deadline | None) -> None:
        supply = self._supplied()
        self._retire()
        self._current = start  # from here on this is what the disk in its folder stands on, whatever happens
        wanted = attrs.evolve(start, forwards=tuple(self._forwards.items()))
        self._adopt(*supply.launch(wanted, deadline or Deadline(supply.patience)))

    # -- there and back --------------------------------------------------------------------------------------------------------------

    def snapshot(self, name: str) -> Snapshot:
        """Writes the machine down, RAM included; it goes on."""
        # Imported here and not above: whoever only names `Machine` pays nothing for what manifests need (cattrs).
        from pytest_vmbottle import packs

        supply, origin = self._supplied(), self._origin()
        self._powered()
        _ = self.channel
        instance = self.instance
        if not isinstance(instance, Snapshots):
            raise self._error("cannot be written down: its backend makes no snapshots")
        folder = supply.folder / SNAPSHOTS / secrets.token_hex(32)
        try:
            private_dir(folder)
            instance.snapshot(folder, deadline=Deadline(supply.patience))
            packs.seal(folder, self._manifest(folder.name, name))
            disks = (*origin.disks, Disk(path=folder / "disk.qcow2")) if origin.disks else ()
            start = attrs.evolve(origin, disks=disks, saved=folder, kept=False, building=False)
            return packs.Snapshot(path=folder, manifest=packs.read(folder).manifest, spec=self._spec, start=start)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, MachineError):
                raise self._unwritten(name, str(error.strerror), supply.folder) from error
            raise

    def _unwritten(self, name: str, reason: str, folder: Path) -> CatalogError:
        free = format_size(shutil.disk_usage(folder).free)
        hint = "make room (vmbottle pack prune), or choose another folder with --vm-catalog"
        return CatalogError(
            f"the snapshot {name!r} of the machine {self._spec.name} could not be written, and the machine goes on: {reason}; "
            f"{free} are free in {folder}: {hint}"
        )

    def _manifest(self, key: str, name: str) -> Manifest:
        from pytest_vmbottle.packs import Manifest

        supply = self._supplied()
        return Manifest(
            key=key,
            kind=PackKind.STREAM,
            name=name,
            parent=supply.start.saved.name if supply.start.saved else None,
            image=supply.image,
            backend=supply.backend,
            memory=self._spec.memory,
            disk_size=supply.start.disk_size,
        )

    def restore(self, snapshot: Snapshot | None) -> None:
        """Replaces what runs by what was written down, or by what the machine was started from."""
        from pytest_vmbottle.packs import Snapshot

        supply = self._supplied()
        if supply.start.building:
            raise self._error("is being built: a layer cannot go back")
        if snapshot is None:
            start = supply.start
        elif isinstance(snapshot, Snapshot):
            snapshot.check()
            snapshot.check_fits(self._spec)
            start = snapshot.start
        else:
            raise TypeError(f"a machine goes back to what its snapshot() returned, not to {snapshot!r}")
        self._relaunch(start, None)
