"""What tests of every kind ask of the host."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

__all__ = ["is_gone", "line", "process"]


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that only waits for its parent to take note of its end has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def process(text: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A Python that runs this text with these arguments; killed at the end."""
    argv = [sys.executable, "-c", text, *map(str, words)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def line(running: subprocess.Popen[str]) -> str:
    """The next line that a process prints, without its end."""
    assert running.stdout is not None
    return running.stdout.readline().strip()
