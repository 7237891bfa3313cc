"""Faults and crashes with programs that an image has besides: a traced one, and another file system."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle import Machine, layer
from pytest_vmbottle.images import ImageStore, build

if TYPE_CHECKING:
    from pytest_vmbottle.catalog.catalog import Catalog
    from pytest_vmbottle.machine.crash_explorer import CrashLog

DISK = "/dev/disk/by-id/virtio-data"
IMAGE = "programs"
Explorer = Callable[[Machine, str], AbstractContextManager["CrashLog"]]
SYNCS = """
import os, time
file = open("/srv/synced", "a")
while True:
    try:
        os.fsync(file.fileno())
        told = "fine"
    except OSError as error:
        told = f"OSError {error.errno}"
    print(told, file=file, flush=True)
    time.sleep(0.05)
"""


@pytest.fixture(autouse=True, scope="module")
def _image(vm_catalog: Catalog) -> None:
    store = ImageStore(vm_catalog.root / "images")
    if IMAGE not in {image.name for image in store.list()}:
        build(store, "debian-12", name=IMAGE, include=["cron", "strace", "xfsprogs", "postgresql"])


@pytest.mark.vm(IMAGE)
def test_jobs_of_cron_and_timers_run_each_time_and_in_order_and_nothing_twice(vm: Machine) -> None:
    vm.exec("rm /etc/cron.d/* /etc/crontab")  # an hourly job comes 504 times
    vm.path("/etc/cron.d/mine").write_text(
        "30 4 * * mon root echo monday $(date +\\%u-\\%H:\\%M) >> /srv/runs\n"
        "31 4 */2 * * root echo second $(date +\\%u-\\%H:\\%M) >> /srv/runs\n"
    )
    vm.exec(
        "systemctl restart cron; systemd-run --on-calendar='mon 04:30:30' --timer-property=AccuracySec=1us sh -c 'echo timer >> /srv/runs'"
    )
    with vm.clock.fast_forward(days=21):
        runs = vm.path("/srv/runs").read_text().splitlines()
    assert [run for run in runs if "second" not in run] == ["monday 1-04:30", "timer"] * 3
    assert 9 <= len([run for run in runs if "second" in run]) <= 12
    assert all(run.endswith("-04:31") for run in runs if "second" in run)
    vm.exec("date +%s > /srv/after; rm /srv/runs")
    vm.path("/etc/cron.d/mine").write_text("* * * * * root touch /srv/again\n")
    assert vm.wait_until("test -e /srv/again", timeout=90).ok


@pytest.mark.vm(IMAGE)
def test_a_system_call_of_a_running_unit_fails_from_the_second_time_on(vm: Machine) -> None:
    vm.write_files({"/root/syncs.py": SYNCS})
    vm.exec("systemd-run --unit=syncs python3 /root/syncs.py; until [ -e /srv/synced ]; do sleep 0.1; done")
    with vm.faults.syscall("syncs", "fsync", error="EIO", when="2+"):
        assert vm.wait_until("grep -qx 'OSError 5' /srv/synced").ok
    assert vm.wait_until("tail -n1 /srv/synced | grep -qx fine").ok


@layer(IMAGE)
def writer(vm: Machine) -> None:
    """Has a program that replaces a configuration file in one of the usual ways."""
    vm.path("/data").mkdir()
    vm.write_files({"/usr/local/bin/configure": CONFIGURE}, mode=0o755)


CONFIGURE = """#!/usr/bin/python3
import os, sys
way, content = sys.argv[1], sys.argv[2] * 3000
name = '/data/config.new' if 'rename' in way else '/data/config'
with open(name, 'w') as file:
    file.write(content)
    if 'fsync' in way:
        file.flush()
        os.fsync(file.fileno())
if 'rename' in way:
    os.rename(name, '/data/config')
if way == 'rename+fsync':
    folder = os.open('/data', os.O_RDONLY)
    os.fsync(folder)
"""


PROMISES = {
    ("ext4", "write"): "",
    ("ext4", "write+fsync"): "kept",
    ("ext4", "rename"): "whole",  # its option auto_da_alloc
    ("ext4", "rename+fsync"): "whole kept",
    ("xfs", "write"): "",
    ("xfs", "write+fsync"): "kept",
    ("xfs", "rename"): "",
    ("xfs", "rename+fsync"): "whole kept",
}
"""What each way promises: an old or a new file is there in every state, and what was acknowledged is."""


@pytest.mark.vm(writer, disks={"data": "320M"})
@pytest.mark.parametrize(("kind", "way"), PROMISES)
def test_a_configuration_is_whole_and_kept_as_its_writer_deserves(vm: Machine, crash_explorer: Explorer, kind: str, way: str) -> None:
    vm.exec(f"mkfs.{kind} -q {DISK}; mount {DISK} /data; configure rename+fsync a; sync")
    with crash_explorer(vm, "data") as log:
        for content in "bcd":
            vm.exec(["configure", way, content])
            log.mark(content)
        vm.exec("sync")
    torn, lost = [], []
    for state in log.states(limit=40):
        with state.machine() as after:
            found = after.exec(f"mount {DISK} /data; cat /data/config").stdout
        if len(found) != 3000 or len(set(found)) != 1:
            torn.append(state.text)
        elif state.marks and found[0] < str(state.marks[-1]):
            lost.append(state.text)
    if "whole" in PROMISES[kind, way]:
        assert not torn, log.summary
    if "kept" in PROMISES[kind, way]:
        assert not lost, log.summary
    if way == "write":
        assert torn or lost, log.summary


CLUSTER = "pg_ctlcluster 15 main"


@layer(IMAGE, disks={"data": "256M"})
def database(vm: Machine) -> None:
    """Has PostgreSQL with its data on a disk of its own, which is not mounted."""
    vm.exec(
        f"mkfs.ext4 -q {DISK}; mkdir /data; mount {DISK} /data; install -d -o postgres /data/pg; "
        "pg_dropcluster --stop 15 main || true; pg_createcluster 15 main -d /data/pg --start-conf=manual; umount /data",
        timeout=300,
    )


def sql(vm: Machine, statement: str, *, check: bool = True) -> str:
    return vm.exec(["psql", "-qAtc", statement], user="postgres", cwd="/", check=check).stdout.strip()


@pytest.mark.vm(database)
@pytest.mark.parametrize("fsync", ["on", "off"])
def test_postgresql_keeps_what_it_has_acknowledged_unless_it_is_told_not_to_sync(vm: Machine, crash_explorer: Explorer, fsync: str) -> None:
    vm.exec(f"mount {DISK} /data; {CLUSTER} start -o '-c fsync={fsync}'", timeout=300)
    sql(vm, "CREATE TABLE entries (number int)")
    sql(vm, "CHECKPOINT")
    with crash_explorer(vm, "data") as log:
        for number in range(5):
            sql(vm, f"INSERT INTO entries VALUES ({number})")
            log.mark(number)
    lost = []
    for state in log.states(limit=8):
        with state.machine() as after:
            after.exec(f"mount {DISK} /data; {CLUSTER} start", check=fsync == "on", timeout=300)
            # Without sync the table may be gone as well, or the whole database.
            rows = int(sql(after, "SELECT count(*) FROM entries", check=fsync == "on") or 0)
            after.exec(f"{CLUSTER} stop -m immediate", check=False)
        if rows < state.acknowledged:
            lost.append(state.text)
    assert bool(lost) is (fsync == "off"), log.summary


FILES = 12
PACKAGE = f"""
set -e
for version in 1 2; do
  mkdir -p /root/$version/DEBIAN /root/$version/opt
  printf 'Package: sample\\nVersion: %s\\nArchitecture: all\\nMaintainer: nobody <nobody@example.org>\\nDescription: sample\\n' \\
    $version > /root/$version/DEBIAN/control
  for file in $(seq {FILES}); do head -c 6000 /dev/zero | tr '\\0' $version > /root/$version/opt/$file; done
  dpkg-deb -b /root/$version /root/sample_$version.deb
done
"""


@layer(IMAGE)
def packages(vm: Machine) -> None:
    """Has two versions of a package."""
    vm.path("/data").mkdir()
    vm.exec(PACKAGE)


@pytest.mark.vm(packages, disks={"data": "64M"})
def test_an_upgrade_that_a_crash_interrupts_is_done_or_can_be_done_again(vm: Machine, crash_explorer: Explorer) -> None:
    vm.exec(
        f"mkfs.ext4 -q {DISK}; mount {DISK} /data; mkdir -p /data/var/lib/dpkg/updates /data/var/lib/dpkg/info; "
        "touch /data/var/lib/dpkg/status; dpkg --root=/data -i /root/sample_1.deb; sync"
    )
    with crash_explorer(vm, "data") as log:
        vm.exec("dpkg --root=/data -i /root/sample_2.deb")
        log.mark("upgraded")
    found = set()
    for state in log.states(limit=24):
        with state.machine() as after:
            after.exec(["mount", DISK, "/data"])
            status = after.exec("dpkg-query --admindir=/data/var/lib/dpkg -W -f '${db:Status-Status} ${Version}' sample").stdout
            contents = {after.path(f"/data/opt/{number}").read_text() for number in range(1, FILES + 1)}
            assert contents <= {"1" * 6000, "2" * 6000}
            if status == "installed 2":
                assert contents == {"2" * 6000}
            assert status == "installed 2" or not state.acknowledged
            after.exec("dpkg --root=/data -i /root/sample_2.deb")
            assert after.exec("cat /data/opt/* | tr -d 2 | wc -c").stdout.strip() == "0"
        found.add(status)
    assert "installed 2" in found
    assert len(found) > 1, log.summary
