"""The fixtures: what is fresh, what is shared, and what a test gets that did not say what it wants."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., pytest.RunResult]


def said(result: pytest.RunResult) -> str:
    return result.stdout.str() + "\n" + result.stderr.str()


def test_every_test_has_its_own_machine_and_shared_ones_live_as_long_as_their_scope(run: Run) -> None:
    result = run(
        """
pytestmark = pytest.mark.vm("debian-12")
seen = {}

def note(name, machine):
    seen.setdefault(name, set()).add(machine.id)

class TestOne:
    def test_a(self, vm, class_vm, module_vm, session_vm):
        for name, machine in (("vm", vm), ("class", class_vm), ("module", module_vm), ("session", session_vm)):
            note(name, machine)
    test_b = test_a

class TestTwo(TestOne):
    pass

def test_counts():
    assert {name: len(ids) for name, ids in seen.items()} == {"vm": 4, "class": 2, "module": 1, "session": 1}
    assert len(set.union(*seen.values())) == 8
""",
        passed=5,
    )

    assert re.search(r"^vmbottle: 8 machines .*1 booted.* 1 packs? .*0 reused", said(result), re.MULTILINE)


def test_a_session_machine_outlives_modules_and_differs_by_spec(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_other="""
import pytest
from test_it import ids

@pytest.mark.vm("debian-12")
def test_same(session_vm, module_vm):
    assert {session_vm.id} == ids["session"]
    assert module_vm.id not in ids["module"]

@pytest.mark.vm("debian-12", cpus=2)
def test_differs(session_vm):
    assert session_vm.id not in ids["session"]
"""
    )
    run(
        """
ids = {"session": set(), "module": set()}

@pytest.mark.vm("debian-12")
def test_first(session_vm, module_vm):
    ids["session"].add(session_vm.id)
    ids["module"].add(module_vm.id)
""",
        passed=3,
    )


def test_marks_that_say_the_same_share_a_session_machine(run: Run) -> None:
    run(
        """
ids = set()

@layer("debian-12")
def web(vm): pass

@pytest.mark.vm(web, cpus=2, env={"A": "1", "B": "2"})
def test_one(session_vm): ids.add(session_vm.id)

@pytest.mark.vm("web", env={"B": "2", "A": "1"})
@pytest.mark.vm(cpus=2)
def test_other(session_vm):
    ids.add(session_vm.id)
    assert len(ids) == 1
""",
        passed=2,
    )


def test_a_users_own_session_fixture_can_stand_on_the_session_machine(run: Run) -> None:
    run(
        """
made = []

@pytest.fixture(scope="session")
def database(session_vm):
    made.append(session_vm.exec("create database").stdout)
    return session_vm

@pytest.mark.vm("debian-12")
@pytest.mark.parametrize("n", range(3))
def test_it(database, session_vm, n):
    assert database is session_vm
    assert made == ["sh -eu -c create database"]
""",
        passed=3,
    )


def test_the_factory_starts_machines_that_end_with_the_test_last_first(run: Run) -> None:
    run(
        """
def test_start(vm_factory, vm_defaults):
    first = vm_factory("debian-12", cpus=2, name="first")
    second = vm_factory(first.spec, name="second", memory="64M", env={"A": "1"})
    assert (first.name, first.spec.cpus) == ("first", 2)
    assert (second.name, second.spec.cpus, second.spec.memory, second.spec.env) == ("second", 2, 64 << 20, (("A", "1"),))
    assert first.id != second.id

def test_ended(pytestconfig):
    assert pytestconfig.ended == ["second", "first"]
""",
        conftest="""
def pytest_configure(config):
    config.ended = []
    config.pluginmanager.register(Ends(config))

class Ends:
    def __init__(self, config):
        self.config = config
    def pytest_vmbottle_machine_stopping(self, machine):
        self.config.ended.append(machine.name)
""",
        passed=2,
    )


def test_machines_of_a_shared_factory_live_as_long_as_its_scope(run: Run) -> None:
    result = run(
        """
ended = []

@pytest.fixture(scope="session")
def pair(session_vm_factory):
    return [session_vm_factory("debian-12", name=name, memory="64M") for name in ("one", "two")]

class TestA:
    def test_own(self, class_vm_factory, pair):
        first, second = class_vm_factory("debian-12", name="a"), class_vm_factory(pair[0].spec, name="b")
        assert (second.spec.memory, [machine.state for machine in (first, second, *pair)]) == (64 << 20, ["running"] * 4)
        TestA.both = first, second

    def test_later(self, class_vm_factory, module_vm_factory):
        assert [machine.state for machine in TestA.both] == ["running"] * 2
        TestA.third = module_vm_factory("debian-12", name="c")

def test_after_the_class(module_vm_factory, pair):
    assert [machine.state for machine in TestA.both] == ["off"] * 2
    assert [machine.state for machine in (TestA.third, *pair)] == ["running"] * 3

def test_reset(class_vm_factory):
    with pytest.raises(ValueError, match="reset='test'.*class_vm_factory is reset by its restore"):
        class_vm_factory("debian-12", reset="test")
""",
        passed=4,
    )

    assert "5 machines" in said(result)


def test_a_wrong_keyword_to_the_factory_is_an_error_where_it_is_called(run: Run) -> None:
    result = run('def test_it(vm_factory):\n    vm_factory("debian-12", memmory="1G")\n', status=1, failed=1)

    assert "'memory'" in said(result)


def test_vm_spec_is_what_the_machine_will_be_without_one(run: Run) -> None:
    result = run(
        """
@pytest.mark.vm("debian-12", memory="64M")
def test_it(vm_spec):
    assert isinstance(vm_spec, MachineSpec)
    assert vm_spec.memory == 64 << 20
""",
        passed=1,
    )

    assert "machines restored" not in said(result)


def test_specs_and_machines_can_be_parametrised_indirectly(run: Run) -> None:
    run(
        """
@layer("debian-12", user="joe")
def web(vm): pass

@pytest.mark.vm("debian-12", memory="64M")
@pytest.mark.parametrize("vm_spec", [{"cpus": 2}, {"cpus": 3}, MachineSpec(source="debian-12", cpus=4, memory="64M")], indirect=True)
def test_spec(vm, vm_spec):
    assert vm.spec == vm_spec
    assert vm.spec.cpus in (2, 3, 4)
    assert vm.spec.memory == 64 << 20

@pytest.mark.parametrize("vm", ["debian-12", web, "web", {"source": "debian-12", "cpus": 2}], indirect=True)
def test_vm(vm, request):
    expected = [(1, "root"), (1, "joe"), (1, "joe"), (2, "root")]
    assert (vm.spec.cpus, vm.spec.user) == expected[request.node.callspec.indices["vm"]]

@pytest.mark.vm("debian-12", memory="64M")
@pytest.mark.parametrize("vm", [web], indirect=True)
def test_both(vm):
    assert (vm.spec.memory, vm.spec.user) == (64 << 20, "joe")
""",
        passed=8,
    )


def test_a_machine_can_be_asked_for_while_the_test_runs(run: Run) -> None:
    run(
        """
@pytest.mark.vm("debian-12", cpus=2)
def test_it(request):
    assert request.getfixturevalue("vm").spec.cpus == 2
""",
        passed=1,
    )


@pytest.mark.parametrize("fixture", ["vm", "vms", "vm_spec", "class_vm", "module_vm", "session_vm"])
def test_a_test_that_says_nowhere_what_machine_it_wants_is_told_which_mark_to_add(run: Run, fixture: str) -> None:
    result = run(f"def test_it({fixture}): pass\n", status=1, errors=1)

    assert '@pytest.mark.vm("debian-12")' in said(result)
    assert "plugin.py" not in said(result)


def test_an_unmarked_test_gets_the_machine_of_the_defaults(run: Run) -> None:
    run(
        """
def test_fresh(vm): assert vm.spec.cpus == 7
def test_shared(session_vm): assert session_vm.spec.cpus == 7
""",
        conftest="""
@pytest.fixture(scope="session")
def vm_defaults():
    return {"source": "debian-12", "cpus": 7}
""",
        passed=2,
    )


def test_the_catalog_is_the_one_that_the_run_uses(run: Run, catalog: Path) -> None:
    run(f"def test_it(vm_catalog):\n    assert str(vm_catalog.root) == {str(catalog)!r}\n", passed=1)


def test_hooks_change_keywords_and_see_machines_come_and_go(run: Run) -> None:
    result = run(
        """
@pytest.mark.vm("debian-12")
def test_fresh(vm): assert vm.spec.env == (("ITEM", "test_fresh"),)

@pytest.mark.vm("debian-12")
def test_shared(session_vm): assert session_vm.spec.env == (("ITEM", "none"),)
""",
        conftest="""
def pytest_vmbottle_spec(item, keywords):
    return {**keywords, "env": {"ITEM": item.name if item else "none"}}

def pytest_vmbottle_machine_ready(machine):
    assert machine.exec("hello").ok

def pytest_vmbottle_machine_stopping(machine):
    assert machine.exec("goodbye").ok
    raise RuntimeError("a hook that fails")
""",
        passed=2,
    )

    assert "RuntimeError('a hook that fails')" in said(result)


def test_two_backends_can_be_used_side_by_side(run: Run) -> None:
    run(
        """
@pytest.mark.vm("debian-12")
@pytest.mark.vm("debian-12", name="second", backend="other")
def test_it(vms):
    assert (vms["vm"].backend, vms["second"].backend) == ("fake", "other")
""",
        passed=1,
    )


def test_a_private_lan_takes_a_backend_that_has_it_and_a_machine_of_one_test(run: Run) -> None:
    result = run(
        """
pytestmark = pytest.mark.vm("debian-12", network="lan")

def test_own(vm): pass
def test_made(vm_factory): vm_factory("debian-12", network="lan")
def test_shared(class_vm): pass
""",
        errors=3,
        status=1,
    )

    assert "has no private LANs" in said(result)
    assert "SpecError: network='lan'" in said(result)
