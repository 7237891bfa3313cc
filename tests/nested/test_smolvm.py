"""The tests of smolvm, run on the real engine in a guest."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable

import pytest

from pytest_vmbottle import Machine

REPORT = "/root/report.xml"
MINUTES = 10
LEAST = 20
"""Tests that the suite has at least: with fewer, it was not found."""


def outcomes(report: bytes) -> Counter[str]:
    """How many tests of a JUnit report passed, failed, had an error or were skipped."""
    cases = ET.fromstring(report).iter("testcase")
    return Counter(next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed") for case in cases)


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Shows a line on the terminal as it comes, although pytest captures output."""

    def tell(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n  | {line.rstrip()}")
            sys.stdout.flush()

    return tell


@pytest.mark.vm("engine")
def test_a_clone_of_a_guest_with_kvm_has_it_at_once(vm: Machine) -> None:
    assert "kvm" in vm.exec(["lsmod"]).stdout
    assert vm.path("/dev/kvm").exists()


@pytest.mark.vm("suite", timeout=600)
@pytest.mark.timeout(60 * (MINUTES + 5))
def test_the_suite_of_smolvm_passes_on_the_real_engine(vm: Machine, told: Callable[[str], None]) -> None:
    options = ["--vm-backend=smolvm", "--vm-missing=fail", f"--junitxml={REPORT}", "--color=no", "--durations=10"]
    # One worker: in emulation within emulation, each machine that only waits takes a good part of a processor.
    command = ["python3", "-m", "pytest", "-v", "-m", "smolvm", "--timeout=300", *options, "tests/smolvm"]
    done = vm.exec(command, cwd="/srv", timeout=60 * MINUTES, check=False, stream=told)
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-60:])
    found = outcomes(vm.path(REPORT).read_bytes())
    told(f"{found.total()} tests on the real engine: {dict(found)}\n")
    assert found.keys() == {"passed"}
    assert found["passed"] >= LEAST
