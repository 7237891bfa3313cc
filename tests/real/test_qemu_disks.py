"""Disks that are changed beneath a device, and logs of writes that end, in a QEMU whose guest has no system."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pytest_vmbottle import MachineError
from pytest_vmbottle.backends.port import DataDisk, NotPlugged
from pytest_vmbottle.backends.qemu.command_line import DISK_PORTS, DiskSlot
from pytest_vmbottle.backends.qemu.disks import OVERLAY, Disks
from pytest_vmbottle.backends.qemu.qmp import Qmp
from pytest_vmbottle.disks.overlay import write_overlay
from pytest_vmbottle.host.deadline import Deadline

SIZE = 8 << 20


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    root = DiskSlot(disk=DataDisk(name="root", size=SIZE), port="", file=tmp_path / OVERLAY)
    write_overlay(root.file, size=SIZE)
    ours, its = socket.socketpair()
    argv = [shutil.which("qemu-system-x86_64") or "", "-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-m", "32M"]
    argv += ["-chardev", f"socket,id=monitor,fd={its.fileno()}", "-mon", "chardev=monitor,mode=control"]
    for number, port in enumerate(DISK_PORTS[:2], 1):
        argv += ["-device", f"pcie-root-port,id={port},chassis={number}"]
    for node in root.nodes():
        argv += ["-blockdev", json.dumps(node)]
    argv += ["-device", json.dumps(root.device_options())]
    with subprocess.Popen(argv, pass_fds=[its.fileno()]) as process:
        its.close()
        try:
            with closing(Qmp(ours, deadline=Deadline(30))) as qmp:
                yield Disks(qmp, (root,), account=None, alive=lambda: None)
        finally:
            process.kill()


def nodes(disks: Disks) -> list[str]:
    """The names of block nodes, without those that QEMU gives."""
    return sorted(name for node in disks._execute("query-named-block-nodes") if not (name := node["node-name"]).startswith("#"))


def test_a_disk_is_changed_as_often_as_is_wanted_and_nothing_is_left_of_those_before(disks: Disks, tmp_path: Path) -> None:
    disks.plug(DataDisk(name="data", size=SIZE))
    for number in range(1, 4):
        image = tmp_path / f"state-{number}"
        write_overlay(image, size=SIZE)
        disks.change(DataDisk(name="data", size=SIZE, overlay=image))
        image.unlink()
        (slot,) = disks.slots[1:]
        assert nodes(disks) == ["disk0", slot.top]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk-data.qcow2", OVERLAY]
    assert disks._execute("query-status")["running"]


def test_a_disk_of_another_size_or_with_a_fault_takes_no_place(disks: Disks) -> None:
    disks.plug(DataDisk(name="data", size=SIZE))
    with pytest.raises(NotPlugged, match="another size"):
        disks.change(DataDisk(name="data", size=2 * SIZE))
    with disks.slow("data", iops=5, bytes_per_second=0), pytest.raises(NotPlugged, match="faults"):
        disks.change(DataDisk(name="data", size=SIZE))
    with pytest.raises(NotPlugged, match="no disk 'other'"):
        disks.change(DataDisk(name="other", size=SIZE))


def test_logs_of_a_disk_that_are_too_long_together_end_and_faults_stay(
    disks: Disks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_vmbottle.backends.qemu.disks._LONGEST_LOG", 1000)
    for name in ("data", "other"):
        disks.plug(DataDisk(name=name, size=SIZE))
    log = disks.slot("data").log
    assert log is not None
    (folder := tmp_path / "recording").mkdir()

    def record() -> None:
        with disks.recorded("data", folder) as recording, disks.slow("data", iops=5, bytes_per_second=0):
            log.write_bytes(bytes(600))
            assert disks.bound_logs() == []
            recording.write_bytes(bytes(600))
            with disks.stopped():
                assert disks.bound_logs() == [], "it may be saved just now"
            (told,) = disks.bound_logs()
            assert "'data' is not recorded any more, since the log had 1.2 KiB" in told
            assert len([node for node in nodes(disks) if node.startswith("filter-")]) == 1

    with pytest.raises(MachineError, match="recording was ended"):
        record()
    assert not log.exists()
    assert nodes(disks) == ["disk0", "node-disk0", "node-disk1", "track-node-disk1"]
    for refused in (disks.check_tracked, disks.lying("data").__enter__):
        with pytest.raises(NotPlugged, match="is again after"):
            refused()
