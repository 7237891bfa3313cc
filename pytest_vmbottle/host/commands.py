"""Running programs of this host to their end."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Ended", "run_tool"]
_LAST_WORDS = 2.0
"""Seconds for reading the rest of a killed process's output."""


@attrs.frozen(kw_only=True)
class Ended:
    """A host command that has ended: argv, status and output.

    The status is negative for a signal, and None if it was killed at the deadline.
    """

    argv: tuple[str, ...]
    returncode: int | None
    output: str

    @property
    def ok(self) -> bool:
        """Tell whether it ended with status 0."""
        return self.returncode == 0


def run_tool(argv: Sequence[str | Path], *, timeout: float, env: dict[str, str] | None = None) -> Ended:
    """Run a host command without a shell, in bounded time.

    Never raises for its status.

    Raises:
        FileNotFoundError: There is no such program.
    """
    words = tuple(str(word) for word in argv)
    process = subprocess.Popen(  # noqa: S603 - argv list, no shell
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        # One pipe for both, so that what a tool printed stays in its order.
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        start_new_session=True,  # so that what it starts can be killed with it, and keeps nobody waiting for the end of its output
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return Ended(argv=words, returncode=None, output=_kill_group(process))
    except BaseException:
        _kill_group(process)
        raise
    return Ended(argv=words, returncode=process.returncode, output=output)


def _kill_group(process: subprocess.Popen[str]) -> str:
    """Kill a process with everything it started, and return its output."""
    with suppress(ProcessLookupError):
        # The first process of a new session leads its process group, whose number is then the process's own.
        os.killpg(process.pid, signal.SIGKILL)
    try:
        return process.communicate(timeout=_LAST_WORDS)[0]
    except subprocess.TimeoutExpired as error:  # something has left the group and holds the other end
        if process.stdout is not None:
            process.stdout.close()
        with suppress(subprocess.TimeoutExpired):  # killed, but the kernel may hold it while it waits for a disk
            process.wait(_LAST_WORDS)
        # The exception carries bytes, even from a process in text mode.
        return (error.output or b"").decode(errors="replace")
