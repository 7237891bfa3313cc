"""Images and packs while those who make, use, prune and damage them get in each other's way."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pytest_vmbottle import MachineSpec, PackCorrupt
from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.testing import FakeBackend

Rounds = Callable[[str, int], range]
Figures = Callable[[str, object], None]

# Builds a slow layer and pours from it; writes down who built, and when it had a machine.
POUR = """
import os, sys, time
from pathlib import Path
from pytest_vmbottle import MachineSpec, layer
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.testing import FakeBackend
root = Path(sys.argv[1])

@layer("debian-12", version=sys.argv[2])
def slow(vm):
    with open(root / "built", "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(float(sys.argv[3]))

settings = Settings(report=lambda line: print(line, flush=True), timeout_factor=0.1)
provisioner = Provisioner(Catalog(root), FakeBackend(), name="fake", settings=settings)
print("ready", flush=True)
sys.stdin.readline()
with provisioner.machine(MachineSpec.resolve(slow, {})) as machine:
    assert machine.exec(["true"]).ok
    print("poured", flush=True)
provisioner.close()
"""


@contextmanager
def workers(number: int, root: Path, *words: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are about to pour a machine."""
    worker = root.with_name("worker.py")  # a layer's source is read from its file
    worker.write_text(POUR)
    argv = [sys.executable, str(worker), str(root), *words]
    with ExitStack() as stack:
        running = [
            stack.enter_context(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)) for _ in range(number)
        ]
        assert [each.stdout.readline() for each in running if each.stdout] == ["ready\n"] * number
        try:
            yield running
        finally:
            for each in running:
                each.kill()


def go(running: list[subprocess.Popen[str]]) -> None:
    for each in running:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()


def builders(root: Path) -> list[int]:
    return [int(word) for word in (root / "built").read_text().split()] if (root / "built").exists() else []


@pytest.mark.usefixtures("image")
def test_many_workers_build_a_pack_once_and_another_takes_over_from_a_builder_that_is_killed(root: Path, rounds: Rounds) -> None:
    with workers(max(3, len(rounds("C3", 4))), root, "1", "2.5") as running:
        go(running)
        assert Deadline(30).poll(lambda: builders(root))
        (first,) = builders(root)
        victim = next(each for each in running if each.pid == first)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        assert packs.scan(root / "packs")[0][1:] == (), "no half pack is to be seen"
        others = [each for each in running if each is not victim]
        said = [each.communicate()[0] for each in others]

    assert [each.returncode for each in others] == [0] * len(others)
    assert all(text.endswith("poured\n") for text in said)
    second, *more = builders(root)[1:]
    assert second in {each.pid for each in others}
    assert more == []
    assert any(str(second) in text or str(first) in text for text in said)


@pytest.mark.guests
@pytest.mark.usefixtures("image")
def test_different_packs_are_built_at_the_same_time(root: Path, catalog: Catalog) -> None:
    ours = Provisioner(catalog, FakeBackend(), name="fake", settings=Settings())
    ours.pack(MachineSpec(source="debian-12"))
    ours.close()
    with workers(1, root, "1", "600") as one, workers(1, root, "2", "0") as other:
        go(one)
        assert Deadline(30).poll(lambda: builders(root))
        go(other)
        assert other[0].communicate()[0].endswith("poured\n")
        assert one[0].poll() is None


PRUNE = """
import sys
from pathlib import Path
from pytest_vmbottle.catalog.catalog import Catalog
catalog = Catalog(Path(sys.argv[1]))
print("ready", flush=True)
gone = 0
while True:
    for pack in list(catalog.packs.iterdir()):
        if catalog.discard(pack):
            gone += 1
            print(gone, flush=True)
"""


@pytest.mark.usefixtures("image")
def test_a_pack_is_never_pruned_under_a_machine_that_is_being_made_of_it(root: Path, catalog: Catalog, rounds: Rounds) -> None:
    backend = FakeBackend()
    (root / "packs").mkdir()
    with subprocess.Popen([sys.executable, "-c", PRUNE, str(root)], stdout=subprocess.PIPE, text=True) as pruner:
        assert pruner.stdout is not None
        assert pruner.stdout.readline() == "ready\n"
        for _ in rounds("C4", 5):
            provisioner = Provisioner(catalog, backend, name="fake", settings=Settings())
            with provisioner.machine(MachineSpec(source="debian-12")):
                used = backend.launched[-1].saved
                assert used is not None
                packs.read(used).verify()
            provisioner.close()
        Deadline(10).poll(lambda: not list((root / "packs").iterdir()))
        pruner.kill()
        assert pruner.communicate()[0], "it has pruned what was not in use"


@pytest.mark.usefixtures("image")
def test_every_pack_with_one_changed_bit_is_refused(catalog: Catalog, tmp_path: Path, rounds: Rounds, record_property: Figures) -> None:
    provisioner = Provisioner(catalog, FakeBackend(), name="fake", settings=Settings())
    good = provisioner.pack(MachineSpec(source="debian-12"))
    provisioner.close()
    refused, chance = 0, random.Random(5)
    bad = tmp_path / good.key
    times = rounds("C5", 20)
    for _ in times:
        shutil.copytree(good.path, bad)
        flip(chance.choice([path for path in sorted(bad.iterdir()) if path.stat().st_size]), chance)
        try:
            packs.read(bad).verify()
        except PackCorrupt:
            refused += 1
        shutil.rmtree(bad)
    record_property("C5", f"{refused} of {len(times)} damaged packs refused")
    assert refused == len(times)


def flip(path: Path, chance: random.Random) -> None:
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


# -- disks ---------------------------------------------------------------------------------------------------------------------------


def img(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, check=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A disk of 4 MiB, not to be written."""
    path = tmp_path / "base.qcow2"
    assert img("create", "-q", "-f", "qcow2", path, "4M").returncode == 0
    assert subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", path], capture_output=True, check=False).returncode == 0
    path.chmod(0o400)
    return path


def overlay(base: Path, path: Path) -> Path:
    assert img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, path).returncode == 0
    return path


@contextmanager
def qemu(root: Path, disk: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A machine with this disk whose processor never runs."""
    node = f"driver=qcow2,node-name=disk,file.driver=file,file.filename={disk}"
    argv = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-machine", "none", "-name", str(root), "-blockdev", node]
    monitor = root / f"monitor-{disk.stem}-{time.monotonic_ns()}"
    with subprocess.Popen([*argv, "-qmp", f"unix:{monitor.name},server=on,wait=off"], cwd=root, stderr=subprocess.PIPE) as running:
        try:
            assert Deadline(30).poll(lambda: running.poll() is not None or monitor.exists(), every=0.02)
            yield running
        finally:
            running.kill()
            monitor.unlink(missing_ok=True)


@pytest.mark.usefixtures("catalog")
def test_a_disk_that_a_machine_has_is_nobody_elses(root: Path, base: Path, tmp_path: Path) -> None:
    disk = overlay(base, tmp_path / "disk.qcow2")
    with qemu(root, disk) as first:
        assert first.poll() is None
        with qemu(root, disk) as second:
            assert second.wait(60) == 1
            assert second.stderr is not None
            assert b'Failed to get "write" lock' in second.stderr.read()
        commands = [("commit", disk), ("snapshot", "-c", "now", disk), ("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, disk)]
        for command in commands:
            refused = img(*command)
            assert refused.returncode == 1
            assert 'Failed to get "write" lock' in refused.stderr
        assert first.poll() is None


@pytest.mark.usefixtures("catalog")
def test_many_machines_on_one_base_leave_it_as_it_was(root: Path, base: Path, tmp_path: Path, rounds: Rounds) -> None:
    before = hashlib.sha256(base.read_bytes()).hexdigest()
    with ExitStack() as stack:
        disks = [overlay(base, tmp_path / f"disk-{number}.qcow2") for number in rounds("C2", 6)]
        running = [stack.enter_context(qemu(root, disk)) for disk in disks]
        assert [each.poll() for each in running] == [None] * len(disks)
    assert hashlib.sha256(base.read_bytes()).hexdigest() == before


WRITES = "\n".join(f"write -q -P {number % 255} {number * 64 % 4000}k 64k" for number in range(4000)) + "\n"


def test_a_disk_whose_writer_is_killed_loses_nothing_but_room(base: Path, tmp_path: Path, rounds: Rounds, record_property: Figures) -> None:
    chance, statuses, writes = random.Random(6), [], tmp_path / "writes"
    writes.write_text(WRITES)
    for number in rounds("C6", 8):
        disk = overlay(base, tmp_path / f"disk-{number}.qcow2")
        with writes.open() as source, subprocess.Popen(["qemu-io", "-f", "qcow2", disk], stdin=source, stdout=subprocess.DEVNULL) as writer:
            threading.Timer(chance.uniform(0.02, 0.25), writer.kill).start()
        statuses.append(img("check", "-q", disk).returncode)
        disk.unlink()
    record_property("C6", f"qemu-img check: {statuses.count(0)} clean, {statuses.count(3)} with leaks, of {len(statuses)}")
    assert set(statuses) <= {0, 3}
