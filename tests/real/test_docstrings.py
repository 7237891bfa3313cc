"""The examples in the docstrings of what a test has of a machine: each member has one, and each is run on a real machine."""

from __future__ import annotations

import datetime as dt
import doctest
import inspect
import re
import socket
import stat
import subprocess
import time
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from pytest_vmbottle import GuestPath, Machine
from pytest_vmbottle.machine.clock import Clock
from pytest_vmbottle.machine.faults import Faults

WITHOUT = {
    "Machine.shell": "takes a terminal: it is tested with one",
    "Machine.join_lan": "takes a fork on a LAN: it is tested with one",
}
"""Members without an example, and why."""
BOOTED_AGAIN = {"Machine.reboot", "Machine.start"}
"""These are run in guests/test_boots.py."""
ON_A_LAN = {"Machine.address", "Machine.addresses", "Machine.impair"}
COUNTED = {"Machine.count_instructions"}
WITH_A_DISPLAY = {f"Machine.{name}" for name in ("screenshot", "screen_text", "send_keys", "wait_for_screen_text")}
KNOWN = {
    "dt": dt,
    "time": time,
    "Path": Path,
    "PurePosixPath": PurePosixPath,
    "re": re,
    "socket": socket,
    "stat": stat,
    "subprocess": subprocess,
}


FAULTS_ON_A_LAN = {"Faults.network", "Faults.partition"}


def examples(kind: type) -> dict[str, doctest.DocTest]:
    """The examples of a class's public members, by the member's name."""
    members = [name for name, _ in inspect.getmembers_static(kind) if not name.startswith("_")]
    parser = doctest.DocTestParser()
    found = {}
    for name in members:
        text = inspect.getdoc(inspect.getattr_static(kind, name)) or ""
        found[f"{kind.__name__}.{name}"] = parser.get_doctest(text, {}, f"{kind.__name__}.{name}", None, None)
    return found


PATHS, MACHINES, FAULTS = examples(GuestPath), examples(Machine), examples(Faults) | examples(Clock)


def run(test: doctest.DocTest, **known: Any) -> None:
    said: list[str] = []
    test.globs = {**KNOWN, **known}
    ended = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not ended.failed, "".join(said)


def of(tests: dict[str, doctest.DocTest]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("test", [pytest.param(test, id=name) for name, test in tests.items() if test.examples])


def test_every_public_member_has_an_example_that_is_run() -> None:
    tests = {**PATHS, **MACHINES}
    assert {name for name, test in tests.items() if not test.examples} == WITHOUT.keys()
    assert not [name for name, test in tests.items() for each in test.examples if doctest.SKIP in each.options]


@pytest.mark.guests
@pytest.mark.vm("debian-12")
@of(PATHS)
def test_the_example_of_a_path_is_right(test: doctest.DocTest, session_vm: Machine) -> None:
    run(test, vm=session_vm)


@pytest.mark.vm("debian-12")
@of({name: test for name, test in MACHINES.items() if name not in ON_A_LAN | WITH_A_DISPLAY | COUNTED | BOOTED_AGAIN})
@pytest.mark.guests
def test_the_example_of_a_machine_is_right(test: doctest.DocTest, vm: Machine, tmp_path: Path) -> None:
    run(test, vm=vm, tmp_path=tmp_path)


@pytest.mark.guests
@pytest.mark.vm("debian-12")
@of({name: test for name, test in FAULTS.items() if name not in FAULTS_ON_A_LAN})
def test_the_example_of_a_fault_is_right(test: doctest.DocTest, session_vm: Machine) -> None:
    run(test, vm=session_vm)


@pytest.mark.guests
@pytest.mark.vm("debian-12", name="one", network="lan")
@pytest.mark.vm("debian-12", name="two", network="lan")
@of({name: FAULTS[name] for name in sorted(FAULTS_ON_A_LAN)})
def test_the_example_of_a_fault_on_a_lan_is_right(test: doctest.DocTest, vms: dict[str, Machine]) -> None:
    run(test, vms=vms)


@pytest.mark.vm("debian-12", cpu_clock="instructions")
@of({name: MACHINES[name] for name in sorted(COUNTED)})
@pytest.mark.guests
def test_the_example_of_a_machine_whose_instructions_are_counted_is_right(test: doctest.DocTest, vm: Machine) -> None:
    run(test, vm=vm)


@pytest.mark.vm("debian-12", display=True)
@of({name: MACHINES[name] for name in sorted(WITH_A_DISPLAY)})
@pytest.mark.guests
def test_the_example_of_a_machine_with_a_display_is_right(test: doctest.DocTest, vm: Machine, tmp_path: Path) -> None:
    run(test, vm=vm, tmp_path=tmp_path)


@pytest.mark.vm("debian-12", name="one", network="lan")
@pytest.mark.vm("debian-12", name="two", network="lan")
@of({name: MACHINES[name] for name in sorted(ON_A_LAN)})
@pytest.mark.guests
def test_the_example_of_machines_on_a_lan_is_right(test: doctest.DocTest, vms: dict[str, Machine]) -> None:
    run(test, vms=vms)
