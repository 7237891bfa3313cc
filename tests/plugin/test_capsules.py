"""Capsules of failed tests, in whole runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.standalone.capsules import Capsule, all_in
from tests.plugin.conftest import said

if TYPE_CHECKING:
    from pathlib import Path

    from tests.plugin.conftest import Run

TESTS = """
@pytest.mark.vm("debian-12", name="web")
@pytest.mark.vm("debian-12", name="db")
def test_two(vms): assert False, "it is broken"

@pytest.mark.vm("debian-12")
def test_right(vm): pass

def test_none(): assert False

@pytest.fixture
def ready(vm): raise RuntimeError("not ready")

@pytest.mark.vm("debian-12")
def test_set_up(ready): pass
"""


@pytest.mark.parametrize("workers", [pytest.param((), id="alone"), pytest.param(("-n2",), id="xdist", marks=pytest.mark.guests)])
def test_failed_tests_with_machines_leave_a_capsule_each_and_say_how_to_open_it(run: Run, catalog: Path, workers: tuple[str, ...]) -> None:
    text = said(run(TESTS, "--vm-capsule=failed", *workers, status=1, passed=1, failed=2, errors=1))
    found = {each.name: each for each in all_in(catalog)}
    assert {name: each.machines for name, each in found.items()} == {
        "test_it-py-test_two": ("web", "db"),
        "test_it-py-test_set_up": ("vm",),
    }
    assert found["test_it-py-test_two"].error.startswith("AssertionError: it is broken")
    for name in found:
        # In the report of the test, and at the end.
        assert text.count(f"replay {name}") == 2
    # The files that the capsules have are all that is left of the snapshots.
    assert not list(catalog.glob("run/*/*/snapshots/*"))


def test_no_capsule_is_left_unless_it_is_asked_for(run: Run, catalog: Path) -> None:
    run(TESTS, status=1)
    assert not list(all_in(catalog))


def test_a_test_starts_from_a_capsule(run: Run, catalog: Path) -> None:
    run(TESTS, "--vm-capsule=failed", status=1)
    capsule = Capsule(catalog / "capsules" / "test_it-py-test_two")
    text = f"""
from pytest_vmbottle import Capsule

def test_again(vm_factory):
    vm = vm_factory(Capsule({str(capsule.path)!r}), name="again")
    assert vm.name == "again"
    assert vm.lifecycle.boot_source.saved == Capsule({str(capsule.path)!r}).snapshot().path
"""
    run(text, passed=1)


def test_a_machine_that_cannot_be_saved_is_told_and_hides_nothing(run: Run, catalog: Path) -> None:
    text = '@pytest.mark.vm("debian-12")\ndef test_it(vm):\n    vm.poweroff()\n    assert False, "its own error"\n'
    told = said(run(text, "--vm-capsule=failed", status=1, failed=1))
    assert "its own error" in told
    assert "vm is not in the capsule: the machine vm is off" in told
    assert not list(all_in(catalog))
