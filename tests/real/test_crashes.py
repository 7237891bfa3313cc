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


@layer("debian-12", depends=["test_crashes.py"])
def notebook(vm: Machine) -> None:
    """Has a program that appends a line to a file; with `--sync` it is on the disk when the program ends."""
    vm.path("/data").mkdir()
    vm.write_files({"/usr/local/bin/note": NOTE}, mode=0o755)


def recorded(vm: Machine, explorer: Explorer, *options: str) -> CrashLog:
    vm.exec(f"mkfs.ext4 -q {DISK}; mount {DISK} /data; touch /data/notes; sync")
    with explorer(vm, "data") as log:
        for number in range(6):
            vm.exec(["note", *options, str(number)])
            log.mark(number)
        if not options:
            vm.exec("sync")
    return log


def count(after: Machine) -> int:
    return len(after.exec(f"mount {DISK} /data; cat /data/notes").stdout.splitlines())


@pytest.mark.vm(notebook, disks={"data": "32M"})
def test_what_was_synced_before_it_was_acknowledged_survives_every_crash(vm: Machine, crash_explorer: Explorer) -> None:
    log = recorded(vm, crash_explorer, "--sync")
    seen = set()
    for state in log.states(limit=12):
        with state.machine() as after:
            found = count(after)
        assert found >= state.acknowledged
        seen.add((found, after.id))
    assert {lines for lines, _ in seen} >= {0, 6}
    assert len({machine for _, machine in seen}) == 1, "one clone looks at all states"
    assert "of" in log.summary


@pytest.mark.guests
@pytest.mark.vm(notebook, disks={"data": "32M"})
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
