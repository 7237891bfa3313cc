"""Machines that are rebooted, switched off and on, and paused: by the test, by their guests, and by accident."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pytest_vmbottle import CommandTimeout, Machine, MachineDied, MachineError, MachineTimeout
from pytest_vmbottle.host.deadline import Deadline

pytestmark = pytest.mark.vm("debian-12")

FACTS = "cat /etc/ssh/ssh_host_ed25519_key.pub /etc/machine-id; hostname; cat /root/lasting; ls /dev/shm"


@pytest.mark.guests
def test_a_rebooted_clone_is_ready_again_with_what_was_on_its_disk(vm: Machine) -> None:
    vm.exec("echo synced > /root/lasting")
    known, address = vm.exec(FACTS).stdout, vm.forward(22)
    vm.path("/dev/shm/fleeting").write_text("gone")
    boot = vm.path("/proc/sys/kernel/random/boot_id").read_text()
    pid, process = vm.pid, vm.spawn(["sleep", "4720"])

    vm.reboot()

    with pytest.raises(MachineError, match="reboots"):
        process.wait(timeout=60)
    assert vm.path("/proc/sys/kernel/random/boot_id").read_text() != boot
    assert vm.exec(FACTS).stdout == known
    assert (vm.pid, vm.forward(22)) == (pid, address)
    assert abs(float(vm.exec(["date", "+%s"]).stdout) - time.time()) < 5
    ssh = vm.lifecycle.instance.channel(deadline=Deadline(60), bulk=True)
    assert type(ssh).__name__ == "SshChannel"
    vm.poweroff()
    vm.wait_for_shutdown()
    with pytest.raises(MachineError, match="off"):
        vm.exec(["true"])


@pytest.mark.guests
def test_a_power_cut_loses_what_was_not_written_out_and_the_machine_starts_from_the_rest(vm: Machine) -> None:
    vm.exec("echo synced > /root/lasting; sync")
    known, address, name = vm.exec(FACTS).stdout, vm.forward(22), vm.id
    vm.exec("echo > /root/lost")

    vm.power_cut()
    assert vm.state == "off"
    vm.start()

    assert vm.state == "running"
    assert vm.exec(FACTS).stdout == known
    assert not vm.path("/root/lost").exists()
    assert (vm.id, vm.forward(22)) == (name, address)
    assert type(vm.lifecycle.instance.channel(deadline=Deadline(60), bulk=True)).__name__ == "SshChannel"


@pytest.mark.guests
def test_a_guest_that_does_not_power_off_is_waited_for_no_longer_than_asked(vm: Machine) -> None:
    vm.exec("ln -sf /bin/true /usr/sbin/poweroff")
    with pytest.raises(MachineTimeout, match=r"vm\.power_cut\(\)"):
        vm.poweroff(timeout=2)
    assert vm.state == "running"
    vm.exec("ln -sf /bin/true /usr/sbin/reboot")
    with pytest.raises(MachineTimeout):
        vm.reboot(timeout=2)
    assert vm.exec(["echo", "alive"]).stdout == "alive\n"


@pytest.mark.guests
def test_a_guest_that_panics_while_it_reboots_has_died_and_comes_back_as_it_began(vm: Machine) -> None:
    vm.path("/usr/sbin/reboot").unlink()
    vm.path("/usr/sbin/reboot").write_text("#!/bin/sh\necho c > /proc/sysrq-trigger\n", mode=0o755)
    with pytest.raises(MachineDied, match="panic"):
        vm.reboot()
    assert vm.state == "died"
    with pytest.raises(MachineDied, match=r"vm\.start\(\)"):
        vm.poweroff()
    vm.restore()
    assert vm.state == "running"
    assert vm.exec("ls -l /usr/sbin/reboot").stdout.endswith("systemctl\n")


@pytest.mark.guests
def test_a_guest_that_powers_off_instead_of_rebooting_is_off(vm: Machine) -> None:
    vm.path("/usr/sbin/reboot").unlink()
    vm.path("/usr/sbin/reboot").write_text("#!/bin/sh\necho o > /proc/sysrq-trigger\n", mode=0o755)
    with pytest.raises(MachineDied, match="reboot"):
        vm.reboot()
    assert vm.state == "off"
    with pytest.raises(MachineError, match="off"):
        vm.poweroff()


def test_a_hypervisor_that_was_killed_has_died_and_its_machine_comes_back(vm: Machine) -> None:
    os.kill(vm.pid, signal.SIGKILL)
    Deadline(10).poll(lambda: vm.state == "died", every=0.05)
    for call in (vm.pause, vm.poweroff, vm.reboot, lambda: vm.snapshot("late")):
        with pytest.raises(MachineDied):
            call()
    vm.restore()
    assert vm.exec(["echo", "back"]).stdout == "back\n"


def test_a_paused_machine_answers_nothing_until_it_is_resumed(vm: Machine) -> None:
    vm.exec("(while sleep 0.1; do echo; done) > /dev/shm/ticks 2>&1 &")
    vm.pause()
    assert vm.state == "paused"
    with pytest.raises(MachineError, match="paused"):
        vm.exec(["true"])
    time.sleep(0.5)
    vm.resume()
    assert vm.state == "running"
    vm.wait_until("test $(wc -l < /dev/shm/ticks) -gt 3")
    with pytest.raises(CommandTimeout):
        vm.exec(["sleep", "100"], timeout=1)


def test_the_monitor_runs_any_command_and_a_refused_one_leaves_the_machine_as_it_was(vm: Machine) -> None:
    vm.qmp("stop")
    assert vm.state == "paused"
    vm.qmp("cont")
    assert vm.exec(["echo", "again"]).stdout == "again\n"
    # A name with an underscore of its own, and one with a dash.
    assert vm.qmp("object-add", {"qom-type": "throttle-group", "id": "slow", "limits": {"bps-total": 1}}) == {}
    assert "slow" in vm.qmp("human-monitor-command", command_line="qom-list /objects")
    with pytest.raises(MachineError, match=r"QEMU could not run set_link: .*Parameter 'na-me' is unexpected"):
        vm.qmp("set_link", name="nic", up=True, na_me="")
    with pytest.raises(MachineError, match=r"Parameter 'na_me' is unexpected"):
        vm.qmp("set_link", {"name": "nic", "up": True, "na_me": ""})
    assert vm.exec(["true"]).ok
    with pytest.raises(MachineDied):
        vm.wait_until(lambda: vm.qmp("quit") and vm.state)
