"""Disks beside the root disk, in real guests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pytest_vmbottle import Machine, MachineError, MachineFactory, SpecError, layer

BY_ID = "/dev/disk/by-id/virtio-"


@layer("debian-12", disks={"data": "32M"})
def shelf(vm: Machine) -> None:
    """Has a file system on its disk, mounted when the pack is saved."""
    vm.exec(f"mkfs.ext4 -q {BY_ID}data && mount {BY_ID}data /mnt && echo packed > /mnt/state")


@pytest.mark.vm("debian-12", disks={"data": "32M", "other": "64M"})
def test_a_machine_has_its_disks_by_name_from_the_start_in_a_snapshot_and_after_the_power_was_cut(
    vm: Machine, vm_factory: MachineFactory
) -> None:
    assert vm.exec(f"blockdev --getsize64 {BY_ID}data {BY_ID}other").stdout.split() == [str(32 << 20), str(64 << 20)]
    vm.exec(f"mkfs.ext4 -q {BY_ID}data; mount {BY_ID}data /mnt; echo one > /mnt/state; sync")
    before = vm.snapshot("before")
    vm.exec("echo two > /mnt/state; sync")
    other = vm_factory(before)
    assert other.path("/mnt/state").read_text() == "one\n"
    other.exec("echo three > /mnt/state; sync")
    vm.power_cut()
    vm.start()
    assert vm.exec(f"mount {BY_ID}data /mnt; cat /mnt/state").stdout == "two\n"
    vm.restore(before)
    assert vm.path("/mnt/state").read_text() == "one\n"
    vm.restore()
    # As the test got it: nothing was written to the disk yet.
    assert vm.exec(["blkid", f"{BY_ID}data"], check=False).returncode == 2


@pytest.mark.vm(shelf, disks={"more": "16M"})
def test_the_disk_of_a_layer_is_in_its_pack_and_those_of_a_mark_are_added(vm: Machine, vm_factory: MachineFactory) -> None:
    assert vm.path("/mnt/state").read_text() == "packed\n"
    assert vm.exec(f"blockdev --getsize64 {BY_ID}more").stdout == f"{16 << 20}\n"
    vm.exec("echo mine > /mnt/state; sync")
    assert vm_factory(shelf).path("/mnt/state").read_text() == "packed\n"
    with pytest.raises(SpecError, match="32"):
        vm_factory(shelf, disks={"data": "64M"})


@pytest.mark.vm("debian-12", disks={"data": "32M"}, run=[f"mkfs.ext4 -q -L shelf {BY_ID}data"])
def test_commands_of_a_mark_prepare_its_disks(vm: Machine) -> None:
    assert vm.exec("blkid -s LABEL -o value /dev/disk/by-id/virtio-data").stdout == "shelf\n"


@pytest.mark.vm("debian-12")
def test_disks_go_in_and_out_of_a_running_machine_and_an_image_is_not_written_to(vm: Machine, tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(8 << 20))
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-L", "given", image], check=True)
    given = image.read_bytes()
    vm.plug_disk("image", image)
    vm.plug_disk("spare", "16M")
    assert vm.exec("mount -L given /mnt; echo text > /mnt/file; umount /mnt; blkid -s LABEL -o value /dev/disk/by-id/virtio-image").ok
    with pytest.raises(MachineError, match="already"):
        vm.plug_disk("spare", "16M")
    vm.unplug_disk("image")
    assert not vm.path(f"{BY_ID}image").exists()
    assert vm.path(f"{BY_ID}spare").exists()
    assert image.read_bytes() == given
    with pytest.raises(MachineError, match="no disk 'image'"):
        vm.unplug_disk("image")


@pytest.mark.vm("debian-12")
@pytest.mark.parametrize(
    ("name", "source"), [("no such", "1G"), ("root", "1G"), ("x" * 21, "1G"), ("a", "much"), ("a", 5), ("a", "/dev/null")]
)
def test_a_disk_that_cannot_be_is_refused_before_anything_happens(session_vm: Machine, name: str, source: str | int) -> None:
    with pytest.raises(SpecError):
        session_vm.plug_disk(name, source)
    assert session_vm.lifecycle.instance.data == ()
