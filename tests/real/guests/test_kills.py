"""Runs that are killed in the middle of faults: nothing is left of their machines."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vmbottle.host.deadline import Deadline
from tests.real.conftest import qemus

if TYPE_CHECKING:
    from pytest_vmbottle.catalog.catalog import Catalog
    from tests.conftest import Rounds

SUITE = """
import itertools, pathlib, pytest


@pytest.mark.vm("debian-12", disks={"data": "32M"})
def test_faults(vm):
    faults = vm.faults
    makers = [
        lambda: faults.disk_errors("data", on="write", after=1),
        lambda: faults.slow_disk("root", iops=200),
        lambda: faults.lying_disk("data"),
        lambda: faults.disk_full("/srv", leave="1M"),
        lambda: faults.memory_pressure(leave="200M"),
        lambda: faults.cpu_steal(40),
        lambda: faults.freeze(0.2),
        lambda: faults.clock(jump=86400),
        lambda: faults.process("ssh").pause(),
    ]
    pathlib.Path("began").touch()
    for one, other in itertools.cycle(itertools.combinations(makers, 2)):
        with one(), other():
            vm.exec("dd if=/dev/zero of=/dev/disk/by-id/virtio-data bs=4k count=4 oflag=direct", check=False)
"""


def kill_in_the_middle(folder: Path, root: Path, seconds: float) -> None:
    """Start a run, kill it some seconds after its machine is there, and wait until nothing is left of that."""
    began = folder / "began"
    began.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--vm-artifacts=never",
        "--vm-missing=fail",
        f"--vm-catalog={root}",
    ]
    with subprocess.Popen(argv, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        assert Deadline(120).poll(lambda: began.exists() or run.poll() is not None)
        time.sleep(seconds)
        run.send_signal(signal.SIGKILL)
        said = run.communicate()[0].decode()
        assert run.returncode == -signal.SIGKILL, said
    # By the run's own folder: others have machines in this catalog meanwhile.
    assert Deadline(60).poll(lambda: not qemus(root / f"run/{run.pid}-") and not list(root.glob(f"run/{run.pid}-*")))


def test_nothing_is_left_of_runs_that_are_killed_in_the_middle_of_faults(tmp_path: Path, vm_catalog: Catalog, rounds: Rounds) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(SUITE)
    chance = random.Random(4711)
    for _ in rounds("F2", 5):
        kill_in_the_middle(tmp_path, vm_catalog.root, chance.uniform(0, 4))
