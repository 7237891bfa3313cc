"""What QEMU is told: nothing more than a machine needs, and nothing that a name or a spec can change the meaning of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmbottle import MachineSpec
from pytest_vmbottle.backends.port import DataDisk, Disk
from pytest_vmbottle.backends.qemu.command_line import (
    BOARDS,
    DISK_PORTS,
    HOT_PORTS,
    HVF,
    KVM,
    SCRATCH_PORT,
    DiskSlot,
    Emulator,
    LaunchResources,
    command_line,
)
from pytest_vmbottle.backends.qemu.features import Features


def root(overlay: str | Path, *below: Disk) -> DiskSlot:
    """The root disk."""
    return DiskSlot(disk=DataDisk(name="root", size=1 << 30, disks=below), port="", file=Path(overlay))


BELOW = (Disk(path=Path("/img/base.raw"), format="raw"), Disk(path=Path("/packs/a/disk.qcow2")), Disk(path=Path("/packs/b/disk.qcow2")))
WIRING = LaunchResources(
    name="vm-1",
    ram=Path("/run/ram"),
    share=True,
    disks=(root("/run/overlay.qcow2", *BELOW),),
    seed=Path("/packs/a/seed.iso"),
    kernel=Path("/img/vmlinuz"),
    initrd=Path("/img/initrd"),
    cmdline="root=/dev/vda console=ttyS0,115200",
    qmp=3,
    agent=4,
    waker=5,
    runner=7,
    console=6,
    incoming=False,
)
PLAIN = Features(sandbox=True, exit_with_parent=False, readonly_ram=False, state_files=False, mapped_ram=False, vmgenid=True)
"""Features of QEMU 7.2 in Debian 12."""
BOARD = BOARDS["x86_64"]
EMULATOR = Emulator(binary=Path("/usr/bin/qemu"), board=BOARD, accelerator=BOARD.tcg, dialect=PLAIN)


def line(spec: dict[str, Any] | None = None, *, emulator: Emulator = EMULATOR, **wiring: Any) -> list[str]:
    return command_line(emulator, MachineSpec.resolve("debian-12", spec or {}), attrs.evolve(WIRING, **wiring))


def values(argv: list[str], option: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == option]


def test_the_guest_reaches_nothing_unless_it_is_let_and_is_reached_from_this_host_only() -> None:
    (closed,), (opened,) = values(line(), "-netdev"), values(line({"network": True, "ports": [80, 22, 443]}), "-netdev")

    assert closed == "user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:0-:22"
    assert opened == "user,id=net0,restrict=off," + ",".join(f"hostfwd=tcp:127.0.0.1:0-:{port}" for port in (22, 80, 443))


def test_no_address_but_the_hosts_own_is_listened_on() -> None:
    text = " ".join(line({"ports": [80]}))

    assert "0.0.0.0" not in text
    assert "tcp::" not in text
    assert "vnc" not in text
    assert "telnet" not in text
    assert all(value.startswith("socket,id=") for value in values(line(), "-chardev"))
    assert all("fd=" in value and "path=" not in value for value in values(line(), "-chardev"))


def test_qemu_may_do_nothing_that_it_need_not() -> None:
    argv = line()

    assert values(argv, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    assert {"-nodefaults", "-no-user-config"} <= set(argv)
    assert values(argv, "-display") == ["none"]
    assert "-monitor" not in argv
    assert "-daemonize" not in argv


def test_the_whole_chain_of_disks_is_spelled_out_read_only_with_its_formats_below_one_overlay() -> None:
    overlay, seed = (json.loads(value) for value in values(line(), "-blockdev"))
    chain = []
    node = overlay
    while node is not None:
        chain.append((node["driver"], node["file"]["filename"], node.get("read-only", False), node["file"].get("read-only", False)))
        node = node.get("backing")

    assert chain == [
        ("qcow2", "/run/overlay.qcow2", False, False),
        ("qcow2", "/packs/b/disk.qcow2", True, True),
        ("qcow2", "/packs/a/disk.qcow2", True, True),
        ("raw", "/img/base.raw", True, True),
    ]
    assert (seed["driver"], seed["read-only"], seed["file"]["read-only"]) == ("raw", True, True)


def test_a_qcow2_at_the_bottom_is_told_to_have_nothing_beneath_it() -> None:
    overlay = json.loads(values(line(disks=(root("/own", Disk(path=Path("/img/base.qcow2"))),)), "-blockdev")[0])

    assert "backing" in overlay["backing"]
    assert overlay["backing"]["backing"] is None


def test_a_machine_that_waits_for_a_saved_state_differs_only_in_sharing_its_ram_and_in_waiting() -> None:
    booting, restoring = line(), line(share=False, incoming=True)

    assert restoring[-3:] == ["-S", "-incoming", "defer"]
    different = [(one, other) for one, other in zip(booting, restoring[:-3], strict=True) if one != other]
    assert len(different) == 1
    one, other = (json.loads(value) for value in different[0])
    assert {**one, "share": False} == other
    assert one["share"] is True


def test_the_ram_is_a_named_file_of_exactly_the_machines_size() -> None:
    argv = line({"memory": "1.3G"})
    ram = json.loads(values(argv, "-object")[0])

    assert ram == {"qom-type": "memory-backend-file", "id": "ram0", "size": 1332 << 20, "mem-path": "/run/ram", "share": True}
    assert values(argv, "-m") == [f"{1332 << 10}k"]
    assert "memory-backend=ram0" in values(argv, "-machine")[0]


PATHS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=20).map(
    lambda text: Path(f"/x/{text},readonly=off,share=on")
)


@given(PATHS)
def test_no_path_splits_an_option(path: Path) -> None:
    argv = line(ram=path, disks=(root(path, Disk(path=path)),), seed=path, kernel=path, initrd=path)
    plain = line(disks=(root("/x", Disk(path=Path("/y"))),))

    assert len(argv) == len(plain)
    assert json.loads(values(argv, "-object")[0])["mem-path"] == str(path)
    overlay, seed = (json.loads(value) for value in values(argv, "-blockdev"))
    assert overlay["file"]["filename"] == overlay["backing"]["file"]["filename"] == seed["file"]["filename"] == str(path)
    assert (values(argv, "-kernel"), values(argv, "-initrd")) == ([str(path)], [str(path)])


def test_a_kernel_is_booted_directly_and_without_one_the_firmware_boots_the_disk() -> None:
    # An emulated guest boots twice as quickly where programs lie at the same addresses each time.
    assert values(line(), "-append") == ["norandmaps root=/dev/vda console=ttyS0,115200"]
    assert values(line(emulator=attrs.evolve(EMULATOR, accelerator=KVM)), "-append") == ["root=/dev/vda console=ttyS0,115200"]
    assert not {"-kernel", "-initrd", "-append"} & set(line(kernel=None, initrd=None, cmdline=""))
    assert "-initrd" not in line(initrd=None)


@pytest.mark.parametrize("accelerator", [KVM, HVF, *(board.tcg for board in BOARDS.values())])
def test_the_accelerator_and_its_processor_are_said(accelerator: Any) -> None:
    argv = command_line(attrs.evolve(EMULATOR, accelerator=accelerator), MachineSpec(source="x", cpus=3), WIRING)

    assert (values(argv, "-accel"), values(argv, "-cpu"), values(argv, "-smp")) == ([accelerator.option], [accelerator.cpu], ["3"])


def spoken(**offered: bool) -> list[str]:
    return command_line(attrs.evolve(EMULATOR, dialect=attrs.evolve(PLAIN, **offered)), MachineSpec(source="x"), WIRING)


def test_a_qemu_that_ends_with_its_parent_is_told_to() -> None:
    assert "-run-with" not in spoken()
    assert values(spoken(exit_with_parent=True), "-run-with") == ["exit-with-parent=on"]


def test_a_qemu_that_cannot_filter_its_system_calls_is_not_told_to() -> None:
    assert "-sandbox" not in spoken(sandbox=False)


def test_a_qemu_without_the_device_gives_its_machines_no_generation_id() -> None:
    assert "vmgenid" not in " ".join(spoken(vmgenid=False))


def test_the_ram_of_a_pack_is_opened_read_only_where_qemu_can_and_that_of_a_machine_of_its_own_never() -> None:
    emulator = attrs.evolve(EMULATOR, dialect=attrs.evolve(PLAIN, readonly_ram=True))
    clone, own = (command_line(emulator, MachineSpec(source="x"), attrs.evolve(WIRING, share=share)) for share in (False, True))

    assert json.loads(values(clone, "-object")[0]).items() >= {"share": False, "readonly": True, "rom": "off"}.items()
    assert not {"readonly", "rom"} & json.loads(values(own, "-object")[0]).keys()
    assert not {"readonly", "rom"} & json.loads(values(line(share=False), "-object")[0]).keys()


def test_an_aarch64_machine_is_the_virt_board_with_its_own_serial_port() -> None:
    emulator = Emulator(
        binary=Path("/q"), board=BOARDS["aarch64"], accelerator=BOARDS["aarch64"].tcg, dialect=attrs.evolve(PLAIN, vmgenid=False)
    )
    argv = command_line(emulator, MachineSpec(source="x", arch="aarch64"), WIRING)

    assert values(argv, "-machine")[0].startswith("virt,gic-version=max,memory-backend=ram0")
    assert values(argv, "-serial") == ["chardev:console"]
    assert "isa-serial" not in " ".join(argv)


def test_a_firmware_file_boots_the_disk_unless_there_is_a_kernel() -> None:
    firmware = Path("/usr/share/firmware.fd")

    assert values(line(kernel=None, initrd=None, cmdline="", firmware=firmware), "-bios") == [str(firmware)]
    assert "-bios" not in line(firmware=firmware)
    assert "-bios" not in line(kernel=None, initrd=None, cmdline="")


def test_a_machine_has_what_a_clone_needs_to_be_itself() -> None:
    devices = " ".join(values(line(), "-device"))

    assert "virtio-rng-pci" in devices
    assert "vmgenid,guid=auto" in devices
    assert "name=org.qemu.guest_agent.0" in devices
    assert "pvpanic-pci" in devices


@pytest.mark.parametrize("arch", sorted(BOARDS))
def test_every_machine_has_empty_ports_that_the_guest_can_tell_apart(arch: str) -> None:
    emulator = attrs.evolve(EMULATOR, board=BOARDS[arch])
    argv = command_line(emulator, MachineSpec(source="x", arch=arch), WIRING)
    ports = [dict(part.split("=") for part in value.split(",")[1:]) for value in values(argv, "-device") if "pcie-root-port" in value]

    assert [port["id"] for port in ports] == [SCRATCH_PORT, *HOT_PORTS, *DISK_PORTS]
    assert len({port["chassis"] for port in ports}) == len({port["slot"] for port in ports}) == len(ports)
    assert not [value for value in values(argv, "-device") if any(f"bus={port['id']}" in value for port in ports)]


def test_a_disk_beside_the_root_disk_is_in_its_port_under_its_name_and_gets_errors_itself() -> None:
    disk = DataDisk(name="data", size=1 << 20, disks=(Disk(path=Path("/base,1"), format="raw"),))
    argv = line(disks=(*WIRING.disks, DiskSlot(disk=disk, port=DISK_PORTS[2], file=Path("/own,1"))))
    (device,) = [value for value in values(argv, "-device") if "serial=data" in value]
    (node,) = [node for node in map(json.loads, values(argv, "-blockdev")) if node["node-name"] in device]

    assert {f"bus={DISK_PORTS[2]}", "werror=report", "rerror=report"} <= set(device.split(","))
    assert (node["file"]["filename"], node["backing"]["file"]["filename"]) == ("/own,1", "/base,1")
    assert node["backing"]["read-only"] is True


def test_a_display_is_added_behind_all_other_devices_and_shown_nowhere() -> None:
    plain, shown = line(), line({"display": True})

    assert values(shown, "-device") == [*values(plain, "-device"), "VGA,id=screen"]
    assert values(shown, "-display") == ["none"]
    assert [word for word in shown if word not in ("-device", "VGA,id=screen")] == [word for word in plain if word != "-device"]


def test_an_aarch64_machine_with_a_display_has_a_keyboard_of_its_own() -> None:
    emulator = attrs.evolve(EMULATOR, board=BOARDS["aarch64"])
    argv = command_line(emulator, MachineSpec(source="x", arch="aarch64", display=True), WIRING)

    assert values(argv, "-device")[-2:] == ["virtio-gpu-pci,id=screen", "virtio-keyboard-pci,id=keyboard"]


def test_a_tracked_disk_has_a_log_of_its_writes_between_its_overlay_and_its_device() -> None:
    tracked = attrs.evolve(root("/own", Disk(path=Path("/base"))), log=Path("/own.log"))
    argv = line(disks=(tracked,))
    overlay, log = (json.loads(value) for value in values(argv, "-blockdev")[:2])

    assert (log["driver"], log["file"], log["log"]["filename"]) == ("blklogwrites", overlay["node-name"], "/own.log")
    assert f"drive={log['node-name']}" in next(value for value in values(argv, "-device") if "id=root" in value)
