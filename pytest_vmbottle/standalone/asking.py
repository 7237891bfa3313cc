"""Requests for commands by hand to a machine's daemon, and their streams."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pytest_vmbottle.standalone.quick import is_terminal

__all__ = ["request", "streams"]


def request(
    argv: Sequence[str],
    *,
    user: str | None = None,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Return the request for a command, of which the daemon's `Requests` tell more."""
    return {"verb": "exec", "argv": list(argv), "user": user, "cwd": cwd, "env": dict(env or {}), "timeout": timeout}


@contextmanager
def streams(*, interactive: bool = False) -> Iterator[tuple[int, int, int]]:
    """Yield the descriptors of this process that are a command's input, output and error.

    They go to the daemon themselves, which writes to the terminal or pipe without a copy by this process. A terminal is its input only if
    it is to be interactive: two readers of one terminal would steal each other's keys.
    """
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a device
        yield 0 if interactive or not is_terminal(0) else nothing.fileno(), 1, 2
