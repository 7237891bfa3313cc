"""Events in words, for terminals."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from pytest_vmbottle.shown import printable

__all__ = ["describe_event"]

_SHOWN = 160


def describe_event(event: Mapping[str, Any]) -> str:
    """Return an event in words, on one line."""
    kind = event.get("kind", "")
    if kind in ("command", "spawn", "exit"):
        what = f"{'' if kind == 'command' else kind} {shlex.join(map(str, event.get('argv', ())))}"
    elif kind == "file":
        what = f"{event.get('verb')} {event.get('path')} {' '.join(map(str, event.get('args', ())))}"
    else:
        what = f"{event.get('verb', kind)} {event.get('text', '')} {' '.join(map(str, event.get('args', ())))}"
    end = f" -> exit {event['status']}" if "status" in event else ""
    end += f" in {event['seconds']:.2f} s" if "seconds" in event else ""
    end += f": {event['error']}" if "error" in event else ""
    line = " ".join(what.split())
    return printable(line[:_SHOWN] + ("..." if len(line) > _SHOWN else "") + " ".join(end.split("\n")[:1])[: 2 * _SHOWN])
