"""Starts of machines: those that fail are remembered, those that are cancelled leave nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_vmbottle import CatalogError
from pytest_vmbottle.service import starts as module
from pytest_vmbottle.service.starts import Starts
from pytest_vmbottle.standalone.record import Record


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), 120))


def new(folder: Path, source: str, **keywords: Any) -> dict[str, Any]:
    """A request for a machine that cannot be made here, since the catalog is none."""
    (folder / "catalog").touch()
    places = {"machines": str(folder / "machines"), "catalog": str(folder / "catalog"), "folder": str(folder)}
    return {"new": {**places, "source": source, "name": "web", "keywords": keywords, "settings": {}}}


async def over(starts: Starts) -> None:
    while starts.is_under_way("web"):
        await asyncio.sleep(0.05)


def test_a_start_that_failed_is_remembered_with_its_reason_until_it_is_forgotten(tmp_path: Path) -> None:
    async def work() -> tuple[str, Record | None, bool, bool]:
        starts = Starts(1)
        begun = starts.begin(Record(name="web", source="x"), new(tmp_path, "debian-12", cpus=0))
        await over(starts)
        failed = starts.get("web")
        return begun.state, failed, starts.forget("web"), starts.forget("web")

    state, failed, was_there, again = run(work)
    assert (state, was_there, again) == ("starting", True, False)
    assert failed is not None
    assert failed.state == "error"
    assert "cpus=0" in failed.reason
    assert list(tmp_path.iterdir()) == [tmp_path / "catalog"]


def test_a_machine_whose_daemon_fails_leaves_no_folder(tmp_path: Path) -> None:
    async def work() -> Record | None:
        starts = Starts(1)
        starts.begin(Record(name="web", source="x"), new(tmp_path, "debian-12"))
        await over(starts)
        return starts.get("web")

    failed = run(work)
    assert failed.state == "error"
    assert "catalog" in failed.reason
    assert list((tmp_path / "machines").iterdir()) == []


def test_a_machine_is_started_once_at_a_time(tmp_path: Path) -> None:
    async def work() -> None:
        starts = Starts(1)
        starts.begin(Record(name="web", source="x"), new(tmp_path, "debian-12", cpus=0))
        with pytest.raises(CatalogError, match="already"):
            starts.begin(Record(name="web", source="x"), {})
        await over(starts)

    run(work)


def test_a_start_that_is_cancelled_has_no_process_any_more_and_is_no_failure(tmp_path: Path) -> None:
    async def work() -> tuple[int, bool, Record | None]:
        starts = Starts(1)
        before = set(psutil.Process().children())
        starts.begin(Record(name="web", source="x"), new(tmp_path, "debian-12"))
        while not (children := list(set(psutil.Process().children()) - before)):
            await asyncio.sleep(0.01)
        cancelled = await starts.cancel("web")
        return children[0].pid, cancelled, starts.get("web")

    pid, cancelled, record = run(work)
    assert (cancelled, record) == (True, None)
    assert not psutil.pid_exists(pid)
    machines = tmp_path / "machines"
    assert not machines.exists() or list(machines.iterdir()) == []


def test_a_start_that_is_cancelled_before_it_has_begun_is_no_start_any_more(tmp_path: Path) -> None:
    async def work() -> tuple[bool, Record | None]:
        starts = Starts(1)
        starts.begin(Record(name="web", source="x"), new(tmp_path, "debian-12"))
        return await starts.cancel("web"), starts.get("web")

    assert run(work) == (True, None)


def test_starts_beyond_their_number_wait_and_can_be_cancelled(tmp_path: Path) -> None:
    async def work() -> tuple[int, list[str]]:
        starts, before = Starts(1), set(psutil.Process().children())
        for number in range(3):
            starts.begin(Record(name=f"web{number}", source="x"), new(tmp_path, "debian-12"))
        while not (children := set(psutil.Process().children()) - before):
            await asyncio.sleep(0.01)
        running = len(children)
        names = [record.name for record in starts]
        await starts.cancel_all()
        assert not list(starts)
        return running, names

    assert run(work) == (1, ["web0", "web1", "web2"])


def test_no_more_failures_than_so_many_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FAILURES", 2)
    # No process can be made.
    monkeypatch.setattr("sys.executable", os.fspath(tmp_path / "none"))

    async def work() -> list[str]:
        starts = Starts(4)
        for number in range(4):
            starts.begin(Record(name=f"web{number}", source="x"), {})
        while any(starts.is_under_way(f"web{number}") for number in range(4)):
            await asyncio.sleep(0.01)
        return [record.name for record in starts]

    assert run(work) == ["web2", "web3"]
