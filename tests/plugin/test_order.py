"""Tests that share a session's machine stand together, so that it is started once; all others keep their places."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    Run = Callable[..., pytest.RunResult]

TEXT = """
@layer("debian-12")
def web(vm): pass

one, two, three = pytest.mark.vm("debian-12"), pytest.mark.vm(web), pytest.mark.vm("debian-12", cpus=2)

@one
def test_0_one(session_vm): pass
def test_1_plain(): pass
@two
def test_2_two(session_vm): pass
@three
def test_3_fresh(vm): pass
@three
def test_4_three(session_vm): pass
@one
def test_5_one(session_vm): pass
@two
def test_6_two(session_vm): pass
def test_7_plain(): pass
@one
def test_8_one(session_vm): pass
"""


def order(result: pytest.RunResult) -> list[str]:
    names = (line.partition("::")[2].split()[0] for line in result.outlines if line.startswith("test_it.py::"))
    return list(dict.fromkeys(names))  # a line is begun again after a report about a machine


def test_tests_of_a_session_machine_come_together_in_the_order_of_the_first_and_others_stay(run: Run) -> None:
    shuffled = "\ndef pytest_collection_modifyitems(items):\n    items.sort(key=lambda item: item.name)\n"  # after pytest's own sorting
    result = run(TEXT, "-v", conftest=shuffled, passed=9)

    names = ("0_one", "1_plain", "5_one", "3_fresh", "8_one", "2_two", "6_two", "7_plain", "4_three")
    assert order(result) == [f"test_{name}" for name in names]
    assert "vmbottle: 4 machines " in result.stdout.str()


def test_places_of_tests_without_a_session_machine_do_not_change(run: Run) -> None:
    text = TEXT.replace("session_vm", "vm")

    assert order(run(text, "--collect-only", "-q")) == [
        f"test_{n}" for n in ("0_one", "1_plain", "2_two", "3_fresh", "4_three", "5_one", "6_two", "7_plain", "8_one")
    ]
