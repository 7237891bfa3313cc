"""The books of a run: added up over processes, and told in a few lines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_vmbottle.catalog.ledger import Ledger, processes_naming


def test_nothing_made_is_nothing_told() -> None:
    assert Ledger().lines() == []


def test_everything_is_counted_and_one_of_a_kind_is_not_called_many() -> None:
    ledger = Ledger(machines=1, folders=2, packs={"a"}, locks={"x", "y"})
    ledger.reclaim(process=2, machine=1, run=0)

    assert ledger.lines() == [
        "made 1 machine, 1 pack, 2 locks, 2 folders; kept 1 pack for later runs; 2 locks (lock files are never removed)",
        "reclaimed from dead runs: 1 machine, 2 processes; left behind: nothing",
    ]


def test_the_books_of_workers_are_added_up_and_what_they_share_counts_once() -> None:
    workers = [Ledger(machines=2, folders=3, packs={"a"}, locks={"x", "a"}), Ledger(machines=1, folders=1, packs={"b"}, locks={"x"})]
    workers[0].keep("/q/pack", "a damaged pack")
    workers[1].reclaim(machine=1)
    workers[1].left.append("process 9 still runs")
    total = Ledger()
    for worker in workers:
        total.add(json.loads(json.dumps(worker.sent())))

    assert (total.machines, total.folders, total.packs, total.locks) == (3, 4, {"a", "b"}, {"x", "a"})
    assert total.lines()[1:] == [
        "reclaimed from dead runs: 1 machine; left behind: 1",
        "kept /q/pack: a damaged pack",
        "LEAK: process 9 still runs",
    ]


@pytest.fixture
def naming(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that names something in a folder."""
    argv = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", str(tmp_path / "owner" / "vm" / "disk.qcow2")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process:
        process.stdout.readline()
        yield process
        process.kill()


def test_what_is_still_there_is_left_behind(tmp_path: Path, naming: subprocess.Popen[bytes]) -> None:
    owner, lock, gone = tmp_path / "owner", tmp_path / "owner.lock", tmp_path / "gone"
    lock.symlink_to("nowhere")
    ledger = Ledger()
    ledger.leave(owner, lock, gone)

    assert str(lock) in ledger.left[0]
    assert ledger.left[1].startswith(f"process {naming.pid} still runs: {sys.executable} -c ")
    assert len(ledger.left) == 2


def test_what_ends_in_a_moment_is_not_left_behind(tmp_path: Path, naming: subprocess.Popen[bytes]) -> None:
    assert dict(processes_naming(f"{tmp_path}/owner/")).keys() == {naming.pid}
    ledger = Ledger()
    naming.kill()
    ledger.leave(tmp_path / "owner")

    assert ledger.left == []


def test_a_folder_whose_name_only_begins_alike_is_another_one(tmp_path: Path, naming: subprocess.Popen[bytes]) -> None:
    assert naming.poll() is None
    ledger = Ledger()
    ledger.leave(tmp_path / "own")

    assert ledger.left == []
