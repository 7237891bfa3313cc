"""Signals in runs that have machines, and in those that have none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., pytest.RunResult]

TELL = """
import atexit, signal
{before}

def tell():
    with open("after", "w") as file:
        file.write(" ".join(str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGHUP)))

atexit.register(tell)
"""
LOOK = """
import signal

def handled():
    return [signal.getsignal(number) is not signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGHUP)]
"""


def test_signals_are_handled_while_there_are_tests_with_machines_and_not_after(run: Run, pytester: pytest.Pytester) -> None:
    run(
        LOOK + "\n@pytest.mark.vm('debian-12')\ndef test_it(vm): assert handled() == [True, True]\n",
        conftest=TELL.format(before=""),
        process=True,
        passed=1,
    )
    assert (pytester.path / "after").read_text().split() == ["0", "0"]


def test_a_run_without_machines_handles_no_signal(run: Run) -> None:
    run(LOOK + "\ndef test_it(): assert handled() == [False, False]\n", process=True, passed=1)


def test_a_run_whose_tests_with_machines_are_deselected_handles_no_signal(run: Run) -> None:
    text = "\n@pytest.mark.vm('debian-12')\ndef test_vm(vm): pass\n\ndef test_it(): assert handled() == [False, False]\n"
    run(LOOK + text, "-m", "not vm", process=True, passed=1, deselected=1)


def test_who_handles_a_signal_already_keeps_it(run: Run, pytester: pytest.Pytester) -> None:
    before = "signal.signal(signal.SIGTERM, lambda *_: None)\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)"
    text = "\n@pytest.mark.vm('debian-12')\ndef test_it(vm):\n    assert signal.getsignal(signal.SIGTERM).__name__ == '<lambda>'\n"
    text += "    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN\n"
    run(LOOK + text, conftest=TELL.format(before=before), process=True, passed=1)
    assert "<lambda>" in (pytester.path / "after").read_text()


LATE = """
@pytest.fixture(scope="session")
def late(session_vm):
    yield
    with open("state", "w") as file:
        file.write(session_vm.state)
"""


def test_an_interrupted_run_ends_its_machines_before_any_teardown(run: Run, pytester: pytest.Pytester) -> None:
    text = (
        LATE
        + """
import os, signal

@pytest.mark.vm("debian-12")
def test_it(late):
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
"""
    )
    run(text, status=pytest.ExitCode.INTERRUPTED, process=True)
    assert (pytester.path / "state").read_text() == "off"


def test_a_run_that_stops_at_a_failure_tears_down_with_its_machines_on(run: Run, pytester: pytest.Pytester) -> None:
    text = (
        LATE
        + """
@pytest.mark.vm("debian-12")
def test_it(late): assert 0

@pytest.mark.vm("debian-12")
def test_other(late): pass
"""
    )
    run(text, "-x", status=pytest.ExitCode.TESTS_FAILED, failed=1)
    assert (pytester.path / "state").read_text() == "running"
