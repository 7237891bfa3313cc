"""Findings about this host, and the checks that make them.

Each part of the package checks what it needs itself; the doctor asks them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import attrs

__all__ = ["TOOL_SECONDS", "Answer", "Check", "Finding", "State", "degraded", "missing", "ok", "unknown"]

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
