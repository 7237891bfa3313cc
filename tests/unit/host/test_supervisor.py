"""What is left of dead owners, and what of it is proven: real processes that are, look like, or once were a machine's."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.cli import main
from pytest_vmbottle.host import supervisor
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.supervisor import Identity, Record, Supervisor, reap

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
Spawn = Callable[..., subprocess.Popen[bytes]]

# Gives up the memory that its command line is in, as one that is killed does first of all, and ends a second later.
ENDING = """
import ctypes, mmap, os, time
words = open("/proc/self/stat").read().rpartition(")")[2].split()
first, last = (int(word) // mmap.PAGESIZE * mmap.PAGESIZE for word in words[45:47])  # arg_start and arg_end: man 5 proc
munmap = ctypes.CDLL(None).munmap
munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
munmap(first, last - first + mmap.PAGESIZE)
os.write(1, b"done")
time.sleep(1)
os._exit(0)
"""


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "catalog")
    yield catalog
    catalog.close()


@pytest.fixture
def owner(catalog: Catalog) -> Path:
    """The folder of an owner that is dead, with its lock."""
    folder = catalog.root / "run" / "4711-abcdef"
    folder.mkdir(parents=True, mode=0o700)
    folder.with_suffix(".lock").touch()
    return folder


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts a process that sleeps, with more words in its command line or environment."""
    started = []

    def spawn(*words: object, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([*SLEEP, *map(str, words)], env=env))
        return started[-1]

    yield spawn
    for process in started:
        process.kill()
        process.wait()


def machine(owner: Path, name: str, *, process: Identity | None = None, ending: tuple[str, ...] = ()) -> Path:
    """A machine's folder and record."""
    folder = owner / name
    folder.mkdir()
    (folder / "disk.qcow2").touch()
    (owner / f"{name}.json").write_bytes(Record(owner=dead(), process=process, ending=ending).dump())
    os.utime(owner / f"{name}.json", (0, 0))  # long ago
    return folder


def dead() -> Identity:
    return Identity(pid=4711, ticks=1, boot="an earlier one")


def identity(process: subprocess.Popen[bytes]) -> Identity:
    found = Identity.of(process.pid)
    assert found is not None
    return found


def ended(process: subprocess.Popen[bytes]) -> bool:
    return bool(Deadline(60).poll(lambda: process.poll() is not None, every=0.01))


def test_a_process_that_its_record_names_and_that_names_its_folder_is_ended(catalog: Catalog, owner: Path, spawn: Spawn) -> None:
    process = spawn(owner / "vm-1" / "disk.qcow2")
    machine(owner, "vm-1", process=identity(process))

    (reaped,) = catalog.gc()
    assert (reaped.owner, reaped.machines, reaped.processes, reaped.kept) == ("4711-abcdef", ("vm-1",), (process.pid,), ())
    assert ended(process)
    assert list((catalog.root / "run").iterdir()) == []


def test_a_process_that_carries_the_mark_is_ended_even_if_no_record_names_it(catalog: Catalog, owner: Path, spawn: Spawn) -> None:
    folder = machine(owner, "vm-1")
    process = spawn(env=supervisor.environment(folder))
    Deadline(60).poll(lambda: supervisor._carriers(owner), every=0.01)

    (reaped,) = catalog.gc()
    assert reaped.processes == (process.pid,)
    assert ended(process)


def test_a_process_that_only_looks_at_a_machines_files_is_left_alone(catalog: Catalog, owner: Path, spawn: Spawn) -> None:
    folder = machine(owner, "vm-1")
    reader = spawn("tail", "-f", folder / "console.log")

    (reaped,) = catalog.gc()
    assert (reaped.machines, reaped.processes) == (("vm-1",), ())
    assert reader.poll() is None


@pytest.mark.parametrize("change", [{"ticks": 1}, {"boot": "another"}])
def test_a_process_that_has_but_the_number_of_a_machines_is_left_alone(
    catalog: Catalog, owner: Path, spawn: Spawn, change: dict[str, Any]
) -> None:
    other = spawn(owner / "vm-1" / "disk.qcow2")
    machine(owner, "vm-1", process=identity(other)._replace(**change))

    (reaped,) = catalog.gc()
    assert (reaped.machines, reaped.processes, reaped.kept) == (("vm-1",), (), ())
    assert other.poll() is None


def test_a_process_that_its_record_names_but_nothing_proves_is_kept_with_all_that_belongs_to_it(
    catalog: Catalog, owner: Path, spawn: Spawn
) -> None:
    process = spawn()
    folder = machine(owner, "vm-1", process=identity(process))
    machine(owner, "vm-2")

    for _ in range(2):
        (reaped,) = catalog.gc()
        assert [str(folder) in line and str(process.pid) in line for line in reaped.kept] == [True]
        assert (folder / "disk.qcow2").exists()
        assert folder.with_name("vm-1.json").exists()
        assert not (owner / "vm-2").exists()
    assert process.poll() is None

    process.kill()
    process.wait()
    assert [each.kept for each in catalog.gc()] == [()]
    assert not owner.exists()


def test_a_process_that_is_about_to_end_and_has_no_command_line_any_more_is_waited_for(catalog: Catalog, owner: Path) -> None:
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", ENDING, str(owner / "vm-1")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == b"done"
        assert Path(f"/proc/{process.pid}/cmdline").read_bytes() == b""
        machine(owner, "vm-1", process=identity(process))

        (reaped,) = catalog.gc()

    assert (reaped.machines, reaped.processes, reaped.kept) == (("vm-1",), (), ())
    assert not owner.exists()


def test_a_dry_run_ends_and_removes_nothing(catalog: Catalog, owner: Path, spawn: Spawn) -> None:
    process = spawn(owner / "vm-1")
    folder = machine(owner, "vm-1", process=identity(process))

    assert [(each.machines, each.processes) for each in catalog.gc(dry_run=True)] == [(("vm-1",), (process.pid,))]
    assert folder.is_dir()
    assert process.poll() is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"sha256": "", "record": {"version": 1}}', b"\xff" * 100])
def test_a_record_that_cannot_be_read_is_put_aside_and_told(catalog: Catalog, owner: Path, content: bytes) -> None:
    machine(owner, "vm-1")
    (owner / "vm-1.json").write_bytes(content)

    (reaped,) = catalog.gc()
    assert [sentence.partition(":")[0] for sentence in reaped.damaged] == [f"{owner}/vm-1.json"]
    assert [path.read_bytes() for path in catalog.root.glob("quarantine/*/vm-1.json")] == [content]
    assert not owner.exists()


def test_a_record_of_another_version_is_not_taken_for_one_of_this(tmp_path: Path) -> None:
    record = json.loads(Record(owner=dead()).dump())
    record["record"]["version"] = 2
    record["sha256"] = supervisor._digest(record["record"])
    (tmp_path / "record").write_text(json.dumps(record))

    with pytest.raises(ValueError, match="version 2"):
        Record.read(tmp_path / "record")


def test_no_link_is_followed(catalog: Catalog, owner: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (owner / "vm-1").symlink_to(tmp_path / "precious")
    (owner / "vm-2.json").symlink_to(tmp_path / "precious" / "file")
    (catalog.root / "run" / "1-a.lock").symlink_to(tmp_path / "precious" / "file")
    (catalog.root / "run" / "2-b.lock").touch()
    (catalog.root / "run" / "2-b").symlink_to(tmp_path / "precious")

    catalog.gc()
    assert (tmp_path / "precious" / "file").read_text() == "x"


def test_a_machine_that_outlives_its_starter_is_ended_by_its_command(catalog: Catalog, owner: Path, spawn: Spawn) -> None:
    process = spawn()
    kill = (sys.executable, "-c", "import os, sys; os.kill(int(sys.argv[1]), 9)", str(process.pid))
    machine(owner, "vm-1", process=identity(process), ending=kill)

    (reaped,) = catalog.gc()
    assert (reaped.machines, reaped.kept) == (("vm-1",), ())
    assert ended(process)
    assert not owner.exists()


@pytest.mark.parametrize(("argv", "told"), [(("false",), "ended with status 1"), (("/no/such/program",), "cannot be run")])
def test_a_machine_whose_command_does_not_end_it_is_kept(catalog: Catalog, owner: Path, argv: tuple[str, ...], told: str) -> None:
    folder = machine(owner, "vm-1", ending=argv)

    (reaped,) = catalog.gc()
    assert told in reaped.kept[0]
    assert folder.is_dir()


def test_a_process_that_shows_up_late_is_ended_too(owner: Path, tmp_path: Path) -> None:
    folder = machine(owner, "vm-1")
    os.utime(owner / "vm-1.json")  # a moment ago
    late = subprocess.Popen(
        ["sh", "-c", 'sleep 0.4; VMBOTTLE_MACHINE="$1" exec "$2" -I -S -c "import time; time.sleep(600)"', "sh", folder, sys.executable]
    )
    reap(owner, aside=tmp_path)

    assert ended(late)
    assert not owner.exists()


def test_the_scratch_folder_of_a_proof_goes_when_it_is_old_and_nobody_holds_it(catalog: Catalog) -> None:
    folders = [catalog.proofs / f"proving-{name}" for name in ("old", "held", "new")]
    for folder in folders:
        folder.mkdir(parents=True, mode=0o700)
    for folder in folders[:2]:
        os.utime(folder, (0, 0))
    hold = os.open(folders[1], os.O_RDONLY)
    fcntl.flock(hold, fcntl.LOCK_SH)

    catalog.gc()
    assert sorted(catalog.proofs.iterdir()) == sorted(folders[1:])
    os.close(hold)


def test_fifty_dead_machines_are_cleared_away_at_once(
    catalog: Catalog, owner: Path, spawn: Spawn, record_property: Callable[[str, object], None]
) -> None:
    processes = [spawn(owner / f"vm-{number}" / "disk") for number in range(50)]
    for number, process in enumerate(processes):
        machine(owner, f"vm-{number}", process=identity(process))

    began = time.monotonic()
    (reaped,) = catalog.gc()
    record_property("50 dead machines", f"{time.monotonic() - began:.2f} s")
    assert (len(reaped.machines), len(reaped.processes)) == (50, 50)
    assert all(map(ended, processes))
    assert not owner.exists()


def test_a_supervisor_outlives_signals_that_end_what_it_watches(owner: Path) -> None:
    lock = os.open(owner.with_suffix(".lock"), os.O_RDONLY)
    watching = Supervisor(owner, lock)
    assert Deadline(10).poll(lambda: b"SigCgt" in Path(f"/proc/{watching.pid}/status").read_bytes() and _catches(watching.pid), every=0.01)
    for number in (2, 1, 15):
        os.kill(watching.pid, number)
    time.sleep(0.1)

    assert watching.is_running
    watching.close()
    watching.close()
    assert not watching.is_running
    os.close(lock)


def _catches(pid: int) -> bool:
    """Tell whether a process handles SIGTERM."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) >> 14 & 1)


# -- the command -------------------------------------------------------------------------------------------------------------------------


def invoke(catalog: Catalog, *words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["--catalog", str(catalog.root), "gc", *words])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_tells_what_it_removed(catalog: Catalog, owner: Path) -> None:
    machine(owner, "vm-1")

    assert invoke(catalog, "--dry-run")[:2] == (0, "4711  vm-1\n")
    assert json.loads(invoke(catalog, "--dry-run", "--json")[1])[0]["machines"] == ["vm-1"]
    assert invoke(catalog) == (0, "4711  vm-1\n", "")
    assert invoke(catalog) == (0, "", "")


def test_the_command_fails_if_something_is_kept_and_names_machines_that_no_record_knows(
    catalog: Catalog, owner: Path, spawn: Spawn
) -> None:
    stray = spawn(env=supervisor.environment(catalog.root / "run" / "5-ff" / "vm-9"))
    Deadline(60).poll(catalog.strays, every=0.01)
    machine(owner, "vm-1", process=identity(spawn()))

    status, stdout, stderr = invoke(catalog)
    assert (status, stdout) == (1, "")
    assert str(owner / "vm-1") in stderr
    assert f"kill {stray.pid}" in stderr
    assert stray.poll() is None
