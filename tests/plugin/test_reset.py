"""`reset="test"`: a shared machine is one and the same for its tests, and fresh for each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.plugin.conftest import said

if TYPE_CHECKING:
    from tests.plugin.conftest import Run

TESTS = """
ids = set()

def starts(machine):
    return machine.console.text.count("started")

class TestShared:
    pytestmark = pytest.mark.vm("debian-12", reset={reset!r})

    def test_first(self, {fixture}):
        ids.add({fixture}.id)
        assert starts({fixture}) == 1

    def test_second(self, {fixture}):
        assert {{{fixture}.id}} == ids
        assert starts({fixture}) == {second}

    @pytest.fixture
    def user(self, {fixture}):
        return starts({fixture})

    @pytest.mark.parametrize("number", [0, 1])
    def test_a_fixture_of_the_test_sees_it_fresh(self, user, number, request):
        assert user == {third} + number * {step}

    def test_that_has_none(self):
        pass
"""


def _tests(fixture: str, *, reset: str) -> str:
    step = 1 if reset == "test" else 0
    return TESTS.format(fixture=fixture, reset=reset, step=step, second=1 + step, third=1 + 2 * step)


def test_a_shared_machine_is_restored_before_each_test_but_the_first(run: Run) -> None:
    for fixture in ("class_vm", "module_vm", "session_vm"):
        result = run(_tests(fixture, reset="test"), passed=5)
        assert "vmbottle: 4 machines " in said(result)


def test_without_it_a_shared_machine_is_left_as_the_tests_leave_it(run: Run) -> None:
    result = run(_tests("module_vm", reset="none"), passed=5)
    assert "vmbottle: 1 machine" in said(result)


def test_a_machine_that_a_test_has_switched_off_is_back_for_the_next(run: Run) -> None:
    run(
        """
pytestmark = pytest.mark.vm("debian-12", reset="test")

def test_one(session_vm):
    session_vm.power_cut()
    assert session_vm.state == "off"

def test_two(session_vm):
    assert session_vm.state == "running"
""",
        passed=2,
    )


def test_a_wrong_word_is_refused_at_collection(run: Run) -> None:
    result = run("@pytest.mark.vm('debian-12', reset='class')\ndef test_it(session_vm): pass", status=4)
    assert "reset='class'" in said(result)


def test_a_machine_is_poured_from_a_snapshot_of_another_and_not_after_its_end(run: Run) -> None:
    run(
        """
from pytest_vmbottle import CatalogError, SpecError
snapshots = []

@pytest.mark.vm("debian-12")
def test_one(vm, vm_factory):
    snapshots.append(vm.snapshot("base"))
    other = vm_factory(snapshots[0], env={"A": "1"})
    assert other.id != vm.id and dict(other.spec.env) == {"A": "1"}
    with pytest.raises(SpecError, match="cpus"):
        vm_factory(snapshots[0], cpus=2)

def test_two(vm_factory):
    with pytest.raises(CatalogError, match="'base'"):
        vm_factory(snapshots[0])
""",
        passed=2,
    )
