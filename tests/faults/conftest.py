"""Faults on purpose. Each test has a catalog of its own, and after it nothing of that may be left: `_nothing_is_left` counts.

How often a fault is tried is small by default. `SOAK=10` tries everything ten times as often; `SOAK=A1=1000,B5=200` sets the numbers of
single experiments; both can be said together: `SOAK=10,A1=1000`. `tox -e soak` says 10.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import attrs
import psutil
import pytest

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.catalog import Catalog

HERE = Path(__file__).parent
SECONDS = 5.0
"""In which everything has to be gone."""

Rounds = Callable[[str, int], range]


@attrs.frozen(kw_only=True)
class Left:
    """What there is of a catalog's machines at one moment; nothing of it may be there when nobody uses the catalog.

    Attributes:
        processes: Those that name the catalog in their command line, or were given it in their environment.
        ports: Where these listen.
        records: Of machines.
        folders: Of machines, and of what was being built.
        locks: That somebody holds, and those of processes that have, or had, machines.
        temporary: Files that were to be renamed.
    """

    processes: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    locks: tuple[str, ...] = ()
    temporary: tuple[str, ...] = ()

    @classmethod
    def of(cls, root: Path) -> Left:
        """Counts."""
        processes = carriers(root)
        run = root / "run"
        locks = [*(path for path in root.glob("locks/*.lock") if _is_held(path)), *run.glob("*.lock")]
        return cls(
            processes=tuple(f"{each.pid}: {' '.join(_words(each))[:200]}" for each in processes),
            ports=tuple(f"{each.pid}: {port}" for each in processes for port in _ports(each)),
            records=tuple(str(path) for path in run.glob("*/*.json")),
            folders=tuple(str(path) for path in [*run.glob("*"), *run.glob("*/*")] if path.is_dir()),
            locks=tuple(map(str, locks)),
            temporary=tuple(str(path) for path in root.rglob(".*") if path.is_file()),
        )

    def __bool__(self) -> bool:
        return any(attrs.astuple(self))


def _words(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def _environment(process: psutil.Process) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
    return ""


def _ports(process: psutil.Process) -> list[int]:
    with suppress(psutil.Error):
        return [each.laddr.port for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return []


def _is_held(lock: Path) -> bool:
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def carriers(root: Path) -> list[psutil.Process]:
    """The processes, but for this one, that carry a folder's name, which no other test uses, in their command line or environment."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid() or str(root) not in " ".join(_words(process)) + _environment(process):
            continue
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the test's catalog is."""
    return tmp_path / "catalog"


@pytest.fixture
def catalog(root: Path) -> Iterator[Catalog]:
    """The test's catalog, as this process has it."""
    catalog = Catalog(root)
    yield catalog
    catalog.close()


@pytest.fixture
def left(root: Path) -> Callable[[], Left]:
    """What is left of the test's machines, asked now."""
    return lambda: Left.of(root)


@pytest.fixture(autouse=True)
def _nothing_is_left(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name == "CI" or name.startswith(("PYTEST_", "VMBOTTLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(root))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])))
    yield
    deadline = Deadline(SECONDS)
    deadline.poll(lambda: not Left.of(root), every=0.1)
    left = Left.of(root)
    for process in carriers(root):  # whatever the verdict: the next test begins with nothing
        with suppress(psutil.Error):
            process.kill()
    assert not left, "something outlived its owner"


@pytest.fixture(scope="session")
def rounds() -> Rounds:
    """How often an experiment is done: `rounds("A1", 20)` is 20 times, unless `SOAK` says otherwise."""
    words = [word for word in os.environ.get("SOAK", "1").split(",") if word]
    factor = next((float(word) for word in words if "=" not in word), 1.0)
    given = {name: int(number) for name, _, number in (word.partition("=") for word in words if "=" in word)}
    return lambda experiment, few: range(given.get(experiment, max(1, round(few * factor))))


@pytest.fixture
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process that looks much like a machine to who does not look closely; it has to survive the test."""
    innocent = subprocess.Popen(["sleep", "86400"], cwd=tmp_path_factory.getbasetemp(), start_new_session=True)
    began = time.monotonic()
    try:
        yield
        assert innocent.poll() is None, f"a process that is no machine was ended within {time.monotonic() - began:.0f} s"
    finally:
        innocent.kill()
        innocent.wait()
