"""Timeline of a machine: what a test did to it and what it said, as events on one clock."""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from pytest_vmbottle.result import Result
from pytest_vmbottle.shown import hidden
from pytest_vmbottle.timeline.ring import Ring

__all__ = ["FORMAT", "Span", "Timeline", "now", "recorded", "since_epoch", "without_secrets"]

FORMAT = 1
"""Version of the events, which `docs/timeline.md` describes."""
# Once for each process, so that its times keep their order and their distances when the host's clock is set.
_EPOCH = time.time() - time.monotonic()
_EVENTS, _CONSOLE, _OUTPUTS = 6 << 20, 2 << 20, 8 << 20
"""Bytes kept of a machine's events, of its console, and of whole outputs: 16 MiB in all."""
_TEXT = 4 << 10
"""Characters of a text in an event."""
_WHOLE = 1 << 20
"""Bytes kept of each output of a failed command."""
# Characters of an argument in an event.
_WORDS = 1 << 11
# Bytes of a line of the console.
_LINE = 1 << 12

_F = TypeVar("_F", bound=Callable[..., Any])


def now() -> float:
    """Return seconds since 1970, on a clock that never runs backwards within a process."""
    return since_epoch(time.monotonic())


def since_epoch(monotonic: float) -> float:
    """Return a time of `time.monotonic` as seconds since 1970."""
    return _EPOCH + monotonic


class Timeline:
    """Record of what happens to one machine.

    Of verbs that use other verbs only the outermost is recorded: a copy runs commands, and a reader looks for the copy. A full disk costs
    events, never a test.
    """

    def __init__(self, folder: Path | None, *, machine: str = "") -> None:
        """Begin a timeline.

        Args:
            folder: An existing folder of its own; None records nothing.
            machine: The machine's name, which all events have.
        """
        self._folder, self._machine = folder, machine
        # A forked child may have got the lock from a thread that it has not, and its parent's machines are none of its own.
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # By thread, because two threads of a test may use a machine at once, and each has its outermost verb.
        self._threads = threading.local()
        self._console: Callable[[], bytes] = bytes
        # The last line of the console, which has no end yet.
        self._rest = b""
        self._commands = 0
        if folder is not None:
            self._events, self._lines = Ring(folder / "events.jsonl", _EVENTS), Ring(folder / "console.jsonl", _CONSOLE)
            self._outputs = folder / "outputs"

    def watch(self, console: Callable[[], bytes]) -> None:
        """Take a function that returns what the machine's console has printed since its last call."""
        self._console = console

    def note(self, kind: str, **fields: object) -> None:
        """Record an event that takes no time."""
        # Before it has its time: what the console has said by now came before it.
        self.look()
        self._write({"time": now(), "kind": kind, **fields})

    def span(self, kind: str, **fields: object) -> Span:
        """Return a context manager that records an event with its duration, and with its error if it fails."""
        return Span(self, kind, fields)

    def look(self) -> None:
        """Record the lines that the console has printed since the last event."""
        if self._is_recorded:
            with self._lock, suppress(OSError):
                self._take_lines(now())

    @property
    def _is_recorded(self) -> bool:
        return self._folder is not None and self._pid == os.getpid()

    def events(self, since: float = 0.0) -> list[dict[str, Any]]:
        """Return the events that began or ended since a time, in their order."""
        if self._folder is None:
            return []
        # Without this the lines since the last second would be missing.
        self.look()
        found = filter(None, (_decoded(line) for ring in (self._events, self._lines) for line in ring.lines()))
        # By the time of their beginning; a long wait is written after what happened during it.
        return sorted((event for event in found if event["time"] + event.get("seconds", 0) >= since), key=lambda event: event["time"])

    def output(self, name: str) -> Path:
        """Return the file of a whole output that an event names."""
        # The name alone, since events are read from a file.
        return (self._folder or Path()) / "outputs" / Path(name).name

    def close(self) -> None:
        """Close the files; later events open them again."""
        if self._is_recorded:
            with self._lock:
                self._events.close()
                self._lines.close()

    @property
    def is_busy(self) -> bool:
        """Tell whether this thread is in a verb that is recorded."""
        return getattr(self._threads, "busy", False)

    @is_busy.setter
    def is_busy(self, busy: bool) -> None:
        self._threads.busy = busy

    def keep_outputs(self, result: Result) -> dict[str, str]:
        """Write the outputs of a failed command that an event has no room for, and return the names of their files."""
        names: dict[str, str] = {}
        if not self._is_recorded or (len(result.stdout) <= _TEXT and len(result.stderr) <= _TEXT):
            return names
        # Two threads whose commands fail at once must not write to one file.
        with self._lock, suppress(OSError):
            self._commands += 1
            self._outputs.mkdir(mode=0o700, exist_ok=True)
            for stream, text in (("stdout", result.stdout), ("stderr", result.stderr)):
                if len(text) > _TEXT:
                    name = f"{self._commands:06}-{stream}.txt"
                    # The end of an output, which mostly has the reason.
                    data = hidden(text).encode("utf-8", "surrogateescape")[-_WHOLE:]
                    self._make_room(len(data))
                    (self._outputs / name).write_bytes(data)
                    names[f"{stream}_file"] = name
        return names

    def _make_room(self, size: int) -> None:
        # Names begin with a number of fixed width, so their order is that of time.
        kept = sorted(self._outputs.iterdir())
        total = size + sum(path.stat().st_size for path in kept)
        for path in kept:
            if total <= _OUTPUTS:
                return
            total -= path.stat().st_size
            path.unlink()

    def _write(self, event: Mapping[str, object]) -> None:
        if not self._is_recorded:
            return
        # Outside of the lock: `repr` of a test's own value may take any time, or use the machine.
        line = self._encoded(event)
        with self._lock, suppress(OSError):
            # First the console, so that its lines come before the event that followed them.
            self._take_lines(now())
            self._events.append(line)

    def _encoded(self, event: Mapping[str, object]) -> bytes:
        # `default=repr`, because events have whatever a test gives.
        return json.dumps({"machine": self._machine, **without_secrets(event)}, default=repr, separators=(",", ":")).encode() + b"\n"

    def _take_lines(self, at: float) -> None:
        new = self._console()
        if not new:
            return
        *lines, self._rest = (self._rest + new[-_CONSOLE:]).split(b"\n")
        # A line without an end is passed on in pieces, or a guest could have us hold it in memory for ever.
        if len(self._rest) > _LINE:
            lines.append(self._rest)
            self._rest = b""
        with suppress(OSError):
            for line in lines:
                text = line.removesuffix(b"\r")[:_LINE].decode("utf-8", "replace")
                self._lines.append(self._encoded({"time": at, "kind": "console", "text": text}))


class Span:
    """A verb while it runs, which is recorded when it ends."""

    def __init__(self, timeline: Timeline, kind: str, fields: dict[str, object]) -> None:
        self._timeline, self._kind, self._fields = timeline, kind, fields
        self._outer = False

    def add(self, **fields: object) -> None:
        """Add what is known only now."""
        self._fields.update(fields)

    def finish(self, result: Result) -> None:
        """Add what a command has done; the whole output of a failed one is kept in files."""
        self.add(status=result.returncode, stdout=_end(result.stdout), stderr=_end(result.stderr))
        if result.note:
            self.add(note=result.note)
        # Only of verbs that become events: nobody would find the files of others.
        if not result.ok and not self._outer:
            self.add(**self._timeline.keep_outputs(result))

    def __enter__(self) -> Self:
        # A verb that runs within another one of this thread is not recorded.
        self._outer = self._timeline.is_busy
        self._timeline.is_busy = True
        self._began = now()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._outer:
            return
        self._timeline.is_busy = False
        if error is not None:
            # A command that timed out has its output in the error alone.
            result = getattr(error, "result", None)
            if isinstance(result, Result):
                self.finish(result)
            self.add(error=f"{type(error).__name__}: {error}"[:_TEXT])
        self._timeline._write({"time": self._began, "kind": self._kind, "seconds": round(now() - self._began, 6), **self._fields})  # noqa: SLF001


def recorded(kind: str, about: Callable[[Any], dict[str, object]] = lambda _: {}) -> Callable[[_F], _F]:
    """Decorate a verb of an object that has a `_timeline`: each call is an event with its arguments in words.

    Args:
        kind: The events' kind.
        about: Function that returns fields of an object whose verb is called.
    """

    def decorate(method: _F) -> _F:
        name = method.__name__

        @functools.wraps(method)
        def verb(self: Any, /, *args: Any, **keywords: Any) -> Any:
            # Before the call, which may change its arguments.
            words = [*map(_word, args), *(f"{key}={_word(value)}" for key, value in keywords.items())]
            with self._timeline.span(kind, verb=name, args=words, **about(self)):
                return method(self, *args, **keywords)

        return cast("_F", verb)

    return decorate


def _decoded(line: bytes) -> dict[str, Any] | None:
    """Return an event; None for a line that is not whole, as on a full disk."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "time" in event else None


def _word(value: object) -> str:
    """Return an argument in words: content of files by its length, everything else as its reader would write it."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    # The keys only: of `write_files` these are the paths, and the values are contents.
    if isinstance(value, Mapping):
        return f"{{{', '.join(map(str, value))}}}"[:_WORDS]
    return (value if isinstance(value, str) else repr(value))[:_WORDS]


def _end(text: str) -> str:
    return text[-_TEXT:]


def without_secrets(value: Any) -> Any:
    """Return a value of an event with `[redacted]` in place of secrets, before JSON escapes a part of one."""
    if isinstance(value, str):
        return hidden(value)
    if isinstance(value, Mapping):
        return {key: without_secrets(each) for key, each in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [without_secrets(each) for each in value]
    return value
