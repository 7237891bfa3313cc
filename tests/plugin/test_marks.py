"""The vm mark: how several of them become one machine, what a wrong one is answered with, and what shows in node ids."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., pytest.RunResult]


def said(result: pytest.RunResult) -> str:
    return result.stdout.str() + "\n" + result.stderr.str()


def test_of_the_same_keyword_the_closest_mark_wins_from_the_function_down_to_the_ini_file(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makeini(
        '[pytest]\nvm_defaults =\n    source = "debian-12"\n    cpus = 11\n    memory = "11M"\n    user = ini\n    timeout = 11\n'.replace(
            "11M", "64M"
        )
    )
    run(
        """
        pytestmark = pytest.mark.vm(cpus=3, memory="192M", env={"FROM": "module"})

        @pytest.mark.vm(cpus=4)
        class TestIt:
            @pytest.mark.vm(cpus=5, env={"FROM": "function"})
            def test_function(self, vm):
                assert (vm.spec.cpus, vm.spec.memory, dict(vm.spec.env)) == (5, 192 << 20, {"FROM": "function"})

            def test_class(self, vm):
                assert (vm.spec.cpus, dict(vm.spec.env)) == (4, {"FROM": "module"})

        def test_module(vm):
            assert (vm.spec.cpus, vm.spec.disk, vm.spec.user, vm.spec.timeout) == (3, 2 << 30, "fixture", 11)
        """.replace("\n        ", "\n"),
        conftest="""
@pytest.fixture(scope="session")
def vm_defaults(vm_defaults):
    return {**vm_defaults, "cpus": 22, "user": "fixture", "disk": "2G"}
""",
        passed=3,
    )


def test_the_nearest_class_wins_among_bases_and_mixins_and_a_parameter_set_wins_over_all(run: Run) -> None:
    run(
        """
shared = pytest.mark.vm(env={"FROM": "far"})

@pytest.mark.vm("debian-12", cpus=2, memory="64M", user="base", timeout=1)
class Base:
    pass

@shared
@pytest.mark.vm(cpus=3, user="mixin")
class Mixin:
    pass

class Middle(Mixin, Base):
    pytestmark = pytest.mark.vm(cpus=4, timeout=4)

class TestLeaf(Middle):
    pytestmark = [pytest.mark.vm(cpus=5)]

    def test_class(self, vm, module_vm):
        for machine in (vm, module_vm):
            spec = machine.spec
            assert (spec.cpus, spec.memory, spec.user, spec.timeout, dict(spec.env)) == (5, 64 << 20, "mixin", 4, {"FROM": "far"})

    @pytest.mark.vm(cpus=6, user="function")
    def test_function(self, class_vm):
        assert (class_vm.spec.cpus, class_vm.spec.user, class_vm.spec.timeout) == (6, "function", 4)

    class TestInner(Base):
        def test_nested(self, vm):
            assert (vm.spec.cpus, vm.spec.user) == (2, "base")

    @pytest.mark.parametrize(
        ("cpus", "user"),
        [
            (6, "function"),
            pytest.param(7, "function", marks=pytest.mark.vm(cpus=7)),
            pytest.param(8, "set", marks=[pytest.mark.vm(cpus=8), pytest.mark.vm(user="set")]),
        ],
    )
    @pytest.mark.vm(cpus=6, user="function")
    def test_parameter_set(self, cpus, user, vm, session_vm):
        for machine in (vm, session_vm):
            assert (machine.spec.cpus, machine.spec.user, machine.spec.timeout) == (cpus, user, 4)

@shared
class TestOther(TestLeaf):
    def test_class(self, vm):
        assert (vm.spec.cpus, dict(vm.spec.env)) == (5, {"FROM": "far"})
    test_function = test_parameter_set = TestInner = None
""",
        passed=7,
    )


def test_a_parameter_set_can_be_all_that_describes_a_machine_and_goes_with_a_matrix(run: Run) -> None:
    run(
        """
@layer("debian-12")
def web(vm): pass

machine = pytest.mark.vm("debian-12", user="nobody")

@pytest.mark.parametrize("n", [pytest.param(1, marks=machine), pytest.param(2, marks=pytest.mark.vm("web", name="db"))])
def test_alone(vm, session_vm, n):
    assert vm.spec == session_vm.spec
    assert (vm.spec.user, len(vm.spec.steps)) == (("nobody", 0) if n == 1 else ("root", 1))

@pytest.mark.vm([web, "debian-12"])
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.vm(cpus=2))])
@pytest.mark.parametrize("fixture", ["vm", "session_vm"])
def test_matrix(vm, session_vm, fixture, request, n):
    spec = request.getfixturevalue(fixture).spec
    assert spec.cpus == n
    assert len(spec.steps) == ("web" in request.node.name)
""",
        passed=10,
    )


@pytest.mark.parametrize("hook", ["pytest_collection_modifyitems(items)", "pytest_itemcollected(item)", "pytest_runtest_setup(item)"])
def test_a_mark_that_a_hook_adds_counts_behind_those_of_the_function_or_before_them(run: Run, hook: str) -> None:
    run(
        """
def test_unmarked(vm):
    assert (vm.spec.cpus, vm.spec.user, vm.spec.image) == (2, "first", "debian-12")

@pytest.mark.vm(cpus=3, user="function")
class TestClass:
    def test_class(self, vm): assert (vm.spec.cpus, vm.spec.user) == (2, "first")

    @pytest.mark.vm(cpus=4, user="function")
    def test_function(self, vm): assert (vm.spec.cpus, vm.spec.user) == (4, "first")

    def test_dynamic(self, request): assert request.getfixturevalue("vm").spec.cpus == 2
""",
        conftest=f"""
@pytest.hookimpl(trylast="runtest" not in {hook!r})
def {hook}:
    for each in {"items" if "items" in hook else "[item]"}:
        each.add_marker(pytest.mark.vm("debian-12", cpus=2))
        each.add_marker(pytest.mark.vm(user="first"), append=False)
""",
        passed=4,
    )


def test_a_mark_that_a_hook_adds_counts_for_shared_machines_too_and_is_refused_where_it_comes_too_late(run: Run) -> None:
    result = run(
        """
pytestmark = pytest.mark.vm("debian-12", memory="64M")
ids = set()

def test_one(session_vm):
    ids.add(session_vm.id)
    assert session_vm.spec.cpus == 2

def test_two(session_vm):
    ids.add(session_vm.id)
    assert session_vm.spec.cpus == 1

def test_three(session_vm):
    ids.add(session_vm.id)
    assert (session_vm.spec.cpus, len(ids)) == (2, 1)

def test_late(session_vm): pass
def test_later(vm): pass
""",
        conftest="""
def pytest_itemcollected(item):
    if item.name in ("test_one", "test_three"):
        item.add_marker(pytest.mark.vm(cpus=2))

@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    if item.name == "test_late":
        item.add_marker(pytest.mark.vm(cpus=3))
    yield
    if item.name == "test_later":
        item.add_marker(pytest.mark.vm(cpus=3))
""",
        status=1,
        passed=4,
        errors=2,
    )

    assert said(result).count("SpecError: ") >= 2


def test_a_list_of_sources_that_cannot_be_honoured_is_refused_with_what_to_write(run: Run) -> None:
    result = run(
        """
import unittest
two = pytest.mark.vm(["debian-12", "debian-13"])

@pytest.mark.parametrize("n", [pytest.param(1, marks=two)])
def test_parameter_set(vm, n): pass

@pytest.mark.vm("debian-12")
def test_hook(vm): pass

@two
@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.vm("debian-11"))])
def test_changed(vm, n): pass

@two
def test_two_shared(class_vm, module_vm): pass

@two
class TestCase(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def machine(self, vm): pass
    def test_unittest(self): pass

@two
def test_that_uses_none(): open("ran", "w").close()
""",
        conftest="""
def pytest_itemcollected(item):
    if item.name == "test_hook":
        item.add_marker(pytest.mark.vm(["debian-12", "debian-13"]), append=False)
""",
        status=4,
    )

    for name, advice in {
        "test_parameter_set[1]": "parameter set",
        "test_hook": "parameter set",
        "test_changed[debian-12-1]": "parameter set",
        "test_two_shared[debian-12]": "class_vm",
        "TestCase::test_unittest": "class",
    }.items():
        assert re.search(rf"^test_it.py::{re.escape(name)}: .*{advice}", said(result), re.MULTILINE), name
    assert "test_that_uses_none" not in said(result)


def test_a_machine_of_a_matrix_or_a_shared_one_is_refused_where_it_is_asked_for_while_the_test_runs(run: Run) -> None:
    result = run(
        """
@pytest.mark.vm(["debian-12", "debian-13"])
@pytest.mark.parametrize("name", ["vm", "vms", "vm_spec"])
def test_matrix(request, name): request.getfixturevalue(name)

@pytest.mark.vm("debian-12")
@pytest.mark.parametrize("name", ["class_vm", "module_vm", "session_vm"])
def test_shared(request, name): request.getfixturevalue(name)

@pytest.mark.vm(["debian-12", "debian-13"])
@pytest.mark.usefixtures("vm")
def test_that_says_so(request):
    assert request.getfixturevalue("vm").spec.image in request.node.name
""",
        "-k",
        "not 13",
        status=1,
        failed=6,
        passed=1,
    )

    assert said(result).count('@pytest.mark.usefixtures("vm")') >= 3
    for name in ("class_vm", "module_vm", "session_vm"):
        assert f"@pytest.mark.usefixtures('{name}')" in said(result)


def test_in_unittest_the_machine_of_a_class_is_what_the_marks_of_the_class_say(run: Run) -> None:
    text = """
import unittest

class Base(unittest.TestCase):
    pytestmark = pytest.mark.vm("debian-12", cpus=2, user="base")

    @pytest.fixture(autouse=True)
    def machine(self, {fixture}):
        self.spec = {fixture}.spec

@pytest.mark.vm(cpus=3)
class TestNear(Base):
    def test_it(self): assert (self.spec.cpus, self.spec.user) == (3, "base")

class TestFar(Base):
    def test_it(self): assert self.spec.cpus == 2
    {mark}
    def test_other(self): assert self.spec.cpus == {cpus}
"""
    run(text.format(fixture="class_vm", mark="", cpus=2), passed=3)
    run(text.format(fixture="vm", mark="@pytest.mark.vm(cpus=4)", cpus=4), passed=3)
    on_method = run(text.format(fixture="class_vm", mark="@pytest.mark.vm(cpus=4)", cpus=4), status=4)
    session = run(text.format(fixture="session_vm", mark="", cpus=2), status=4)

    assert re.search("test_it.py::TestFar::test_other: .*class_vm", said(on_method))
    assert "TestFar::test_it" not in said(on_method)
    assert said(session).count("class_vm") == 3


def test_all_that_is_wrong_with_a_mark_is_told_together(run: Run) -> None:
    result = run(
        """
@pytest.mark.vm(5, "debian-13", cpuss=1, memory="lots", network="my lan")
@pytest.mark.vm(user="Not A User")
def test_many(vm): pass

@pytest.mark.vm(["debian-12", 5, 6], cpus="2")
def test_sources(vm): pass
""",
        status=4,
    )

    for mistake in (
        "one source, not 2",
        "'cpuss'",
        "memory='lots'",
        "network='my lan'",
        "'Not A User'",
        "source=5",
        "source=6",
        "cpus='2'",
    ):
        assert said(result).count(mistake) == 1, mistake
    assert said(result).count("vm(source, *, name='vm'") == 2


def test_a_misspelt_layer_is_the_tests_mistake_and_near_ones_are_named(run: Run) -> None:
    result = run(
        """
@layer("debian-12")
def web_server(vm): pass

@layer("web_server")
def above(vm): pass

@pytest.mark.vm("web_sever")
def test_own(vm): pass

@pytest.mark.vm("databse")
def test_of_conftest(session_vm): pass

@pytest.mark.vm("above")
def test_layer_beneath(vm): pass

def test_factory(vm_factory): vm_factory("webserver")

@pytest.mark.vm("nothing-like-it")
def test_no_image(vm): pass
""",
        conftest='\n@layer("debian-12")\ndef database(vm): pass\n',
        status=1,
        errors=4,
        failed=1,
    )

    assert said(result).count("'web_server'") >= 3
    assert "'database'" in said(result)
    assert re.findall(r"^INFRA (\S+)", said(result), re.MULTILINE) == ["test_it.py::test_no_image"]


def test_an_ini_value_need_not_be_quoted(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makeini(
        "[pytest]\nvm_defaults =\n    source = debian-12\n    memory = 64M\n    cpus = 2\n    network = true\n    ports = [80]\n"
    )
    run(
        "def test_it(vm):\n    assert (vm.spec.memory, vm.spec.cpus, vm.spec.network, vm.spec.ports) == (64 << 20, 2, True, (80,))\n",
        passed=1,
    )


WRONG = {
    "unknown keyword": ('"debian-12", cpuss=2', "'cpuss'"),
    "wrong type": ('"debian-12", cpus="2"', "cpus='2'"),
    "bad size": ('"debian-12", memory="lots"', "memory='lots'"),
    "bad network": ('"debian-12", network="my lan"', "network='my lan'"),
    "name of no host": ('"debian-12", name="a_b", network="lan"', "name='a_b'"),
    "other architecture": ('"debian-12", arch="s390x"', "arch='s390x'"),
    "two sources": ('"debian-12", "debian-13"', "one source"),
    "source twice": ('"debian-12", source="debian-13"', "source"),
    "source of a wrong type": ("5", "source=5"),
    "no source in the list": ("[]", "source"),
    "wrong source in the list": ('["debian-12", 5]', "source=5"),
    "name of a wrong type": ('"debian-12", name=["a"]', "name=['a']"),
}


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["alone", "xdist"])
def test_every_wrong_mark_is_a_usage_error_with_node_id_and_signature_before_anything_runs(
    run: Run, pytester: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    wrong = [f"@pytest.mark.vm({arguments})\ndef test_{number}(vm): pass\n" for number, (arguments, _) in enumerate(WRONG.values())]
    right = "def test_right():\n    open('ran', 'w').close()\n"
    result = run("\n".join([*wrong, right]), *workers, status=4)

    assert "ERROR: " in said(result)
    for number, (_, message) in enumerate(WRONG.values()):
        assert len(re.findall(rf"^test_it.py::test_{number}: .*{re.escape(message)}", said(result), re.MULTILINE)) == 1, message
        assert "vm(source, *, name='vm'" in said(result)
    assert "Traceback" not in said(result)
    assert not (pytester.path / "ran").exists()


def test_a_wrong_mark_is_told_even_where_the_test_uses_no_machine(run: Run) -> None:
    result = run('@pytest.mark.vm("debian-12", cpuss=1)\ndef test_it(): pass\n', status=4)

    assert "test_it.py::test_it: " in said(result)


def test_keywords_of_a_mark_and_of_its_layer_are_checked_together(run: Run) -> None:
    result = run(
        """
@layer("debian-12", env={"A": "1"})
def web(vm): pass

@pytest.mark.vm(web, user="Not A User")
def test_it(vm): pass
""",
        status=4,
    )

    assert "user='Not A User'" in said(result)


def test_a_layer_with_a_wrong_keyword_is_told_where_it_stands(run: Run) -> None:
    result = run('@layer("debian-12", memmory="1G")\ndef web(vm): pass\ndef test_it(): pass\n', status=2)

    assert re.search("'memmory'.*'memory'", said(result))
    assert "test_it.py" in said(result)


def test_a_list_of_sources_makes_one_test_each_with_readable_ids_and_one_source_leaves_the_id_alone(run: Run) -> None:
    result = run(
        """
@layer("debian-12")
def web(vm): pass

@pytest.mark.vm(["debian-12", web])
def test_matrix(vm): pass

@pytest.mark.vm(["debian-12", web])
@pytest.mark.parametrize("n", [1, 2])
def test_both(vm, n): pass

@pytest.mark.vm([web])
def test_list_of_one(vm): pass

@pytest.mark.vm("debian-12")
def test_single(vm): pass

@pytest.mark.vm(["debian-12", web])
@pytest.mark.vm("debian-12", name="db")
def test_two(vms): pass

@pytest.mark.vm(["debian-12", web])
def test_shared(session_vm): pass
""",
        "--collect-only",
        "-q",
    )

    ids = [line.partition("::")[2] for line in result.outlines if "::" in line]
    assert sorted(ids) == sorted([
        "test_matrix[debian-12]", "test_matrix[web]",
        "test_both[debian-12-1]", "test_both[debian-12-2]", "test_both[web-1]", "test_both[web-2]",
        "test_list_of_one", "test_single",
        "test_two[debian-12-debian-12]", "test_two[web-debian-12]",
        "test_shared[debian-12]", "test_shared[web]",
    ])  # fmt: skip


def test_each_source_of_a_list_gives_its_own_machine(run: Run) -> None:
    run(
        """
@layer("debian-12", cpus=2)
def web(vm): pass

@pytest.mark.vm(["debian-12", web])
def test_fresh(vm, request):
    assert vm.spec.cpus == (2 if "web" in request.node.name else 1)

@pytest.mark.vm(["debian-12", web])
def test_shared(session_vm, request):
    assert session_vm.spec.cpus == (2 if "web" in request.node.name else 1)
""",
        passed=4,
    )


def test_a_layer_is_found_by_its_name_in_the_module_and_in_the_conftests_above_the_closest_first(
    run: Run, pytester: pytest.Pytester
) -> None:
    sub = pytester.mkdir("sub")
    aside = pytester.mkdir("aside")
    for folder, user in ((sub, "sub"), (aside, "aside")):
        (folder / "conftest.py").write_text(f'from pytest_vmbottle import layer\n@layer("debian-12", user="{user}")\ndef near(vm): pass\n')
    (aside / "test_aside.py").write_text("def test_nothing(): pass\n")
    (sub / "test_sub.py").write_text("""
import pytest
from pytest_vmbottle import layer

@layer("debian-12", user="module")
def own(vm): pass

@pytest.mark.vm("own")
def test_module(vm): assert vm.spec.user == "module"

@pytest.mark.vm("near")
def test_near(vm): assert vm.spec.user == "sub"

@pytest.mark.vm("far")
def test_far(vm): assert vm.spec.user == "root"

@pytest.mark.vm("far")
def test_shared(session_vm): assert session_vm.spec.steps[0].name == "far"

def test_factory(vm_factory): assert vm_factory("near").spec.user == "sub"
""")
    run(
        '@pytest.mark.vm("near")\ndef test_top(vm): assert vm.spec.user == "top"\n',
        conftest='\n@layer("debian-12", user="top")\ndef near(vm): pass\n@layer("debian-12")\ndef far(vm): pass\n',
        passed=7,
    )


def test_marks_with_several_names_make_several_machines(run: Run) -> None:
    run(
        """
@pytest.mark.vm("debian-12", name="client")
@pytest.mark.vm("debian-12", name="server", cpus=2)
def test_two(vms):
    assert sorted(vms) == ["client", "server"]
    assert (vms["client"].name, vms["server"].spec.cpus, vms["client"].spec.cpus) == ("client", 2, 1)
    assert vms["client"].id != vms["server"].id

@pytest.mark.vm("debian-12")
@pytest.mark.vm("debian-12", name="server")
def test_main_and_another(vm, vms):
    assert vms["vm"] is vm
    assert len(vms) == 2

@pytest.mark.vm("debian-12", name="box")
def test_renamed(vm, vms):
    assert vms == {"box": vm}
    assert vm.name == "box"
""",
        passed=3,
    )


@pytest.mark.parametrize("marks", [("", 'name="server", cpus=2'), ('name="server", cpus=2', "")])
def test_a_mark_that_says_nothing_is_the_machine_vm_of_the_defaults_beside_others(
    run: Run, marks: tuple[str, str], pytester: pytest.Pytester
) -> None:
    pytester.makeini("[pytest]\nvm_defaults = source = debian-12\n")
    above, below = marks
    text = f"""
@pytest.mark.vm({above})
@pytest.mark.vm({below})
def test_two(vm, vms):
    assert vms["vm"] is vm
    assert (vm.name, vm.spec.cpus, vms["server"].spec.cpus) == ("vm", 1, 2)
"""
    run(text, passed=1)


def test_tests_with_machines_are_selected_by_their_mark(run: Run) -> None:
    text = '@pytest.mark.vm("debian-12")\ndef test_with(vm): pass\n\ndef test_without(): pass\n'
    run(text, "-m", "vm", passed=1, deselected=1)
    result = run(text, "-m", "not vm", passed=1, deselected=1)

    assert "vmbottle:" not in said(result)
