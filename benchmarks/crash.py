"""Time to look at what a crash leaves: `python benchmarks/crash.py [STATES]`, on an otherwise idle computer.

A database of SQLite on ext4 is written to while the disk is recorded; then states are looked at in one clone, each by mounting the disk and
counting rows. Prints the seconds of each step, by median, and how long 200 states take.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pytest_vmbottle import Machine, MachineSpec
from pytest_vmbottle.backends.port import Start
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_root
from pytest_vmbottle.machine.crash_explorer import record_crashes
from pytest_vmbottle.provision import Provisioner, Settings

DISK = "/dev/disk/by-id/virtio-data"
SQL = "import sqlite3, sys; base = sqlite3.connect('/data/base', isolation_level=None); print(base.execute(sys.argv[1]).fetchall())"


def main(count: int) -> None:
    """Record, look, and print."""
    catalog = Catalog(default_root())
    provisioner = Provisioner(
        catalog, QemuBackend(proofs=catalog.root), name="qemu", settings=Settings(report=lambda text: print(text, flush=True))
    )

    @contextmanager
    def make(spec: MachineSpec, start: Start) -> Iterator[Machine]:
        with provisioner.machine(spec, start=start) as machine:
            yield machine

    spec = MachineSpec(source="debian-12", disks={"data": "256M"}, run=["mkdir /data"])
    with provisioner.machine(spec) as vm:
        vm.exec(f"mkfs.ext4 -q {DISK}; mount {DISK} /data; sync")
        with record_crashes(vm, "data", make) as log:
            vm.exec(["python3", "-c", SQL, "CREATE TABLE entries (number)"])
            for number in range(20):
                vm.exec(["python3", "-c", SQL, f"INSERT INTO entries VALUES ({number})"])
                log.mark(number)
        seconds, looks = [], []
        for state in log.states(limit=count):
            began = time.perf_counter()
            with state.machine() as after:
                looked = time.perf_counter()
                after.exec(f"mount {DISK} /data; python3 -c \"{SQL}\" 'SELECT count(*) FROM sqlite_master'", check=False)
                looks.append(time.perf_counter() - looked)
            seconds.append(time.perf_counter() - began)
        log.close()
    print(log.summary)
    each = statistics.median(seconds)
    print(f"a state: {each:.2f} s, of which the look at it {statistics.median(looks):.2f} s; {len(seconds)} states: {sum(seconds):.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
