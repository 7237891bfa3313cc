"""Disks that were made to do harm, as images and in real machines."""

from __future__ import annotations

import base64
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_vmbottle import Machine, MachineFactory, MachineSpec, layer
from pytest_vmbottle.backends.port import Disk, Start
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.backends.qemu.instance import QemuInstance
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.channels.ssh import new_keys
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.provision.seed import write_seed

MIB = 1 << 20


def evil(backing: Path | str) -> bytes:
    """The first sector of a qcow2 that names a backing file, as a guest can write it to its own disk."""
    name = str(backing).encode()
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQIIQ", b"QFI\xfb", 3, 120, len(name), 16, MIB, 0, 1, 3 << 16, 1 << 16, 1, 0, 0, 0, 0, 0, 4, 112, 0
    )
    return (header + bytes(8) + name).ljust(512, b"\0")


@layer("debian-12")
def planted(vm: Machine) -> None:
    vm.exec(["dd", "of=/dev/vda", "bs=512", "count=1", "conv=notrunc", "oflag=direct", "status=none"], input=evil("/etc/passwd"))


@pytest.mark.guests
@pytest.mark.vm(planted)
def test_a_qcow2_header_that_a_guest_wrote_to_its_disk_is_data_the_next_time(vm: Machine, vm_factory: MachineFactory) -> None:
    other = vm_factory("debian-12")
    first, size = "dd if=/dev/vda bs=512 count=1 iflag=direct status=none | base64 -w 0", ["blockdev", "--getsize64", "/dev/vda"]
    assert base64.b64decode(vm.exec(first).stdout) == evil("/etc/passwd")
    assert base64.b64decode(other.exec(first).stdout) != evil("/etc/passwd")
    assert vm.exec(size).stdout == other.exec(size).stdout


@pytest.fixture
def qemu_img_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The command lines of qemu-img from now on, as a program of its name in the search path writes them down."""
    log, real = tmp_path / "runs", shutil.which("qemu-img")
    assert real is not None
    wrapper = tmp_path / "bin" / "qemu-img"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {log}\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    return lambda: log.read_text().splitlines() if log.exists() else []


@contextmanager
def launched(catalog: Catalog, disk: Disk, folder: Path) -> Iterator[tuple[QemuInstance, Path]]:
    """A machine that has just been started from a disk, and the folder it runs in."""
    spec, keys = MachineSpec.resolve("debian-12", {"memory": "128M"}), new_keys()
    write_seed(folder / "seed.iso", hostname="vm", keys=keys)
    start = Start(disks=(disk,), disk_size=2 * MIB, kernel=None, initrd=None, cmdline="", seed=folder / "seed.iso", keys=keys)
    with catalog.rundir("hostile-disk") as rundir:
        instance = QemuBackend(proofs=catalog.proofs).launch(spec, source=start, rundir=rundir, deadline=Deadline(120))
        assert isinstance(instance, QemuInstance)
        try:
            yield instance, rundir
        finally:
            instance.stop()


def test_a_raw_disk_that_begins_like_a_qcow2_is_raw_to_qemu_and_what_it_names_stays_closed(
    vm_catalog: Catalog, tmp_path: Path, qemu_img_runs: Callable[[], list[str]]
) -> None:
    """QEMU is told the format of every disk in the chain, and qemu-img gets to see none."""
    secret, disk = tmp_path / "secret", tmp_path / "disk.raw"
    secret.write_bytes(bytes(MIB))
    disk.write_bytes(evil(secret).ljust(2 * MIB, b"\0"))
    with launched(vm_catalog, Disk(path=disk, format="raw"), tmp_path) as (instance, rundir):
        nodes = instance._qmp.execute("query-named-block-nodes", flat=True, deadline=Deadline(30))
        opened = {os.readlink(fd) for fd in Path(f"/proc/{instance.pid}/fd").iterdir()}  # noqa: PTH115
    assert sorted(node["drv"] for node in nodes) == ["file", "file", "file", "qcow2", "raw", "raw"]
    files = {node["file"] for node in nodes if node["drv"] == "file"}
    assert files == {str(rundir / "disk.qcow2"), str(disk), str(tmp_path / "seed.iso")}
    assert str(disk) in opened
    assert str(secret) not in opened
    assert qemu_img_runs() == []
