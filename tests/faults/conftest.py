"""Faults on purpose. Each test has a catalog of its own, and after it nothing of that may be left: `_nothing_is_left` counts.

How often a fault is tried is small by default. `SOAK=10` tries everything ten times as often; `SOAK=A1=1000,B5=200` sets the numbers of
single experiments; both can be said together: `SOAK=10,A1=1000`. `tox -e soak` says 10.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest
from hypothesis import settings

from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.images import ImageStore

settings.register_profile("any speed", deadline=None)  # a busy computer is no fault of an example's
settings.load_profile("any speed")

HERE = Path(__file__).parent
SECONDS = 5.0
"""In which everything has to be gone."""


@attrs.frozen(kw_only=True)
class Left:
    """Remains of a catalog's machines at one moment, which must be empty when nobody uses the catalog.

    Attributes:
        processes: Processes that name the catalog in their command line or environment.
        ports: Ports on which these processes listen.
        records: Records of machines.
        folders: Folders of machines and of unfinished builds.
        locks: Locks that somebody holds, and those of processes that have, or had, machines.
        temporary: Files in packs that were to be renamed; `gc` sweeps up those of records when they are old.
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
        run = str(root / "run")
        files, folders = _walk(root)
        locks = [path for path in files if path.endswith(".lock") and (path.startswith(run) or _is_held(path))]
        return cls(
            processes=tuple(f"{each.pid}: {' '.join(_words(each))[:200]}" for each in processes),
            ports=tuple(f"{each.pid}: {port}" for each in processes for port in _ports(each)),
            records=tuple(path for path in files if path.startswith(run) and path.endswith(".json")),
            folders=tuple(path for path in folders if path.startswith(run + os.sep)),
            locks=tuple(locks),
            temporary=tuple(path for path in files if path.startswith(f"{root}/packs/") and os.path.basename(path).startswith(".")),  # noqa: PTH119
        )

    @property
    def machines(self) -> tuple[str, ...]:
        """Remains of machines alone."""
        return (*self.processes, *self.ports, *self.records, *self.folders)

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


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """The files and the folders below a folder, whatever vanishes meanwhile."""
    files, folders = [], []
    for place, inner, names in os.walk(root):
        folders += [os.path.join(place, name) for name in inner]  # noqa: PTH118 - there are many
        files += [os.path.join(place, name) for name in names]  # noqa: PTH118
    return files, folders


def _is_held(lock: str) -> bool:
    with open(lock, "rb") as file:  # noqa: PTH123
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Shows what was measured."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {name}: {value}")


def carriers(root: Path) -> list[psutil.Process]:
    """The processes, but for this one, that carry a folder's name, which no other test uses, in their command line or environment."""
    found = []
    for process in psutil.process_iter():
        environment = _environment(process)
        if process.pid == os.getpid() or "CANARY=1" in environment or str(root) not in " ".join(_words(process)) + environment:
            continue
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of the test's catalog."""
    return tmp_path / "catalog"


@pytest.fixture
def catalog(root: Path) -> Iterator[Catalog]:
    """The test's catalog, as this process has it."""
    catalog = Catalog(root)
    yield catalog
    catalog.close()


@pytest.fixture
def left(root: Path) -> Callable[[], Left]:
    """Function that returns the present remains of the test's machines."""
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


@pytest.fixture
def image(root: Path, tmp_path: Path) -> None:
    """The image "debian-12" in the test's catalog: the smallest file that passes for a disk."""
    content = bytearray(1 << 20)
    content[510:512] = b"\x55\xaa"
    (tmp_path / "disk.raw").write_bytes(content)
    ImageStore(Catalog(root).images).add(tmp_path / "disk.raw", name="debian-12")


class Zygote:
    """Forks processes that have imported everything already (see `zygote.py`)."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, HERE / "zygote.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._ended: dict[int, int] = {}

    def _next(self) -> dict[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote ended"
        message: dict[str, int] = json.loads(line)
        if "ended" in message:
            self._ended[message["ended"]] = message["status"]
        return message

    def fork(self, **order: Any) -> int:
        """Has a process do something, and returns its number."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        while "began" not in (message := self._next()):
            pass
        return message["began"]

    def wait(self, pid: int) -> int:
        """Its status, negative for a signal."""
        while pid not in self._ended:
            self._next()
        return self._ended.pop(pid)

    def close(self) -> None:
        """Ends it; its children go on."""
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """Process that forks test processes with all imports already done."""
    kept = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith(("PYTEST_", "VMBOTTLE_"))}
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    zygote = Zygote({**kept, "PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    yield zygote
    zygote.close()


def percentiles(seconds: Iterable[float]) -> str:
    """Describe many durations by their percentiles."""
    ordered = sorted(seconds)
    p50, p95 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.95))
    return f"p50 {p50 * 1000:.1f} ms, p95 {p95 * 1000:.1f} ms, at most {ordered[-1] * 1000:.1f} ms, of {len(ordered)}"


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str, Iterable[float]], None]:
    """Takes durations that the end of the run tells of."""
    return lambda name, seconds: record_property(name, percentiles(seconds))


@pytest.fixture
def canary(root: Path) -> Iterator[None]:
    """Processes that look like machines of this catalog to who does not look closely; they have to survive the test."""
    argv = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(86400)", "qemu-system-x86_64", f"{root}/run/disk.qcow2"]
    marks = ("", f"{root}/run", f"{root}/run/")
    innocent = [
        subprocess.Popen(argv, env={**os.environ, "CANARY": "1", "VMBOTTLE_MACHINE": mark}, start_new_session=True) for mark in marks
    ]
    try:
        yield
        assert [each.poll() for each in innocent] == [None] * len(innocent), "a process that is no machine was ended"
    finally:
        for each in innocent:
            each.kill()
            each.wait()
