"""Machines of a system that boots in seconds, run in a guest with a real KVM."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pytest_vmbottle import Machine, MachineFactory, layer


@layer("small", cpus=2, memory="256M", timeout=300)
def prepared(vm: Machine) -> None:
    """Has something in RAM and something on its disk."""
    vm.path("/root/lasting").write_text("lasting")
    vm.path("/run/in-memory").write_text("kept")
    vm.exec(["dd", "if=/dev/urandom", "of=/run/filled", "bs=1M", "count=60"])


@pytest.mark.vm(prepared)
def test_a_clone_goes_on_under_kvm_with_the_right_time_and_randomness_of_its_own(
    vm: Machine, vm_factory: MachineFactory, pytestconfig: pytest.Config
) -> None:
    assert vm.path("/root/lasting").read_text() == "lasting"
    assert vm.path("/run/in-memory").exists() == (pytestconfig.getoption("--vm-pack") != "disk")
    clocks = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    if pytestconfig.getoption("--vm-accel") == "kvm":
        assert vm.path(clocks).read_text() == "kvm-clock\n"
    assert abs(float(vm.exec(["date", "+%s"]).stdout) - time.time()) < 5
    other = vm_factory(prepared)
    first, second = (each.exec("head -c 16 /dev/urandom | md5sum").stdout for each in (vm, other))
    assert first != second
    vm.path("/root/mine").write_text("changed")
    assert not other.path("/root/mine").exists()


@pytest.mark.vm(prepared)
def test_two_processors_both_run_in_a_clone(vm: Machine) -> None:
    places = vm.exec("for cpu in 0 1; do busybox taskset $((1 << cpu)) cut -d' ' -f39 /proc/self/stat; done").stdout
    assert places.split() == ["0", "1"]


@pytest.mark.vm(prepared)
def test_it_is_paused_stands_still_and_goes_on(vm: Machine) -> None:
    vm.exec("while :; do date +%s%N > /run/tick; sleep 0.1; done > /dev/null 2>&1 &")
    vm.pause()
    vm.resume()
    first = vm.exec(["cat", "/run/tick"]).stdout
    assert vm.wait_until(f'[ "$(cat /run/tick)" != "{first.strip()}" ]', timeout=30).ok


@pytest.mark.vm(prepared)
def test_a_snapshot_has_the_ram_and_the_disk_of_its_moment(vm: Machine) -> None:
    vm.path("/run/state").write_text("one")
    vm.path("/root/state").write_text("one")
    then = vm.snapshot("then")
    vm.path("/run/state").write_text("two")
    vm.path("/root/state").write_text("two")
    vm.restore(then)
    assert [vm.path(f"/{place}/state").read_text() for place in ("run", "root")] == ["one", "one"]


@pytest.mark.vm(prepared)
def test_disks_go_in_and_out(vm: Machine) -> None:
    before = vm.path("/proc/partitions").read_text()
    vm.plug_disk("data", "16M")
    assert set(vm.path("/proc/partitions").read_text().split()) - set(before.split()) >= {"16384"}
    vm.unplug_disk("data")
    assert vm.path("/proc/partitions").read_text() == before


@pytest.mark.vm(prepared, name="one", network="lan")
@pytest.mark.vm(prepared, name="two", network="lan")
def test_two_of_them_reach_each_other_on_a_lan(vms: dict[str, Machine]) -> None:
    assert vms["one"].exec(["ping", "-c", "1", "-w", "20", str(vms["two"].address)]).ok


@pytest.mark.vm(prepared)
def test_clones_share_the_memory_of_their_pack(vm: Machine, vm_factory: MachineFactory) -> None:
    other = vm_factory(prepared)
    for machine in (vm, other):
        machine.exec(["md5sum", "/run/filled"])
    for machine in (vm, other):
        rollup = dict(line.split()[:2] for line in Path(f"/proc/{machine.pid}/smaps_rollup").read_text().splitlines()[1:])
        shared = int(rollup["Rss:"]) - int(rollup["Pss:"])
        assert shared > 20 << 10, rollup


@pytest.mark.vm("small", cpu="Nehalem", memory="256M", timeout=300)
def test_a_named_processor_is_what_the_guest_has(vm: Machine) -> None:
    flags = vm.exec("grep -m 1 ^flags /proc/cpuinfo").stdout.split()
    assert "sse4_2" in flags
    assert "avx" not in flags


@pytest.mark.vm(prepared)
def test_it_reboots_and_is_powered_off_and_on(vm: Machine) -> None:
    vm.power_cut()
    vm.start()
    assert vm.path("/root/lasting").read_text() == "lasting"
