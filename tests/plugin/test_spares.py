"""Machines that are made beforehand, in whole runs: who gets them, and that nothing is left of those that nobody got."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.plugin.conftest import said

if TYPE_CHECKING:
    from tests.plugin.conftest import Run

# Each test sees to it that the spare for the next one is there before it ends.
SETTLE = """
import threading, time

@pytest.fixture(autouse=True)
def settled():
    yield
    time.sleep(0.1)
"""
SAME = '@pytest.mark.vm("debian-12")\n@pytest.mark.parametrize("n", range(4))\ndef test_it(vm, n): assert vm.exec(["true"]).ok\n'
OTHERS = """
@pytest.mark.vm("debian-12", env={"IT": "first"})
def test_first(vm): assert dict(vm.spec.env) == {"IT": "first"}

@pytest.mark.vm("debian-12", env={"IT": "second"})
def test_second(vm): assert dict(vm.spec.env) == {"IT": "second"}

@pytest.fixture
def vm_spec(): return MachineSpec(source="debian-12", env={"IT": "third"})

class TestOverridden:
    @pytest.fixture
    def vm_spec(self): return MachineSpec(source="debian-12", env={"IT": "fourth"})

    @pytest.mark.vm("debian-12", env={"IT": "wrong"})
    def test_fourth(self, vm): assert dict(vm.spec.env) == {"IT": "fourth"}

@pytest.mark.vm("debian-12", name="a")
@pytest.mark.vm("debian-12", name="b")
def test_two(vms): assert [vms[name].name for name in vms] == sorted(vms)
"""
DEBUGGER = """
import pdb

class Pdb(pdb.Pdb):
    def interaction(self, frame, trace):
        self.{verb}()
"""
COUNTED = """
import pathlib
made = []

def pytest_vmbottle_make_backend(config, name):
    made.append(FakeBackend())
    return made[-1]

def pytest_unconfigure(config):
    pathlib.Path("counts").write_text(f"{sum(len(each.launched) for each in made)} {sum(each.stopped for each in made)}")
"""


def _spared(text: str) -> int:
    found = re.search(r"(\d+) of them made beforehand", text)
    return int(found[1]) if found else 0


def test_the_next_tests_machine_is_there_before_it_is_asked_for_and_the_report_says_so(run: Run) -> None:
    assert _spared(said(run(SETTLE + SAME, "--vm-spares=1", passed=4))) == 3
    assert _spared(said(run(SETTLE + SAME, "--vm-spares=0", passed=4))) == 0


def test_a_test_with_other_keywords_or_fixtures_gets_what_it_asks_for(run: Run) -> None:
    result = run(SETTLE + OTHERS.replace("@pytest.fixture\ndef vm_spec", "def other"), "--vm-spares=2", "--vm-fail-on-leak", passed=4)
    assert _spared(said(result)) >= 1


@pytest.mark.parametrize(
    ("ending", "options", "status"),
    [
        ("assert n != 1", ("-x",), 1),
        ("assert n != 1", ("--maxfail=1",), 1),
        ("assert n != 1", ("-p", "rerunfailures", "--reruns=1"), 1),
        ("stop(n == 1, KeyboardInterrupt)", (), 2),
        ("stop(n == 1, pytest.exit.Exception)", (), 2),
    ],
)
def test_nothing_is_left_of_a_spare_that_nobody_got(
    run: Run, pytester: pytest.Pytester, ending: str, options: tuple[str, ...], status: int
) -> None:
    text = "def stop(now, error):\n    if now: raise error()\n" + SETTLE + SAME.replace('assert vm.exec(["true"]).ok', ending)
    result = run(text, "--vm-spares=1", "--vm-fail-on-leak", *options, conftest=COUNTED, status=status, process=status == 2)
    assert "left behind: nothing" in said(result)
    launched, stopped = (pytester.path / "counts").read_text().split()
    assert launched == stopped != "0"


@pytest.mark.parametrize("debugger", ["set_continue", "set_quit"])
def test_nothing_is_left_of_a_spare_after_the_debugger(run: Run, pytester: pytest.Pytester, debugger: str) -> None:
    """The test that the spare is for comes after `continue`, and never after `quit`."""
    (pytester.path / "stopper.py").write_text(DEBUGGER.format(verb=debugger))
    text = SETTLE + SAME.replace('assert vm.exec(["true"]).ok', "assert n != 1")
    options = ("--vm-spares=1", "--vm-fail-on-leak", "--pdb", "--pdbcls=stopper:Pdb")
    output = said(run(text, *options, conftest=COUNTED, status=1 if debugger == "set_continue" else 2, process=True))
    assert "left behind: nothing" in output
    launched, stopped = (pytester.path / "counts").read_text().split()
    assert launched == stopped != "0"
    assert _spared(output) == (3 if debugger == "set_continue" else 1)


@pytest.mark.parametrize("wrong", ["-1", "many", "1.5"])
def test_a_wrong_number_of_spares_is_told(run: Run, wrong: str) -> None:
    assert "--vm-spares takes" in said(run(SAME, f"--vm-spares={wrong}", status=4))
