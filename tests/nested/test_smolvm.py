"""The tests of smolvm, run on the real engine in a guest."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable

import pytest

from pytest_vmbottle import CommandTimeout, Machine, MachineDied
from pytest_vmbottle.result import Result

REPORT = "/root/report.xml"
FAILED = "/srv/.pytest_cache/v/cache/lastfailed"
"""Cache file in which pytest keeps the failed tests."""
MINUTES = 20
LEAST = 20
"""Tests that the suite has at least: with fewer, it was not found."""
CRASHED = ("the process that ran it is gone", "boot process exited (code 0) before the agent was ready")
"""Messages about a machine whose hypervisor has ended by itself: ours, and smolvm's if the machine was only just begun."""
PROCESSORS = "1,2"
"""Those that run machines. Not the first one: each other one that restores a floating-point unit writes into its flags, and takes no care
(cpu_clear_ignne in target/i386/tcg/sysemu/fpu_helper.c of QEMU 7.2, and still in 2026). Then it runs a machine without the page tables of
its own, or itself with them: one in ten of smolvm's machines shut down, and none of 74 that were kept off it."""
ATTEMPTS = 3
"""Number of such machines that a test may meet. All tests of that machine miss it."""

TRIPLE_FAULT = """
import ctypes, fcntl, mmap, os, struct
kvm = os.open("/dev/kvm", os.O_RDWR)
machine = fcntl.ioctl(kvm, 0xAE01, 0)  # KVM_CREATE_VM
memory = mmap.mmap(-1, 4096)
memory[0] = 0xCC  # int3
at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(machine, 0x4020AE46, struct.pack("IIQQQ", 0, 0, 0, 4096, at))  # KVM_SET_USER_MEMORY_REGION
processor = fcntl.ioctl(machine, 0xAE41, 0)  # KVM_CREATE_VCPU
state = mmap.mmap(processor, fcntl.ioctl(kvm, 0xAE04, 0))  # KVM_GET_VCPU_MMAP_SIZE
special = bytearray(312)
fcntl.ioctl(processor, 0x8138AE83, special)  # KVM_GET_SREGS
special[0:8], special[12:14], special[216:218] = bytes(8), bytes(2), bytes(2)  # cs at 0; no interrupt table
fcntl.ioctl(processor, 0x4138AE84, bytes(special))  # KVM_SET_SREGS
fcntl.ioctl(processor, 0x4090AE82, struct.pack("18Q", *[0] * 17, 2))  # KVM_SET_REGS
fcntl.ioctl(processor, 0xAE80, 0)  # KVM_RUN
assert struct.unpack_from("I", state, 8) == (8,), "KVM_EXIT_SHUTDOWN"
"""
"""A machine whose first instruction cannot be done, nor what is to be done then."""


def outcomes(report: bytes, *, shut_down: int = 0) -> Counter[str]:
    """Count the tests of a JUnit report: passed, failed for any reason, or failed because machines had ended by themselves.

    Args:
        report: The report of pytest.
        shut_down: Number of processors of machines that shut down meanwhile. The test of such a machine may fail with any message.
    """
    troubles: dict[tuple[str, ...], list[ET.Element]] = {}
    for case in ET.fromstring(report).iter("testcase"):  # one whose teardown failed too is there twice
        test = (case.get("classname", ""), case.get("name", ""))
        troubles.setdefault(test, []).extend(child for child in case if child.tag in ("failure", "error", "skipped"))
    return Counter(_outcome(each, shut_down) for each in troubles.values())


def _outcome(troubles: list[ET.Element], shut_down: int) -> str:
    if not troubles:
        return "passed"
    if any(each.tag == "skipped" for each in troubles):
        return "skipped"
    crashed = shut_down or all(any(words in "".join(each.itertext()) for words in CRASHED) for each in troubles)
    return "crashed" if crashed else troubles[0].tag


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Shows a line on the terminal as it comes, although pytest captures output."""

    def tell(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n  | {line.rstrip()}")
            sys.stdout.flush()

    return tell


def suite(vm: Machine, told: Callable[[str], None], tests: list[str]) -> Result:
    """Runs the suite in a guest. With one worker: in emulation within emulation, each machine that only waits takes much of a processor."""
    options = ["--vm-backend=smolvm", "--vm-missing=fail", f"--junitxml={REPORT}", "--color=no", "--durations=10"]
    command = ["taskset", "--cpu-list", PROCESSORS, "python3", "-m", "pytest", "-v", "-m", "smolvm", "--timeout=300", *options, *tests]
    return vm.exec(command, cwd="/srv", timeout=60 * MINUTES, check=False, stream=told)


def in_a_guest_that_lasts(vm: Machine, told: Callable[[str], None], work: Callable[[], Result]) -> Result:
    """Does it; once more where the guest is lost on the way, as two emulated processors may stand still or run astray."""
    try:
        return work()
    except (CommandTimeout, MachineDied) as lost:
        told(f"the guest is lost, and all is tried once more in one that is new: {str(lost).partition(chr(10))[0]}\n")
    vm.restore()
    return work()


@pytest.mark.vm("engine")
def test_a_clone_of_a_guest_with_kvm_has_it_at_once(vm: Machine) -> None:
    assert "kvm" in vm.exec(["lsmod"]).stdout
    assert vm.path("/dev/kvm").exists()
    assert vm.host.service("held").is_running


@pytest.mark.vm("engine")
def test_a_processor_of_a_machine_that_shuts_down_is_counted(vm: Machine, shutdowns: Callable[[Machine], list[str]]) -> None:
    assert not shutdowns(vm)
    vm.exec(["python3", "-c", TRIPLE_FAULT])
    assert len(shutdowns(vm)) == 1


@pytest.mark.vm("engine")
def test_what_is_done_in_a_guest_that_is_lost_on_the_way_is_done_again_as_if_it_had_never_begun(vm: Machine) -> None:
    told: list[str] = []

    def work() -> Result:
        vm.exec("test ! -e /root/begun && touch /root/begun")
        return vm.exec("true" if told else "echo c > /proc/sysrq-trigger; sleep 60")

    assert in_a_guest_that_lasts(vm, told.append, work).ok
    assert ["the guest is lost" in line for line in told] == [True]


@pytest.mark.vm("suite", timeout=600)
@pytest.mark.timeout(60 * (2 * MINUTES + 5))
def test_the_suite_of_smolvm_passes_on_the_real_engine(
    vm: Machine, told: Callable[[str], None], shutdowns: Callable[[Machine], list[str]]
) -> None:
    def run(tests: list[str]) -> tuple[Result, Counter[str]]:
        done = in_a_guest_that_lasts(vm, told, lambda: suite(vm, told, tests))
        shut_down = shutdowns(vm)
        for line in shut_down:
            told(line)
        return done, outcomes(vm.path(REPORT).read_bytes(), shut_down=len(shut_down))

    done, found = run(["tests/smolvm"])
    passed = found["passed"]
    for _ in range(1, ATTEMPTS):
        if found.keys() - {"passed"} != {"crashed"}:
            break
        told(f"smolvm's process for a machine has ended by itself: {found['crashed']} tests are tried again, in a guest that is new\n")
        crashed = list(json.loads(vm.path(FAILED).read_text()))
        assert len(crashed) == found["crashed"], "what is tried again is what had crashed"
        vm.restore()
        done, found = run(crashed)
        passed += found["passed"]
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-60:])
    told(f"{passed} tests passed on the real engine\n")
    assert found.keys() == {"passed"}
    assert passed >= LEAST


def test_a_test_counts_as_crashed_if_a_machine_shut_down_in_its_run_or_its_every_trouble_is_one_that_ended_by_itself() -> None:
    gone, begun = (f"<failure>E {words}</failure>" for words in CRASHED)
    other, skipped = "<error>E assert 1 == 2</error>", "<skipped>no</skipped>"
    cases = [
        ("a", ""),
        ("b", gone),
        ("c", other),
        ("d", gone + other),
        ("e", skipped),
        ("f", gone),
        ("f", begun),
        ("g", gone),
        ("g", other),
    ]
    report = "<testsuites>" + "".join(f'<testcase name="{name}">{case}</testcase>' for name, case in cases) + "</testsuites>"

    assert outcomes(report.encode()) == {"passed": 1, "crashed": 2, "error": 1, "failure": 2, "skipped": 1}
    assert outcomes(report.encode(), shut_down=1) == {"passed": 1, "crashed": 5, "skipped": 1}
