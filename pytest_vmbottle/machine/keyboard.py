"""Key chords from names of keys and text."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_vmbottle.backends.port import Chord

__all__ = ["chords"]

# Names are those of QKeyCode in QEMU's qapi/ui.json.
_MODIFIERS = frozenset({"shift", "shift_r", "ctrl", "ctrl_r", "alt", "alt_r", "meta_l", "meta_r"})
_NAMED = _MODIFIERS | {
    *(f"f{number}" for number in range(1, 13)),
    *("ret", "esc", "tab", "spc", "backspace", "insert", "delete", "home", "end", "pgup", "pgdn", "up", "down", "left", "right"),
    *("caps_lock", "num_lock", "scroll_lock", "print", "sysrq", "pause", "menu"),
    *(f"kp_{name}" for name in (*"0123456789", "add", "subtract", "multiply", "divide", "decimal", "enter")),
}
_PLAIN = {
    **{character: character for character in "abcdefghijklmnopqrstuvwxyz0123456789"},
    **dict(zip(" \n\t-=[]\\", ("spc", "ret", "tab", "minus", "equal", "bracket_left", "bracket_right", "backslash"), strict=True)),
    **dict(zip(";'`,./", ("semicolon", "apostrophe", "grave_accent", "comma", "dot", "slash"), strict=True)),
}
# By the plain character on the same key, since QEMU names keys and not what is printed on them.
_SHIFTED = dict(zip('ABCDEFGHIJKLMNOPQRSTUVWXYZ)!@#$%^&*(_+{}|:"~<>?', "abcdefghijklmnopqrstuvwxyz0123456789-=[]\\;'`,./", strict=True))
# Single characters are keys in chords, but not names: as words they are text.
_KEYS = _NAMED | set(_PLAIN.values())


def chords(words: Iterable[str]) -> list[Chord]:
    r"""Return the keys to hold down together, one chord after the other.

    A word is the name of a key, or names joined by `-` of which the first is a modifier; any other word is typed on a US keyboard.

    >>> chords(["ctrl-alt-f2", "ret", "Hi\n"])
    [('ctrl', 'alt', 'f2'), ('ret',), ('shift', 'h'), ('i',), ('ret',)]

    Raises:
        ValueError: A combination names an unknown key, or a character is not on a US keyboard.
        TypeError: A word is not a string.
    """
    return [chord for word in words for chord in _word(word)]


def _word(word: str) -> list[Chord]:
    if not isinstance(word, str):
        raise TypeError(f"{word!r} is not a string: keys are names such as 'ret' or 'ctrl-alt-f2', or text to type")
    # First of all: a name such as `up` is the key, not two letters.
    if word in _NAMED:
        return [(word,)]
    first, *others = word.split("-")
    if first in _MODIFIERS and others:
        # Only words that begin with a modifier are chords, so that text with a dash in it can be typed.
        return [(first, *(_key(name, word) for name in others))]
    return [_character(character) for character in word]


def _key(name: str, word: str) -> str:
    if name not in _KEYS:
        near = difflib.get_close_matches(name, _KEYS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "names are QEMU's, such as 'ret', 'spc' or 'f2'."
        raise ValueError(f"{word!r} has no key {name!r} to press: {hint} To type it as text, give its characters one by one: *{word!r}")
    return name


def _character(character: str) -> Chord:
    if character in _PLAIN:
        return (_PLAIN[character],)
    if character in _SHIFTED:
        return ("shift", _PLAIN[_SHIFTED[character]])
    raise ValueError(f"{character!r} is not on a US keyboard: type ASCII, or write to the guest's files with vm.path()")
