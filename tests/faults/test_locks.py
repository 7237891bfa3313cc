"""Locks when their holders are killed, stopped, or robbed of the file."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from pytest_vmbottle import CatalogError
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.memory_budget import Budget
from pytest_vmbottle.host.deadline import Deadline
from tests.conftest import line, process

Rounds = Callable[[str, int], range]
Measured = Callable[[str, Iterable[float]], None]

PRELUDE = """
import os, sys, time
from pathlib import Path
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.catalog.memory_budget import Budget
from pytest_vmbottle.catalog.catalog import Catalog
catalog = Catalog(Path(sys.argv[1]))
"""
# Says when it has it, as the clock that all processes share has it.
TAKE = (
    PRELUDE
    + """
print("waits", flush=True)
with catalog.lock("thing", deadline=Deadline(60), waiting=lambda _: None):
    print(time.monotonic(), flush=True)
    sys.stdin.read()
"""
)
SHARE = (
    PRELUDE
    + """
print("waits", flush=True)
with Budget(catalog.budget, limit=1 << 30).reserve(1 << 30, name="vm", deadline=Deadline(60), waiting=lambda _: None):
    print(time.monotonic(), flush=True)
    sys.stdin.read()
"""
)
# Each marks that it is in, sees that nobody else is, and counts.
OCCUPY = (
    PRELUDE
    + """
inside, counter = catalog.root / "inside", catalog.root / "counter"
for _ in range(int(sys.argv[2])):
    with catalog.lock("thing", deadline=Deadline(120), waiting=lambda _: None):
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        counter.write_text(str(int(counter.read_text()) + 1))
        inside.unlink()
"""
)


def quiet(_: str) -> None:
    pass


@pytest.mark.parametrize("text", [TAKE, SHARE], ids=["lock", "share"])
def test_what_a_killed_process_held_goes_to_the_next_one_at_once(root: Path, text: str, rounds: Rounds, measured: Measured) -> None:
    taken = []
    with ExitStack() as stack:
        holder = stack.enter_context(process(text, root))
        assert line(holder) == "waits"
        float(line(holder))
        for _ in rounds("B5", 2):
            waiter = stack.enter_context(process(text, root))
            assert line(waiter) == "waits"
            time.sleep(0.15)  # until it waits in earnest
            killed = time.monotonic()
            holder.send_signal(signal.SIGKILL)
            taken.append(float(line(waiter)) - killed)
            holder = waiter
    measured("B5 hand-over after kill -9", taken)
    assert statistics.median(taken) < 1.0


def test_a_holder_that_is_stopped_is_named_when_the_time_is_over(root: Path, catalog: Catalog) -> None:
    with process(TAKE, root) as holder:
        assert line(holder) == "waits"
        float(line(holder))
        holder.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with (
            pytest.raises(CatalogError, match=str(holder.pid)),
            catalog.lock("thing", deadline=Deadline(1), waiting=quiet),
        ):
            pass
        assert time.monotonic() - began >= 1


@pytest.mark.usefixtures("catalog")
def test_no_two_of_many_processes_are_ever_in_the_same_lock(root: Path, rounds: Rounds) -> None:
    (root / "counter").write_text("0")
    times = len(rounds("B7", 10))
    with ExitStack() as stack:
        running = [stack.enter_context(process(OCCUPY, root, str(times))) for _ in range(4)]
        assert [each.wait(600) for each in running] == [0] * 4
    assert int((root / "counter").read_text()) == 4 * times


def test_a_lock_whose_file_is_removed_is_still_nobody_elses(root: Path, catalog: Catalog, rounds: Rounds) -> None:
    with process(TAKE, root) as holder:
        assert line(holder) == "waits"
        float(line(holder))
        for _ in rounds("B8", 1):
            for path in (root / "locks").iterdir():
                path.unlink()
            with pytest.raises(CatalogError, match="thing"), catalog.lock("thing", deadline=Deadline(0.2), waiting=quiet):
                pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with catalog.lock("thing", deadline=Deadline(60), waiting=quiet):
            assert (root / "locks" / "thing.lock").exists()


def test_no_hold_is_passed_on_to_a_process_that_is_started_meanwhile(root: Path, catalog: Catalog) -> None:
    pack = root / "packs" / "key"
    pack.mkdir(parents=True)
    hold = catalog.lease(pack)
    with (
        catalog.lock("thing", deadline=Deadline(60), waiting=quiet),
        Budget(catalog.budget, limit=1 << 30).reserve(1 << 30, name="vm", deadline=Deadline(60), waiting=quiet),
        catalog.rundir("vm"),
        subprocess.Popen(["sleep", "60"], close_fds=False) as child,
    ):
        theirs, ours = files_of(child.pid), files_of(os.getpid())
        child.kill()
    os.close(hold)

    assert [path for path in theirs if path.startswith(str(root))] == []
    assert len([path for path in ours if path.startswith(str(root))]) >= 4, "and this process has them open"


def files_of(pid: int) -> list[str]:
    """Return the files that a process has open."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the one for looking
            found.append(str(path.readlink()))
    return found
