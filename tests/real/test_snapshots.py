"""Snapshots of machines in the middle of a test, and the way back."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle import CatalogError, GuestPanic, Machine, MachineDied, MachineFactory
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.spec import MachineSpec

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vmbottle.catalog.catalog import Catalog

pytestmark = pytest.mark.vm("debian-12")


def _boot_id(vm: Machine) -> str:
    return vm.path("/proc/sys/kernel/random/boot_id").read_text()


@pytest.mark.guests
def test_restoring_twice_gives_the_same_state_twice_and_ram_is_part_of_it(vm: Machine, vm_factory: MachineFactory) -> None:
    vm.exec("echo disk > /root/state; echo ram > /dev/shm/state; sleep 1000 > /dev/null 2>&1 & echo $! > /dev/shm/pid")
    address, boot, name = vm.forward(22), _boot_id(vm), vm.id

    snapshot = vm.snapshot("in the middle")

    seen, random = "cat /root/state /dev/shm/state; kill -0 $(cat /dev/shm/pid) && echo runs", []
    assert vm.exec(seen).stdout == "disk\nram\nruns\n", "the machine goes on after the snapshot"
    snapshot.verify()
    for _ in range(2):
        vm.exec("kill $(cat /dev/shm/pid); rm /root/state /dev/shm/state; touch /root/more; sync")
        vm.restore(snapshot)
        assert vm.exec(seen).stdout == "disk\nram\nruns\n"
        assert not vm.path("/root/more").exists()
        assert (vm.id, vm.forward(22), _boot_id(vm)) == (name, address, boot)
        assert abs(float(vm.exec(["date", "+%s"]).stdout) - time.time()) < 5
        random.append(vm.exec("head -c 16 /dev/urandom | md5sum").stdout)
    assert random[0] != random[1]
    other = vm_factory(snapshot)
    assert other.exec(seen).stdout == "disk\nram\nruns\n"
    assert other.forward(22) != address
    vm.restore()
    assert not vm.path("/root/state").exists()


@pytest.mark.guests
def test_a_snapshot_of_a_restored_machine_stands_on_the_one_before(vm: Machine) -> None:
    vm.exec("echo one > /root/one; sync")
    one = vm.snapshot("one")
    vm.restore(one)
    vm.exec("echo two > /root/two; sync")
    two = vm.snapshot("two")
    vm.restore()
    vm.restore(two)
    # The kernel reads both from the disk again.
    assert vm.exec("sync; echo 3 > /proc/sys/vm/drop_caches; cat /root/one /root/two").stdout == "one\ntwo\n"
    assert type(vm.lifecycle.instance.channel(deadline=Deadline(60), bulk=True)).__name__ == "SshChannel"
    vm.power_cut()
    vm.restore(one)
    assert not vm.path("/root/two").exists()


@pytest.mark.guests
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_host_disk_that_is_full_leaves_no_half_snapshot_and_the_machine_goes_on(vm: Machine, vm_catalog: Catalog) -> None:
    (folder,) = vm_catalog.root.glob(f"run/{os.getpid()}-*/{vm.id}")
    small = folder / "snapshots"
    small.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "small", small], check=True)
    try:
        with pytest.raises(CatalogError, match="free"):
            vm.snapshot("too big")
        assert list(small.iterdir()) == []
        vm.exec("echo on > /root/on; sync")
    finally:
        subprocess.run(["umount", small], check=True)
    vm.restore(vm.snapshot("with room"))
    assert vm.path("/root/on").read_text() == "on\n"


def test_a_machine_is_poured_into_the_same_machine_as_often_as_one_likes(vm_catalog: Catalog) -> None:
    provisioner = Provisioner(vm_catalog, QemuBackend(proofs=vm_catalog.proofs), name="qemu", settings=Settings())
    with provisioner.machine(MachineSpec.resolve("debian-12", {})) as machine:
        for _ in range(3):
            machine.exec("touch /root/dirty; sync")
            machine.restore()
            assert not machine.path("/root/dirty").exists()
        assert provisioner.tally.restored == 4
    provisioner.close()


@pytest.mark.guests
def test_what_a_test_holds_of_a_machine_follows_it_to_its_snapshot(vm: Machine, tmp_path: Path) -> None:
    (tmp_path / "much").write_bytes(os.urandom(2 << 20))
    vm.cp(tmp_path / "much", vm.path("/root"))  # over a disk, which no snapshot may have
    before = vm.snapshot("after a copy")
    config, process, sample = vm.ssh_config(), vm.spawn(["sleep", "4719"]), vm.metrics()
    vm.exec("echo said before > /dev/ttyS0")
    vm.wait_for_console("said before")

    vm.restore(before)

    with pytest.raises(MachineDied):
        process.wait(timeout=60)
    assert list(vm.spawn(["echo", "again"]).stdout) == ["again\n"]
    vm.cp(tmp_path / "much", vm.path("/root/more"))
    assert vm.exec("cmp /root/much /root/more").ok
    after = vm.metrics()
    assert sample.guest
    assert after.guest
    assert after.cpu_percent is None, "it is another process, of which there is no sample before"
    assert subprocess.run(["ssh", "-F", config, "vm", "true"], stdin=subprocess.DEVNULL, check=False).returncode == 0
    vm.exec("echo said after > /dev/ttyS0")
    assert vm.wait_for_console("said ")[0] == "said "
    assert "said before" in vm.console.text
    assert "said after" in list(vm.console.follow(timeout=1))


@pytest.mark.vm(panic="expected")
def test_a_kernel_that_panicked_is_forgotten_with_what_it_ran(vm: Machine) -> None:
    with pytest.raises(GuestPanic):
        vm.exec("echo c > /proc/sysrq-trigger")
    vm.power_cut()
    assert vm.panic == "Kernel panic - not syncing: sysrq triggered crash"
    vm.restore()
    assert vm.panic is None
    assert vm.state == "running"
    assert vm.exec(["echo", "back"]).stdout == "back\n"
    assert "Kernel panic" in vm.console.text
