"""States in which a crash may leave a disk."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmbottle.disks.crash_states import CrashState, WriteHistory
from pytest_vmbottle.disks.write_log import SECTOR, Entry


def entries(shape: Iterable[str | tuple[int, int]]) -> list[Entry]:
    """Entries of a log: `"flush"`, `"fua"` (a write of one sector that is safe at once), or a write's sector and count."""
    made, end = [], SECTOR
    for what in shape:
        sector, count = what if isinstance(what, tuple) else (100, int(what == "fua"))
        data = end + SECTOR
        end = data + count * SECTOR
        made.append(Entry(sector=sector, count=count, data=data, flush=what == "flush", fua=what == "fua", end=end))
    return made


def history(*shape: str | tuple[int, int], marks: Iterable[int] = ()) -> WriteHistory:
    """A history with marks behind so many entries."""
    made = entries(shape)
    return WriteHistory(made, [made[number - 1].end if number else SECTOR for number in marks])


A, B, C, D = (0, 1), (1, 1), (2, 1), (3, 1)


def test_a_write_can_be_lost_until_a_flush_follows() -> None:
    log = history(A, B, "flush", C, D)
    assert log.unflushed(2) == [1, 2]
    assert log.unflushed(3) == [3]
    assert log.unflushed(4) == [3, 4]


def test_a_write_that_is_safe_at_once_is_never_lost() -> None:
    assert history(A, "fua", B).unflushed(3) == [1, 3]


def test_a_state_has_what_is_not_lost_and_the_later_one_of_two_writes_to_a_place() -> None:
    log = history(A, B, A)
    whole, without = log.content(log.state("w3")), log.content(log.state("w3-u1"))
    assert whole.keys() == without.keys() == {0, 1}
    assert whole[0] == log.writes[2].data
    assert without[0] == log.writes[0].data


def test_a_torn_write_has_its_first_half() -> None:
    log = history((0, 4), (8, 4))
    log_block = log.block // SECTOR
    assert log_block == 4
    finer = history((0, 4), (9, 1))
    assert sorted(finer.content(CrashState(upto=1, torn=True))) == [0, 1]


def test_blocks_are_as_large_as_all_writes_allow() -> None:
    assert history((0, 8), (16, 24)).block == 8 * SECTOR
    assert history((0, 8), (17, 8)).block == SECTOR
    # Larger ones are torn.
    assert history((0, 1 << 20)).block == 4096


@pytest.mark.parametrize(("text", "expected"), [("w2", 1), ("w2-u1", 1), ("w1", 0), ("w3-u1", 2), ("w3", 3), ("w0", 0)])
def test_marks_that_were_set_before_the_crash_are_counted(text: str, expected: int) -> None:
    # Marks after the flush (3 entries), right after the third write (4), and at the end.
    log = history(A, B, "flush", C, "flush", marks=[2, 4, 5])
    assert log.acknowledged(log.state(text)) == expected


def test_losing_all_since_a_flush_is_told_by_the_latest_crash_that_leaves_it() -> None:
    log = history(A, "flush", B, C, marks=[3, 4])
    states, _ = log.states(100, 0)
    found = {log.text(state) for state in states}
    assert {"w3-u2", "w3-u1", "w3"} <= found
    # With the same content and fewer marks, `w1` would prove less.
    assert "w1" not in found


def test_a_write_in_the_middle_can_be_lost_alone() -> None:
    log = history(A, B, C)
    texts = {log.text(state): state.kind for state in log.states(100, 0)[0]}
    assert texts["w3-x2"] == "reordered"
    assert texts["w3-x4"] == "reordered"


shapes = st.lists(st.one_of(st.sampled_from(["flush", "fua"]), st.tuples(st.integers(0, 50), st.integers(1, 16))), max_size=30)


@given(shape=shapes, limit=st.integers(1, 60), seed=st.integers(0, 5))
def test_every_state_is_possible_and_its_name_brings_it_back(shape: list[str | tuple[int, int]], limit: int, seed: int) -> None:
    log = history(*shape, marks=range(len(shape) + 1))
    states, there = log.states(limit, seed)
    assert len(states) <= limit
    assert len(set(states)) == len(states)
    assert all(sum(state.kind == kind for state in states) <= count for kind, count in there.items())
    assert [state.losses for state in states] == sorted(state.losses for state in states)
    for state in states:
        assert state.lost <= set(log.unflushed(state.upto))
        assert log.state(log.text(state)) == state
        # What was flushed before a mark is there: no state loses it.
        assert 0 <= log.acknowledged(state) <= len(shape) + 1


@given(shape=shapes, seed=st.integers(0, 5))
def test_the_same_seed_gives_the_same_states(shape: list[str | tuple[int, int]], seed: int) -> None:
    assert history(*shape).states(10, seed) == history(*shape).states(10, seed)


@given(shape=shapes)
def test_a_program_that_flushes_before_it_acknowledges_loses_nothing_that_it_acknowledged(shape: list[str | tuple[int, int]]) -> None:
    """The model of the whole: write, flush, mark; in no state is a marked write missing."""
    flushed = [step for what in shape if isinstance(what, tuple) for step in (what, "flush")]
    log = history(*flushed, marks=range(2, len(flushed) + 1, 2))
    for state in log.states(200, 0)[0]:
        there = set(range(1, state.upto + 1)) - state.lost
        assert set(range(1, log.acknowledged(state) + 1)) <= there


def test_a_program_that_acknowledges_before_it_flushes_loses_something() -> None:
    log = history(A, B, "flush", marks=[1, 2])
    worst = min(log.states(100, 0)[0], key=lambda state: state.upto - len(state.lost) - log.acknowledged(state))
    assert log.acknowledged(worst) == 2
    assert worst.lost == {1, 2}


@pytest.mark.parametrize("text", ["", "w", "41", "w1-u", "w1-q2", "w1-u0x", "w4", "w3-u3", "w3-x8", "w1-u2"])
def test_a_name_that_this_log_does_not_have_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=repr(text)):
        history(A, "flush", B, C).state(text)
