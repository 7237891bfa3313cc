"""Forks: a second machine that is as the first one is now, and both go on."""

from __future__ import annotations

import json
import mmap
import shutil
import subprocess
import time
from contextlib import closing
from typing import TYPE_CHECKING

import attrs
import pytest

from pytest_vmbottle import Machine, MachineError, MachineFactory, SpecError
from pytest_vmbottle.backends.qemu.own_memory import Memory, OwnMemory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_vmbottle.backends.port import Start
    from pytest_vmbottle.backends.qemu.pages import Area
    from tests.conftest import Rounds

pytestmark = pytest.mark.vm("debian-12")

_STATE = "cat /root/state /dev/shm/state /proc/sys/kernel/random/boot_id; kill -0 $(cat /dev/shm/pid) && echo runs"


def _began(vm: Machine) -> str:
    vm.exec("echo disk > /root/state; echo ram > /dev/shm/state; sleep 1000 > /dev/null 2>&1 & echo $! > /dev/shm/pid")
    return vm.exec(_STATE).stdout


def test_a_fork_is_as_its_machine_was_and_each_goes_on_for_itself(vm: Machine) -> None:
    began = _began(vm)
    fork = vm.fork()
    assert (fork.name, fork.exec(_STATE).stdout) == ("vm-1", began)
    assert fork.forward(22) != vm.forward(22)
    fork.exec("echo of the fork > /root/state; kill $(cat /dev/shm/pid)")
    assert vm.exec(_STATE).stdout == began
    vm.exec("echo of the machine > /root/state")
    assert fork.path("/root/state").read_text() == "of the fork\n"
    # As after every restore: its own clock and random numbers.
    assert abs(float(fork.exec(["date", "+%s"]).stdout) - time.time()) < 5
    drawn = [each.exec("head -c 16 /dev/urandom | md5sum").stdout for each in (vm, fork)]
    assert drawn[0] != drawn[1]
    fork.restore()
    assert fork.exec(_STATE).stdout == began


@pytest.mark.guests
def test_forks_of_forks_and_several_at_once_begin_with_all_that_was_before(vm: Machine) -> None:
    machine = vm
    for depth in range(3):
        machine.exec(f"echo {depth} >> /root/depths; echo {depth} >> /dev/shm/depths")
        machine = machine.fork(f"depth{depth}")
    first, second = machine.fork(2)
    assert [each.name for each in (machine, first, second)] == ["depth2", "depth2-1", "depth2-2"]
    for each in (first, second):
        assert each.exec("sync; echo 3 > /proc/sys/vm/drop_caches; cat /root/depths /dev/shm/depths").stdout.split() == list("012012")
    first.exec("rm /root/depths")
    assert second.path("/root/depths").exists()
    # Its memory is the pack's, and its own pages: not those of all that were before it.
    assert first.lifecycle.boot_source.ram == vm.lifecycle.boot_source.saved


@pytest.mark.guests
def test_a_fork_boots_again_by_its_firmware_and_from_its_own_disk(vm_factory: MachineFactory) -> None:
    vm = vm_factory("debian-12", display=True)
    vm.exec("echo kept > /root/state; sync")
    fork = vm.fork()
    before = fork.exec(["cat", "/proc/sys/kernel/random/boot_id"]).stdout
    fork.reboot()
    assert fork.exec(["cat", "/proc/sys/kernel/random/boot_id"]).stdout != before
    assert fork.path("/root/state").read_text() == "kept\n"
    # By its firmware, and not by the kernel that was given to it: the firmware's memory is in no file of the pack.
    assert "SeaBIOS" in fork.exec(["cat", "/sys/class/dmi/id/bios_vendor"]).stdout


@pytest.mark.guests
@pytest.mark.vm(disks={"data": "64M"})
def test_a_fork_has_disks_of_its_own_with_what_was_on_them(vm: Machine) -> None:
    vm.exec("mkfs.ext4 -q /dev/disk/by-id/virtio-data && mount /dev/disk/by-id/virtio-data /mnt && echo before > /mnt/state")
    fork = vm.fork()
    assert fork.path("/mnt/state").read_text() == "before\n"
    fork.exec("echo after > /mnt/state; sync")
    vm.exec("sync; echo 3 > /proc/sys/vm/drop_caches")
    assert vm.path("/mnt/state").read_text() == "before\n"


@pytest.mark.guests
@pytest.mark.vm(network="lan")
def test_a_fork_of_a_machine_on_a_lan_is_off_it_until_it_joins(vm: Machine) -> None:
    # A card that is plugged in anew gets another number.
    card = vm.exec("cat /sys/class/net/*/ifindex").stdout
    fork = vm.fork("right")
    assert vm.exec("cat /sys/class/net/*/ifindex").stdout == card
    assert len(fork.exec(["ls", "/sys/class/net"]).stdout.split()) == len(card.split()) - 1
    assert fork.address is None
    address = fork.join_lan()
    assert address not in (None, vm.address)
    for each, other in ((vm, fork), (fork, vm)):
        assert each.exec(["bash", "-c", f"read -r line < /dev/tcp/{other.name}/22; echo $line"]).stdout.startswith("SSH")
    with pytest.raises(MachineError, match="is on its private LAN"):
        fork.join_lan()


def test_what_cannot_be_forked_says_why_and_leaves_nothing(vm: Machine) -> None:
    with pytest.raises(SpecError, match="takes a name, or how many"):
        vm.fork(0)
    with pytest.raises(SpecError, match="name"):
        vm.fork("no name")
    with pytest.raises(MachineError, match="no private LAN"):
        vm.join_lan()
    vm.pause()
    with pytest.raises(MachineError, match="is paused"):
        vm.fork()
    vm.resume()
    assert not list(vm.lifecycle.folder.glob("snapshots/*"))
    assert vm.exec(["echo", "on"]).stdout == "on\n"


def test_a_fork_that_is_discarded_is_gone_with_those_forked_from_it_and_its_machine_goes_on(vm: Machine) -> None:
    first = vm.fork()
    second = first.fork()
    folders = [each.lifecycle.folder for each in (first, second)]
    assert list(vm.lifecycle.folder.glob("snapshots/*"))
    first.discard()
    first.discard()
    assert not [each for each in (*folders, *vm.lifecycle.folder.glob("snapshots/*")) if each.exists()]
    for each in (first, second):
        with pytest.raises(MachineError):
            each.exec(["true"])
    assert vm.exec(["echo", "on"]).stdout == "on\n"
    with pytest.raises(MachineError, match="is no fork"):
        vm.discard()


def _ram(memory: Memory) -> mmap.mmap:
    content = mmap.mmap(-1, memory.ram.size)
    memory.read([memory.ram], content)
    return content


def _differing(one: mmap.mmap, other: mmap.mmap, size: int = 1 << 20) -> int:
    """How many pages differ: whole blocks are compared first."""
    blocks = [start for start in range(0, len(one), size) if one[start : start + size] != other[start : start + size]]
    pages = (slice(start, start + mmap.PAGESIZE) for block in blocks for start in range(block, block + size, mmap.PAGESIZE))
    return sum(one[page] != other[page] for page in pages)


def _disk(start: Start, overlay: Path) -> str:
    """The root disk of a machine, for QEMU's own tool."""
    chain: dict[str, object] | None = None
    for path, form in (*((disk.path, disk.format) for disk in start.disks), (overlay, "qcow2")):
        below = {"backing": chain} if form == "qcow2" else {}
        chain = {"driver": form, "file": {"driver": "file", "filename": str(path)}, **below}
    return f"json:{json.dumps(chain)}"


@pytest.mark.guests
def test_a_fork_has_the_memory_and_the_disk_of_its_machine_byte_for_byte(
    vm: Machine, rounds: Rounds, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compared when the one stands still and the other does not run yet: all that differs is the page with the id that tells them apart."""
    copy, into_others = Memory.read, OwnMemory.into_others
    seen: dict[str, mmap.mmap] = {}
    disk = tmp_path / "disk.qcow2"

    def read(memory: Memory, areas: Sequence[Area], target: mmap.mmap) -> None:
        copy(memory, areas, target)
        if areas != [memory.ram]:
            seen["machine"] = _ram(memory)
            shutil.copy(vm.lifecycle.instance.overlay or "", disk)

    def write(own: OwnMemory, memory: Memory) -> None:
        seen["fork"] = _ram(memory)
        into_others(own, memory)

    monkeypatch.setattr(Memory, "read", read)
    monkeypatch.setattr(OwnMemory, "into_others", write)
    origin = vm.lifecycle.boot_source
    for number in rounds("forks", 1):
        vm.exec(f"head -c {number % 50 + 1}M /dev/urandom | tee /root/more > /dev/shm/more; sync")
        fork = vm.fork()
        with closing(seen.pop("machine")) as ours, closing(seen.pop("fork")) as its:
            assert len(ours) == len(its) == vm.spec.memory
            assert _differing(ours, its) == 1
        # What the fork stands on, since it has written to its own overlay meanwhile.
        source = fork.lifecycle.boot_source
        below = _disk(attrs.evolve(source, disks=source.disks[:-1]), source.disks[-1].path)
        subprocess.run(["qemu-img", "compare", "-q", _disk(origin, disk), below], check=True)
        # What each writes from here on is its own.
        for each in (vm, fork):
            each.exec(f"echo {each.name} | tee /root/name > /dev/shm/name; sync; echo 3 > /proc/sys/vm/drop_caches")
        for each in (vm, fork):
            assert each.exec(["cat", "/root/name", "/dev/shm/name"]).stdout.split() == [each.name] * 2
        fork.discard()
