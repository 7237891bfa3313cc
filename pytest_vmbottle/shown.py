"""Neutralising of guest text for terminals, reports, errors and CI logs.

CI services obey command lines in the logs of their jobs. A guest that could write one could set variables, hide what follows, or make the
job succeed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

__all__ = ["MOST", "coloured", "hidden", "printable", "redact", "redact_variables", "tail", "visible"]

MOST = 1 << 18
"""Characters of a text that are shown at most."""
# C0 but tab and newline, DEL, C1, what else ends lines, and the bidirectional controls that can reorder what a reader sees. Surrogates have
# a way of their own.
_CONTROLS = (0x61C, 0x200E, 0x200F, *range(9), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {number: ascii(chr(number))[1:-1] for number in _CONTROLS}
_UNSAFE = re.compile(f"[{''.join(map(chr, _CONTROLS))}\ud800-\udfff]")
# GitHub's runner trims a line before it looks for `::`. By what .NET takes for blanks, now or in older versions.
_GITHUB = re.compile(
    "^[\\t\\v\\f\\r\\x1c- \\x85\\xa0\u1680\u180e\u2000-\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff]*:(?=:)", re.MULTILINE
)
# Azure's agent, TeamCity's and the older commands of GitHub's runner are found anywhere in a line, GitLab's too.
_ANYWHERE = re.compile(r"#(?=#(?:\[|vso\[|teamcity\[))|section_(?=(?:start|end):)", re.IGNORECASE)
# SGR alone, which only changes how text looks. pytest's own colours are such.
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")
# Headings of Buildkite's logs, which fold what follows.
_BUILDKITE = ("---", "+++", "~~~", "^^^")
_SHORTEST = 4
"""Characters of a secret at least: a shorter one would be found in ordinary words."""
_SECRETS: dict[str, None] = {}
_NAMES: set[str] = set()
"""Values that no text may show. They are the process's own, because every text that is shown goes through this module."""


def redact(value: str) -> None:
    """Hide a value, and each longer line of it, in every text that is shown from now on.

    Raises:
        ValueError: It has fewer than four characters.
    """
    if len(value) < _SHORTEST:
        raise ValueError(f"a secret has at least {_SHORTEST} characters, since a shorter one is part of ordinary words")
    # A tool may print a key line by line, and then the whole value is nowhere in a text.
    _SECRETS.update(dict.fromkeys(line for line in (value, *value.splitlines()) if len(line) >= _SHORTEST))


def redact_variables(variables: Mapping[str, str], *, names: Iterable[str] = ()) -> None:
    """Hide the values of the environment variables whose names were given, now or earlier, and that are long enough.

    Args:
        variables: An environment.
        names: More names to hide the values of.
    """
    # Kept, because commands of machines get environments of their own later, in which the same names count.
    _NAMES.update(names)
    for name in _NAMES & variables.keys() if _NAMES else ():
        if len(variables[name]) >= _SHORTEST:
            redact(variables[name])


def hidden(text: str) -> str:
    """Return a text in which secrets are replaced by `[redacted]`."""
    # The longest first: a line of a key is part of the whole key.
    for secret in sorted(_SECRETS, key=len, reverse=True) if _SECRETS else ():
        text = text.replace(secret, "[redacted]")
    return text


def visible(text: str) -> str:
    r"""Replace control characters by visible escapes, in a text of any length.

    >>> visible("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    # A serial line ends with both. A lone carriage return would write over what is shown already.
    plain = text.replace("\r\n", "\n")
    if _UNSAFE.search(plain) is None:
        return plain
    # Surrogates first: they cannot be encoded, so this writes them by their numbers. Then the controls.
    return plain.encode("utf-8", "backslashreplace").decode().translate(_ESCAPES)


def printable(text: str, most: int = MOST) -> str:
    r"""Make guest text safe to show.

    Control characters and commands for CI services are neutralised, and long texts are cut.

    Args:
        text: Text that may come from a guest in part.
        most: Characters that are shown, half of them from the text's end.

    >>> printable("one\n  ::error::\x1b[31mtwo")
    'one\n  : :error::\\x1b[31mtwo'
    """
    # Before it is cut: half of a secret would not be found any more.
    text = hidden(text)
    # Most texts are one plain line, and this is called for each of them.
    if text.isascii() and text.isprintable() and text[:1] not in " :-+~^" and "##" not in text and "section_" not in text:
        return _shortened(text, most)  # one plain line, as most are
    plain = _shortened(text, most).replace("\r\n", "\n")
    # The expression looks at each line's beginning, which takes long in large texts.
    if "::" in plain:
        plain = _GITHUB.sub(_broken, plain)
    return visible(_indented(_ANYWHERE.sub(_broken, plain)))


def coloured(text: str) -> str:
    r"""Make a report of pytest safe to show, in full and with its colours.

    It mixes pytest's own text with a test's and a guest's.

    >>> coloured("\x1b[31m##[error]\x1b[0m \x1b[2J")
    '\x1b[31m# #[error]\x1b[0m \\x1b[2J'
    """
    parts = _COLOUR.split(hidden(text))
    # The pattern has one group, so the colours themselves are at the odd places.
    parts[::2] = (printable(part, len(part)) for part in parts[::2])
    return "".join(parts)


def _broken(match: re.Match[str]) -> str:
    return f"{match[0]} "  # four times as fast as a template


def _indented(text: str) -> str:
    """Indent lines that Buildkite takes for headings, which it knows at the beginning of a line only."""
    text = f"\n{text}"
    for mark in _BUILDKITE:
        text = text.replace(f"\n{mark}", f"\n {mark}")
    return text[1:]


def _shortened(text: str, most: int) -> str:
    left_out = len(text) - most
    if left_out <= 0:
        return text
    # Both ends are kept: the beginning says what it is, the end says what went wrong.
    note = f"[{left_out} character{'s' if left_out > 1 else ''} left out]"
    return f"{text[: most // 2]}\n{note}\n{text[-(most // 2) :]}"


def tail(text: str, lines: int) -> str:
    """Return the last lines of a text, and say how many were left out."""
    # Found from the end, so that it takes no longer for megabytes.
    at = end = len(text) - text.endswith("\n")
    for _ in range(lines):
        at = text.rfind("\n", 0, at)
        if at < 0:
            return text
    above = text.count("\n", 0, at) + 1
    return f"[{above} line{'s' if above > 1 else ''} above]\n{text[at + 1 : end]}"
