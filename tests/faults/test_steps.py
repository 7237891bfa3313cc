"""A process is killed before each step of a machine's life in turn: the next one finds nothing half done."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.host.deadline import Deadline

pytestmark = pytest.mark.usefixtures("image", "canary")

SOAK = "SOAK" in os.environ


@pytest.fixture
def die_before(zygote: Any, root: Path, tmp_path: Path) -> Callable[[int, str], int]:
    """Has a process provide a machine and end it, and killed before a step; returns its status."""

    def die_before(step: int, phase: str) -> int:
        status: int = zygote.wait(zygote.fork(steps=step, phase=phase, root=str(root), count=str(tmp_path / "count")))
        return status

    return die_before


@pytest.fixture
def clean_up(root: Path, left: Callable[[], object]) -> Callable[[], object]:
    """Function that cleans up as the next run does; in the first steps there was no supervisor yet."""
    catalog = Catalog(root)
    return lambda: Deadline(60).poll(lambda: not left() or (catalog.gc() and not left()), every=0.02)


def every(steps: range) -> range:
    """Return all steps or, where there is little time, ten of them, others each time."""
    stride = 1 if SOAK else max(1, len(steps) // 10)
    return steps[os.getpid() % stride :: stride]


@pytest.mark.parametrize("phase", ["create", "end"])
def test_a_process_killed_at_any_step_of_starting_or_ending_a_machine_leaves_nothing(
    die_before: Callable[[int, str], int], tmp_path: Path, left: Callable[[], object], clean_up: Callable[[], object], phase: str
) -> None:
    assert die_before(0, phase) == 0, "and the pack is there"
    assert die_before(0, phase) == 0
    steps = int((tmp_path / "count").read_text())
    assert steps >= 4
    for step in every(range(1, steps + 1)):
        assert die_before(step, phase) in (-signal.SIGKILL, 0), "how many there are depends on time, a little"
        clean_up()
        assert not left(), f"after it was killed before step {step} of {steps}"


@pytest.mark.guests
def test_a_process_killed_at_any_step_of_building_a_pack_leaves_a_whole_one_or_none(
    die_before: Callable[[int, str], int], root: Path, tmp_path: Path, left: Callable[[], object], clean_up: Callable[[], object]
) -> None:
    for _ in range(2):
        shutil.rmtree(root / "packs", ignore_errors=True)
        assert die_before(0, "all") == 0
    steps = int((tmp_path / "count").read_text())
    for step in every(range(1, steps + 1)):
        shutil.rmtree(root / "packs")
        assert die_before(step, "all") in (-signal.SIGKILL, 0), "how many there are depends on time, a little"
        clean_up()
        assert not left(), f"after it was killed before step {step} of {steps}"
        found, damaged = packs.scan(Catalog(root).packs)
        assert not damaged
        for pack in found:
            pack.verify()
        assert die_before(0, "all") == 0, "the next one goes on from there"
