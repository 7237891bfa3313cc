"""Failures in words: for terminals, for programs, and for the texts of the page."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.report.events import Event, as_text, events_of, has_failed, number, stands_out, start_of
from pytest_vmbottle.report.run import TestArtifacts
from pytest_vmbottle.shown import printable

__all__ = ["as_json", "describe", "describe_event", "one_line"]

_MOST = 240
"""Characters of a guest's text in a line."""
_EARLIER = 5
"""Events at most that stand out before the last ones: what a kernel says about a cause may be many lines above a failure."""
_FILES = 40
"""Files of a test that are listed; more are counted."""


def describe(tests: Iterable[TestArtifacts], *, before: int = 10) -> str:
    """Return the failed tests in words, each with the last events before its failure.

    Args:
        tests: Tests, of which the failed ones are described.
        before: Events of each at most; samples of metrics do not count.
    """
    failures = [_failure(test, before) for test in tests if test.failed]
    return "\n\n".join(map(_paragraph, failures)) if failures else "No test failed."


def as_json(tests: Iterable[TestArtifacts], before: int = 10) -> list[dict[str, Any]]:
    """Return the same facts as `describe` as values for JSON; their texts are made safe to show."""
    return [attrs.asdict(_failure(test, before)) for test in tests if test.failed]


def describe_event(event: Event) -> str:
    r"""Return what happened on one line: what was done, how it ended, and how long it took.

    >>> describe_event({"kind": "command", "argv": ["ls", "a b"], "status": 2, "stderr": "ls: no such file\n", "seconds": 0.5})
    "ls 'a b': status 2: ls: no such file (0.50 s)"
    >>> describe_event({"kind": "wait", "verb": "wait_for_port", "args": ["80"], "seconds": 30.0, "error": "TimeoutError: nothing listens"})
    'wait_for_port 80: TimeoutError: nothing listens (30.00 s)'
    """
    # Unknown kinds are told by their text: the file may be of a newer version.
    what = _WORDS.get(as_text(event.get("kind")), _text)(event)
    parts = [one_line(what), *_outcome(event)]
    seconds = number(event.get("seconds"))
    return ": ".join(part for part in parts if part) + ("" if seconds is None else f" ({seconds:.2f} s)")


def one_line(text: str, most: int = _MOST) -> str:
    r"""Return a guest's text on one line that is safe to show: line ends are visible, and the middle of a long text is left out.

    >>> one_line("one\ntwo\x07\n")
    'one\\ntwo\\x07'
    """
    if len(text) > most:
        # Before anything else looks at it: it may have megabytes.
        text = f"{text[: most * 2 // 3]} [...] {text[-most // 3 :]}"
    # Only line ends are stripped: blanks at the beginning are indentation.
    return printable(text.strip("\r\n")).replace("\n", "\\n").replace("\t", "    ")


def _outcome(event: Event) -> list[str]:
    if error := as_text(event.get("error")):
        return [one_line(error)]
    status = number(event.get("status"))
    # Other kinds have no status, whatever a file says.
    if event.get("kind") not in ("command", "exit") or status is None:
        return []
    # A command's last line on stderr mostly says why it failed.
    reason = as_text(event.get("stderr")).rstrip().rpartition("\n")[2] if status else ""
    # Success is told for the end of a background command only: of all others it is the rule.
    return [f"status {status:.0f}" if status or event.get("kind") == "exit" else "", one_line(reason)]


def _command(event: Event) -> str:
    argv = event.get("argv")
    what = shlex.join(map(str, argv)) if isinstance(argv, list) else str(argv or "")
    user, folder = as_text(event.get("user")), as_text(event.get("cwd"))
    return what + (f" as {user}" if user not in ("", "root") else "") + (f" in {folder}" if folder else "")


def _spawn(event: Event) -> str:
    return f"{_command(event)} in the background"


def _exit(event: Event) -> str:
    return f"end of {_command(event)}"


def _verb(event: Event) -> str:
    args = event.get("args")
    words = [str(word) for word in args] if isinstance(args, list) else []
    return " ".join(filter(None, (as_text(event.get("verb")), as_text(event.get("path")), *words)))


def _fault(event: Event) -> str:
    return f"{_verb(event)} {as_text(event.get('state'))}"


def _phase(event: Event) -> str:
    return f"{as_text(event.get('phase'))} {as_text(event.get('state'))}"


def _metrics(event: Event) -> str:
    cpu, memory, threads = (number(event.get(name)) for name in ("cpu_percent", "rss_bytes", "threads"))
    figures = [
        f"CPU {cpu:.0f} %" if cpu is not None else "",
        f"memory {format_size(int(memory))}" if memory is not None else "",
        f"{threads:.0f} threads" if threads is not None else "",
    ]
    return ", ".join(filter(None, figures))


def _text(event: Event) -> str:
    return as_text(event.get("text"))


_WORDS: Mapping[str, Callable[[Event], str]] = {
    "command": _command,
    "spawn": _spawn,
    "exit": _exit,
    **dict.fromkeys(("file", "copy", "search", "wait", "power", "snapshot", "network", "screen"), _verb),
    "fault": _fault,
    "phase": _phase,
    "metrics": _metrics,
}


@attrs.frozen
class _Line:
    """One event before a failure."""

    seconds: float
    machine: str
    kind: str
    what: str
    failed: bool


@attrs.frozen
class _Failure:
    """One failed test; all texts can be shown."""

    nodeid: str
    phase: str
    error: str
    machines: list[str]
    earlier: list[_Line]  # that stand out
    events: list[_Line]
    folder: str
    files: list[str]


def _failure(test: TestArtifacts, before: int) -> _Failure:
    events = events_of(test)
    start = start_of(test, events)
    shown = [event for event in _before_failure(test, events) if event.get("kind") != "metrics"]
    first = max(0, len(shown) - before)
    earlier = [event for event in shown[:first] if stands_out(event)]
    return _Failure(
        nodeid=one_line(test.nodeid, 1000),
        phase=one_line(test.phase),
        error=one_line(test.error, 1000),
        machines=[one_line(name) for name in test.machines],
        earlier=[_line(event, start) for event in earlier[-_EARLIER:]],
        events=[_line(event, start) for event in shown[first:]],
        folder=one_line(str(test.folder), 4096),
        files=[one_line(path.relative_to(test.folder).as_posix(), 4096) for path in test.files()],
    )


def _before_failure(test: TestArtifacts, events: Sequence[Event]) -> Sequence[Event]:
    """Return the events up to the one that tells the failure; all if none does, as when the process was killed."""
    for place, event in enumerate(events):
        if event.get("kind") == "phase" and has_failed(event) and event.get("phase") == test.phase:
            # What comes after it is teardown, and what the plugin did to gather evidence.
            return events[:place]
    return events


def _line(event: Event, start: float) -> _Line:
    return _Line(
        seconds=round(event["time"] - start, 6),
        machine=one_line(as_text(event.get("machine"))),
        kind=one_line(as_text(event.get("kind"))),
        what=describe_event(event),
        failed=has_failed(event),
    )


def _paragraph(failure: _Failure) -> str:
    machines = ", ".join(failure.machines) or "none"
    head = [f"{failure.nodeid} failed in {failure.phase}", f"  {failure.error}" if failure.error else "", f"  machines: {machines}"]
    return "\n".join(filter(None, [*head, *_event_lines(failure), f"  files: {failure.folder}", *_file_lines(failure.files)]))


def _event_lines(failure: _Failure) -> list[str]:
    lines, count = [*failure.earlier, *failure.events], len(failure.events)
    if not lines:
        return ["  no events of machines"]
    machine, kind = (max(len(getattr(line, name)) for line in lines) for name in ("machine", "kind"))
    shown = [
        # The mark is for eyes that run down the column; the words tell the same.
        f"  {'!' if line.failed else ' '} {line.seconds:10.3f}  {line.machine:{machine}}  {line.kind:{kind}}  {line.what}".rstrip()
        for line in lines
    ]
    last = f"  the last {count} events before the failure, in seconds since the test's start:"
    heading = last.replace("1 events", "1 event") if count == 1 else last
    earlier = ["  what stands out before them:", *shown[: len(failure.earlier)]] if failure.earlier else []
    return [*earlier, heading, *shown[len(failure.earlier) :]]


def _file_lines(names: Sequence[str]) -> list[str]:
    more = [f"    and {len(names) - _FILES} more"] if len(names) > _FILES else []
    return [*(f"    {name}" for name in names[:_FILES]), *more]
