"""Lines of files in a guest that have a pattern in them: what grep is asked, and what it found."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import attrs

from pytest_vmbottle.guestpath import GuestPath, raise_for
from pytest_vmbottle.result import Match, Matches, Result, printable

__all__ = ["Query"]

_BAD_PATTERN, _BAD_GREP = 110, 111
_ENDED_LATE = frozenset({124, 137, 143})
"""What timeout(1) ends with when it had to end its command: GNU's own status, then SIGKILL, then BusyBox's."""
_LINE_BYTES = 8200
"""Bytes of a line of grep's output that are kept: the longest path (PATH_MAX, 4096), and more of the text than is shown."""
_TEXT = 1000
_RECORD = re.compile(r"([0-9]{1,18}):([^\0]*)\0(.*)", re.DOTALL)

# $1 root, $2 seconds, $3 matches, the rest grep's options. Names may have newlines in them and lines of text may not, so newline and NUL
# are swapped: then head counts matches. grep alone is under the clock, and what comes after it passes on all that it had found. Its status
# takes a way of its own around the pipe. BusyBox's cut would end lines at a NUL: there long lines come whole.
_SCRIPT = rf"""
[ -e "$1" ] || exit 101
[ -r "$1" ] || exit 105
root=$1 seconds=$2 records=$3; shift 3
grep --null --line-buffered -e x </dev/null >/dev/null 2>&1; [ $? -lt 2 ] || exit {_BAD_GREP}
grep "$@" </dev/null; [ $? -lt 2 ] || exit {_BAD_PATTERN}
shorten="cut -b 1-{_LINE_BYTES}"; cut --version >/dev/null 2>&1 || shorten=cat
exec 3>&1
status=$({{ {{
  timeout -k 2 "$seconds" grep -rnsIH --null --line-buffered --devices=skip "$@" -- "$root" 2>/dev/null 3>&- 4>&-
  echo $? >&4
}} | $shorten | tr '\n\000' '\000\n' | head -n "$records" >&3; }} 4>&1)
exit "$status"
"""


def _globs(given: str | Sequence[str]) -> tuple[str, ...]:
    """One glob or several."""
    return (given,) if isinstance(given, str) else tuple(given)


@attrs.frozen(kw_only=True)
class Query:
    """A search in the files below a folder of the guest.

    Attributes:
        pattern: What a line is to have in it.
        root: A folder, or one file.
        regex: Whether the pattern is an extended regular expression (POSIX ERE) and not literal text.
        ignore_case: Whether upper and lower case are the same.
        include: Globs of which a file's name has to match one, if there are any.
        exclude_dirs: Globs of the names of folders that are left out.
        max_results: How many matches are returned at most.
    """

    pattern: str
    root: GuestPath
    regex: bool = False
    ignore_case: bool = False
    include: tuple[str, ...] = attrs.field(default=(), converter=_globs)
    exclude_dirs: tuple[str, ...] = attrs.field(default=(), converter=_globs)
    max_results: int = 500

    def __attrs_post_init__(self) -> None:
        if "\n" in self.pattern:
            raise ValueError(f"{self.pattern!r} has a newline in it, and no line has: search for its lines one by one")
        if self.max_results < 1:
            raise ValueError(f"max_results={self.max_results} makes no sense: ask for at least one")

    @property
    def env(self) -> dict[str, str]:
        """What the pattern's characters are: bytes where that comes to the same, so that text in any encoding is found."""
        bytewise = not self.regex and (self.pattern.isascii() or not self.ignore_case)
        return {"LC_ALL": "C" if bytewise else "C.UTF-8"}

    def argv(self, *, seconds: float) -> tuple[str, ...]:
        """The command that searches for so long at most, in whole seconds, and then passes on what it has found."""
        case = ("-i",) if self.ignore_case else ()
        names = (*(f"--include={glob}" for glob in self.include), *(f"--exclude-dir={glob}" for glob in self.exclude_dirs))
        enough = str(self.max_results + 1)
        options = ("-E" if self.regex else "-F", *case, *names, f"--max-count={enough}", "-e", self.pattern)
        return ("sh", "-c", _SCRIPT, "sh", str(self.root), str(math.ceil(seconds)), enough, *options)

    def matches(self, result: Result, *, timed_out: bool = False) -> Matches:
        """What the command found.

        Raises:
            FileNotFoundError, PermissionError: There is no such root, or it may not be read.
            ValueError: The regular expression is none.
            OSError: The guest has no grep that can do it.
        """
        __tracebackhide__ = True
        if not timed_out:
            self._check(result)
        records = result.stdout.split("\n")  # a path; then line, text and the path of the next match, again and again
        path, found = records[0], Matches(timed_out=timed_out or result.returncode in _ENDED_LATE, truncated=result.truncated)
        for record in records[1:]:
            match = _RECORD.match(record)
            if match is None:
                break  # cut off
            found.append(Match(path=path.replace("\0", "\n"), line=int(match[1]), text=_cut(match[2])))
            path = match[3]
        found.truncated |= len(found) == self.max_results and bool(path)
        return found

    def _check(self, result: Result) -> None:
        __tracebackhide__ = True
        if result.returncode == _BAD_PATTERN:
            raise ValueError(f"{self.pattern!r} is no extended regular expression: {printable(result.stderr.strip()[-_TEXT:])}")
        if result.returncode == _BAD_GREP:
            raise OSError("the grep of this guest is not GNU grep, whose option --null is needed: install it, for example `apk add grep`")
        if result.returncode not in {0, 1, 2, 141, *_ENDED_LATE}:  # 2: something could not be read; 141: enough was found (SIGPIPE)
            raise_for(result, self.root)


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}…"
