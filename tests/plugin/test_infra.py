"""INFRA: a machine that could not be provided is an error of its own kind, tried again on a fresh machine, and nothing else ever is."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

from tests.plugin.conftest import said

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.plugin.conftest import Run

# Backends that fail as their names say: "down" always, "down-N" the first N times in a process.
CONFTEST = """
from pytest_vmbottle import MachineDied

class Down(FakeBackend):
    def __init__(self, times):
        super().__init__()
        self.times = times

    def launch(self, spec, **keywords):
        with open("launches", "a") as launches:
            print(spec.name, file=launches)
        if self.times > 0:
            self.times -= 1
            raise MachineDied("QEMU was killed", machine=spec.name, console_tail="last words", exitcode=-9)
        return super().launch(spec, **keywords)

@pytest.hookimpl(tryfirst=True)
def pytest_vmbottle_make_backend(config, name):
    if name.startswith("down"):
        return Down(int(name.partition("-")[2] or 1000))
"""
DOWN = '@pytest.mark.vm("debian-12", backend="{backend}", fresh="boot")\n'


def _properties(path: Path) -> dict[str, dict[str, str]]:
    """The properties of each test in JUnit's XML."""

    def cases() -> Iterator[ET.Element]:
        return ET.parse(path).iter("testcase")

    return {case.attrib["name"]: {each.attrib["name"]: each.attrib["value"] for each in case.iter("property")} for case in cases()}


@pytest.mark.parametrize("workers", [pytest.param((), id="alone"), pytest.param(("-n2",), id="xdist", marks=pytest.mark.guests)])
def test_tests_without_their_machine_are_counted_apart_and_told_once_in_full(run: Run, pytester: pytest.Pytester, workers: str) -> None:
    text = DOWN.format(backend="down") + "class TestDown:\n" + "".join(f"    def test_{n}(self, vm): pass\n" for n in range(4))
    text += "def test_that_makes_one(vm_factory):\n    vm_factory('debian-12', backend='down', fresh='boot')\ndef test_good(): pass\n"
    result = run(text, "--junitxml=junit.xml", *workers, conftest=CONFTEST, status=1, errors=5, passed=1)

    assert said(result).count("\nlast words") == 1
    assert len(re.findall(r"INFRA: MachineDied: QEMU was killed .*test_it\.py::", said(result))) >= 4
    assert re.search(r"^vmbottle: INFRA: 5 tests .*5 MachineDied.* 5 machines ", said(result), re.MULTILINE)
    assert said(result).count("\nINFRA test_it.py::") == 5
    properties = _properties(pytester.path / "junit.xml")
    assert properties.pop("test_good") == {}
    assert len(properties) == 5
    for each in properties.values():
        assert each.pop("vmbottle_artifacts").startswith("vmbottle-artifacts/test_it.py")
        assert each == {"vmbottle_infra": "MachineDied: QEMU was killed", "vmbottle_infra_retries": "1"}


def test_a_machine_that_comes_at_the_second_trial_is_no_error_and_is_counted(run: Run, pytester: pytest.Pytester) -> None:
    text = DOWN.format(backend="down-1") + "def test_it(vm): pass\n"
    result = run(text, "--junitxml=junit.xml", conftest=CONFTEST, passed=1)

    assert "MachineDied: QEMU was killed" in said(result)
    assert re.search(r"^vmbottle: INFRA: 0 tests .* 1 machine ", said(result), re.MULTILINE)
    assert _properties(pytester.path / "junit.xml") == {"test_it": {"vmbottle_infra_retries": "1"}}


@pytest.mark.parametrize(("retries", "launches"), [("0", 1), ("3", 4)])
def test_a_machine_is_tried_again_as_often_as_it_was_said(run: Run, pytester: pytest.Pytester, retries: str, launches: int) -> None:
    run(DOWN.format(backend="down") + "def test_it(vm): pass\n", f"--vm-infra-retries={retries}", conftest=CONFTEST, status=1, errors=1)

    assert (pytester.path / "launches").read_text() == "vm\n" * launches


def test_what_a_test_a_fixture_or_a_layer_did_is_never_tried_again(run: Run, pytester: pytest.Pytester) -> None:
    result = run(
        """
import os

def once(name):
    with open(name, "a") as file:
        file.write("x")
    assert os.path.getsize(name) > 1, "it would pass the second time"

@layer("debian-12")
def shaky(vm): once("layer")

@pytest.fixture
def prepared(vm): once("fixture")

@pytest.mark.vm("debian-12")
def test_assertion(vm): once("test")

@pytest.mark.vm("debian-12")
def test_fixture(prepared): pass

@pytest.mark.vm(shaky)
def test_layer(vm): pass
""",
        "--vm-infra-retries=9",
        status=1,
        failed=1,
        errors=2,
    )

    assert {name: (pytester.path / name).read_text() for name in ("test", "fixture", "layer")} == {
        "test": "x",
        "fixture": "x",
        "layer": "x",
    }
    assert re.search(r"INFRA: 1 test .*1 MachineError.* 0 machines ", said(result))
    assert "ERROR test_it.py::test_fixture" in said(result)
    assert "INFRA test_it.py::test_layer" in said(result)


@pytest.mark.parametrize("workers", [pytest.param((), id="alone"), pytest.param(("-n2",), id="xdist", marks=pytest.mark.guests)])
def test_a_failed_layer_is_told_in_full_exactly_once_and_all_others_name_that_test(run: Run, workers: tuple[str, ...]) -> None:
    text = """
import os, time

@layer("debian-12")
def broken(vm): raise RuntimeError(f"attempt {os.getpid()} at {time.time()}\\nthe reason")

@layer(broken)
def above(vm): pass

@pytest.mark.vm(above)
class TestAbove:
    @pytest.mark.parametrize("n", range(3))
    def test_own(self, vm, n): pass
    def test_shared(self, class_vm): pass
    def test_shared_too(self, class_vm): pass

@pytest.mark.vm(broken)
@pytest.mark.parametrize("n", range(3))
def test_broken(vm, n): pass

def test_made(vm_factory): vm_factory(broken)
"""
    result = said(run(text, *workers, status=1))

    assert len(re.findall("^(E +)?the reason", result, re.MULTILINE)) == 1
    named = re.findall(r"\(.* (test_it\.py::\S+)\)\n", result)
    assert len(named) >= 8
    assert len(set(named)) == 1
    assert result.count("the console's last lines") == 1


def test_a_description_that_makes_no_sense_is_not_infra(run: Run) -> None:
    result = run('@pytest.mark.vm("debian-12", memory="900T")\ndef test_it(vm): pass\n', status=1, errors=1)

    assert "ERROR test_it.py::test_it" in said(result)
    assert "INFRA" not in said(result)


@pytest.mark.parametrize("number", ["-1", "many", "1.5"])
def test_a_number_of_retries_that_is_none_is_refused(run: Run, number: str) -> None:
    result = run("def test_it(): pass\n", f"--vm-infra-retries={number}", status=4)

    assert f"'{number}'" in said(result)
