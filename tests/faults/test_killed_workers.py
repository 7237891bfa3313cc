"""Processes that have machines are killed at random moments: nothing is left, and nothing else is harmed."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import pytest

from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.host.deadline import Deadline

pytestmark = pytest.mark.usefixtures("image", "canary")

AT_ONCE = 8
WORK = """
import pytest, time

@pytest.mark.vm("debian-12")
@pytest.mark.parametrize("n", range(2))
def test_poured(vm, n):
    time.sleep(0.1)

@pytest.mark.vm("debian-12", fresh="boot")
def test_booted(vm, session_vm):
    time.sleep(0.1)

@pytest.mark.vm("debian-12")
def test_endless(vm, session_vm):
    time.sleep(600)
"""


@attrs.frozen
class Worker:
    """A forked pytest run, and when it is to be killed."""

    pid: int
    at: float
    root: Path

    def machines(self) -> list[int]:
        """The processes of the machines that it has now, by its records."""
        found = []
        for path in self.root.glob(f"run/{self.pid}-*/*.json"):
            with suppress(OSError, ValueError):
                process = json.loads(path.read_bytes())["record"]["process"]
                found += [process[0]] if process else []
        return found

    def kill(self) -> list[float]:
        """Kills it; returns after how many seconds each of its machines was gone."""
        handles = []
        for pid in self.machines():
            with suppress(ProcessLookupError):
                handles.append(os.pidfd_open(pid))
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        killed, seconds = time.monotonic(), []
        for handle in handles:
            assert select.select([handle], [], [], 10)[0], "a machine outlived its owner by 10 s"
            seconds.append(time.monotonic() - killed)
            os.close(handle)
        return seconds


@pytest.fixture
def order(tmp_path: Path, root: Path) -> dict[str, Any]:
    """Order for a worker to run tests with machines."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "test_it.py").write_text(WORK)
    return {"run": [], "folder": str(folder), "env": {"VMBOTTLE_CATALOG": str(root), "VMBOTTLE_BACKEND": "standin"}}


def lasting(zygote: Any, order: dict[str, Any]) -> float:
    """Seconds until the endless test begins, when the packs are there."""
    seconds = 0.0
    for _ in range(2):
        began = time.monotonic()
        assert zygote.wait(zygote.fork(**{**order, "run": ["-k", "not endless"]})) == 0
        seconds = time.monotonic() - began
    return seconds


def kill_each(workers: Iterable[Worker]) -> list[float]:
    """Kills each at its time."""
    began, seconds = time.monotonic(), []
    for worker in sorted(workers, key=lambda worker: worker.at):
        time.sleep(max(0.0, began + worker.at - time.monotonic()))
        seconds += worker.kill()
    return seconds


def test_nothing_is_left_of_workers_that_are_killed_at_any_moment(  # noqa: PLR0917 - all fixtures
    zygote: Any,
    order: dict[str, Any],
    catalog: Catalog,
    rounds: Callable[[str, int], range],
    left: Callable[[], Any],
    measured: Callable[[str, Iterable[float]], None],
) -> None:
    whole, chance = lasting(zygote, order), random.Random(4711)
    gone: list[float] = []
    for _ in rounds("A1", 30)[::AT_ONCE]:
        workers = [Worker(zygote.fork(**order), chance.uniform(0, whole * 1.5), catalog.root) for _ in range(AT_ONCE)]
        gone += kill_each(workers)
        assert [zygote.wait(worker.pid) for worker in workers] == [-signal.SIGKILL] * AT_ONCE
    began = time.monotonic()
    Deadline(60).poll(lambda: not left().machines, every=0.05)
    assert not left().machines
    catalog.gc()  # in its very first moment a worker has a lock, and no supervisor yet
    assert not left()
    measured("owner killed to machine gone", gone)
    measured("the last owner killed to nothing left", [time.monotonic() - began])
