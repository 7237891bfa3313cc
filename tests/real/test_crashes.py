"""What is on a disk after a crash, looked at in real guests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle import Machine, layer

if TYPE_CHECKING:
    from pytest_vmbottle.machine.crash_explorer import AfterCrash, CrashLog

DISK = "/dev/disk/by-id/virtio-data"
Explorer = Callable[[Machine, str], AbstractContextManager["CrashLog"]]


NOTE = """#!/usr/bin/python3
import os, sys
with open('/data/notes', 'a') as file:
    file.write(sys.argv[-1] + '\\n')
    if sys.argv[1] == '--sync':
        file.flush()
        os.fsync(file.fileno())
"""


def recorded(vm: Machine, explorer: Explorer, *options: str, notes: int = 6) -> CrashLog:
    """Notes taken by a program that appends a line to a file; with `--sync` it is on the disk when the program ends."""
    vm.path("/usr/local/bin/note").write_text(NOTE, mode=0o755)
    vm.exec(f"mkdir /data; mkfs.ext4 -q {DISK}; mount {DISK} /data; touch /data/notes; sync")
    with explorer(vm, "data") as log:
        for number in range(notes):
            vm.exec(["note", *options, str(number)])
            log.mark(number)
        if not options:
            vm.exec("sync")
    return log


def count(after: Machine) -> int:
    return len(after.exec(f"mkdir -p /data; mount {DISK} /data; cat /data/notes").stdout.splitlines())


@pytest.mark.vm("debian-12", disks={"data": "32M"})
def test_what_was_synced_before_it_was_acknowledged_survives_every_crash(vm: Machine, crash_explorer: Explorer) -> None:
    log = recorded(vm, crash_explorer, "--sync", notes=3)
    seen = set()
    for state in log.states(limit=6):
        with state.machine() as after:
            found = count(after)
        assert found >= state.acknowledged
        seen.add((found, after.id))
    assert {lines for lines, _ in seen} >= {0, 3}
    assert len({machine for _, machine in seen}) == 1, "one clone looks at all states"
    assert "of" in log.summary


@pytest.mark.vm("debian-12", disks={"data": "32M"})
def test_a_state_has_nothing_of_the_one_before_and_no_program_is_left_on_its_disk(vm: Machine, crash_explorer: Explorer) -> None:
    vm.exec("mkdir /data")
    with crash_explorer(vm, "data") as log:
        for name in ("one", "two"):
            vm.exec(f"mkfs.ext4 -q -F -L {name} {DISK}; mount {DISK} /data; echo {name} > /data/notes; umount /data")
            log.mark(name)
    whole = [log.state(f"w{number}") for number in range(len(log._history.writes) + 1)]
    one, two = (next(state for state in whole if state.marks == marks) for marks in (("one",), ("one", "two")))
    machines = []
    for state, name in ((two, "two"), (one, "one"), (two, "two"), (one, "one")):
        with state.machine() as after:
            assert after.exec(f"blkid -p -s LABEL -o value {DISK}").stdout.split() == [name]
            assert {"one", "two"} & set(after.exec("ls /dev/disk/by-label").stdout.split()) == {name}
            assert after.exec(f"mkdir -p /data; mount LABEL={name} /data; cat /data/notes").stdout == f"{name}\n"
            after.exec("echo three > /data/notes; mount --bind /data '/mnt'; sync")
            machines.append(after.id)
    with one.machine() as after:
        after.exec(f"sleep 1000 < {DISK} >/dev/null 2>&1 &")
    for _ in range(2):
        with one.machine() as after:
            machines.append(after.id)
            assert after.exec(f"mkdir -p /data; mount {DISK} /data; cat /data/notes").stdout == "one\n"
    assert machines == [machines[0]] * 4 + [machines[-1]] * 2
    assert machines[0] != machines[-1]


@pytest.mark.guests
@pytest.mark.vm("debian-12", disks={"data": "32M"})
def test_what_was_not_synced_is_found_to_be_lost_and_the_state_is_told_and_comes_back(vm: Machine, crash_explorer: Explorer) -> None:
    log = recorded(vm, crash_explorer)

    def look(after: Machine, state: AfterCrash) -> None:
        assert count(after) >= state.acknowledged

    with pytest.raises(AssertionError, match=r"w\d+.* failed") as caught:
        log.check(look, limit=6)
    state = log.state(str(caught.value).split()[0])
    assert state.acknowledged
    with pytest.raises(AssertionError) as again, state.machine() as after:
        look(after, state)
    assert str(state) in again.value.__notes__[0]


SQL = """#!/usr/bin/python3
import sqlite3, sys
base = sqlite3.connect('/data/base', isolation_level=None)
if sys.argv[1] == 'count':
    assert base.execute('PRAGMA integrity_check').fetchone() == ('ok',)
    print(base.execute('SELECT count(*) FROM sqlite_master').fetchone()[0] and base.execute('SELECT count(*) FROM entries').fetchone()[0])
else:
    base.execute('PRAGMA journal_mode=' + sys.argv[1])
    base.execute('PRAGMA synchronous=' + sys.argv[2])
    base.execute('CREATE TABLE IF NOT EXISTS entries (number)')
    base.execute('INSERT INTO entries VALUES (?)', sys.argv[3:])
"""


@layer("debian-12", depends=["test_crashes.py"])
def ledger(vm: Machine) -> None:
    """Has a program that puts rows into a database of SQLite."""
    vm.path("/data").mkdir()
    vm.write_files({"/usr/local/bin/sql": SQL}, mode=0o755)


@pytest.mark.guests
@pytest.mark.vm(ledger, disks={"data": "32M"})
@pytest.mark.parametrize(
    ("journal", "synchronous", "most"),
    [("DELETE", "OFF", 10), ("DELETE", "FULL", 1), ("DELETE", "EXTRA", 0), ("WAL", "FULL", 0)],
)
def test_sqlite_keeps_what_its_documentation_promises(
    vm: Machine, crash_explorer: Explorer, journal: str, synchronous: str, most: int
) -> None:
    """https://www.sqlite.org/pragma.html#pragma_synchronous: with FULL the end of a journal's life is not synced, with EXTRA it is."""
    vm.exec(f"mkfs.ext4 -q {DISK}; mount {DISK} /data; sql {journal} {synchronous} 0; sync")
    with crash_explorer(vm, "data") as log:
        for number in range(1, 11):
            vm.exec(["sql", journal, synchronous, str(number)])
            log.mark(number)
        vm.exec("sync")  # what nobody has synced goes to the disk in the end
    lost: dict[str, int] = {}
    for state in log.states(limit=40):
        with state.machine() as after:
            found = after.exec(f"mount {DISK} /data; sql count 2>&1", check=False)
            # A file that was not synced may be anything, and no database either.
            rows = int(found.stdout) if found.ok else 0
        lost[state.text] = max(0, state.acknowledged + 1 - rows)
    worst = max(lost, key=lambda text: lost[text])
    assert lost[worst] <= most, (worst, log.summary)
    if synchronous == "OFF":
        assert lost[worst] > 1, log.summary
        with log.state(worst).machine() as after:
            again = after.exec(f"mount {DISK} /data; sql count 2>&1", check=False)
        assert log.state(worst).acknowledged + 1 - (int(again.stdout) if again.ok else 0) == lost[worst]


@pytest.mark.guests
@pytest.mark.vm("debian-12")
def test_a_root_disk_is_booted_as_a_crash_left_it(vm: Machine, crash_explorer: Explorer) -> None:
    with crash_explorer(vm, "root") as log:
        for number in range(3):
            vm.exec(f"echo {number} >> /root/lines; sync /root/lines; sync")
            log.mark(number)
    last = list(log.states(limit=30))[-1]
    with last.machine(boot=True) as after:
        assert len(after.exec("cat /root/lines 2>/dev/null || true").stdout.splitlines()) >= last.acknowledged
    with pytest.raises(ValueError, match="boot=True"), last.machine():
        pass
