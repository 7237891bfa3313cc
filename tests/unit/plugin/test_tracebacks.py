"""Which frames a traceback keeps."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import pytest_vmbottle
from pytest_vmbottle import MachineDied
from pytest_vmbottle.plugin.tracebacks import hide_our_frames

OURS = str(Path(pytest_vmbottle.__file__).parent / "machine" / "imagined.py")


def ours(text: str) -> dict[str, Callable[..., object]]:
    """Define functions as if a module of the package had them."""
    found: dict[str, Callable[..., object]] = {}
    exec(compile(text, OURS, "exec"), {"MachineDied": MachineDied}, found)
    return found


def caught(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("it did not fail")


def files(error: BaseException) -> list[str]:
    return [Path(frame.filename).name for frame in traceback.extract_tb(error.__traceback__)]


def test_frames_of_ours_go_and_those_of_the_test_stay() -> None:
    error = caught(ours("def verb():\n    raise MachineDied('gone')\n")["verb"])
    hide_our_frames(error)

    assert files(error) == ["test_tracebacks.py"]


def test_a_function_of_the_test_that_we_call_keeps_its_frame() -> None:
    def check() -> None:
        raise RuntimeError("mine")

    verb = ours("def verb(check):\n    check()\n")["verb"]
    error = caught(lambda: verb(check))
    hide_our_frames(error)

    assert files(error) == ["test_tracebacks.py"] * 3


def test_a_cause_in_our_own_code_goes_and_one_in_the_tests_code_stays() -> None:
    text = """
def verb(check):
    try:
        check()
    except ValueError as error:
        raise MachineDied("gone") from error
"""

    def mine() -> None:
        raise ValueError("mine")

    verb = ours(text)["verb"]
    below = caught(lambda: verb(ours("def inner():\n    raise ValueError('below')\n")["inner"]))
    hide_our_frames(below)
    above = caught(lambda: verb(mine))
    hide_our_frames(above)

    assert below.__cause__ is None
    assert below.__suppress_context__
    assert isinstance(above.__cause__, ValueError)
    assert files(above.__cause__) == ["test_tracebacks.py"]


@pytest.mark.parametrize("text", ["{}['missing']", "[][1]", "None.missing", "missing"])
def test_a_fault_of_our_own_keeps_all_frames(text: str) -> None:
    error = caught(ours(f"def verb():\n    return {text}\n")["verb"])
    hide_our_frames(error)

    assert "imagined.py" in files(error)


def test_an_outcome_of_pytest_in_the_middle_of_a_verb_shows_the_test() -> None:
    error = caught(lambda: ours("def verb(fail):\n    fail('too long')\n")["verb"](pytest.fail))
    hide_our_frames(error)

    assert "imagined.py" not in files(error)
    assert files(error)[0] == "test_tracebacks.py"
