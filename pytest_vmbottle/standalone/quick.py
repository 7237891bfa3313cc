"""`vmbottle machine exec NAME COMMAND...`, if it is plain, with as little loaded as possible.

Scripts call it again and again, and to load the command line takes longer than a command in a guest. What is not plain is left to that:
options, and a machine that does not answer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytest_vmbottle.standalone.line import connect, exchange

__all__ = ["execute", "exit_status", "request", "streams"]

_INTERRUPTED = 130


def execute(words: Sequence[str]) -> int | None:
    """Run the command of a plain `machine exec`, and return its exit status; None for all other words, with which nothing was done."""
    name, argv = _plain(words)
    if not argv:
        return None
    folder = _catalog() / "machines" / name
    try:
        line = connect(folder)
    except OSError:
        return None
    try:
        with streams() as descriptors:
            message = exchange(line, request(argv), descriptors)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    return exit_status(message["answer"]) if message and "answer" in message else _told(folder, message)


def _plain(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the name and the command of a plain `machine exec`; of anything else, no command."""
    if list(words[:2]) != ["machine", "exec"] or not words[3:]:
        return "", ()
    name, argv = words[2], words[3:]
    # A machine's name is no path, and what begins with a dash is an option, up to a lone `--`.
    if name.startswith(("-", ".")) or "/" in name or (argv[0].startswith("-") and argv[0] != "--"):
        return "", ()
    return name, argv[1:] if argv[0] == "--" else argv


def _catalog() -> Path:
    given = os.environ.get("VMBOTTLE_CATALOG")
    if given:
        return Path(given).expanduser()
    from pytest_vmbottle.catalog.location import default_root  # noqa: PLC0415 - loaded only where it is needed

    return default_root()


def _told(folder: Path, message: Mapping[str, Any] | None) -> int:
    """Write the error of a command that was begun, as the command line does, and return the exit status."""
    from pytest_vmbottle.errors import VMBottleError  # noqa: PLC0415 - loaded only where something went wrong
    from pytest_vmbottle.shown import printable  # noqa: PLC0415
    from pytest_vmbottle.standalone.client import Kept  # noqa: PLC0415

    try:
        return exit_status(Kept(folder).answered(message))
    except (VMBottleError, OSError) as error:
        sys.stderr.write(f"Error: {printable(str(error))}\n")
        return 1


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
        yield 0 if interactive or not _is_terminal(0) else nothing.fileno(), 1, 2


def _is_terminal(fd: int) -> bool:
    """Tell whether a descriptor is a terminal or closed; neither is passed on."""
    try:
        os.fstat(fd)
        return os.isatty(fd)
    except OSError:
        return True


def exit_status(status: int) -> int:
    """Return a status as shells do: 128 + N for a command ended by signal N."""
    return status if status >= 0 else 128 - status
