"""The QEMU command line of a machine, composed here and nowhere else.

The state that a saved machine is made of follows the order and the ids of devices: a pack is restored with the same command line but
for what `share` and `incoming` say, so anything added here changes `FORMAT`.
"""

from __future__ import annotations

import json
from pathlib import Path

import attrs

from pytest_vmbottle.backend import Disk
from pytest_vmbottle.spec import MachineSpec

__all__ = ["FORMAT", "Accelerator", "Wiring", "command_line"]

FORMAT = 1
"""Part of every fingerprint: packs made with another set of devices are not restored."""

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@attrs.frozen(kw_only=True)
class Accelerator:
    """How guest code is run.

    Attributes:
        name: QEMU's word for it.
        option: The argument of `-accel`.
        cpu: The argument of `-cpu`.
    """

    name: str
    option: str
    cpu: str


KVM = Accelerator(name="kvm", option="kvm", cpu="host")
# A processor with all that TCG emulates, but for 57-bit addresses: page tables of five levels only cost time. The translation cache
# defaults to 1 GiB per machine, too much for many machines side by side.
TCG = Accelerator(name="tcg", option="tcg,thread=multi,tb-size=256", cpu="max,la57=off")


@attrs.frozen(kw_only=True)
class Wiring:
    """What a machine's command line refers to on the host: files by absolute path, sockets by inherited descriptor.

    Attributes:
        ram: The file that is the guest's RAM.
        share: Whether the guest's writes go to that file, or stay private to the process.
        overlay: The only disk that is written.
        disks: What the overlay lies on, lowest first.
        seed: The cloud-init ISO.
        console: The file that records the serial console.
        kernel, initrd, cmdline: For a direct boot; None and empty to boot by firmware.
        qmp, agent, waker: Listening unix sockets.
        incoming: Whether it waits for a saved state instead of booting.
    """

    name: str
    ram: Path
    share: bool
    overlay: Path
    disks: tuple[Disk, ...]
    seed: Path
    console: Path
    kernel: Path | None
    initrd: Path | None
    cmdline: str
    qmp: int
    agent: int
    waker: int
    incoming: bool


def command_line(binary: Path, accelerator: Accelerator, spec: MachineSpec, wiring: Wiring) -> list[str]:
    """The argv of an x86-64 machine."""
    return [
        str(binary),
        *("-name", f"guest={wiring.name}"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX),
        *("-machine", "q35,memory-backend=ram0,vmport=off,smbus=off,sata=off,usb=off,graphics=off,dump-guest-core=off"),
        *("-accel", accelerator.option, "-cpu", accelerator.cpu),
        *("-smp", str(spec.cpus), "-m", f"{spec.memory // 1024}k"),
        *("-rtc", "base=utc,clock=host", "-action", "panic=none"),
        *_memory(spec, wiring),
        *_disks(wiring),
        *_channels(wiring),
        *_network(spec),
        *("-object", _json(qom_type="rng-random", id="rng0", filename="/dev/urandom")),
        *("-device", "virtio-rng-pci,rng=rng0,id=rng"),
        *("-device", "vmgenid,guid=auto,id=genid", "-device", "pvpanic-pci,id=panic"),
        *_boot(wiring),
        *(("-incoming", "defer") if wiring.incoming else ()),
    ]


def _json(**members: object) -> str:
    return json.dumps({name.replace("_", "-"): value for name, value in members.items()}, separators=(",", ":"))


def _memory(spec: MachineSpec, wiring: Wiring) -> list[str]:
    # A named file, because the RAM of anything else is not left out of the saved state (since QEMU 8.1 only RAM_NAMED_FILE is).
    backend = _json(qom_type="memory-backend-file", id="ram0", size=spec.memory, mem_path=str(wiring.ram), share=wiring.share)
    return ["-object", backend]


def _disks(wiring: Wiring) -> list[str]:
    # The chain is spelled out. No image's header says what lies beneath it, so none can point QEMU at another file of this host.
    backing: dict[str, object] | None = None
    for disk in wiring.disks:
        below = {"backing": backing} if disk.format == "qcow2" else {}
        source = {"driver": "file", "filename": str(disk.path), "read-only": True}
        backing = {"driver": disk.format, "read-only": True, "file": source, **below}
    overlay = {
        "driver": "qcow2",
        "node-name": "disk0",
        "file": {"driver": "file", "filename": str(wiring.overlay)},
        "backing": backing,
        "discard": "unmap",
        # What the guest flushes need not survive the host: an overlay lives as long as its machine, and a pack is synced when published.
        "cache": {"no-flush": True},
    }
    seed = {
        "driver": "raw",
        "node-name": "seed0",
        "read-only": True,
        "file": {"driver": "file", "filename": str(wiring.seed), "read-only": True},
    }
    return [
        *("-blockdev", json.dumps(overlay), "-device", "virtio-blk-pci,drive=disk0,id=root"),
        *("-blockdev", json.dumps(seed), "-device", "virtio-blk-pci,drive=seed0,id=seed"),
    ]


def _channels(wiring: Wiring) -> list[str]:
    path = str(wiring.console).replace(",", ",,")
    return [
        *("-chardev", f"socket,id=qmp,fd={wiring.qmp},server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"file,id=console,path={path},append=on", "-device", "isa-serial,chardev=console,id=serial"),
        *("-device", "virtio-serial-pci,id=ports"),
        *("-chardev", f"socket,id=agent,fd={wiring.agent},server=on,wait=off"),
        *("-device", "virtserialport,bus=ports.0,nr=1,chardev=agent,name=org.qemu.guest_agent.0,id=agentport"),
        *("-chardev", f"socket,id=waker,fd={wiring.waker},server=on,wait=off"),
        *("-device", "virtserialport,bus=ports.0,nr=2,chardev=waker,name=org.vmbottle.waker,id=wakerport"),
    ]


def _network(spec: MachineSpec) -> list[str]:
    # Port 0: the kernel chooses a free port, which QEMU then tells. There is no moment in which another process could take it.
    forwards = ",".join(f"hostfwd=tcp:127.0.0.1:0-:{port}" for port in (22, *(port for port in spec.ports if port != 22)))  # noqa: PLR2004
    restrict = "off" if spec.network else "on"
    return [
        *("-netdev", f"user,id=net0,restrict={restrict},{forwards}"),
        *("-device", "virtio-net-pci,netdev=net0,id=nic,mac=52:54:00:12:34:56,romfile="),
    ]


def _boot(wiring: Wiring) -> list[str]:
    if wiring.kernel is None:
        return []
    initrd = ("-initrd", str(wiring.initrd)) if wiring.initrd is not None else ()
    return ["-kernel", str(wiring.kernel), *initrd, "-append", wiring.cmdline]
