"""What real machines take, as the host and the guest see it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from pytest_vmbottle import Machine, MachineDied
from pytest_vmbottle.host.deadline import Deadline

pytestmark = pytest.mark.vm("debian-12")


@pytest.mark.guests
def test_a_busy_guest_shows_in_both_views(session_vm: Machine) -> None:
    session_vm.metrics()
    session_vm.exec("sleep 2")
    idle = session_vm.metrics()
    session_vm.exec("timeout 2 sh -c 'while :; do :; done' || true")
    busy = session_vm.metrics()

    assert idle.guest is not None
    assert busy.guest is not None
    assert (busy.guest.cpu_percent or 0) > 50
    assert (busy.guest.cpu_percent or 0) > (idle.guest.cpu_percent or 0)
    assert (busy.cpu_percent or 0) > (idle.cpu_percent or 0)
    assert (busy.guest.memory_used_bytes or 0) + (busy.guest.memory_available_bytes or 0) <= session_vm.spec.memory
    assert busy.threads


def _write_out(machine: Machine) -> None:
    """Has the host write out what it holds of the machine's disks, all of it."""
    disks = [Path(file.path) for file in psutil.Process(machine.pid).open_files() if file.path.endswith(".qcow2")]
    assert disks
    for disk in disks:
        with disk.open("rb") as opened:
            os.fsync(opened)


@pytest.mark.guests
def test_written_bytes_show_in_both_views_where_the_host_had_none_of_them_to_write_yet(session_vm: Machine) -> None:
    write = "dd if=/dev/urandom of=/root/written bs=1M count=16 conv=notrunc oflag=direct && sync"
    session_vm.exec(write)
    _write_out(session_vm)
    before = session_vm.metrics()
    session_vm.exec(f"{write} && rm /root/written")
    after = session_vm.metrics()

    assert before.guest is not None
    assert after.guest is not None
    assert (after.guest.disk_write_bytes or 0) - (before.guest.disk_write_bytes or 0) >= 16 << 20
    assert (after.write_bytes or 0) - (before.write_bytes or 0) >= 16 << 20


def test_a_recording_of_a_command_has_its_beginning_its_end_and_the_guests_figures(session_vm: Machine, tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    with session_vm.record(0.2) as recording:
        session_vm.exec("timeout 1 sh -c 'while :; do :; done' || true")
    clock = [sample.time for sample in recording.samples]
    answers = [sample.guest for sample in recording.samples if sample.guest]

    assert set(threading.enumerate()) <= threads
    assert clock == sorted(clock)
    assert len(clock) >= 3
    assert all(clock[0] <= answer.time <= clock[-1] for answer in answers)
    assert recording.summary["cpu_percent"].max >= recording.summary["cpu_percent"].mean > 0
    assert recording.summary["guest_cpu_percent"].max > 0
    recording.to_csv(tmp_path / "r.csv")
    assert len((tmp_path / "r.csv").read_text().splitlines()) == len(clock) + 1
    assert "guest_memory_used_bytes" in recording.plot()


def test_a_machine_that_dies_ends_its_recording_and_cannot_be_measured_any_more(vm: Machine) -> None:
    threads = set(threading.enumerate())
    with vm.record(0.1) as recording:
        vm.wait_until(lambda: recording.samples)
        os.kill(vm.pid, signal.SIGKILL)
        assert Deadline(60).poll(lambda: recording.lost, every=0.05)  # vm.wait_until() would say that the machine is gone

    assert recording.samples
    assert set(threading.enumerate()) <= threads
    with pytest.raises(MachineDied):
        vm.metrics()
