"""What a command came to, and what a search found."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmbottle import CommandFailed, Match, Matches, Result


@given(st.binary(), st.binary())
def test_bytes_come_back_as_the_guest_sent_them(out: bytes, err: bytes) -> None:
    result = Result(argv=("x",), returncode=0, stdout=out.decode("utf-8", "surrogateescape"), stderr=err.decode("utf-8", "surrogateescape"))

    assert (result.stdout_bytes, result.stderr_bytes) == (out, err)


def test_check_returns_the_result_or_raises_with_it() -> None:
    good, bad = (Result(argv=("x",), returncode=code, stdout="", stderr="") for code in (0, 3))

    assert good.check() is good
    assert good.ok
    assert not bad.ok
    with pytest.raises(CommandFailed, match="status 3") as caught:
        bad.check()
    assert caught.value.result is bad


def test_the_message_of_a_failed_command_begins_with_the_command_in_one_short_line() -> None:
    short, long = (Result(argv=("sh", "-c", script), returncode=3, stdout="", stderr="") for script in ("a\nb", "x" * 200))

    assert str(CommandFailed(short)).startswith("`sh -c 'a b'` ended with status 3\n")
    assert str(CommandFailed(long)).startswith("`sh -c xxx")
    assert len(str(CommandFailed(long)).splitlines()[0]) < 120


def test_the_representation_shows_the_command_as_it_can_be_pasted_and_cuts_long_streams() -> None:
    text = repr(Result(argv=("echo", "a b", "$HOME"), returncode=0, stdout="x\n" * 1000, stderr=""))

    assert "$ echo 'a b' '$HOME'" in text
    assert "[940 lines above]" in text
    assert text.count("\n") < 80


def _found(*places: tuple[str, int], truncated: bool = False, timed_out: bool = False) -> Matches:
    return Matches([Match(path=path, line=line, text="x\x1b[31m") for path, line in places], truncated=truncated, timed_out=timed_out)


def test_matches_are_grouped_by_file_in_the_order_in_which_they_were_found() -> None:
    found = _found(("/b", 1), ("/a", 2), ("/b", 3))

    assert {path: [match.line for match in matches] for path, matches in found.by_path().items()} == {"/b": [1, 3], "/a": [2]}
    assert list(found.by_path()) == ["/b", "/a"]


def test_matches_are_a_list_that_shows_whether_it_is_all_and_nothing_that_steers_a_terminal() -> None:
    found = _found(("/a\n", 2), truncated=True)

    assert found == [Match(path="/a\n", line=2, text="x\x1b[31m")]
    assert repr(found) == "<Matches: 1, truncated\n/a\n:2: x\\x1b[31m>"
    assert repr(_found(timed_out=True)) == "<Matches: none, timed_out>"


def test_of_a_long_output_no_more_is_shown_than_anybody_reads() -> None:
    endless = Result(argv=("yes",), returncode=1, stdout="y" * (4 << 20), stderr="\x1b\n" * (2 << 20))
    many = Matches([Match(path="/a", line=line, text="x" * 1000) for line in range(1, 10_001)])

    assert len(repr(endless)) + len(str(CommandFailed(endless))) + len(repr(many)) < 1 << 20
    assert "[9940 matches above]" in repr(many)


def test_matches_cross_processes_with_what_they_know() -> None:
    copy = pickle.loads(pickle.dumps(_found(("/a", 1), truncated=True, timed_out=True)))

    assert (copy, copy.truncated, copy.timed_out) == (_found(("/a", 1)), True, True)
