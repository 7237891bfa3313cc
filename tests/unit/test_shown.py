"""Text from a guest that is safe to show, judged as terminals and the runners of CI services judge it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_vmbottle.shown import MOST, coloured, printable, tail, visible

# -- as the runners do --------------------------------------------------------------------------------------------------------------------


def _github(line: str) -> bool:
    return line.strip(_DOTNET_BLANKS).startswith("::") or "##[" in line


def _azure(line: str) -> bool:
    return "##vso[" in line.lower() or "##[" in line


def _gitlab(line: str) -> bool:
    return re.search(r"section_(?:start|end):", line) is not None


def _teamcity(line: str) -> bool:
    return "##teamcity[" in line.lower()


def _buildkite(line: str) -> bool:
    return line.startswith(("---", "+++", "~~~", "^^^"))


_DOTNET_BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
RUNNERS = [_github, _azure, _gitlab, _teamcity, _buildkite]
COMMANDS = [
    "::error file=x::y",
    "  \t::set-output name=a::b",
    "\u2003\xa0::add-mask::x",
    "\x85::stop-commands::x",
    "ok\n::group::x",
    "ok\r\n ::group::x",
    "ok\r::group::x",
    "::::error::x",
    "##[error]x",
    "progress 3 % ##[endgroup]",
    "###[section]",
    "#####[section]",
    "##vso[task.complete result=Succeeded]",
    "x ##VSO[task.setvariable variable=a]b",
    "section_start:1:x\r\x1b[0K",
    "x section_end:1:x\r\x1b[0K",
    "##teamcity[testFailed name='x']",
    "a ##TeamCity[x]",
    "--- a section",
    "+++",
    "~~~ muted",
    "^^^ +++",
    "-----BEGIN",
    "\n\n+++ b/file",
]


def lines(text: str) -> list[str]:
    return re.split("\r\n|\n|\r", text)


@pytest.mark.parametrize("text", COMMANDS)
def test_the_examples_are_commands_to_some_service_until_they_are_made_safe(text: str) -> None:
    assert any(runner(line) for line in lines(text) for runner in RUNNERS)
    assert not any(runner(line) for line in lines(printable(text)) for runner in RUNNERS)


PARTS = st.sampled_from(
    [*"#[:-+~^ \t\n\r\v\x1b\x1c\x85\u2028\u200b", "##", "::", "vso[", "teamcity[", "section_start:", "---", "x", "é", "\udcff"]
)


@given(st.lists(PARTS, max_size=30).map("".join))
@settings(max_examples=200)
def test_no_line_of_shown_text_is_a_command_to_any_service_however_often_it_is_made_safe(text: str) -> None:
    shown = printable(text)

    assert not any(runner(line) for line in lines(shown) for runner in RUNNERS)
    assert printable(shown) == shown


@given(st.text())
def test_nothing_that_steers_a_terminal_ends_a_line_or_reorders_text_is_shown(text: str) -> None:
    for shown in (printable(text), visible(text)):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", shown)
        shown.encode()


def test_text_without_commands_stays_as_it_is() -> None:
    for text in (
        "a\tb\nc\n",
        "inet6 ::1/128",
        "std::string",
        "a -- b",
        "# title\n## more",
        "x --- y\n",
        "subsection_start",
        "",
        "äöü 😀\n",
    ):
        assert printable(text) == text
    assert printable("a\r\nb") == "a\nb"
    assert printable("spinner\rdone") == "spinner\\rdone"


def test_colours_of_a_report_stay_and_nothing_else_that_steers_a_terminal() -> None:
    shown = coloured("\x1b[31;1mred\x1b[0m\n::error::x\n\x1b[2J\x1b]0;title\x07")

    assert shown.startswith("\x1b[31;1mred\x1b[0m\n")
    assert shown.count("\x1b") == 2
    assert not any(_github(line) for line in lines(shown))


# -- in a time that is bounded ------------------------------------------------------------------------------------------------------------

PIECES = st.lists(
    st.one_of(PARTS, st.sampled_from(COMMANDS), st.text(max_size=20), st.sampled_from(["\n", " ", "\x00", "a", "😀", "\u202e"])),
    min_size=1,
    max_size=4,
).map("".join)


@given(PIECES.filter(bool), st.sampled_from([lambda text: text, lambda text: f"{text}\n", lambda text: f" {text}"]))
@settings(max_examples=20)
def test_eight_megabytes_of_any_text_are_shown_at_once_and_cut(piece: str, shape: Callable[[str], str]) -> None:
    unit = shape(piece)
    text = (unit * ((8 << 20) // len(unit) + 1))[: 8 << 20]
    began = time.process_time()
    shown = printable(text)
    seconds = time.process_time() - began

    assert seconds < 0.5  # of the processor: a tenth of it where nothing else runs
    assert f"[{(8 << 20) - MOST} characters left out]" in shown


@pytest.mark.parametrize("unit", ["\n", " ", "::\n", " ::\n", "##[", "#", "\x00", "\u202e", "\udcff", "\r\n", "---\n", "a"])
def test_to_make_control_characters_visible_takes_a_time_that_grows_with_the_text(unit: str) -> None:
    def seconds(length: int) -> float:
        text = unit * (length // len(unit))
        began = time.process_time()
        visible(text)
        tail(text, 60)
        return time.process_time() - began

    assert seconds(1 << 21) < 40 * seconds(1 << 18) + 0.5


def test_of_a_long_text_its_beginning_and_its_end_are_shown() -> None:
    assert printable("a" * 50 + "b" * 60 + "c" * 40, 80) == f"{'a' * 40}\n[70 characters left out]\n{'c' * 40}"


def test_a_tail_says_how_much_is_above_it() -> None:
    assert tail("a\nb\n", 2) == "a\nb\n"
    assert tail("a\nb\nc\n", 2) == "[1 line above]\nb\nc"
    assert tail("\n" * 100, 3) == "[97 lines above]\n\n\n"
    assert tail("", 3) == ""
