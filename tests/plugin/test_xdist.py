"""Several workers: one catalog, each pack once, one summary."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., pytest.RunResult]

TEXT = """
import os, time

@layer("debian-12")
def web(vm):
    time.sleep(0.3)
    with open({built!r}, "a") as file:
        file.write("built\\n")

@pytest.mark.vm(web)
@pytest.mark.parametrize("n", range(6))
def test_it(vm, n):
    with open({built!r} + os.environ.get("PYTEST_XDIST_WORKER", ""), "a"):
        time.sleep(0.1)
"""


def test_two_workers_build_a_pack_once_between_them_and_report_together(run: Run, tmp_path: Path) -> None:
    built = tmp_path / "built"
    result = run(TEXT.format(built=str(built)), "-n2", passed=6)
    text = result.stdout.str() + result.stderr.str()

    assert built.read_text() == "built\n"
    assert sorted(path.name for path in tmp_path.glob("builtgw*")) == ["builtgw0", "builtgw1"]
    assert len(re.findall(r"^vmbottle: 6 machines .*1 booted.* 2 packs .*[12] reused", text, re.MULTILINE)) == 1
    assert text.count("vmbottle: fake (1)") == 1


@pytest.mark.guests
def test_one_worker_rebuilds_for_both(run: Run, tmp_path: Path) -> None:
    built = tmp_path / "built"
    text = TEXT.format(built=str(built))
    run(text, passed=6)
    run(text, "-n2", "--vm-rebuild", passed=6)

    assert built.read_text() == "built\nbuilt\n"


@pytest.mark.guests
def test_an_error_of_a_machine_comes_through_from_a_worker_in_words(run: Run) -> None:
    result = run('@pytest.mark.vm("my-image")\ndef test_it(vm): pass\n', "-n2", status=1, errors=1)

    assert "'my-image'" in result.stdout.str()
    assert "provisioner.py" not in result.stdout.str()


@pytest.mark.guests
def test_no_run_leaves_a_folder_of_machines_behind(run: Run, catalog: Path) -> None:
    run('@pytest.mark.vm("debian-12")\n@pytest.mark.parametrize("n", range(4))\ndef test_it(vm, n): pass\n', "-n2", passed=4)

    assert list((catalog / "run").iterdir()) == []
    assert not (catalog / "quarantine").exists()
