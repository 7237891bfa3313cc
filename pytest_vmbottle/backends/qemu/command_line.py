"""Composition of a machine's QEMU command line.

The saved state of a machine follows the order and the ids of devices. So a pack is restored with the same command line, except for `share`,
`incoming` and `nameless`, and anything added here must change `FORMAT`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import attrs

from pytest_vmbottle.backends.port import GUEST_MAC, ROOT_DISK, DataDisk, Disk
from pytest_vmbottle.backends.qemu.features import Features
from pytest_vmbottle.disks.write_log import SECTOR
from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.host.account import Account
from pytest_vmbottle.spec import MachineSpec

__all__ = [
    "BOARDS",
    "DISK_PORTS",
    "FORMAT",
    "HOT_PORTS",
    "HVF",
    "KVM",
    "NETDEV",
    "NIC",
    "SCRATCH_PORT",
    "Accelerator",
    "Board",
    "DiskSlot",
    "Emulator",
    "LaunchResources",
    "board_of",
    "command_line",
    "log_node",
    "sandbox",
]

FORMAT = 7
"""Version of the command line and of the after-restore process, part of every fingerprint.

Packs made with another processor or another set of devices are not restored.
"""

SCRATCH_PORT = "hot0"
"""Empty PCI Express port for a disk that is plugged in while the machine runs."""
HOT_PORTS = tuple(f"hot{number}" for number in range(1, 7))
"""Ports for network cards on private LANs."""
DISK_PORTS = tuple(f"disk{number}" for number in range(6))
"""Ports for disks beside the root disk."""

NIC = "nic"
"""Id of the network card by which the host reaches a guest."""
NETDEV = "net0"
"""Id of the network behind it."""

FIXED_ADDRESSES = "norandmaps"
"""Word for a kernel that is to load programs at the same addresses each time."""

# What QEMU never does for a machine: old system calls, more rights, other programs, and priorities.
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@attrs.frozen(kw_only=True)
class Accelerator:
    """Accelerator that runs guest code.

    Attributes:
        name: QEMU's name of it.
        option: The argument of `-accel`.
        cpu: The argument of `-cpu`.
        counting: The argument of `-icount`, by which the guest's clocks follow its instructions; empty if they do not.
    """

    name: str
    option: str
    cpu: str
    counting: str = ""


KVM = Accelerator(name="kvm", option="kvm", cpu="host")
HVF = Accelerator(name="hvf", option="hvf", cpu="host")


def _tcg(cpu: str) -> Accelerator:
    # The translation cache defaults to 1 GiB per machine, too much for many machines side by side.
    return Accelerator(name="tcg", option="tcg,thread=multi,tb-size=256", cpu=cpu)


@attrs.frozen(kw_only=True)
class Board:
    """Differences between the machines of two architectures.

    Attributes:
        arch: The guest's architecture, as `uname -m` names it.
        package: The package of its QEMU in Debian and Ubuntu.
        machine: The argument of `-machine`, without the part common to all.
        tcg: The accelerator that emulates it.
        serial: Arguments that connect the chardev `console` to the first serial port.
        quick_hotplug: Whether a guest releases a device at once. With PCI Express's native hot-plug, without ACPI, it waits for 5 s.
        display: Arguments for a screen, and for a keyboard if the board has none.
    """

    arch: str
    package: str
    machine: str
    tcg: Accelerator
    serial: tuple[str, ...]
    quick_hotplug: bool
    display: tuple[str, ...]


_BOARDS = (
    Board(
        arch="x86_64",
        package="qemu-system-x86",
        machine="q35,vmport=off,smbus=off,sata=off,usb=off,graphics=off",
        # All that TCG emulates but what only costs time: page tables of five levels (57-bit addresses), and the advice to move strings
        # byte by byte (ERMS, FSRM), which processors do fast and TCG does not: without it a guest boots in a seventh less time.
        tcg=_tcg("max,la57=off,erms=off,fsrm=off"),
        serial=("-device", "isa-serial,chardev=console,id=serial"),
        quick_hotplug=True,
        display=("-device", "VGA,id=screen"),  # its keyboard (PS/2) is part of the board
    ),
    Board(
        arch="aarch64",
        package="qemu-system-arm",
        machine="virt,gic-version=max",
        # By its own algorithm, pointer authentication takes half of the time of an emulated guest.
        tcg=_tcg("max,pauth-impdef=on"),
        serial=("-serial", "chardev:console"),
        quick_hotplug=False,
        display=("-device", "virtio-gpu-pci,id=screen", "-device", "virtio-keyboard-pci,id=keyboard"),
    ),
)
BOARDS = {board.arch: board for board in _BOARDS}


def board_of(arch: str) -> Board:
    """Return the board of an architecture.

    Raises:
        BackendUnavailable: There is no board for it.
    """
    try:
        return BOARDS[arch]
    except KeyError:
        known = " and ".join(BOARDS)
        raise BackendUnavailable(f"{arch} is not supported: machines are defined for {known}", f"Use a host of {known}") from None


@attrs.frozen(kw_only=True)
class Emulator:
    """A QEMU for one architecture.

    Attributes:
        binary: The program, by its absolute path.
        board: The machine that it emulates.
        accelerator: The accelerator that runs guest code.
        dialect: The features that it offers.
        account: The account that it runs as; None for our own.
    """

    binary: Path
    board: Board
    accelerator: Accelerator
    dialect: Features
    account: Account | None = None


@attrs.frozen(kw_only=True)
class DiskSlot:
    """A disk of a machine, where it is.

    Attributes:
        disk: The disk.
        port: Its port, of `DISK_PORTS`; empty for the root disk, which has none.
        file: The file of its overlay.
        log: The file that gets everything that is written to it (see `read_log`); None if nobody wants to know.
        turn: How many disks its device has had before it.
    """

    disk: DataDisk
    port: str
    file: Path
    log: Path | None = None
    turn: int = 0

    @property
    def node(self) -> str:
        """Name of the block node of its overlay."""
        return (f"node-{self.port}" if self.port else "disk0") + (f"-{self.turn}" if self.turn else "")

    @property
    def top(self) -> str:
        """Name of the block node that its device uses as long as no filter lies between."""
        return self.node if self.log is None else f"track-{self.node}"

    @property
    def device(self) -> str:
        """Id of its device."""
        return f"data-{self.port}" if self.port else ROOT_DISK

    def device_options(self) -> dict[str, str]:
        """Return the arguments of its device."""
        options = {"driver": "virtio-blk-pci", "drive": self.top, "id": self.device}
        if not self.port:
            return options
        # Errors go to the guest. By default QEMU would stop the machine where the host's disk is full.
        return options | {"bus": self.port, "serial": self.disk.name, "werror": "report", "rerror": "report"}

    def nodes(self) -> list[dict[str, object]]:
        """Return the arguments of its block nodes, the lowest one first."""
        nodes = [_overlay_node(self.node, self.file, self.disk.disks)]
        return nodes if self.log is None else [*nodes, log_node(self.top, self.node, self.log)]


def log_node(name: str, below: str, log: Path) -> dict[str, object]:
    """Return the arguments of a block node that writes all requests down in a file."""
    file = {"driver": "file", "filename": str(log), "cache": {"no-flush": True}}
    return {"driver": "blklogwrites", "node-name": name, "file": below, "log": file, "log-sector-size": SECTOR}


@attrs.frozen(kw_only=True)
class LaunchResources:
    """Host resources that a machine's command line refers to.

    Files are named by absolute path, sockets by inherited descriptor.

    Attributes:
        ram: The file of the guest's RAM.
        share: Whether the guest's writes go to that file, or stay private to the process.
        disks: The disks that are there from the beginning, the root disk first.
        seed: The cloud-init ISO.
        kernel, initrd, cmdline: Files and command line for a direct boot; None and empty to boot by firmware.
        firmware: A firmware file that replaces QEMU's default firmware.
        qmp, agent, waker, runner, console: Connected sockets.
        incoming: Whether the machine waits for a saved state instead of booting.
        nameless: Whether that state does not begin with the name of the machine.
        lent: Arguments that name the open files which QEMU inherits.
    """

    name: str
    ram: Path
    share: bool
    disks: tuple[DiskSlot, ...]
    seed: Path
    kernel: Path | None
    initrd: Path | None
    cmdline: str
    firmware: Path | None = None
    qmp: int
    agent: int
    waker: int
    runner: int
    console: int
    incoming: bool
    nameless: bool = False
    lent: tuple[str, ...] = ()


def command_line(emulator: Emulator, spec: MachineSpec, wiring: LaunchResources) -> list[str]:
    """Return the command line of a machine."""
    board, dialect = emulator.board, emulator.dialect
    return [
        str(emulator.binary),
        *("-name", f"guest={wiring.name}"),
        # No default devices, and no configuration of this host's QEMU: only what is listed here is in a machine.
        *("-nodefaults", "-no-user-config", "-display", "none", *sandbox(dialect)),
        *wiring.lent,
        *(("-run-with", "exit-with-parent=on") if dialect.exit_with_parent else ()),
        # A core dump of QEMU is for finding its fault, and without the guest's RAM it stays small.
        *("-machine", f"{board.machine},memory-backend=ram0,dump-guest-core=off"),
        *("-accel", emulator.accelerator.option, "-cpu", emulator.accelerator.cpu),
        *(("-icount", emulator.accelerator.counting) if emulator.accelerator.counting else ()),
        # In KiB, because a number without a unit is MiB, and not every size is a whole number of these.
        *("-smp", str(spec.cpus), "-m", f"{spec.memory // 1024}k"),
        # By default QEMU ends a machine that panics (pvpanic). Here `QemuInstance.alive` decides, by the event, which comes all the same.
        *("-rtc", "base=utc,clock=host", "-action", "panic=none"),
        *_memory(spec, wiring, dialect),
        *_disks(wiring),
        *_channels(wiring, board),
        *_network(spec),
        *("-object", _json(qom_type="rng-random", id="rng0", filename="/dev/urandom")),
        # A guest without it may wait for its first random numbers at boot.
        *("-device", "virtio-rng-pci,rng=rng0,id=rng"),
        *(("-device", "vmgenid,guid=auto,id=genid") if dialect.vmgenid else ()),
        *("-device", "pvpanic-pci,id=panic"),
        *_ports(),
        *(word for slot in wiring.disks[1:] for word in _plugged(slot)),
        *(board.display if spec.display else ()),  # the last, so that what all machines have is where it is in all of them
        *_boot(wiring, emulator.accelerator),
        # It never runs by itself: a state may say that it did when it was saved.
        *(("-S", "-incoming", "defer") if wiring.incoming else ()),
        # By default QEMU expects the name.
        *(("-global", "migration.send-configuration=off") if wiring.nameless else ()),
    ]


def sandbox(dialect: Features) -> tuple[str, ...]:
    """Return the arguments by which QEMU forbids itself system calls that it does not need.

    Empty if this QEMU cannot.
    """
    return ("-sandbox", _SANDBOX) if dialect.sandbox else ()


def _json(**members: object) -> str:
    return json.dumps({name.replace("_", "-"): value for name, value in members.items()}, separators=(",", ":"))


def _memory(spec: MachineSpec, wiring: LaunchResources, dialect: Features) -> list[str]:
    # A named file, because the RAM of anything else is not left out of the saved state (since QEMU 8.1 only RAM_NAMED_FILE is).
    readonly: dict[str, object] = {"readonly": True, "rom": "off"} if dialect.readonly_ram and not wiring.share else {}
    # JSON, since in QEMU's other syntax a comma in the file's name would end it.
    backend = _json(qom_type="memory-backend-file", id="ram0", size=spec.memory, mem_path=str(wiring.ram), share=wiring.share, **readonly)
    return ["-object", backend]


def _overlay_node(name: str, file: Path, disks: Iterable[Disk]) -> dict[str, object]:
    """Return the arguments of a block node for an overlay with the disks below it, lowest first."""
    # The chain is spelled out. No image's header says what lies beneath it, so none can point QEMU at another file of this host.
    backing: dict[str, object] | None = None
    for disk in disks:
        below = {"backing": backing} if disk.format == "qcow2" else {}
        source = {"driver": "file", "filename": str(disk.path), "read-only": True}
        backing = {"driver": disk.format, "read-only": True, "file": source, **below}
    return {
        "driver": "qcow2",
        "node-name": name,
        "file": {"driver": "file", "filename": str(file)},
        "backing": backing,
        # What a guest trims leaves the overlay, and so the pack that is made of it.
        "discard": "unmap",
        # What the guest flushes need not survive the host: an overlay lives as long as its machine, and a pack is synced when published.
        "cache": {"no-flush": True},
    }


def _disks(wiring: LaunchResources) -> list[str]:
    seed = {
        "driver": "raw",
        "node-name": "seed0",
        "read-only": True,
        "file": {"driver": "file", "filename": str(wiring.seed), "read-only": True},
    }
    return [
        *_plugged(wiring.disks[0]),
        *("-blockdev", json.dumps(seed), "-device", "virtio-blk-pci,drive=seed0,id=seed"),
    ]


def _plugged(slot: DiskSlot) -> list[str]:
    nodes = [word for node in slot.nodes() for word in ("-blockdev", json.dumps(node))]
    driver, *options = slot.device_options().items()
    return [*nodes, "-device", ",".join([driver[1], *(f"{key}={value}" for key, value in options)])]


def _channels(wiring: LaunchResources, board: Board) -> list[str]:
    return [
        *("-chardev", f"socket,id=qmp,fd={wiring.qmp}", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=console,fd={wiring.console}", *board.serial),
        *("-device", "virtio-serial-pci,id=ports"),
        *("-chardev", f"socket,id=agent,fd={wiring.agent}"),
        # Numbers are given, because a saved state names ports by them. QEMU reserves port 0 for a console.
        *("-device", "virtserialport,bus=ports.0,nr=1,chardev=agent,name=org.qemu.guest_agent.0,id=agentport"),
        *("-chardev", f"socket,id=waker,fd={wiring.waker}"),
        *("-device", "virtserialport,bus=ports.0,nr=2,chardev=waker,name=org.vmbottle.waker,id=wakerport"),
        *("-chardev", f"socket,id=runner,fd={wiring.runner}"),
        *("-device", "virtserialport,bus=ports.0,nr=3,chardev=runner,name=org.vmbottle.runner,id=runnerport"),
    ]


def _network(spec: MachineSpec) -> list[str]:
    # Port 0: the kernel chooses a free port, which QEMU then tells. There is no moment in which another process could take it.
    forwards = ",".join(f"hostfwd=tcp:127.0.0.1:0-:{port}" for port in (22, *(port for port in spec.ports if port != 22)))  # noqa: PLR2004
    restrict = "off" if spec.nat else "on"
    return [
        *("-netdev", f"user,id={NETDEV},restrict={restrict},{forwards}"),
        # No ROM for a network boot, which nobody wants and which every saved state would carry (250 KB).
        *("-device", f"virtio-net-pci,netdev={NETDEV},id={NIC},mac={GUEST_MAC},romfile="),
    ]


def _ports() -> list[str]:
    # Nothing can be plugged into the root bus itself while the machine runs. A port is known to the guest by its chassis and slot.
    return [
        word
        for number, port in enumerate((SCRATCH_PORT, *HOT_PORTS, *DISK_PORTS), 1)
        for word in ("-device", f"pcie-root-port,id={port},chassis={number},slot={number}")
    ]


def _boot(wiring: LaunchResources, accelerator: Accelerator) -> list[str]:
    if wiring.kernel is None:
        return ["-bios", str(wiring.firmware)] if wiring.firmware is not None else []
    initrd = ("-initrd", str(wiring.initrd)) if wiring.initrd is not None else ()
    # An emulator translates a program anew that lies at another address than the last time, so a boot with addresses drawn at random takes
    # twice as long. The runner, when it is started, has them drawn again (start_runner.sh).
    cmdline = f"{FIXED_ADDRESSES} {wiring.cmdline}" if accelerator.name == "tcg" else wiring.cmdline
    return ["-kernel", str(wiring.kernel), *initrd, "-append", cmdline]
