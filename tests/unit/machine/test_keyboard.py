"""What is pressed for what somebody wants typed."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmbottle.machine.keyboard import _KEYS, _NAMED, chords


@pytest.mark.parametrize(
    ("word", "pressed"),
    [
        ("ret", [("ret",)]),
        ("ctrl-alt-f2", [("ctrl", "alt", "f2")]),
        ("shift-a", [("shift", "a")]),
        ("shift", [("shift",)]),
        ("a", [("a",)]),
        ("aB!", [("a",), ("shift", "b"), ("shift", "1")]),
        ("up-down", [(key,) for key in ("u", "p", "minus", "d", "o", "w", "n")]),
        ("end\n", [("e",), ("n",), ("d",), ("ret",)]),
        ("", []),
    ],
)
def test_a_word_is_a_key_or_keys_held_together_or_else_text(word: str, pressed: list[tuple[str, ...]]) -> None:
    assert chords([word]) == pressed


@given(st.text(string.ascii_letters + string.digits + string.punctuation + " \n\t"))
def test_each_character_by_itself_is_one_key_perhaps_with_shift_whatever_word_they_make(text: str) -> None:
    pressed = chords(text)

    assert len(pressed) == len(text)
    assert all(chord[-1] in _KEYS - _NAMED | {"ret", "tab", "spc"} and chord[:-1] in ((), ("shift",)) for chord in pressed)
    assert len(set(pressed)) == len(set(text))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("ctrl-alt-fn2", "'f2'"),
        ("ctrl-", "'ctrl-'"),
        ("ctrl-C", r"\*'ctrl-C'"),
        ("naïve", "'ï'"),
        ("a\0", r"'\\x00'"),
    ],
)
def test_what_cannot_be_pressed_is_refused_with_what_to_do(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        chords(["ret", word])


def test_what_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match="2"):
        chords(["a", 2])  # type: ignore[list-item]
