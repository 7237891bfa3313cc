"""Findings about this host, and the checks that make them.

Each part of the package checks what it needs itself; the doctor asks them all.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Self

import attrs

__all__ = ["TOOL_SECONDS", "Answer", "Check", "Command", "Finding", "Remedy", "State", "degraded", "install", "missing", "ok", "unknown"]

TOOL_SECONDS = 10.0
"""Limit for a program that is asked for its version, or what it offers."""


class State(StrEnum):
    """State of a thing that was checked.

    `DEGRADED` works, but slower or only in part; `UNKNOWN` could not be found out.
    """

    OK = "ok"
    DEGRADED = "degraded"
    MISSING = "missing"
    UNKNOWN = "unknown"


@attrs.frozen
class Command:
    """A command of this host.

    Attributes:
        argv: Its words.
        reads: What it reads on its standard input.
    """

    argv: tuple[str, ...]
    reads: str = ""

    def __str__(self) -> str:
        words = shlex.join(self.argv)
        return f"echo {shlex.quote(self.reads.rstrip())} | {words}" if self.reads else words


class Remedy(str):
    """A line for a shell that mends something, with the commands in it, so that a program can run them without one."""

    commands: tuple[Command, ...]

    __slots__ = ("__dict__",)

    @classmethod
    def of(cls, *commands: Command, line: str = "", note: str = "") -> Self:
        """Return the remedy of some commands, in their order.

        Args:
            commands: The commands.
            line: The line for people, if it is another one than the commands make.
            note: What is to be said beside it.
        """
        made = cls((line or " && ".join(map(str, commands))) + (f"  # {note}" if note else ""))
        made.commands = commands
        return made


def install(packages: Sequence[str], *options: str) -> Remedy:
    """Return the remedy that installs packages of Debian."""
    # Where nothing was installed yet, in a container, there are no package lists. --yes is for whoever was asked by us already.
    run = ("sudo", "apt-get", "install", "--yes", *options, *packages)
    line = shlex.join(["sudo", "apt-get", "install", *options, *packages])
    return Remedy.of(Command(("sudo", "apt-get", "update")), Command(run), line=line)


@attrs.frozen
class Answer:
    """Outcome of a check.

    Attributes:
        state: State of the part.
        text: A sentence, with the evidence.
        details: The facts behind it, fit for JSON.
        remedy: The command that mends it; empty if there is nothing to mend, or no command that does.
    """

    state: State
    text: str
    details: Mapping[str, Any]
    remedy: str = ""


def ok(text: str, **details: object) -> Answer:
    """Return the answer that all is well."""
    return Answer(State.OK, text, details)


def degraded(text: str, remedy: str = "", **details: object) -> Answer:
    """Return the answer that the part works, but slower or not in full."""
    return Answer(State.DEGRADED, text, details, remedy)


def missing(text: str, remedy: str = "", **details: object) -> Answer:
    """Return the answer that the part is missing or broken."""
    return Answer(State.MISSING, text, details, remedy)


def unknown(text: str, **details: object) -> Answer:
    """Return the answer that the state could not be found out."""
    return Answer(State.UNKNOWN, text, details)


@attrs.frozen(kw_only=True)
class Finding:
    """Answer to one check, with its topic.

    Attributes:
        topic: A short name that stays the same.
        state: State of the part.
        text: A sentence, with the evidence.
        remedy: The command that mends it; empty if there is nothing to mend, or no command that does.
        details: The facts behind it, fit for JSON.
        needed: Whether no machine can be run without it.
    """

    topic: str
    state: State
    text: str
    remedy: str = ""
    details: Mapping[str, Any] = attrs.field(factory=dict)
    needed: bool = False

    @property
    def commands(self) -> tuple[Command, ...]:
        """Return the commands of the remedy that a program can run; none if it takes a person, or a shell of the user's own."""
        return self.remedy.commands if isinstance(self.remedy, Remedy) else ()

    @property
    def stops(self) -> bool:
        """Return whether this keeps machines from being run."""
        return self.needed and self.state in (State.MISSING, State.UNKNOWN)


@attrs.frozen
class Check:
    """One question about this host.

    Attributes:
        topic: A short name that stays the same.
        ask: Function that finds out the state.
        needed: Whether no machine can be run without it.
    """

    topic: str
    ask: Callable[[], Answer]
    needed: bool = False

    def find(self) -> Finding:
        """Ask, and turn an error into a finding: the other checks are still to be asked."""
        try:
            answer = self.ask()
        # Any error: a check that fails in an unforeseen way must not hide the others.
        except Exception as error:
            answer = unknown(f"the check failed: {type(error).__name__}: {error}")
        return Finding(
            topic=self.topic, state=answer.state, text=answer.text, remedy=answer.remedy, details=answer.details, needed=self.needed
        )
