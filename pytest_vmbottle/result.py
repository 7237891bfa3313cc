"""What a command in a guest came to, and how text from a guest is shown safely."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

import attrs

from pytest_vmbottle.errors import CommandFailed

__all__ = ["Match", "Matches", "Result", "printable"]

# C0 but tab and newline, DEL, C1, and the bidirectional controls that can reorder what a reader sees.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# GitHub and Azure act on lines that begin like this in a job's log.
_CI_COMMAND = re.compile(r"^(\s*)(::|##)", re.MULTILINE)
_SHOWN_LINES = 60


def printable(text: str) -> str:
    r"""Returns guest text that is safe on a terminal and in a CI log: control characters become visible escapes.

    >>> printable("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    plain = text.replace("\r\n", "\n")
    escaped = _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], plain)
    return _CI_COMMAND.sub(r"\1 \2", escaped)


def tail(text: str, lines: int) -> str:
    """Returns the last lines of a text, saying how many were left out."""
    kept = text.splitlines()
    if len(kept) <= lines:
        return text
    return "\n".join([f"[{len(kept) - lines} lines above]", *kept[-lines:]])


@attrs.frozen(kw_only=True, repr=False)
class Result:
    """A command that has ended in a guest.

    It has no truth value of its own (`if vm.exec(...)` would be a mistake for empty output): ask for `.ok`.

    Attributes:
        argv: The command as it was run.
        returncode: Its exit status; a command ended by signal N has -N, as in `subprocess`.
        stdout: Its standard output; bytes that are not UTF-8 are kept as surrogate escapes (see `stdout_bytes`).
        stderr: Its standard error, likewise.
        duration: Seconds from sending it to having its status.
        truncated: Whether a stream was longer than 16 MiB: then its first 16 MiB are here, followed by a mark.
    """

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str
    duration: float = 0.0
    truncated: bool = False

    @property
    def ok(self) -> bool:
        """Whether the status was 0."""
        return self.returncode == 0

    @property
    def stdout_bytes(self) -> bytes:
        """Standard output exactly as the guest sent it."""
        return self.stdout.encode("utf-8", "surrogateescape")

    @property
    def stderr_bytes(self) -> bytes:
        """Standard error exactly as the guest sent it."""
        return self.stderr.encode("utf-8", "surrogateescape")

    def check(self) -> Result:
        """Returns the result itself if the status was 0.

        Raises:
            CommandFailed: The status was another.
        """
        if not self.ok:
            __tracebackhide__ = True
            raise CommandFailed(self)
        return self

    def describe(self) -> str:
        """The command, its status and both streams, for people: control characters neutralised, long streams cut."""
        parts = [f"$ {printable(shlex.join(self.argv))}", f"status {self.returncode}, after {self.duration:.2f} s"]
        for name, stream in (("stdout", self.stdout), ("stderr", self.stderr)):
            if stream:
                parts.append(f"--- {name} ---\n{tail(printable(stream), _SHOWN_LINES).rstrip()}")
        return "\n".join(parts)

    def __repr__(self) -> str:
        return f"<Result {self.describe()}>"


@attrs.frozen(kw_only=True)
class Match:
    """A line in which a search found its pattern.

    Attributes:
        path: The file in the guest; bytes that are not UTF-8 are kept as surrogate escapes.
        line: The number of the line, from 1.
        text: The line without its newline. Of a longer one the first 1000 characters are here, and `…`.
    """

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        """As grep shows it, control characters neutralised."""
        return f"{printable(self.path)}:{self.line}: {printable(self.text)}"


class Matches(list[Match]):
    """What a search found: a list, in the order in which the guest's files were read.

    Attributes:
        truncated: Whether there were more matches than asked for.
        timed_out: Whether the search was ended by its time-out: then there may be more.
    """

    def __init__(self, matches: Iterable[Match] = (), *, truncated: bool = False, timed_out: bool = False) -> None:
        super().__init__(matches)
        self.truncated = truncated
        self.timed_out = timed_out

    def by_path(self) -> dict[str, list[Match]]:
        """The matches of each file.

        >>> Matches([Match(path="/a", line=3, text="x"), Match(path="/a", line=7, text="x")]).by_path().keys()
        dict_keys(['/a'])
        """
        grouped: dict[str, list[Match]] = {}
        for match in self:
            grouped.setdefault(match.path, []).append(match)
        return grouped

    def __repr__(self) -> str:
        flags = "".join(f", {name}" for name in ("truncated", "timed_out") if getattr(self, name))
        lines = tail("\n".join(str(match) for match in self), _SHOWN_LINES)
        return f"<Matches: {len(self)}{flags}\n{lines}>" if self else f"<Matches: none{flags}>"
