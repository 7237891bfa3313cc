"""Errors cross process borders whole, because pytest-xdist sends them."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path

import attrs
import pytest

import pytest_vmbottle
from pytest_vmbottle import Result, VMBottleError, errors

RESULT = Result(argv=("false",), returncode=1, stdout="out\udcff", stderr="err", duration=0.5)
EXAMPLES: list[VMBottleError] = [
    errors.VMBottleError("plain"),
    errors.SpecError("cpus=0: takes more"),
    errors.BackendUnavailable("QEMU is missing", "apt-get install qemu-system-x86"),
    errors.BackendUnavailable("QEMU is missing"),
    errors.MachineError("gone", machine="vm", console_tail="panic"),
    errors.LaunchError("died", argv=["qemu", "-x"], exitcode=-6, output="abort", machine="vm", console_tail="tail"),
    errors.SmolvmError("not found", argv=["smolvm", "machine"], returncode=1, stderr="it is not there", code="NOT_FOUND"),
    errors.Unsupported("QEMU has no lid", machine="vm"),
    errors.MachineTimeout("late", machine="vm", console_tail="login:"),
    errors.MachineDied("dead", machine="vm", console_tail="Kernel panic"),
    errors.GuestPanic("in trouble", machine="vm", console_tail="BUG: of its own"),
    pytest_vmbottle.CommandFailed(RESULT),
    pytest_vmbottle.CommandSucceeded(RESULT),
    pytest_vmbottle.CommandTimeout(RESULT, 2.5),
    errors.TransferError("it was interrupted", src=Path("/here"), dst="/there"),
    errors.CatalogError("not writable"),
    errors.ImageMissing("there is none", name="debain-12"),
    errors.PackCorrupt("flipped"),
]


def test_every_public_error_has_an_example_here() -> None:
    assert {type(each).__name__ for each in EXAMPLES} == {*errors.__all__, "CommandFailed", "CommandSucceeded", "CommandTimeout"}


def test_every_public_error_is_a_name_of_the_package() -> None:
    assert set(errors.__all__) <= set(pytest_vmbottle.__all__)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_comes_out_of_a_pickle_with_its_text_and_all_its_attributes(error: VMBottleError, protocol: int) -> None:
    error.add_note("seen on the way")
    revived = pickle.loads(pickle.dumps(error, protocol))

    assert type(revived) is type(error)
    assert str(revived) == str(error)
    assert revived.args == error.args
    assert vars(revived) == vars(error)
    assert str(copy.copy(error)) == str(error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.SpecError, ValueError),
        (errors.MachineTimeout, TimeoutError),
        (pytest_vmbottle.CommandTimeout, TimeoutError),
        (errors.PackCorrupt, errors.CatalogError),
    ],
)
def test_an_error_is_also_what_python_calls_it(error: type[Exception], kind: type[Exception]) -> None:
    assert issubclass(error, kind)
    assert issubclass(error, VMBottleError)


def test_a_lost_machine_shows_its_console_and_a_failed_launch_its_evidence() -> None:
    text = str(EXAMPLES[5])

    assert [part for part in ("died", "tail", "abort", "qemu -x") if part in text] == ["died", "tail", "abort", "qemu -x"]


def test_a_failed_command_shows_the_command_and_both_streams() -> None:
    text = str(pytest_vmbottle.CommandFailed(RESULT))

    assert "$ false" in text
    assert "status 1" in text
    assert "--- stdout ---\nout\\udcff" in text
    assert "--- stderr ---\nerr" in text


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_no_error_has_in_its_text_what_steers_a_terminal_or_a_ci_service(error: VMBottleError) -> None:
    hostile = "x\x1b[2J\n::error::x\n##vso[x]\n+++ x"
    result = attrs.evolve(RESULT, argv=(hostile,), stdout=hostile, stderr=hostile)
    names = inspect.signature(type(error)).parameters
    own = {"argv": [hostile], "exitcode": 1, "returncode": 1, "result": result, "timeout": 1.0, "killed": True}
    given = {name: own.get(name, hostile) for name in names if name not in {"args", "kwargs"}}
    hostile_error = type(error)(*([hostile] if "args" in names else ()), **given)

    for text in (str(hostile_error), repr(hostile_error), str(pickle.loads(pickle.dumps(hostile_error)))):
        assert "\x1b" not in text
        assert not re.search(r"^\s*::|##vso\[|^\+\+\+|^---", text, re.MULTILINE)


def test_an_errors_text_is_no_longer_than_can_be_read() -> None:
    endless = "x" * (8 << 20)
    assert len(str(errors.MachineDied(endless, console_tail=endless))) < 1 << 20
