"""Disks beside the root disk, in real guests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from pytest_vmbottle import Machine, MachineError, MachineFactory, SpecError, layer
from pytest_vmbottle.host.deadline import Deadline

if TYPE_CHECKING:
    from pytest_vmbottle.catalog.catalog import Catalog

BY_ID = "/dev/disk/by-id/virtio-"


@layer("debian-12", disks={"data": "32M"})
def shelf(vm: Machine) -> None:
    """Has a file system on its disk, mounted when the pack is saved."""
    vm.exec(f"mkfs.ext4 -q {BY_ID}data && mount {BY_ID}data /mnt && echo packed > /mnt/state")


@pytest.mark.guests
@pytest.mark.vm("debian-12", disks={"data": "32M", "other": "64M"})
def test_a_machine_has_its_disks_by_name_from_the_start_and_in_a_snapshot(vm: Machine, vm_factory: MachineFactory) -> None:
    assert vm.exec(f"blockdev --getsize64 {BY_ID}data {BY_ID}other").stdout.split() == [str(32 << 20), str(64 << 20)]
    vm.exec(f"mkfs.ext4 -q {BY_ID}data; mount {BY_ID}data /mnt; echo one > /mnt/state; sync")
    before = vm.snapshot("before")
    vm.exec("echo two > /mnt/state; sync")
    other = vm_factory(before)
    assert other.path("/mnt/state").read_text() == "one\n"
    other.exec("echo three > /mnt/state; sync")
    vm.restore(before)
    assert vm.path("/mnt/state").read_text() == "one\n"
    vm.restore()
    # As the test got it: nothing was written to the disk yet.
    assert vm.exec(["blkid", f"{BY_ID}data"], check=False).returncode == 2


@pytest.mark.guests
@pytest.mark.vm("debian-12", disks={"data": "32M"})
def test_a_machine_has_its_disks_after_its_power_was_cut_and_in_a_snapshot_of_then(vm: Machine) -> None:
    vm.exec(f"mkfs.ext4 -q {BY_ID}data; mount {BY_ID}data /mnt; echo one > /mnt/state; sync")
    for number in range(2):
        vm.power_cut()
        vm.start()
        assert vm.exec(f"mount {BY_ID}data /mnt; cat /mnt/state").stdout == "one\n", number
    then = vm.snapshot("then")
    vm.exec("echo two > /mnt/state; sync")
    vm.restore(then)
    assert vm.path("/mnt/state").read_text() == "one\n"


@pytest.mark.guests
@pytest.mark.vm("debian-12", disks={"data": "32M"}, track_writes=True)
def test_a_power_cut_loses_what_was_not_flushed_if_that_is_wanted_and_what_was_is_there(vm: Machine) -> None:
    """Twice, since the second time the disks stand on what the first one left."""
    vm.exec(f"mkfs.ext4 -q {BY_ID}data; mount {BY_ID}data /mnt; echo flushed > /mnt/state; sync")
    for number in range(2):
        vm.exec(f"echo {number} >> /mnt/state; echo {number} >> /root/state; sync")
        # Over the file system, and in no cache of the guest: only the loss makes it whole again.
        vm.exec(f"dd if=/dev/zero of={BY_ID}data bs=1M count=30 oflag=direct")
        vm.power_cut(lose="unflushed")
        vm.start()
        vm.exec(f"mount {BY_ID}data /mnt")
        kept = "".join(f"{each}\n" for each in range(number + 1))
        assert (vm.path("/mnt/state").read_text(), vm.path("/root/state").read_text()) == (f"flushed\n{kept}", kept)


@pytest.mark.guests
@pytest.mark.vm("debian-12", disks={"data": "32M"})
@pytest.mark.parametrize(("lose", "lies", "found"), [(None, "", 2), ("unflushed", "", 0), ("torn", "", 1), ("unflushed", "lies", -1)])
def test_what_a_power_cut_leaves_of_a_disk(vm: Machine, lose: Literal["unflushed", "torn"] | None, lies: str, found: int) -> None:
    """A pattern that is flushed, and over it another one that is not: its first half, of two blocks, or none is there."""
    fill = f"import os; fd = os.open('{BY_ID}data', os.O_RDWR | os.O_DIRECT); import mmap; m = mmap.mmap(-1, 8192); m.write(b'%s' * 8192); "
    one, two = (fill % letter + "os.pwritev(fd, [m], 0)" for letter in "ab")
    with vm.faults.lying_disk("data") if lies else nullcontext():
        vm.exec(["python3", "-c", f"{one}; os.fsync(fd)"])
    vm.exec(["python3", "-c", two])
    vm.power_cut(lose=lose)
    vm.start()
    read = vm.exec(f"head -c 8192 {BY_ID}data | tr '\\0' 0").stdout
    expected = {2: "b" * 8192, 0: "a" * 8192, 1: "b" * 4096 + "a" * 4096, -1: "0" * 8192}[found]
    assert read == expected


@pytest.mark.guests
@pytest.mark.vm("debian-12", disks={"data": "32M", "other": "16M"})
def test_a_log_of_writes_that_becomes_too_long_is_ended_and_what_to_do_is_told(
    vm: Machine, crash_explorer: Callable[[Machine, str], AbstractContextManager[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_vmbottle.backends.qemu.disks._LONGEST_LOG", 8 << 20)

    def told() -> list[str]:
        return [event["text"] for event in vm.lifecycle.timeline.events() if event["kind"] == "disk"]

    fill = f"yes text | dd of={BY_ID}data bs=1M count=20 iflag=fullblock oflag=direct"
    vm.exec(f"dd if=/dev/zero of={BY_ID}other bs=1M count=2 oflag=direct")
    ended = pytest.raises(MachineError, match="recording was ended")
    with vm.faults.slow_disk("data", iops=1000), ended, crash_explorer(vm, "data"):
        vm.exec(fill)
        assert Deadline(60).poll(told)
    assert len(told()) == 1
    assert vm.exec(f"yes text | head -c 20M | cmp -n 20971520 - {BY_ID}data").ok
    assert not list(vm.lifecycle.folder.rglob("disk-data.log"))
    vm.exec(fill)
    with vm.faults.disk_errors("data", on="write"):
        assert not vm.exec(fill, check=False).ok
    for use in (lambda: vm.power_cut(lose="unflushed"), vm.faults.lying_disk("data").start):
        with pytest.raises(MachineError, match="is again after"):
            use()
    with vm.faults.lying_disk("other"):
        assert vm.exec(["true"]).ok
    vm.restore()
    with vm.faults.lying_disk("data"):
        assert vm.exec(["true"]).ok
    assert len(told()) == 1


@pytest.mark.vm("debian-12")
def test_without_a_tracked_disk_a_power_cut_cannot_lose_more_and_says_so(vm: Machine) -> None:
    with pytest.raises(MachineError, match="track_writes"):
        vm.power_cut(lose="unflushed")
    assert vm.exec(["true"]).ok


@pytest.mark.guests
@pytest.mark.vm(shelf, disks={"more": "16M"})
def test_the_disk_of_a_layer_is_in_its_pack_and_those_of_a_mark_are_added(vm: Machine, vm_factory: MachineFactory) -> None:
    assert vm.path("/mnt/state").read_text() == "packed\n"
    assert vm.exec(f"blockdev --getsize64 {BY_ID}more").stdout == f"{16 << 20}\n"
    vm.exec("echo mine > /mnt/state; sync")
    assert vm_factory(shelf).path("/mnt/state").read_text() == "packed\n"
    with pytest.raises(SpecError, match="32"):
        vm_factory(shelf, disks={"data": "64M"})


@pytest.mark.guests
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


def image_with(folder: Path, text: str, kind: str = "raw") -> Path:
    """Make a disk image with a file system, and a file in it."""
    content, image = folder / "content", folder / f"image.{kind}"
    content.mkdir(exist_ok=True)
    (content / "state").write_text(text)
    plain = image.with_suffix(".raw")
    plain.write_bytes(bytes(8 << 20))
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", content, plain], check=True)
    if kind != "raw":
        subprocess.run(["qemu-img", "convert", "-c", "-O", kind, plain, image], check=True)
    return image


@pytest.mark.parametrize("kind", ["qcow2", pytest.param("raw", marks=pytest.mark.guests)])
def test_a_disk_image_of_a_mark_is_seen_in_the_guest_and_stays_as_it_is(vm_factory: MachineFactory, tmp_path: Path, kind: str) -> None:
    image = image_with(tmp_path, "host\n", kind)
    given, before = image.read_bytes(), image.stat()
    vm = vm_factory("debian-12", disks={"data": image})
    assert vm.exec(f"blockdev --getsize64 {BY_ID}data; mount {BY_ID}data /mnt; cat /mnt/state").stdout == f"{8 << 20}\nhost\n"
    vm.exec("echo guest > /mnt/state; sync")
    assert vm_factory(vm.snapshot("written")).path("/mnt/state").read_text() == "guest\n"
    # Another machine, and the same one as it was at first, have the image and not what this one wrote.
    other = vm_factory("debian-12", disks={"data": str(image)})
    vm.restore()
    for each in (other, vm):
        assert each.exec(f"mount {BY_ID}data /mnt; cat /mnt/state").stdout == "host\n"
    assert (image.read_bytes(), image.stat().st_mode, image.stat().st_mtime_ns) == (given, before.st_mode, before.st_mtime_ns)


@pytest.mark.guests
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_pack_has_the_disk_image_that_it_was_made_with(
    vm_factory: MachineFactory, vm_catalog: Catalog, tmp_path: Path, kind: str
) -> None:
    def machine() -> Machine:
        return vm_factory("debian-12", disks={"data": tmp_path / f"image.{kind}"}, run=[f"mount {BY_ID}data /mnt; echo pack >> /mnt/state"])

    for text in ("one\n", "two\n"):
        image = image_with(tmp_path, text, kind)
        given = image.read_bytes()
        vm = machine()
        assert vm.path("/mnt/state").read_text() == f"{text}pack\n"
        vm.exec("echo clone >> /mnt/state; sync")
        image.write_bytes(bytes(len(given)))
        vm.restore()
        assert vm.path("/mnt/state").read_text() == f"{text}pack\n"
        image.write_bytes(given)
        before = set(vm_catalog.packs.iterdir())
        assert machine().path("/mnt/state").read_text() == f"{text}pack\n"
        assert set(vm_catalog.packs.iterdir()) == before


def test_an_image_that_names_other_files_starts_no_machine(vm_factory: MachineFactory, tmp_path: Path) -> None:
    image = image_with(tmp_path, "secret\n")
    top = tmp_path / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", top], check=True)
    (tmp_path / "link").symlink_to(top)
    for wrong, reason in ((top, "backing file"), (tmp_path / "link", "backing file"), (tmp_path / "none", "No such file")):
        for run in ([], ["true"]):
            with pytest.raises(SpecError, match=reason):
                vm_factory("debian-12", disks={"data": wrong}, run=run)


@pytest.mark.vm("debian-12")
@pytest.mark.parametrize(
    ("name", "source"), [("no such", "1G"), ("root", "1G"), ("x" * 21, "1G"), ("a", "much"), ("a", 5), ("a", "/dev/null")]
)
def test_a_disk_that_cannot_be_is_refused_before_anything_happens(session_vm: Machine, name: str, source: str | int) -> None:
    with pytest.raises(SpecError):
        session_vm.plug_disk(name, source)
    assert session_vm.lifecycle.instance.data == ()
