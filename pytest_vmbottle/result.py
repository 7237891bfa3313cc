"""Results of commands and searches in a guest."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

import attrs

from pytest_vmbottle.errors import VMBottleError
from pytest_vmbottle.shown import printable, tail

__all__ = ["CommandFailed", "CommandSucceeded", "CommandTimeout", "Match", "Matches", "Result", "printable", "tail"]

# Lines of a stream, and matches of a search, that are shown.
_SHOWN_LINES = 60
_SHOWN = 1 << 16
"""Characters of each stream that are shown."""
_TITLE = 80
"""Characters of a command that begin the message of its error."""


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
        note: An explanation of its end, for people, such as that the guest's OOM killer ended it; else empty.
    """

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str
    duration: float = 0.0
    truncated: bool = False
    note: str = ""

    @property
    def ok(self) -> bool:
        """Tell whether the exit status was 0."""
        return self.returncode == 0

    @property
    def stdout_bytes(self) -> bytes:
        """Standard output exactly as the guest sent it."""
        # With a surrogate for each byte that is not UTF-8, so that nothing is lost on the way.
        return self.stdout.encode("utf-8", "surrogateescape")

    @property
    def stderr_bytes(self) -> bytes:
        """Standard error exactly as the guest sent it."""
        return self.stderr.encode("utf-8", "surrogateescape")

    def check(self) -> Result:
        """Return the result itself if the status was 0.

        Raises:
            CommandFailed: The status was not 0.
        """
        if not self.ok:
            raise CommandFailed(self)
        return self

    def describe(self) -> str:
        """Return the command, its status and both streams, for people.

        Control characters are neutralised, and long streams are cut.
        """
        # Quoted, so that the line can be pasted into a shell.
        parts = [f"$ {printable(shlex.join(self.argv))}", f"status {self.returncode}, after {self.duration:.2f} s"]
        for name, stream in (("stdout", self.stdout), ("stderr", self.stderr)):
            if stream:
                # First the last lines, then their characters: a line may have megabytes.
                parts.append(f" --- {name} ---\n{printable(tail(stream, _SHOWN_LINES), _SHOWN).rstrip()}")
        return "\n".join(parts)

    def __repr__(self) -> str:
        return f"<Result {self.describe()}>" if not self.note else f"<Result {self.describe()}\n{self.note}>"


@attrs.frozen(kw_only=True)
class Match:
    """A line that matches a search.

    Attributes:
        path: The file in the guest; bytes that are not UTF-8 are kept as surrogate escapes.
        line: The number of the line, from 1.
        text: The line without its newline. A long line is cut to 1000 characters and `…`.
    """

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        """Return the match as grep shows it, with control characters neutralised."""
        return printable(f"{self.path}:{self.line}: {self.text}")


class Matches(list[Match]):
    """Matches of a search, in the order in which the guest's files were read.

    Attributes:
        truncated: Whether there were more matches than `max_results`.
        timed_out: Whether the search was ended by its time-out; then there may be more matches.
    """

    def __init__(self, matches: Iterable[Match] = (), *, truncated: bool = False, timed_out: bool = False) -> None:
        super().__init__(matches)
        self.truncated = truncated
        self.timed_out = timed_out

    def by_path(self) -> dict[str, list[Match]]:
        """Return the matches of each file.

        >>> Matches([Match(path="/a", line=3, text="x"), Match(path="/a", line=7, text="x")]).by_path().keys()
        dict_keys(['/a'])
        """
        grouped: dict[str, list[Match]] = {}
        for match in self:
            grouped.setdefault(match.path, []).append(match)
        return grouped

    def __repr__(self) -> str:
        flags = "".join(f", {name}" for name in ("truncated", "timed_out") if getattr(self, name))
        hidden = len(self) - _SHOWN_LINES
        above = [f"[{hidden} match{'es' if hidden > 1 else ''} above]"] if hidden > 0 else []
        lines = "\n".join([*above, *map(str, self[-_SHOWN_LINES:])])
        return f"<Matches: {len(self)}{flags}\n{lines}>" if self else f"<Matches: none{flags}>"


def _title(result: Result) -> str:
    """Return the command in one short line: summaries show only the beginning of a message."""
    # A script of many lines becomes one.
    line = " ".join(shlex.join(result.argv).split())
    return line if len(line) <= _TITLE else f"{line[: _TITLE - 1]}…"


def _noted(result: Result) -> str:
    return f": {result.note}" if result.note else ""


class CommandFailed(VMBottleError):
    """A command in the guest ended with a status other than 0.

    Attributes:
        result: The `Result`, with the command, both streams and the status.
    """

    def __init__(self, result: Result) -> None:
        # The first line has the command and the status, as pytest's short summary shows no more.
        super().__init__(f"`{_title(result)}` ended with status {result.returncode}{_noted(result)}\n{result.describe()}")
        self.result = result


class CommandSucceeded(VMBottleError):
    """A command in the guest that had to fail ended with status 0.

    Attributes:
        result: The `Result`, with the command and both streams.
    """

    def __init__(self, result: Result) -> None:
        super().__init__(f"`{_title(result)}` succeeded, but had to fail{_noted(result)}\n{result.describe()}")
        self.result = result


class CommandTimeout(VMBottleError, TimeoutError):
    """A command in the guest did not end in time.

    A command of `exec` was killed; one of `spawn` runs on.

    Attributes:
        result: The `Result` with its output by then; the return code is -9.
        timeout: The time-out in seconds.
    """

    def __init__(self, result: Result, timeout: float, *, killed: bool = True) -> None:
        outcome = "was killed" if killed else "runs on"
        super().__init__(f"`{_title(result)}` did not end within {timeout:g} s and {outcome}{_noted(result)}\n{result.describe()}")
        self.result = result
        self.timeout = timeout
