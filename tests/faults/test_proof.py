"""Nobody is signalled, and nothing removed, without proof; with proof, everything is."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.host.supervisor import Identity, Record

Rounds = Callable[[str, int], range]
Forge = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("catalog", "canary")


@pytest.fixture
def forge(root: Path) -> Forge:
    """Makes what a dead owner left: a machine's folder and record, which says whatever one likes; returns the owner's folder."""

    def forge(name: str, record: Record | None = None, *, machine: str = "vm-1") -> Path:
        owner = root / "run" / name
        (owner / machine).mkdir(parents=True)
        (owner / machine / "overlay").write_text("x")
        owner.with_suffix(".lock").touch()
        if record is not None:
            (owner / f"{machine}.json").write_bytes(record.dump())
        return owner

    return forge


@contextmanager
def process(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(argv, start_new_session=True) as running:
        try:
            yield running
        finally:
            running.kill()


def identity(pid: int) -> Identity:
    found = Identity.of(pid)
    assert found is not None
    return found


def sleeper(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)", *words)


def test_a_process_that_a_record_names_wrongly_is_never_signalled(catalog: Catalog, forge: Forge) -> None:
    boot = identity(os.getpid()).boot
    with process(*sleeper()) as innocent, process(*sleeper()) as named:
        truth = identity(innocent.pid)
        forged = [
            *(Identity(pid, 1, boot) for pid in (0, -1, 1, 2, 1 << 31, (1 << 31) - 1, os.getpid(), os.getppid(), innocent.pid)),
            truth._replace(ticks=truth.ticks + 1),
            truth._replace(ticks=truth.ticks - 1),
            truth._replace(boot="another"),
            identity(named.pid),  # the true process, whose command line does not name the machine's folder
            identity(os.getpid()),
        ]
        owners = [
            forge(f"4000000-{number:012x}", Record(owner=Identity(4000000, 1, boot), process=each)) for number, each in enumerate(forged)
        ]
        found = {each.owner: each for each in catalog.gc()}

        assert [each.processes for each in found.values()] == [()] * len(forged)
        assert innocent.poll() is None
        assert named.poll() is None
        # Where a process with that very identity runs, nothing is proven, and so nothing is removed.
        kept = [owner for owner, each in zip(owners, forged, strict=True) if each.is_running]
        assert len(kept) == 2
        assert [owner for owner in owners if owner.exists()] == kept
        assert all("folder" in found[owner.name].kept[0] for owner in kept)
    assert {each.owner for each in catalog.gc() if not each.kept} == {kept[0].name}, "as soon as that process has ended, it is proven"
    shutil.rmtree(kept[1])
    catalog.gc()


def test_what_another_boot_of_this_computer_left_is_removed_without_a_signal(catalog: Catalog, forge: Forge) -> None:
    with process(*sleeper()) as innocent:
        before = identity(innocent.pid)._replace(boot="00000000-0000-0000-0000-000000000000")
        owner = forge("4000000-0123456789ab", Record(owner=before, process=before))
        (reaped,) = catalog.gc()

        assert (reaped.machines, reaped.processes, reaped.kept) == (("vm-1",), (), ())
        assert innocent.poll() is None
    assert not owner.exists()
    assert not owner.with_suffix(".lock").exists()


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_was_set_changes_nothing(
    catalog: Catalog, root: Path, forge: Forge, days: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, clock = time.monotonic(), time.time
    with catalog.rundir("ours") as ours:
        # An intent without a process: the record's own time, by the old clock, is all that there is.
        dead = forge("4000000-0123456789ab", Record(owner=Identity(4000000, 1, "boot")))
        monkeypatch.setattr(time, "time", lambda: clock() + days * 86400)
        (reaped,) = Catalog(root).gc()
        assert reaped.machines == ("vm-1",)
        assert not dead.exists()
        assert ours.is_dir()
    assert time.monotonic() - began < 30


RECYCLE = """
import os, subprocess, sys, time
from pathlib import Path
from pytest_vmbottle.host.supervisor import Identity, kill

def start(pid=None):
    if pid is not None:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    return subprocess.Popen(["sleep", "600"])

for _ in range(int(sys.argv[1])):
    first = start()
    was = Identity.of(first.pid)
    first.kill()
    first.wait()
    time.sleep(0.011)  # the finest that the kernel tells of a beginning is a hundredth of a second
    while True:
        second = start(first.pid)
        if second.pid == first.pid:
            break
        second.kill()
        second.wait()
    assert not was.is_running
    assert kill([was], seconds=0) == []
    assert second.poll() is None, "a process with a recycled number was ended"
    second.kill()
    second.wait()
"""


def _own_numbers() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.mark.skipif(
    subprocess.run([*_own_numbers(), "sh", "-c", "echo 1000 > /proc/sys/kernel/ns_last_pid"], capture_output=True, check=False).returncode
    != 0,
    reason="process numbers of one's own take a namespace, which this host does not give",
)
def test_a_process_that_has_a_dead_ones_number_is_spared(rounds: Rounds, root: Path) -> None:
    times = len(rounds("B2", 10))
    argv = [*_own_numbers(), sys.executable, "-c", RECYCLE, str(times), str(root)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60 + times)
    assert done.returncode == 0, done.stderr


# -- records that make no sense ------------------------------------------------------------------------------------------------------------


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


def _socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"/proc/self/fd/{folder}/{path.name}")
    listening.close()
    os.close(folder)


def text(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


NONSENSE: dict[str, Callable[[Path], object]] = {
    "empty": text(b""),
    "half": text(b"{"),
    "binary": text(bytes(range(256))),
    "a list": text(b"[]"),
    "unknown version": lambda path: path.write_bytes(Record(owner=Identity(1, 1, "")).dump().replace(b'"version": 1', b'"version": 9')),
    "deep": text(b"[" * 100_000),
    "huge": _huge,
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a folder": Path.mkdir,
    "closed": lambda path: path.touch(mode=0),
}


def test_records_that_make_no_sense_are_put_aside_and_keep_nobody_from_the_others(catalog: Catalog, root: Path, forge: Forge) -> None:
    for number, make in enumerate(NONSENSE.values()):
        make(forge(f"4000000-{number:012x}") / "vm-1.json")
    sound = forge("4000001-000000000000", Record(owner=Identity(4000001, 1, "boot")))
    began = time.monotonic()
    found = catalog.gc()

    assert time.monotonic() - began < len(NONSENSE)
    assert len(found) == len(NONSENSE) + 1
    assert [each.kept for each in found] == [()] * len(found)
    assert not sound.exists()
    assert list((root / "run").iterdir()) == []
    assert Path("/etc/passwd").is_file()


# -- many at once --------------------------------------------------------------------------------------------------------------------------

GC = """
import sys
from pathlib import Path
from pytest_vmbottle.catalog.catalog import Catalog
catalog = Catalog(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for each in catalog.gc():
    print(each.owner, *each.machines, *each.kept)
"""


def test_many_sessions_that_clean_up_at_once_reap_each_dead_machine_once_and_no_living_one(
    root: Path, forge: Forge, rounds: Rounds, record_property: Callable[[str, object], None]
) -> None:
    sessions, dead = len(rounds("B16", 4)), 50
    for number in range(dead):
        forge(f"4000000-{number:012x}", Record(owner=Identity(4000000, 1, "boot"), process=Identity(4000000, 1, "boot")))
    owners = [Catalog(root) for _ in range(10)]
    with ExitStack() as stack:
        living = [stack.enter_context(owner.rundir("vm-1")) for owner in owners]
        running = [
            stack.enter_context(
                subprocess.Popen([sys.executable, "-c", GC, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(sessions)
        ]
        assert [each.stdout.readline() for each in running if each.stdout] == ["ready\n"] * sessions
        began = time.monotonic()
        said = [each.communicate("\n")[0] for each in running]
        took = time.monotonic() - began
        assert [each.returncode for each in running] == [0] * sessions
        reaped = [line.split() for each in said for line in each.splitlines()]
        assert sorted(words[0] for words in reaped) == [f"4000000-{number:012x}" for number in range(dead)]
        assert all(words[1:] == ["vm-1"] for words in reaped)
        assert all(folder.is_dir() for folder in living)
    for owner in owners:
        owner.close()
    record_property("B16", f"{sessions} sessions reaped {dead} dead machines in {took:.2f} s")


def test_a_machine_that_is_written_down_and_not_started_yet_is_left_to_its_owner(root: Path, catalog: Catalog, rounds: Rounds) -> None:
    other = Catalog(root)
    for number in rounds("B17", 20):
        with catalog.rundir(f"vm-{number}") as folder:
            assert other.gc() == ()
            assert folder.with_name(f"vm-{number}.json").exists()
