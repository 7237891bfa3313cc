"""Search in a guest's files: the command for grep, and its matches."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import attrs

from pytest_vmbottle.guest.path import GuestPath, raise_for
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.result import Match, Matches, Result, printable

__all__ = ["Query"]

_BAD_PATTERN, _BAD_GREP = 110, 111
_ENDED_LATE = frozenset({124, 137, 143})
"""Statuses of timeout(1) after it ended its command: GNU's own, then SIGKILL, then BusyBox's."""
# Characters of a line that are returned. They take up to 4000 bytes, and search.sh keeps so many behind the longest path.
_TEXT = 1000
_RECORD = re.compile(r"([0-9]{1,18}):([^\0]*)\0(.*)", re.DOTALL)

_SCRIPT = read_script(__package__, "search.sh")


def _globs(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return the globs of a string or a sequence as a tuple."""
    return (given,) if isinstance(given, str) else tuple(given)


@attrs.frozen(kw_only=True)
class Query:
    """A search in the files below a folder of the guest.

    Attributes:
        pattern: The pattern that a line must contain.
        root: A folder, or a single file.
        regex: Whether the pattern is an extended regular expression (POSIX ERE) and not literal text.
        ignore_case: Whether to ignore the case of letters.
        include: Globs for names of files; if there are any, a file must match one of them.
        exclude_dirs: Globs for names of folders that are left out.
        max_results: Maximum number of matches that are returned.
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
            raise ValueError(f"{self.pattern!r} has a newline, and a search finds text within one line: search for each line")
        if self.max_results < 1:
            raise ValueError(f"max_results={self.max_results} is invalid: it must be at least 1")

    @property
    def env(self) -> dict[str, str]:
        """Return the locale of grep.

        It compares bytes where that gives the same result, so that text in any encoding is found.
        """
        bytewise = not self.regex and (self.pattern.isascii() or not self.ignore_case)
        return {"LC_ALL": "C" if bytewise else "C.UTF-8"}

    def argv(self, *, seconds: float) -> tuple[str, ...]:
        """Return the command, which searches for at most so many whole seconds.

        It prints the matches that it has found by then.
        """
        case = ("-i",) if self.ignore_case else ()
        names = (*(f"--include={glob}" for glob in self.include), *(f"--exclude-dir={glob}" for glob in self.exclude_dirs))
        # One more than is returned, to know whether there are more.
        enough = str(self.max_results + 1)
        options = ("-E" if self.regex else "-F", *case, *names, f"--max-count={enough}", "-e", self.pattern)
        return ("sh", "-c", _SCRIPT, "sh", str(self.root), str(math.ceil(seconds)), enough, *options)

    def matches(self, result: Result, *, timed_out: bool = False) -> Matches:
        """Return the matches in the command's result.

        Raises:
            FileNotFoundError, PermissionError: There is no such root, or it may not be read.
            ValueError: The regular expression is invalid.
            OSError: The guest's grep is missing or is not GNU grep.
        """
        # A command that was ended from outside has no status of its own.
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
        # The script asked for one match more, and of that only the path is left.
        found.truncated |= len(found) == self.max_results and bool(path)
        return found

    def _check(self, result: Result) -> None:
        if result.returncode == _BAD_PATTERN:
            raise ValueError(f"{self.pattern!r} is not an extended regular expression: {printable(result.stderr.strip()[-_TEXT:])}")
        if result.returncode == _BAD_GREP:
            raise OSError("the guest's grep is not GNU grep, and its option --null is needed: install it, for example `apk add grep`")
        if result.returncode not in {0, 1, 2, 141, *_ENDED_LATE}:  # 2: something could not be read; 141: enough was found (SIGPIPE)
            raise_for(result, self.root)


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}…"
