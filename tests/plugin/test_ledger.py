"""The ledger: the last lines of a run say what it made, kept, reclaimed and left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.catalog.catalog import Catalog
from tests.plugin.conftest import said

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.plugin.conftest import Run

TWO = '@pytest.mark.vm("debian-12")\n@pytest.mark.parametrize("n", range(2))\ndef test_it(vm, n): pass\n'
# A process that names the folder of its machine, as a hypervisor does, and that nothing ends.
LEAKS = """
import subprocess, sys
from pathlib import Path

@pytest.mark.vm("debian-12")
def test_it(vm):
    folder = vm.console.path.parent
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(61)", str(folder / "disk")],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    process.returncode = 0
    Path({note!r}).write_text(str(process.pid))
"""


@pytest.mark.parametrize("workers", [pytest.param((), id="alone"), pytest.param(("-n2",), id="xdist", marks=pytest.mark.guests)])
def test_a_run_ends_with_what_it_made_and_kept(run: Run, workers: tuple[str, ...]) -> None:
    lines = run(TWO, *workers, passed=2).outlines

    # The machine that the pack is made of is one too, and what is built has a folder.
    made, left = [line for line in lines if line][-3:-1]
    assert re.match("vmbottle: .*3 machines, 1 pack, 1 lock, 4 folders; .*1 pack .*1 lock", made)
    assert left.startswith("vmbottle: ")
    assert "1" not in left


def test_a_run_without_machines_has_no_ledger(run: Run) -> None:
    assert "vmbottle: " not in said(run("def test_it(): pass\n", passed=1))


def test_what_a_killed_run_left_is_reclaimed_by_the_next_and_told(run: Run, catalog: Path) -> None:
    killed = f"""
from pytest_vmbottle.catalog.catalog import Catalog, _Owner
from pathlib import Path
import os
_Owner.supervise = lambda self: None  # nobody sees to what this process leaves
with Catalog(Path({str(catalog)!r})).rundir("vm-dead"):
    os._exit(1)
"""
    subprocess.run([sys.executable, "-c", killed], check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert list((catalog / "run").glob("*/vm-dead"))
    result = run(TWO, passed=2)

    assert re.search("^vmbottle: reclaimed.* 1 machine, 1 run", said(result), re.MULTILINE)


@pytest.fixture
def leaked(tmp_path: Path) -> Iterator[Path]:
    """A file that is to hold the number of a process, which is ended after the test."""
    note = tmp_path / "leaked"
    yield note
    os.kill(int(note.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("workers", [pytest.param((), id="alone"), pytest.param(("-n2",), id="xdist", marks=pytest.mark.guests)])
@pytest.mark.parametrize(("option", "status"), [((), 0), (("--vm-fail-on-leak",), 1)], ids=["told", "failed"])
def test_a_process_that_outlives_its_machine_is_told_and_fails_the_run_if_that_is_wanted(
    run: Run, leaked: Path, workers: tuple[str, ...], option: tuple[str, ...], status: int
) -> None:
    text = said(run(LEAKS.format(note=str(leaked)), *workers, *option, status=status, passed=1))

    assert re.search(rf"^vmbottle: LEAK: .*\b{leaked.read_text()}\b", text, re.MULTILINE)


def test_a_pack_that_was_damaged_is_kept_and_the_reason_told(run: Run, catalog: Path) -> None:
    run(TWO, passed=2)
    (pack,) = Catalog(catalog).packs.iterdir()
    pack.chmod(0o700)
    disk = pack / "disk.qcow2"
    disk.chmod(0o600)
    disk.write_bytes(b"\0" * disk.stat().st_size)
    text = said(run(TWO, passed=2))

    assert re.search(rf"^vmbottle: kept {re.escape(str(catalog))}/quarantine/{pack.name}-[0-9a-f]+: ", text, re.MULTILINE)
