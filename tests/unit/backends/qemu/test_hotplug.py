"""The port for a disk, with a monitor that is only on paper: what is left behind when something goes wrong."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_vmbottle.backends.port import NotPlugged
from pytest_vmbottle.backends.qemu import hotplug
from pytest_vmbottle.backends.qemu.hotplug import DiskPort
from pytest_vmbottle.backends.qemu.qmp import QmpFailed
from pytest_vmbottle.errors import MachineDied
from pytest_vmbottle.host.deadline import Deadline


class Monitor:
    """Remembers files, nodes and devices as QEMU does; a device goes when the guest has been asked and lets it go."""

    def __init__(self) -> None:
        self.files: set[int] = set()
        self.node = self.device = False
        self.releases = True
        self.refuses = ""
        self.asked: list[str] = []

    def add_fd(self, file: int, *, deadline: Deadline) -> int:
        del deadline
        self.files.add(file)
        return file

    def execute(self, command: str, *, deadline: Deadline, **arguments: Any) -> Any:
        del deadline
        if command == self.refuses:
            raise QmpFailed(f"QEMU refused {command}: no")
        self.asked.append(command)
        return getattr(self, command.replace("-", "_"))(**arguments)

    def blockdev_add(self, **_: object) -> None:
        self.node = True

    def device_add(self, **_: object) -> None:
        self.device = True

    def device_del(self, **_: object) -> None:
        self.device = self.device and not self.releases

    def blockdev_del(self, **_: object) -> None:
        if self.device:
            raise QmpFailed("QEMU refused blockdev-del: Node scratch0 is in use")
        if not self.node:
            raise QmpFailed("QEMU refused blockdev-del: Failed to find node with node-name='scratch0'")
        self.node = False

    def query_blockstats(self) -> list[dict[str, Any]]:
        return [{"node-name": "scratch0", "stats": {"rd_bytes": 5, "wr_bytes": 3}}]

    def remove_fd(self, *, fdset_id: int) -> None:
        self.files.remove(fdset_id)

    @property
    def left(self) -> tuple[set[int], bool, bool]:
        return self.files, self.node, self.device


NOTHING: tuple[set[int], bool, bool] = (set(), False, False)


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> Monitor:
    monkeypatch.setattr(hotplug, "_GRACE", 0.2)
    monkeypatch.setattr(DiskPort.empty, "__defaults__", (0.2,))
    return Monitor()


def port(monitor: Any) -> DiskPort:
    return DiskPort(monitor, alive=lambda: None)


def plug(port: DiskPort, file: int = 7) -> Any:
    return port.disk(file, serial="vmb-1", writable=False, deadline=Deadline(60))


def test_a_disk_is_there_for_as_long_as_it_is_used_and_then_nothing_of_it(monitor: Monitor) -> None:
    with plug(port(monitor)) as moved:
        assert monitor.left == ({7}, True, True)
        assert moved() == 8

    assert monitor.left == NOTHING


def test_nothing_is_left_when_the_copy_fails(monitor: Monitor) -> None:
    with pytest.raises(ZeroDivisionError), plug(port(monitor)):
        raise ZeroDivisionError

    assert monitor.left == NOTHING


@pytest.mark.parametrize("command", ["blockdev-add", "device_add"])
def test_nothing_is_left_when_qemu_refuses(monitor: Monitor, command: str) -> None:
    monitor.refuses = command
    with pytest.raises(NotPlugged, match=command), plug(port(monitor)):
        pytest.fail("it was plugged in")

    assert monitor.left == NOTHING


def test_a_disk_that_the_guest_keeps_is_taken_before_the_next_one_comes(monitor: Monitor) -> None:
    place = port(monitor)
    monitor.releases = False
    with plug(place):
        pass
    assert not place.empty()
    with pytest.raises(NotPlugged), plug(place):
        pytest.fail("it was plugged in")
    monitor.releases = True
    with plug(place, 8):
        assert monitor.left == ({8}, True, True)

    assert monitor.left == NOTHING


def test_a_machine_that_died_keeps_nobody_waiting(monitor: Any) -> None:
    dead: list[MachineDied] = []

    def alive() -> None:
        if dead:
            raise dead[0]

    monitor.releases = False
    with DiskPort(monitor, alive=alive).disk(7, serial="x", writable=True, deadline=Deadline(60)):
        dead.append(MachineDied("it is gone"))

    assert "blockdev-del" not in monitor.asked


def test_two_copies_take_turns(monitor: Monitor) -> None:
    place = port(monitor)
    with plug(place), pytest.raises(NotPlugged), place.disk(8, serial="y", writable=False, deadline=Deadline(0.05)):
        pytest.fail("both have the port")


def test_a_port_that_is_reserved_is_empty_and_no_copy_gets_it(monitor: Monitor) -> None:
    place = port(monitor)
    monitor.releases = False
    with plug(place):
        pass
    monitor.releases = True
    with place.reserved(Deadline(60)):
        assert monitor.left == NOTHING
        with pytest.raises(NotPlugged), place.disk(8, serial="y", writable=False, deadline=Deadline(0.05)):
            pytest.fail("it was plugged in")
