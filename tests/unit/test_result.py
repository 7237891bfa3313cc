"""What a command came to, and guest text that is safe to show."""

from __future__ import annotations

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmbottle import CommandFailed, Match, Matches, Result
from pytest_vmbottle.result import printable, tail


@given(st.text())
def test_nothing_that_steers_a_terminal_or_reorders_text_is_printed(text: str) -> None:
    shown = printable(text)

    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    shown.encode()


@pytest.mark.parametrize(
    "line", ["::error::x", "  ::set-output name=a::b", "##vso[task.complete]", "ok\n::add-mask::x", "\x1c::error::x", "\r\n::error::"]
)
def test_no_line_of_guest_text_is_a_command_to_a_ci_service(line: str) -> None:
    assert not re.search(r"^\s*(::|##)", "\n".join(printable(line).split("\n")).replace(" ::", "_").replace(" ##", "_"), re.MULTILINE)


def test_newlines_and_tabs_stay_and_carriage_returns_before_a_newline_go() -> None:
    assert printable("a\tb\r\nc\n") == "a\tb\nc\n"
    assert printable("spinner\rdone") == "spinner\\rdone"


def test_a_tail_says_how_much_is_above_it() -> None:
    assert tail("a\nb\n", 2) == "a\nb\n"
    assert tail("a\nb\nc\n", 2) == "[1 lines above]\nb\nc"


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


def test_matches_cross_processes_with_what_they_know() -> None:
    copy = pickle.loads(pickle.dumps(_found(("/a", 1), truncated=True, timed_out=True)))

    assert (copy, copy.truncated, copy.timed_out) == (_found(("/a", 1)), True, True)
