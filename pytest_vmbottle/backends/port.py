"""Ports of a hypervisor (`Backend`, `Instance`, `Channel`), and the values that they exchange."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Literal

import attrs

from pytest_vmbottle.backends.console import Console
from pytest_vmbottle.channels.port import Channel, Keys
from pytest_vmbottle.errors import MachineDied, MachineError, Unsupported
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.findings import Check
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.spec.pack_kind import PackKind

__all__ = [
    "GUEST_MAC",
    "NANOSECONDS_PER_INSTRUCTION",
    "ROOT_DISK",
    "Backend",
    "CannotSave",
    "Capabilities",
    "Chord",
    "Console",
    "DataDisk",
    "Disk",
    "DiskErrors",
    "Instance",
    "Loss",
    "NotPlugged",
    "OwnImage",
    "SshAccess",
    "Start",
    "State",
]

ROOT_DISK = "root"
"""Name of the root disk."""
GUEST_MAC = "52:54:00:12:34:56"
"""MAC address of the network card by which the host reaches a guest; each machine has a network of its own."""


@attrs.frozen(kw_only=True)
class Capabilities:
    """Capabilities of a backend on this host, found by trying.

    Attributes:
        backend: Its name.
        version: The hypervisor's own version text.
        accelerator: The accelerator that runs guest code, such as `"kvm"` or `"tcg"`.
        reason: The reason for this accelerator, in one sentence, with the evidence.
        pack_kind: The best kind of pack it can restore here.
        pack_reason: The reason for this kind.
        emulated: Whether guest code is translated by software, an order of magnitude slower.
    """

    backend: str
    version: str
    accelerator: str
    reason: str
    pack_kind: PackKind
    pack_reason: str
    emulated: bool


NANOSECONDS_PER_INSTRUCTION = 2
"""Nanoseconds of each instruction on the clocks of a guest with `cpu_clock="instructions"`; a power of two (`-icount shift=`)."""

_NO_KEYS = Keys(user_private="", user_public="", host_private="", host_public="")


@attrs.frozen(kw_only=True)
class Disk:
    """A disk image that nobody writes to.

    Attributes:
        path: Path of the image.
        format: `"qcow2"` or `"raw"`; never guessed from the content, which a guest may have written.
    """

    path: Path
    format: str = "qcow2"


@attrs.frozen(kw_only=True)
class DataDisk:
    """A disk beside the root disk, with an overlay of its own.

    Attributes:
        name: Its name and serial number.
        size: Bytes of the disk that the guest sees.
        disks: The images its overlay lies on, lowest first; none for a disk that was empty at first.
        saved: Whether the saved state of the machine has it.
        overlay: The file that its overlay is to be, as `Start.overlay`; None for a new one.
    """

    name: str
    size: int
    disks: tuple[Disk, ...] = ()
    saved: bool = False
    overlay: Path | None = None

    @property
    def file(self) -> str:
        """Name of its file in the folder of a machine, a pack or a snapshot."""
        return f"disk-{self.name}.qcow2"


@attrs.frozen(kw_only=True)
class Start:
    """Boot source of a machine: disks, kernel, or a saved state.

    Attributes:
        disks: The images its own overlay lies on, lowest first.
        disk_size: Bytes of the disk that the guest sees.
        kernel: A kernel to boot directly, or None to have the firmware boot the disk.
        initrd: Its initial RAM disk.
        cmdline: Its command line.
        firmware: The firmware that boots the disk if there is no kernel: `"bios"` or `"uefi"`.
        seed: The cloud-init seed, an ISO image.
        keys: The keys that the seed carries.
        saved: A folder that `Instance.save` or `Instance.snapshot` filled, to be restored; None to boot.
        ram: The folder with the RAM from which `saved` has the differences alone; None if it has all of it.
        building: Whether the restored machine will itself be saved; then its RAM is a private copy.
        kept: Whether the machine ran before, and continues with its own disk, by default the one in its folder.
        overlay: That disk, if it is in another folder. The machine gets a second name of the file, so that it stays.
        image: The image to start from without `saved`, if the backend has images of its own (`Backend.find_image`). Then there are no
            disks, no seed and no keys.
        forwards: Ports of the guest, each with the host port that should lead to it if it is still free.
        data: The disks beside the root disk, in the order of their ports: those that the saved state has come first.
    """

    disks: tuple[Disk, ...]
    disk_size: int
    kernel: Path | None
    initrd: Path | None
    cmdline: str
    seed: Path
    keys: Keys
    firmware: str = "bios"
    saved: Path | None = None
    ram: Path | None = None
    building: bool = False
    kept: bool = False
    overlay: Path | None = None
    image: str = ""
    forwards: tuple[tuple[int, int], ...] = ()
    data: tuple[DataDisk, ...] = ()

    @property
    def images(self) -> tuple[Disk, ...]:
        """All images that are read: those of the root disk and of the others."""
        return (*self.disks, *(disk for each in self.data for disk in each.disks))

    @classmethod
    def own(cls, *, image: str = "", saved: Path | None = None, building: bool = False) -> Start:
        """Return the boot source for a backend that has images of its own."""
        return cls(
            disks=(),
            disk_size=0,
            kernel=None,
            initrd=None,
            cmdline="",
            seed=Path(),
            keys=_NO_KEYS,
            image=image,
            saved=saved,
            building=building,
        )


class State(StrEnum):
    """State of a machine: `OFF` is an orderly end, `DIED` any other."""

    RUNNING = "running"
    PAUSED = "paused"
    OFF = "off"
    DIED = "died"


class CannotSave(MachineError):
    """The guest cannot be saved with its RAM; its disk can be saved."""


class NotPlugged(MachineError):
    """The machine cannot take a device now; everything else works."""


Loss = Literal["unflushed", "torn"]
"""Loss of a disk with its power: all that no flush had followed; or of the first write of that the second half, and the rest."""


@attrs.frozen(kw_only=True)
class DiskErrors:
    """Requests to a disk that fail.

    Attributes:
        on: Which kind.
        after: How many of this kind succeed first.
        count: How many fail then; None for all.
        sectors: The sectors (of 512 bytes) to which they fail; None for all.
    """

    on: Literal["read", "write", "flush"]
    after: int = 0
    count: int | None = None
    sectors: range | None = None


Chord = tuple[str, ...]
"""Keys that are pressed together, by QEMU's names (QKeyCode in qapi/ui.json)."""


@attrs.frozen(kw_only=True)
class SshAccess:
    """Address and keys for a login by SSH.

    Attributes:
        address: The host's address and port that lead to the guest's SSH server.
        user: The user that the key logs in.
        keys: The key to log in with, and the machine's own.
        folder: A private folder that is removed with the machine.
    """

    address: tuple[str, int]
    user: str
    keys: Keys
    folder: Path


class Instance(ABC):
    """One running VM as its backend sees it.

    A method that a backend does not override raises `Unsupported`, or does what its text says.

    Attributes:
        hypervisor: Name of the hypervisor, for messages.
        console: Its serial console.
    """

    hypervisor: ClassVar[str] = "this backend"
    console: Console

    # -- what every backend offers ---------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def pid(self) -> int:
        """Process ID of the hypervisor."""

    @property
    @abstractmethod
    def exitcode(self) -> int | None:
        """Exit status of the hypervisor, 0 after the guest powered off; None while it runs."""

    @abstractmethod
    def channel(self, *, deadline: Deadline, bulk: bool = False) -> Channel:
        """Return a channel that has answered.

        By default it is the one with the quickest replies, with `bulk` the one with the most throughput.

        Raises:
            MachineTimeout: Nothing answered by the deadline.
            MachineDied: The guest panicked or the hypervisor ended meanwhile.
        """

    @abstractmethod
    def save(self, dest: Path, *, kind: PackKind, deadline: Deadline) -> None:
        """Stop the machine for good and write it into the empty folder `dest`.

        All but a `DISK` can be given as `Start.saved`. Of any kind, `dest / "disk.qcow2"` is the machine's disk on top of `Start.disks`.

        Raises:
            CannotSave: It cannot be saved as this kind, and runs on: it can still be saved as a `DISK`.
        """

    @abstractmethod
    def pause(self) -> None:
        """Stop the processors."""

    @abstractmethod
    def resume(self) -> None:
        """Let the processors run on."""

    def refresh(self, *, deadline: Deadline) -> None:
        """Set the guest's clock and randomness after it stood still, if something in it can do that.

        Raises:
            MachineError: It does not answer, or is another guest.
        """

    @abstractmethod
    def stop(self) -> None:
        """End the machine and free its resources; may be called again."""

    @property
    def overlay(self) -> Path | None:
        """File of the machine's own disk, on top of `Start.disks`; None, the default, if it has none in its folder."""
        return None

    # -- how it is, without asking the guest -----------------------------------------------------------------------------------------

    @property
    def panic(self) -> str | None:
        """The console line that reports a kernel panic, a kernel bug or a hung task; None if nobody looks."""
        return None

    def alive(self) -> None:
        """Return if the guest can still answer; by default as long as its hypervisor runs.

        Raises:
            GuestPanic: Its kernel reported a failure that the spec does not expect.
            MachineDied: It is gone.
        """
        if self.exitcode is not None:
            raise MachineDied(f"{self.hypervisor} ended with status {self.exitcode}", exitcode=self.exitcode)

    def state(self) -> State:
        """Return the state, asked now; by default as the exit status tells."""
        # Asked once: it may change between two questions.
        return {None: State.RUNNING, 0: State.OFF}.get(self.exitcode, State.DIED)

    # -- power -----------------------------------------------------------------------------------------------------------------------

    def shut_down(self, *, deadline: Deadline) -> bool:
        """Have the guest power off in order; return whether it did by the deadline."""
        raise self.unsupported("cannot shut down a guest")

    def reboot(self, *, deadline: Deadline) -> bool:
        """Have the guest reboot in order, and forget the channels; return whether it had restarted by the deadline."""
        raise self.unsupported("cannot reboot a guest")

    def cut(self) -> None:
        """End the machine at once, as if its plug was pulled; by default as `stop` does."""
        self.stop()

    def cut_losing(self, loss: Loss) -> None:
        """End the machine at once, and take from its tracked disks what they had not flushed.

        Raises:
            MachineError: No disk is tracked; the machine runs on.
        """
        raise self.unsupported("cannot tell what a disk has lost when its power is cut")

    def snapshot(self, dest: Path, *, whole: bool, deadline: Deadline) -> bool:
        """Write the machine, RAM included, into the empty folder `dest`; return whether all of its RAM is there.

        Unless `whole` is asked for, a backend may leave out what the RAM has in common with the pack that the machine was started from:
        `Start.ram or Start.saved`, which is `Start.ram` of the machines that start from `dest`.

        The machine is paused meanwhile, and continues whatever happens.

        `dest` can be given as `Start.saved`, with `dest / "disk.qcow2"` on top of the `Start.disks` that it was launched with.

        Raises:
            CannotSave: Nothing in the guest could set its clock after a restore.
            MachineError: It could not be written.
        """
        raise self.unsupported("does not make snapshots")

    # -- network ---------------------------------------------------------------------------------------------------------------------

    @property
    def forwards(self) -> Mapping[int, int]:
        """Host ports that were given out, by guest port."""
        return {}

    def forward(self, port: int) -> tuple[str, int]:
        """Return the host's address and port that lead to a TCP port of the guest."""
        raise self.unsupported("does not forward ports")

    def forward_from(self, here: int, port: int) -> None:
        """Forward a chosen port of 127.0.0.1 to a TCP port of the guest.

        Raises:
            MachineError: It is in use.
        """
        raise self.unsupported("forwards ports that the system chooses, and no others")

    def ssh_access(self) -> SshAccess:
        """Return the address and keys that any SSH client needs to log in."""
        raise self.unsupported("does not offer SSH")

    def link(self, *, up: bool, mac: str | None = None) -> None:
        """Plug a network cable in, or pull it: that of a card that was plugged in, or of the card by which the host reaches the guest."""
        raise self.unsupported("cannot unplug the network cable")

    def plug_card(self, wire: socket.socket, *, mac: str) -> None:
        """Plug in one more network card, whose frames are the datagrams of a socket.

        The caller may close its socket afterwards. It takes a moment until the guest sees the card.

        Raises:
            MachineError: It cannot be plugged in.
        """
        raise self.unsupported("has no private LANs")

    def debug_stub(self) -> Path:
        """Begin to listen for a debugger of the guest's kernel, if need be, and return the path of the unix socket for it.

        Raises:
            MachineError: That is not possible.
        """
        raise self.unsupported("has no stub for a debugger")

    def plug_share(self, folder: Path, *, tag: str) -> None:
        """Plug in a folder of the host, which the guest mounts by its tag as `virtiofs`.

        Raises:
            BackendUnavailable: A program for that is missing here.
            MachineError: It cannot be plugged in.
        """
        raise self.unsupported("shares no folders")

    def unplug_share(self, tag: str, *, deadline: Deadline) -> None:
        """Remove a folder that was plugged in.

        Raises:
            MachineError: The guest did not release it by the deadline.
        """
        raise self.unsupported("shares no folders")

    def capture(self, file: Path) -> None:
        """Record the traffic of the network card in a new file, in the format of pcap, until `end_capture`."""
        raise self.unsupported("cannot record network traffic")

    def end_capture(self) -> None:
        """Stop recording."""
        raise self.unsupported("cannot record network traffic")

    # -- devices ---------------------------------------------------------------------------------------------------------------------

    def disk(
        self,
        file: int,
        *,
        serial: str,
        writable: bool,
        deadline: Deadline,
    ) -> AbstractContextManager[Callable[[], int]]:
        """Plug in a raw disk for the length of a block.

        The block gets a function that returns how many bytes the guest has read or written so far.

        It may take a moment until the guest sees it, or for ever if it has no driver for it. It is gone at the end, unless the guest does
        not release it.

        Args:
            file: Descriptor of the regular file with its content, open in the mode to use it in.
            serial: Serial number by which the guest finds it: at most 20 bytes.
            writable: Whether the guest may write to it.
            deadline: Deadline of the attempt.

        Raises:
            NotPlugged: It cannot take a disk now.
        """
        raise self.unsupported("cannot plug in disks")

    @property
    def data(self) -> tuple[DataDisk, ...]:
        """The disks beside the root disk; none by default."""
        return ()

    def plug_disk(self, disk: DataDisk) -> None:
        """Plug in one more disk, which stays.

        It takes a moment until the guest sees it.

        Raises:
            NotPlugged: It cannot take another disk.
        """
        raise self.unsupported("has no disks beside the root disk")

    def unplug_disk(self, name: str, *, deadline: Deadline) -> None:
        """Remove a disk, and its file.

        Raises:
            NotPlugged: There is no such disk, or the guest did not release it by the deadline.
        """
        raise self.unsupported("has no disks beside the root disk")

    def release_disk(self, name: str, *, deadline: Deadline) -> bool:
        """Have the guest unmount what is on a disk; return whether nothing there uses it any more.

        Raises:
            Unsupported: This needs more time than to unplug the disk, or is impossible.
        """
        raise self.unsupported("cannot have a guest release a disk that stays")

    def change_disk(self, disk: DataDisk, *, deadline: Deadline) -> None:
        """Put a disk in the place of another one with its name and size, which the guest has released.

        Raises:
            NotPlugged: It cannot take its place; the one before is of no use any more.
            MachineError: The guest does not tell that it has seen it.
        """
        raise self.unsupported("cannot have a guest release a disk that stays")

    def record_writes(self, name: str, folder: Path) -> AbstractContextManager[Path]:
        """Record everything that the guest writes to a disk, for the length of a block, which gets the log (`read_log`).

        Args:
            name: The disk, `"root"` for the root disk.
            folder: A private folder; it gets the log, and a copy of the disk's own file as it is at the beginning: `DataDisk.file`.

        Raises:
            MachineError: There is no such disk; or, at the end, its log became too long.
        """
        raise self.unsupported("cannot record what is written to a disk")

    def bound_logs(self) -> Sequence[str]:
        """End the logs of what is written to disks that have become too long for the host's disk; return what is to be told of each.

        It is called every second. By default there are no logs.
        """
        return ()

    def disk_errors(self, name: str, errors: DiskErrors) -> AbstractContextManager[None]:
        """Have requests to a disk fail (EIO), for the length of a block.

        Raises:
            MachineError: There is no such disk.
        """
        raise self.unsupported("cannot have a disk fail")

    def slow_disk(self, name: str, *, iops: float, bytes_per_second: float) -> AbstractContextManager[None]:
        """Have a disk take no more than so much in a second, for the length of a block; 0 is no limit.

        Raises:
            MachineError: There is no such disk.
        """
        raise self.unsupported("cannot slow down a disk")

    def lying_disk(self, name: str) -> AbstractContextManager[None]:
        """Count no flush of a tracked disk as one, for the length of a block; see `cut_losing`.

        Raises:
            MachineError: There is no such disk, or it is not tracked.
        """
        raise self.unsupported("cannot tell what a disk has lost when its power is cut")

    def screenshot(self, kind: Literal["png", "ppm"] = "png") -> bytes:
        """Return a screenshot."""
        raise self.unsupported("does not make machines with a display")

    def press(self, chords: Iterable[Chord]) -> None:
        """Press keys, one chord after the other.

        Raises:
            MachineError: A key is unknown, or the machine is not running.
        """
        raise self.unsupported("does not make machines with a display")

    def write_console(self, data: bytes, *, deadline: Deadline) -> None:
        """Send data to the guest's end of the serial console.

        Raises:
            MachineError: The guest did not read so much by the deadline.
        """
        raise self.unsupported("has no input for the serial console")

    def qmp(self, command: str, arguments: Mapping[str, object], *, deadline: Deadline) -> object:
        """Run a command of QEMU's monitor, and return its answer.

        Raises:
            MachineError: QEMU refused it, or did not answer by the deadline.
        """
        raise self.unsupported("is not QEMU: it has no QMP")

    def unsupported(self, lacks: str) -> Unsupported:
        """Return the error for a method that the backend does not support."""
        return Unsupported(f"{self.hypervisor} {lacks}")


@attrs.frozen(kw_only=True)
class OwnImage:
    """An image in a backend's own store.

    Attributes:
        name: Its name for people.
        reference: The backend's reference to it: `Start.image`.
        digest: Digest of its content, or of a stand-in for it.
        quick: Whether a machine starts from it about as quickly as from a pack, so that no pack is made.
    """

    name: str
    reference: str
    digest: str
    quick: bool


class Backend(ABC):
    """Makes instances with one hypervisor.

    Attributes:
        default_source: The image that machines start from where nobody says it; None if there is no such image.
    """

    default_source: ClassVar[str | None] = None

    @abstractmethod
    def probe(self) -> Capabilities:
        """Probe the capabilities on this host by trying them.

        Raises:
            BackendUnavailable: It can run nothing; the message says why.
        """

    @abstractmethod
    def fingerprint(self, spec: MachineSpec) -> str:
        """Return a digest of a saved machine's dependencies besides its spec.

        These are the program, the machine type, the accelerator and the processor.
        """

    @abstractmethod
    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:
        """Start a machine whose files go into the empty, private folder `rundir`.

        Raises:
            LaunchError: The hypervisor did not start.
        """

    def unsupported_reason(self, spec: MachineSpec) -> str | None:
        """Return one sentence about what in a spec is not supported; None, the default, if all is.

        It runs nothing to find out.
        """
        return None

    def checks(self, *, chosen: bool) -> Sequence[Check]:
        """Return the doctor's checks of this backend; none by default.

        Args:
            chosen: Whether machines are run with it; if not, nothing it needs counts as missing.
        """
        return ()

    # -- images of its own -----------------------------------------------------------------------------------------------------------

    def find_image(self, source: str | Path) -> OwnImage | None:
        """Find the backend's own image for a spec's source.

        None, the default, means that machines start from the catalog's disks.

        Raises:
            SpecError: There is none.
        """
        return None

    def pack_image(self, reference: str, dest: Path, *, deadline: Deadline) -> None:
        """Write an image of its own into the empty folder `dest`, to be used as `Start.saved`.

        Raises:
            MachineError: It could not be fetched or written.
        """
        raise Unsupported(f"{reference}: this backend has no images of its own")

    # -- what it keeps elsewhere -----------------------------------------------------------------------------------------------------

    def ending(self, rundir: Path) -> tuple[str, ...]:
        """Return the command that ends the machine of this folder for good.

        It ends the machine whatever that is doing, and frees its resources.

        It is for machines that outlive the process that started them, and empty by default. It is written down before the machine is
        launched, and run without a shell by the process that cleans up after a dead owner; its status is 0 if there is no machine.
        """
        return ()

    def discard(self, rundir: Path) -> None:
        """Remove a machine's data outside its folder, once it has ended for good; there may be none."""

    def close(self) -> None:
        """End the processes that it started for itself; may be called again."""
