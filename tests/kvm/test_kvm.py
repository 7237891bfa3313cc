"""Machines under a real KVM, in a guest whose processor has virtualisation by emulation."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from pytest_vmbottle import Machine
from pytest_vmbottle.result import Result
from tests.kvm.conftest import kvm_host

pytestmark = pytest.mark.vm(kvm_host)

PROCESSORS = "1,2"
"""Those that run machines: see tests/nested."""
ONE = "clone_goes_on"


def vmbottle(vm: Machine, *words: str, accel: str = "kvm", catalog: str = "", check: bool = True) -> Result:
    argv = ["taskset", "-c", PROCESSORS, "python3", "-m", "pytest_vmbottle", *words]
    env = {"VMBOTTLE_ACCEL": accel, **({"VMBOTTLE_CATALOG": catalog} if catalog else {})}
    return vm.exec(argv, env=env, check=check, timeout=600)


def outcomes(vm: Machine, *options: str) -> dict[str, str]:
    """Runs the tests inside, and returns how each ended: an empty text, or what went wrong."""
    report = "/root/report.xml"
    argv = [
        "taskset",
        "-c",
        PROCESSORS,
        "python3",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junit-xml={report}",
        "--vm-missing=fail",
    ]
    ran = vm.exec([*argv, *options], cwd="/srv/inside", check=False, timeout=1500)
    cases = ET.fromstring(vm.path(report).read_text()).iter("testcase")
    found = {str(case.get("name")): "".join(f"{part.get('message')} {part.text}" for part in case) for case in cases}
    assert found, ran.stdout
    return found


@pytest.fixture
def host(module_vm: Machine) -> Machine:
    return module_vm


def test_kvm_is_proved_by_a_guest_that_runs_under_it(host: Machine) -> None:
    findings = {each["topic"]: each for each in json.loads(vmbottle(host, "doctor", "--json").stdout)}
    assert findings["accelerator"]["state"] == "ok"
    assert "KVM" in findings["accelerator"]["text"]
    assert "template" in findings["packs"]["text"]


def test_machines_are_cloned_changed_restored_and_shared_under_kvm(host: Machine) -> None:
    found = outcomes(host, "--vm-accel=kvm", "--vm-pack=template")
    assert {name: words for name, words in found.items() if words} == {}
    assert len(found) == 9


@pytest.mark.parametrize("kind", ["stream", "disk"])
def test_packs_of_other_kinds_are_saved_and_restored_under_kvm(host: Machine, kind: str) -> None:
    assert [*outcomes(host, "--vm-accel=kvm", f"--vm-pack={kind}", "-k", ONE).values()] == [""]
