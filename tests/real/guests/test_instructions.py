"""Counts of instructions, in guests whose clocks follow them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median_low
from typing import TYPE_CHECKING

import psutil
import pytest

from pytest_vmbottle import Machine, MachineError, layer

if TYPE_CHECKING:
    from pytest_vmbottle.machine.machine import MachineFactory

WORK = """
import sys
total = 0
for number in range(int(sys.argv[1])):
    total += number * number % 7
"""
WORKED = ["python3", "-S", "/srv/work.py"]


@layer("debian-12", cpu_clock="instructions")
def worker(vm: Machine) -> None:
    """Has a program with a known amount of work, and has run it once."""
    vm.write_files({"/srv/work.py": WORK})
    vm.exec([*WORKED, "1000"], env={"PYTHONHASHSEED": "0"})


def counted(vm: Machine, *words: str) -> int:
    with vm.count_instructions() as count:
        vm.exec([*WORKED, *words], env={"PYTHONHASHSEED": "0"})
    return int(count)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep processors of this host busy for a block."""
    spinning = [psutil.Popen(["python3", "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


@pytest.mark.vm(worker)
def test_the_count_of_equal_work_is_the_same_in_each_clone_and_under_load(vm: Machine, vm_factory: MachineFactory) -> None:
    counts = []
    for number in range(4):
        clone = vm if number == 0 else vm_factory(worker, name=f"clone{number}")
        counted(clone, "200000")  # what it reads is in memory from now on
        with busy(4 if number % 2 else 0):
            counts.append(median_low([counted(clone, "200000") for _ in range(3)]))
        if clone is not vm:
            clone.power_cut()
    assert (max(counts) - min(counts)) / min(counts) <= 0.0005, counts
    assert counted(vm, "400000") > 1.7 * min(counts)


@pytest.mark.vm(worker)
def test_what_a_command_starts_counts_and_what_the_guest_does_besides_does_not(vm: Machine) -> None:
    work = " ".join([*WORKED, "200000"])
    plain = counted(vm, "200000")
    vm.exec("systemd-run --unit=beside sh -c 'while :; do :; done'")
    beside = counted(vm, "200000")
    with vm.count_instructions() as twice:
        vm.exec(f"sh -c '{work}' & {work}; wait")
    with vm.count_instructions() as outer:
        with vm.count_instructions() as inner:
            vm.exec(work)
        vm.exec(work)
    assert beside == pytest.approx(plain, rel=0.01)
    assert twice.total == pytest.approx(2 * plain, rel=0.1), "with the two shells"
    assert outer.total == pytest.approx(2 * inner.total, rel=0.05)


@pytest.mark.vm(worker)
def test_a_guest_that_sleeps_has_slept_in_a_fraction_of_the_time(vm: Machine) -> None:
    began = time.monotonic()
    vm.exec("sleep 600", timeout=300)
    assert time.monotonic() - began < 300


@pytest.mark.vm("debian-12")
def test_a_machine_with_the_clocks_of_the_host_says_how_to_count(vm: Machine) -> None:
    with pytest.raises(MachineError, match="cpu_clock"), vm.count_instructions():
        pass


@pytest.mark.vm(worker)
def test_a_machine_that_counts_is_packed_restored_and_started_again_as_any_other(vm: Machine) -> None:
    before = counted(vm, "100000")
    snapshot = vm.snapshot("before")
    vm.restore(snapshot)
    assert counted(vm, "100000") == pytest.approx(before, rel=0.01)
    vm.power_cut()
    vm.start()
    counted(vm, "100000")
    assert counted(vm, "100000") == pytest.approx(before, rel=0.01)


SUITE = """
import pytest
from pytest_vmbottle import layer


@layer("debian-12", cpu_clock="instructions")
def worker(vm):
    vm.write_files({"/srv/work.py": WORK})


WORK = '''%s'''


@pytest.mark.vm(worker)
def test_it_does_not_become_slower(vm, vm_benchmark):
    vm_benchmark(vm, ["python3", "-S", "/srv/work.py", "%d"], limit=0.25, env={"PYTHONHASHSEED": "0"})
"""


def test_work_that_grows_by_half_a_percent_fails_its_test_and_equal_work_does_not(inner: pytest.Pytester) -> None:
    def outcome(amount: int, *options: str) -> tuple[dict[str, int], str]:
        inner.makepyfile(test_speed=SUITE % (WORK, amount))
        ran = inner.runpytest_subprocess("-p", "no:cacheprovider", "--vm-missing=fail", *options)
        return ran.parseoutcomes(), ran.stdout.str()

    assert outcome(200_000)[0] == {"passed": 1}
    (stored,) = json.loads((inner.path / "vm-baselines.json").read_text()).values()
    assert outcome(200_000)[0] == {"passed": 1}
    slower, told = outcome(202_000)
    assert slower == {"failed": 1}
    assert "--vm-new-baselines" in told
    assert outcome(202_000, "--vm-new-baselines")[0] == {"passed": 1}
    assert outcome(202_000)[0] == {"passed": 1}
    (renewed,) = json.loads((inner.path / "vm-baselines.json").read_text()).values()
    assert all(renewed[emulator] > count for emulator, count in stored.items())
