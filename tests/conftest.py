"""Checks of the host, and helpers, for tests of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

__all__ = ["Rounds", "is_gone", "leave_out", "line", "open_files", "process"]

Rounds = Callable[[str, int], range]


def leave_out(config: pytest.Config, items: list[pytest.Item], folder: Path, marker: str) -> None:
    """Leaves what has a mark out of runs that do not ask for it by `-m`; all that is in a folder gets the mark."""
    for item in items:
        if item.path.is_relative_to(folder):
            item.add_marker(marker)
    theirs = [item for item in items if item.get_closest_marker(marker)]
    if marker not in config.getoption("markexpr"):
        config.hook.pytest_deselected(items=theirs)
        items[:] = [item for item in items if item not in theirs]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items, Path(__file__).parent / "real" / "guests", "guests")


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended; a zombie, which its parent has not waited for, has ended too."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def open_files() -> set[str]:
    """What this process has open, with descriptors: others may be closed meanwhile, so their number tells nothing."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one by which they are listed, and what another thread has closed
            found.add(f"{path.name}: {path.readlink()}")
    return found


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


@pytest.fixture(scope="session")
def rounds() -> Rounds:
    """Function that returns the rounds of an experiment: 20 of them for `rounds("A1", 20)`, unless `SOAK` says otherwise."""
    words = [word for word in os.environ.get("SOAK", "1").split(",") if word]
    factor = next((float(word) for word in words if "=" not in word), 1.0)
    given = {name: int(number) for name, _, number in (word.partition("=") for word in words if "=" in word)}
    return lambda experiment, few: range(given.get(experiment, max(1, round(few * factor))))
