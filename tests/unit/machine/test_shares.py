"""Shared folders: when they are plugged in and mounted, with a machine that only writes down what it was asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmbottle.channels.port import Command, Finished
from pytest_vmbottle.errors import MachineError, SpecError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.machine.shares import Share
from pytest_vmbottle.testing import FakeChannel, FakeInstance


class Sharing(FakeInstance):
    """A machine that can be given a folder."""

    def __init__(self) -> None:
        self.done: list[object] = []
        self.answer = Finished(returncode=0)

    def plug_share(self, folder: Path, *, tag: str) -> None:
        self.done.append((folder, tag))

    def unplug_share(self, tag: str, *, deadline: Deadline) -> None:
        assert not deadline.expired
        self.done.append(tag)

    def run(self, command: Command) -> Finished:
        self.done.append(command.argv[4:])
        return self.answer


def share(machine: Sharing, folder: Path) -> Share:
    return Share(
        machine="vm", path="/srv", folder=folder, tag="share0", instance=lambda: machine, channel=lambda: FakeChannel(machine.run), factor=1
    )


def test_a_folder_is_plugged_in_once_mounted_after_each_boot_and_unmounted_before_it_goes(tmp_path: Path) -> None:
    machine = Sharing()
    shared = share(machine, tmp_path)
    shared.settle()
    shared.settle()
    shared.unplug()
    shared.unplug()
    shared.settle()
    plugged, mounted = (tmp_path, "share0"), ("share0", "/srv")
    assert machine.done == [plugged, mounted, mounted, ("/srv",), "share0", plugged, mounted]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Finished(returncode=3), "CONFIG_VIRTIO_FS"),
        (Finished(returncode=-9, timed_out=True), "in time"),
        (Finished(returncode=32, stderr=b"umount: /srv: target is busy.\n"), "target is busy"),
    ],
)
def test_a_guest_that_cannot_is_told_why(tmp_path: Path, answer: Finished, reason: str) -> None:
    machine = Sharing()
    machine.answer = answer
    with pytest.raises(MachineError, match=reason):
        share(machine, tmp_path).settle()


def test_a_folder_that_a_guest_keeps_stays_plugged_in(tmp_path: Path) -> None:
    machine = Sharing()
    shared = share(machine, tmp_path)
    shared.settle()
    machine.answer = Finished(returncode=32, stderr=b"busy")
    with pytest.raises(MachineError, match="busy"):
        shared.unplug()
    machine.answer = Finished(returncode=0)
    shared.unplug()
    assert machine.done[-1] == "share0"


def test_a_folder_that_is_not_there_is_no_folder(tmp_path: Path) -> None:
    machine = Sharing()
    with pytest.raises(SpecError, match="there is no folder"):
        share(machine, tmp_path / "none").settle()
    assert not machine.done
