"""Beside other plugins, and with the options that end a run early: machines are as fresh as ever, and nothing is left behind."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.host.deadline import Deadline
from tests.plugin.conftest import CONFTEST, said

if TYPE_CHECKING:
    from pathlib import Path

    from tests.plugin.conftest import Run

CLEAN = "left behind: nothing"
MANY = """
pytestmark = pytest.mark.vm("debian-12")

@pytest.mark.parametrize("n", range(6))
def test_fresh(vm, n): assert vm.console.text.count("started") == 1

@pytest.mark.parametrize("n", range(2))
def test_shared(session_vm, n): assert session_vm.state == "running"
"""
FAILING = MANY + "\ndef test_fails(vm, session_vm, module_vm): assert vm.state == 'off'\n"


def _nothing_left(catalog: Path) -> bool:
    """Tell whether, within a short time, no process has a folder for machines any more.

    The supervisors of processes that died need a moment.
    """
    return bool(Deadline(10).poll(lambda: not any((catalog / "run").iterdir())))


@pytest.mark.parametrize("dist", ["worksteal", *(pytest.param(dist, marks=pytest.mark.guests) for dist in ("load", "loadgroup"))])
def test_every_way_to_hand_out_tests_gives_the_same(run: Run, catalog: Path, dist: str) -> None:
    assert CLEAN in said(run(MANY, "-n2", f"--dist={dist}", passed=8))
    assert _nothing_left(catalog)


@pytest.mark.parametrize(
    ("args", "status"),
    [
        pytest.param(("-x",), 1, id="x"),
        pytest.param(("-x", "-n2"), 2, id="x-xdist", marks=pytest.mark.guests),
        pytest.param(("--maxfail=1", "-n2", "--dist=worksteal"), 2, id="maxfail-xdist", marks=pytest.mark.guests),
    ],
)
def test_a_run_that_stops_at_a_failure_leaves_nothing(run: Run, catalog: Path, args: tuple[str, ...], status: int) -> None:
    result = run(FAILING.replace("test_fails", "test_0_fails"), *args, status=status)

    assert "1 failed" in said(result)
    assert CLEAN in said(result)
    assert _nothing_left(catalog)


@pytest.mark.guests
def test_a_test_that_ends_its_worker_is_one_failure_and_the_others_run(run: Run, catalog: Path) -> None:
    ends = '\ndef test_ends(vm, module_vm):\n    import os\n    os._exit(3)\n@pytest.mark.vm("debian-12")\ndef test_other(vm): pass\n'
    result = run(MANY + ends, "-n2", "--max-worker-restart=2", status=1, passed=9, failed=1)

    assert "test_ends" in said(result)
    assert CLEAN in said(result)
    assert _nothing_left(catalog)


SLOW = """
import time
pytestmark = pytest.mark.vm("debian-12")

def test_hangs(vm, module_vm): time.sleep(60)
def test_other(vm): pass
"""


def test_a_time_out_by_signal_fails_the_test_and_ends_its_machine(run: Run, catalog: Path) -> None:
    result = run(SLOW, "-p", "pytest_timeout", "--timeout=2", "--timeout-method=signal", status=1, process=True, failed=1, passed=1)

    assert "Timeout" in said(result)
    assert CLEAN in said(result)
    assert _nothing_left(catalog)


@pytest.mark.guests
def test_a_time_out_by_thread_ends_the_process_and_yet_leaves_nothing(run: Run, catalog: Path) -> None:
    result = run(SLOW, "-p", "pytest_timeout", "--timeout=2", "--timeout-method=thread", status=1, process=True)

    assert "left behind" not in said(result)  # it ended before it could say anything
    assert _nothing_left(catalog)


@pytest.mark.guests
def test_a_time_out_by_thread_in_a_worker_is_one_failure(run: Run, catalog: Path) -> None:
    result = run(SLOW, "-n2", "-p", "pytest_timeout", "--timeout=2", "--timeout-method=thread", status=1, failed=1, passed=1)

    assert "test_hangs" in said(result)
    assert CLEAN in said(result)
    assert _nothing_left(catalog)


@pytest.mark.parametrize("workers", [pytest.param((), id="alone"), pytest.param(("-n2",), id="xdist", marks=pytest.mark.guests)])
def test_a_test_that_is_run_again_has_another_machine(run: Run, pytester: pytest.Pytester, catalog: Path, workers: tuple[str, ...]) -> None:
    text = """
@pytest.mark.vm("debian-12")
def test_flaky(vm):
    with open("ids", "a+") as file:
        print(vm.id, file=file)
        file.seek(0)
        assert len(set(file.read().split())) == 3
"""
    result = run(text, "-p", "rerunfailures", "--reruns=5", *workers)

    assert "1 passed, 2 rerun" in said(result)
    assert len(set((pytester.path / "ids").read_text().split())) == 3
    assert CLEAN in said(result)
    assert _nothing_left(catalog)


DOWN = """
@pytest.hookimpl(tryfirst=True)
def pytest_vmbottle_make_backend(config, name):
    return FakeBackend(broken="QEMU cannot be started")
"""


def test_only_the_last_of_several_runs_of_a_test_counts_as_infra(run: Run) -> None:
    test = '@pytest.mark.vm("debian-12", fresh="boot")\ndef test_it(vm): pass\n'
    text = said(run(test, "-p", "rerunfailures", "--reruns=2", conftest=DOWN, status=1))

    assert "1 error, 2 rerun" in text
    assert re.search(r"INFRA: 1 test .*1 LaunchError.* 3 machines ", text)


SHUFFLED = """
one, two, three = pytest.mark.vm("debian-12"), pytest.mark.vm("debian-12", cpus=2), pytest.mark.vm("debian-12", cpus=3)
""" + "".join(f"@{mark}\ndef test_{mark}_{n}(session_vm): pass\n" for n in range(4) for mark in ("one", "two", "three"))


@pytest.mark.parametrize("seed", [1, 2])
def test_in_any_order_a_shared_machine_is_started_once(run: Run, seed: int) -> None:
    result = run(SHUFFLED, "-v", "-p", "pytest_randomly", f"--randomly-seed={seed}", passed=12)
    names = [line.partition("::")[2].split()[0] for line in result.outlines if line.startswith("test_it.py::")]

    assert "vmbottle: 3 machines " in said(result)
    assert list(dict.fromkeys(names)) != sorted(set(names))
    assert CLEAN in said(result)


@pytest.mark.guests
def test_in_random_order_workers_agree(run: Run, catalog: Path) -> None:
    assert CLEAN in said(run(MANY, "-n2", "-p", "pytest_randomly", "--randomly-seed=7", passed=8))
    assert _nothing_left(catalog)


def test_in_the_debugger_the_machine_of_the_failed_test_is_still_there(
    pytester: pytest.Pytester, catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMBOTTLE_BACKEND", "fake")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile('import pytest\n@pytest.mark.vm("debian-12")\ndef test_it(vm):\n    assert vm.exec("x").stdout == "y"\n')
    argv = (sys.executable, "-m", "pytest", "--pdb")
    result = pytester.run(*argv, stdin=b"p vm.exec('ask').argv, vm.state\nc\n")

    assert "(('sh', '-eu', '-c', 'ask'), <State.RUNNING: 'running'>)" in said(result)
    result.assert_outcomes(failed=1)
    assert CLEAN in said(result)
    assert _nothing_left(catalog)
