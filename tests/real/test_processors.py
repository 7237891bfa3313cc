"""The processor that a guest was to have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmbottle import LaunchError, Machine
from pytest_vmbottle.spec import host_arch


def features(cpuinfo: str) -> set[str]:
    """What proc_cpuinfo(5) says that the first processor of an x86 computer has."""
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


def test_a_processor_that_qemu_does_not_know_is_told_in_its_own_words(vm_factory: Callable[..., Machine]) -> None:
    with pytest.raises(LaunchError, match="unable to find CPU model 'Transistor'"):
        vm_factory("debian-12", cpu="Transistor,+svm", fresh="boot")


def test_a_feature_that_qemu_does_not_know_is_told_in_its_own_words(vm_factory: Callable[..., Machine]) -> None:
    with pytest.raises(LaunchError, match=r"cpu\.flying-carpet' not found"):
        vm_factory("debian-12", cpu="max,+flying-carpet", fresh="boot")
