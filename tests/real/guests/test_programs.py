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
        build(store, "debian-12", name=IMAGE, include=["strace", "xfsprogs"])


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
