"""Guests with guests of their own. What they get was laid out by `.ci/nested`; what is here runs only where `-m nested` asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmbottle import Machine, layer
from tests.conftest import leave_out

ROOT = Path(__file__).parents[2]
ENGINE = Path(os.environ.get("ENGINE", ROOT / ".engine"))
SUITE = ("conftest.py", "pyproject.toml", "docs/smolvm.md", "examples", "tests/conftest.py", "tests/real", "tests/smolvm")
"""The tests of smolvm, and those that they share with QEMU's."""
HELD = """
import fcntl, os, signal
machine = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE01, 0)  # KVM_CREATE_VM
fcntl.ioctl(machine, 0xAE60)  # KVM_CREATE_IRQCHIP
fcntl.ioctl(machine, 0xAE41, 0)  # KVM_CREATE_VCPU
os.fork() or signal.pause()
"""
"""A machine that never runs. With the first one, and with the first processor whose interrupt controller is off, KVM switches code of the
kernel, and back with the last. Two processors that an older QEMU emulates may miss that and stand still: after 150 machines made one after
another, where 2,500 went well beside this one."""

WITNESS = "/sys/kernel/tracing/instances/witness"
"""Trace in the guest's kernel of the processors of its machines that shut down: 8 is KVM_EXIT_SHUTDOWN (linux/kvm.h)."""
NOTE = f"mkdir {WITNESS} && cd {WITNESS}/events/kvm/kvm_userspace_exit && echo 'reason == 8' > filter && echo 1 > enable"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items, Path(__file__).parent, "nested")


@layer("debian-12", nested=True, cpus=3, memory="4G", env={"PYTHONPATH": "/opt/libraries:/opt/project"}, depends=[ENGINE / "libraries.txt"])
def engine(vm: Machine) -> None:
    """Pytest, the libraries of this project, and smolvm; nothing of them comes over a network."""
    vm.cp(ENGINE / "libraries", vm.path("/opt/libraries"))
    vm.exec(["/opt/libraries/smol/smol-vmm", "--version"])
    vm.exec("modprobe kvm_amd || modprobe kvm_intel")  # for the pack to have it
    vm.exec(NOTE)
    vm.exec(["systemd-run", "--unit=held", "--property=Type=forking", "python3", "-c", HELD])


@layer(engine, depends=[ENGINE / "project.txt", *(ROOT / name for name in SUITE)])
def suite(vm: Machine) -> None:
    """This project and its tests of smolvm, whose modules are compiled once."""
    vm.cp(ENGINE / "project", vm.path("/opt/project"))
    for name in SUITE:
        vm.path(f"/srv/{name}").parent.mkdir(parents=True, exist_ok=True)
        vm.cp(ROOT / name, vm.path(f"/srv/{name}"))
    vm.exec("python3 -m pytest --collect-only -q -m smolvm tests/smolvm", cwd="/srv", timeout=300)


@pytest.fixture(scope="session")
def shutdowns() -> Callable[[Machine], list[str]]:
    """Tells of each processor of a guest's machines that has shut down, as one does that meets a fault in a fault in a fault."""
    return lambda vm: [line.strip() for line in vm.exec(["cat", f"{WITNESS}/trace"]).stdout.splitlines() if "KVM_EXIT_SHUTDOWN" in line]
