"""Memory is shared out in turn: never more than there is, to all in the end, and the dead hold nothing."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Self

import attrs
import pytest

from pytest_vmbottle import CatalogError, SpecError
from pytest_vmbottle.catalog import memory_budget as budget
from pytest_vmbottle.catalog.memory_budget import Budget
from pytest_vmbottle.host import resources as host
from pytest_vmbottle.host.deadline import Deadline
from tests.conftest import line, process

GIB = 1 << 30
PRELUDE = """
import sys, time
from pathlib import Path
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.catalog.memory_budget import Budget
folder, limit, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
budget = Budget(folder, limit=limit)
"""
HOLD = (
    PRELUDE
    + """
with budget.reserve(size, name="vm", deadline=Deadline(60), waiting=lambda _: None):
    print("held", flush=True)
    sys.stdin.read()
"""
)
# Each writes how much it has while it has it, and looks at what all have together.
CONTEND = (
    PRELUDE
    + """
import os
mine = folder.parent / "in-use" / str(os.getpid())
for _ in range(15):
    with budget.reserve(size, name="vm", deadline=Deadline(60), waiting=lambda _: None):
        mine.write_text(str(size))
        together = sum(int(path.read_text() or 0) for path in mine.parent.iterdir())
        assert together <= limit, together
        time.sleep(0.002)
        mine.write_text("0")
"""
)


@pytest.fixture(autouse=True)
def _large_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "total_memory", lambda: 64 * GIB)
    monkeypatch.setattr(host, "available_memory", lambda: 40 * GIB)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "budget"


@attrs.define
class Taker:
    """Somebody who takes a share in a thread of its own: as another process would, since each has a budget of its own."""

    folder: Path
    size: int
    limit: int = 2 * GIB
    deadline: float = 30.0
    budget: Budget = attrs.field(init=False)
    told: list[str] = attrs.field(factory=list)
    has: threading.Event = attrs.field(factory=threading.Event)
    done: threading.Event = attrs.field(factory=threading.Event)
    thread: threading.Thread = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.budget = Budget(self.folder, limit=self.limit)

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self._take)
        self.thread.start()
        assert Deadline(10).poll(lambda: list(self.folder.glob(f"*-{self.budget._owner}-*")), every=0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _take(self) -> None:
        with share(self.budget, self.size, self.told):
            self.has.set()
            self.done.wait(30)


def share(of: Budget, size: int, told: list[str] | None = None, seconds: float = 30.0, name: str = "vm") -> AbstractContextManager[None]:
    return of.reserve(size, name=name, deadline=Deadline(seconds), waiting=(told if told is not None else []).append)


def test_shares_are_given_at_once_while_there_is_room_and_leave_nothing_behind(folder: Path) -> None:
    mine = Budget(folder, limit=2 * GIB)
    with share(mine, GIB), share(Budget(folder, limit=2 * GIB), GIB):
        assert len(list(folder.iterdir())) == 2
    assert list(folder.iterdir()) == []


def test_who_waits_gets_his_share_when_another_one_is_given_back(folder: Path) -> None:
    with Taker(folder, 2 * GIB) as first, Taker(folder, GIB) as second:
        assert first.has.wait(60)
        assert not second.has.wait(0.3)
        first.done.set()
        assert second.has.wait(60)


def test_the_waiting_is_told_with_how_long_it_has_been_and_who_holds_how_much(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "Reminder", Hasty)
    told: list[str] = []
    with process(HOLD, folder, 2 * GIB, 2 * GIB) as holder:
        assert line(holder) == "held"
        with pytest.raises(CatalogError, match=r"1\.0 GiB"):
            share(Budget(folder, limit=2 * GIB), GIB, told, seconds=0.6).__enter__()
    assert re.search(rf"1\.0 GiB.* \d+ s.* {holder.pid} .*2\.0 GiB", told[0])
    assert [path.name for path in folder.glob("*.waiting")] == []


class Hasty:
    """Reminds at once."""

    elapsed = 0.0

    def due(self) -> bool:
        return True


def test_a_small_wish_does_not_overtake_a_large_one(folder: Path) -> None:
    with Taker(folder, GIB) as holder, Taker(folder, 2 * GIB) as large, Taker(folder, GIB) as small:
        assert holder.has.wait(60)
        assert not small.has.wait(0.4)
        holder.done.set()
        assert large.has.wait(60)
        assert not small.has.is_set()
        large.done.set()
        assert small.has.wait(60)


def test_the_share_of_a_killed_process_goes_to_the_next_one(folder: Path) -> None:
    with process(HOLD, folder, 2 * GIB, 2 * GIB) as holder:
        assert line(holder) == "held"
        with Taker(folder, 2 * GIB) as next_one:
            assert not next_one.has.wait(0.3)
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert next_one.has.wait(60)


def test_who_is_killed_while_he_waits_is_not_waited_for(folder: Path) -> None:
    with Taker(folder, 2 * GIB) as holder:
        assert holder.has.wait(60)
        with process(HOLD, folder, 2 * GIB, 2 * GIB) as waiter:
            assert Deadline(20).poll(lambda: len(list(folder.iterdir())) == 2)
            waiter.send_signal(signal.SIGKILL)
            waiter.wait()
        with Taker(folder, GIB) as behind:
            holder.done.set()
            assert behind.has.wait(60)


@pytest.mark.parametrize(
    ("size", "limit", "words"),
    [
        (3 * GIB, 2 * GIB, r"2\.0 GiB"),
        (65 * GIB, None, "64 GiB"),
        (65 * GIB, 100 * GIB, "64 GiB"),
    ],
)
def test_what_can_never_fit_is_refused_at_once(folder: Path, size: int, limit: int | None, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        share(Budget(folder, limit=limit), size, name="db").__enter__()
    assert list(folder.iterdir()) == []


def test_what_does_not_fit_beside_a_processs_own_machines_is_refused_at_once(folder: Path) -> None:
    mine = Budget(folder, limit=2 * GIB)
    with (
        share(mine, GIB),
        share(mine, GIB),
        pytest.raises(SpecError, match=r"2\.0 GiB"),
    ):
        share(mine, GIB).__enter__()


def test_two_budgets_of_one_process_are_one_owner(folder: Path) -> None:
    one, other = (Budget(folder, limit=2 * GIB, owner="0123abcd") for _ in range(2))
    with share(one, GIB), share(other, GIB), pytest.raises(SpecError, match=r"2\.0 GiB"):
        share(other, GIB).__enter__()


def test_processes_that_all_wait_for_more_do_not_wait_for_each_other_for_ever(folder: Path) -> None:
    left, right = Budget(folder, limit=2 * GIB), Budget(folder, limit=2 * GIB)
    done: list[str] = []

    def second(of: Budget, name: str) -> None:
        with share(of, GIB):
            done.append(name)
        holds[name].close()

    with ExitStack() as stack:
        holds = {name: stack.enter_context(ExitStack()) for name in ("left", "right")}
        holds["left"].enter_context(share(left, GIB))
        holds["right"].enter_context(share(right, GIB))
        threads = [threading.Thread(target=second, args=each) for each in ((left, "left"), (right, "right"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert sorted(done) == ["left", "right"]


def test_by_default_a_share_of_what_is_to_spare_is_given_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = Budget(folder), Budget(folder)
    with share(mine, 16 * GIB), share(other, 16 * GIB):  # 0.8 of 40 GiB
        # What the first ones have is no longer available, and is of the budget all the same.
        monkeypatch.setattr(host, "available_memory", lambda: 8 * GIB)
        with pytest.raises(CatalogError, match="32 GiB"):
            share(Budget(folder), GIB, seconds=0.1).__enter__()


def test_on_a_host_without_any_memory_to_spare_one_machine_still_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_memory", lambda: 0)
    began = time.monotonic()
    with share(Budget(folder), GIB):
        assert time.monotonic() - began < 5


def test_processes_never_have_more_than_the_limit_together(folder: Path) -> None:
    (folder.parent / "in-use").mkdir()
    with ExitStack() as stack:
        sizes = [GIB, 2 * GIB, GIB, 3 * GIB]
        running = [stack.enter_context(process(CONTEND, folder, 3 * GIB, size)) for size in sizes]
        assert [each.wait(60) for each in running] == [0] * 4


def test_a_forked_child_that_ends_gives_back_nothing_of_its_parents(folder: Path) -> None:
    with share(Budget(folder, limit=2 * GIB), GIB):
        held = sorted(path.name for path in folder.iterdir())
        child = os.fork()
        if child == 0:
            try:
                with share(Budget(folder, limit=2 * GIB), GIB):
                    pass
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert sorted(path.name for path in folder.iterdir()) == held


def test_what_is_no_share_is_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "note.txt").write_text("mine")
    with share(Budget(folder, limit=2 * GIB), GIB):
        assert (folder / "note.txt").read_text() == "mine"
