"""The processor that a guest was to have."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from pytest_vmbottle import BackendUnavailable, Machine, MachineFactory, MachineSpec, SpecError
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.provision import Provisioner, Settings

REWRITING = """
import os, signal, time

ping, pong = os.pipe(), os.pipe()
os.write(ping[1], b"x")
others = []
for source, sink in ((ping[0], pong[1]), (pong[0], ping[1])): # each wakes the other, on and on
    others.append(os.fork())
    while not others[-1]:
        os.write(sink, os.read(source, 1))
end, rounds = time.monotonic() + 10, 0
while time.monotonic() < end:
    for state in "10":
        with open("/sys/kernel/tracing/events/sched/enable", "w") as switch:
            switch.write(state)
    rounds += 1
for other in others:
    os.kill(other, signal.SIGKILL)
print(rounds)
"""
"""Script that makes a kernel write over code that its processors are running, by switching trace points of the scheduler on and off."""


def features(cpuinfo: str) -> set[str]:
    """Return the features of the first processor of an x86 computer, from proc_cpuinfo(5)."""
    return set(next(line for line in cpuinfo.splitlines() if line.startswith("flags")).partition(":")[2].split())


@pytest.mark.skipif(host_arch() != "x86_64", reason="these are features of x86-64")
@pytest.mark.vm("debian-12")
def test_an_emulated_guest_has_all_but_what_only_costs_time_and_any_other_what_its_host_has(session_vm: Machine) -> None:
    costly, all_others = {"erms", "fsrm", "la57"}, {"avx2", "smap", "rdrand"}
    emulated = b"\0tcg," in Path(f"/proc/{session_vm.pid}/cmdline").read_bytes()
    wanted = all_others if emulated else features(Path("/proc/cpuinfo").read_text())
    has = features(session_vm.path("/proc/cpuinfo").read_text())

    assert has & costly == wanted & costly
    assert all_others & wanted <= has


def test_a_processor_that_qemu_does_not_know_is_told_in_its_own_words(vm_factory: MachineFactory) -> None:
    for _ in range(2):
        with pytest.raises(SpecError, match="unable to find CPU model 'Transistor'"):
            vm_factory("debian-12", cpu="Transistor,+svm")


def test_a_feature_that_qemu_does_not_know_is_told_in_its_own_words(vm_factory: MachineFactory) -> None:
    with pytest.raises(SpecError, match=r"cpu\.flying-carpet' not found"):
        vm_factory("debian-12", cpu="max,+flying-carpet", fresh="boot")


@pytest.mark.guests
@pytest.mark.vm("debian-12", cpus=2, fresh="boot")
def test_a_kernel_that_rewrites_its_code_goes_on_with_two_processors(vm: Machine) -> None:
    vm.exec("mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing")

    rounds = vm.exec(["python3", "-c", REWRITING], timeout=120).stdout

    assert int(rounds) > 0
    assert vm.exec("nproc").stdout == "2\n"


@pytest.mark.guests
@pytest.mark.skipif(host_arch() != "x86_64", reason="these are features of x86-64")
@pytest.mark.vm("debian-12", cpu="x86-64-v2")
def test_a_guest_of_a_level_has_what_that_has_and_no_more(vm: Machine) -> None:
    has = features(vm.path("/proc/cpuinfo").read_text())
    assert {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"} <= has
    assert not has & {"avx", "avx2", "svm", "vmx"}


@pytest.mark.skipif(host_arch() != "x86_64", reason="these are features of x86-64")
def test_what_a_level_is_to_have_and_this_host_lacks_is_named(vm_catalog: Catalog) -> None:
    spec = MachineSpec.resolve("debian-12", {"cpu": "x86-64-v2,+xstore"})  # of processors by VIA
    with (
        closing(Provisioner(vm_catalog, QemuBackend(proofs=vm_catalog.proofs), name="qemu", settings=Settings())) as provisioner,
        pytest.raises(BackendUnavailable, match=r"cpu='x86-64-v2,\+xstore': .*: xstore") as caught,
        provisioner.machine(spec),
    ):
        pass
    assert "x86-64-v2" in caught.value.remedy
