"""Faults, each seen inside a guest, and gone afterwards."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil
import pytest

from pytest_vmbottle import Machine, MachineError
from pytest_vmbottle.report.words import describe_event

if TYPE_CHECKING:
    from pytest_vmbottle.machine.fault import Fault

pytestmark = pytest.mark.vm("debian-12", disks={"data": "64M"})
DISK = "/dev/disk/by-id/virtio-data"


def _last_event(vm: Machine) -> str:
    return next(describe_event(event) for event in reversed(vm.lifecycle.timeline.events()) if event["kind"] == "fault")


def ends_at_once(vm: Machine, fault: Fault) -> bool:
    """End a fault; tell whether that took less than half a second, or than a few commands on a computer where these take long."""
    began = time.monotonic()
    fault.stop()
    took = time.monotonic() - began
    return took < max(0.5, 10 * vm.exec(["true"]).duration)


def written(vm: Machine, *options: str) -> str:
    """What a program gets that writes to the disk: nothing, or an error."""
    done = vm.exec(["dd", "if=/dev/zero", f"of={DISK}", "bs=4k", "count=1", "oflag=direct", "status=none", *options], check=False)
    return done.stderr.strip().rpartition(": ")[2]


def test_requests_to_a_disk_fail_as_long_as_is_said_and_only_those(session_vm: Machine) -> None:
    vm, faults = session_vm, session_vm.faults
    with faults.disk_errors("data", on="write"):
        assert written(vm) == "Input/output error"
        assert vm.exec(["dd", f"if={DISK}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct"]).ok
    assert written(vm) == ""
    with faults.disk_errors("data", on="write", after=2, count=1):
        assert [written(vm) for _ in range(4)] == ["", "", "Input/output error", ""]
    with faults.disk_errors("data", on="write", after=1):
        assert [written(vm) for _ in range(3)] == ["", "Input/output error", "Input/output error"]
    with faults.disk_errors("data", on="write", sectors=range(80, 88)):
        assert [written(vm, f"seek={block}") for block in (9, 10, 11)] == ["", "Input/output error", ""]
    vm.exec(["udevadm", "settle"])  # which looks at a disk that was written to
    with faults.disk_errors("data", on="read", count=1):
        read = ["dd", f"if={DISK}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct"]
        assert [vm.exec(read, check=False).returncode for _ in range(2)] == [1, 0]
    fault = faults.disk_errors("data", on="flush").start()
    assert written(vm, "conv=fsync") == "Input/output error"
    assert ends_at_once(vm, fault)
    assert written(vm, "conv=fsync") == ""


@pytest.mark.guests
def test_faults_end_with_an_exception_and_lie_upon_each_other(session_vm: Machine) -> None:
    vm = session_vm

    def fail() -> None:
        with vm.faults.slow_disk("data", iops=5), vm.faults.disk_errors("data", on="write", after=3):
            began = time.monotonic()
            assert [written(vm) for _ in range(4)] == ["", "", "", "Input/output error"]
            assert time.monotonic() - began > 0.3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    slow = vm.exec(["dd", "if=/dev/zero", f"of={DISK}", "bs=4k", "count=10", "oflag=direct"]).duration
    with vm.faults.slow_disk("data", latency=0.2):
        assert vm.exec(["dd", "if=/dev/zero", f"of={DISK}", "bs=4k", "count=10", "oflag=direct"]).duration > max(1.5, slow)
    assert written(vm) == ""


@pytest.mark.guests
def test_a_file_system_is_full_of_data_or_of_files_and_the_machine_goes_on(session_vm: Machine) -> None:
    vm = session_vm
    vm.exec(f"mkfs.ext4 -q -F -N 256 {DISK}; mount {DISK} /mnt")
    full = vm.faults.disk_full("/mnt").start()
    assert "No space left" in vm.exec("head -c 100000 /dev/zero > /mnt/file", check=False).stderr
    assert ends_at_once(vm, full)
    assert vm.exec("head -c 1000000 /dev/zero > /mnt/file && rm /mnt/file").ok
    for place in ("/mnt", "/root"):
        with vm.faults.disk_full(place, leave="8M"):
            vm.exec(f"head -c 7000000 /dev/zero > {place}/file && sync && rm {place}/file && sync")
            assert "No space left" in vm.exec(f"head -c 9000000 /dev/zero > {place}/file", check=False).stderr
            vm.exec(f"rm {place}/file")
    inodes = vm.faults.inodes_full("/mnt").start()
    assert "No space left" in vm.exec("touch /mnt/file", check=False).stderr
    assert ends_at_once(vm, inodes)
    assert vm.exec("touch /mnt/file").ok
    with pytest.raises(MachineError, match="/nothing"):
        vm.faults.disk_full("/nothing").start()
    vm.exec("umount /mnt; ! ls -A /mnt | grep .")


@pytest.mark.guests
def test_time_goes_forward_and_back_and_is_right_again(session_vm: Machine) -> None:
    vm = session_vm

    def off() -> float:
        return float(vm.exec("date +%s.%N").stdout) - time.time()

    before, monotonic = off(), float(vm.exec("cut -d' ' -f1 /proc/uptime").stdout)
    for jump in (86400, -86400):
        with vm.faults.clock(jump=jump):
            assert abs(off() - before - jump) < 5
        assert abs(off() - before) < 2
    with vm.faults.clock(rate=1.1):
        wall = off()
        time.sleep(3)
        assert off() - wall > 0.2
    assert abs(off() - before) < 2
    assert 0 < float(vm.exec("cut -d' ' -f1 /proc/uptime").stdout) - monotonic < 600
    with vm.faults.freeze(1.5):
        assert off() - before < -1


@pytest.mark.guests
def test_memory_and_processors_are_short(session_vm: Machine) -> None:
    vm, loop = session_vm, ["python3", "-c", "for number in range(3000000): pass"]
    with vm.faults.memory_pressure(leave="128M"):
        assert int(vm.exec("awk '/MemAvailable/ {print $2}' /proc/meminfo").stdout) < 200_000
        assert "memory_pressure leave=" in _last_event(vm)
        assert vm.exec("python3 -c \"b'x' * (900 << 20)\"", check=False, timeout=300).returncode != 0
    assert int(vm.exec("awk '/MemAvailable/ {print $2}' /proc/meminfo").stdout) > 300_000
    usual = min(vm.exec(loop).duration for _ in range(2))
    with vm.faults.cpu_throttle(25):
        assert vm.exec(loop).duration > 1.7 * usual
    # By the host's figures, since a host with much else to do takes as much away.
    with vm.faults.cpu_steal(75):
        stolen = _share(vm, loop)
    assert stolen < 0.45
    assert max(_share(vm, loop) for _ in range(3)) > 1.2 * stolen


def _share(vm: Machine, command: list[str]) -> float:
    """How much of a processor its machine had while a command ran."""
    hypervisor = psutil.Process(vm.pid)
    before, began = sum(hypervisor.cpu_times()[:2]), time.monotonic()
    vm.exec(command)
    return float(sum(hypervisor.cpu_times()[:2]) - before) / (time.monotonic() - began)


@pytest.mark.guests
def test_processes_stop_go_on_and_end(session_vm: Machine) -> None:
    vm = session_vm
    vm.exec("systemd-run --unit=lonely -p OOMPolicy=continue sleep 4711")
    with vm.faults.process("lonely").pause():
        assert vm.exec("ps -o stat= -C sleep").stdout.startswith("T")
    assert not vm.exec("ps -o stat= -C sleep").stdout.startswith("T")
    vm.faults.process("lonely").oom()
    assert vm.exec("systemctl is-active lonely", check=False).stdout.strip() != "active"
    pid = int(vm.exec("sleep 4712 >/dev/null 2>&1 & echo $!").stdout)
    vm.faults.process(pid).kill()
    assert vm.exec(f"kill -0 {pid}", check=False).returncode == 1
    with pytest.raises(MachineError, match="no-such"):
        vm.faults.process("no-such").kill()


@pytest.mark.guests
def test_a_fault_is_gone_with_its_machine_and_its_end_does_nothing_then(vm: Machine) -> None:
    with vm.faults.disk_errors("data", on="write"), vm.faults.clock(jump=86400), vm.faults.memory_pressure(leave="128M"):
        vm.restore()
        assert written(vm) == ""
        assert abs(float(vm.exec("date +%s").stdout) - time.time()) < 60
        now = float(vm.exec("date +%s.%N").stdout)
    assert abs(float(vm.exec("date +%s.%N").stdout) - now) < 60
    with vm.faults.clock(jump=3600), vm.faults.disk_errors("data", on="write"):
        vm.power_cut()
    vm.start()
    assert written(vm) == ""


@pytest.mark.guests
def test_thirty_days_of_timers_each_come_once_and_in_order(vm: Machine) -> None:
    before = float(vm.exec("date +%s.%N").stdout)
    vm.exec("systemd-run --on-calendar='*-*-* 03:00:00' --unit=early sh -c 'date +\"%F early\" >> /srv/days'")
    vm.exec("systemd-run --on-calendar='*-*-* 15:30:00' --unit=late sh -c 'date +\"%F late\" >> /srv/days'")
    began = time.monotonic()
    with vm.clock.fast_forward(days=30):
        lines = vm.path("/srv/days").read_text().splitlines()
        assert float(vm.exec("date +%s.%N").stdout) - before > 30 * 86400 - 1
    assert len(lines) == len(set(lines)) == 60
    assert lines == sorted(lines)
    assert abs(float(vm.exec("date +%s.%N").stdout) - before - (time.monotonic() - began)) < 5


ECHO = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("", 7))
print("ready", flush=True)
while True:
    data, who = server.recvfrom(2000)
    open("/srv/came", "ab").write(data[:1])
    server.sendto(data, who)
"""
ASK = """
import socket, sys, time
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.connect((sys.argv[1], 7))
client.settimeout(0.05)
sent, count = {}, int(sys.argv[2])
until = time.monotonic() + 3
while time.monotonic() < until:
    if len(sent) < count:
        sent[len(sent)] = time.monotonic()
        client.send(bytes([len(sent) - 1]) + bytes(999))
        until = time.monotonic() + 3
    try:
        number = client.recv(2000)[0]
        print(number, time.monotonic() - sent[number])
    except (OSError, KeyError):
        pass
"""


@pytest.mark.guests
@pytest.mark.vm("debian-12", name="one", network="lan")
@pytest.mark.vm("debian-12", name="two", network="lan")
def test_a_bad_cable_is_measured_between_two_guests(vms: dict[str, Machine]) -> None:
    one, two = vms["one"], vms["two"]
    server = two.spawn(["python3", "-c", ECHO])
    assert next(iter(server.stdout)) == "ready\n"

    def asked(count: int = 5) -> list[tuple[int, float]]:
        """Replies to datagrams: their numbers, in the order in which they came, and the seconds that each took."""
        said = one.exec(["python3", "-c", ASK, "two", str(count)]).stdout
        return [(int(number), float(seconds)) for number, seconds in (line.split() for line in said.splitlines())]

    asked(1)
    assert sorted(number for number, _ in asked()) == list(range(5))
    with two.faults.network(delay=0.2, direction="in"):
        assert min(seconds for _, seconds in asked()) > 0.2
    with two.faults.network(delay=0.2), one.faults.network(loss=0.5, direction="out"):
        replies = asked(40)
        assert 5 < len(replies) < 35
        assert min(seconds for _, seconds in replies) > 0.4
    with two.faults.network(duplicate=1.0, direction="out"):
        assert sorted(number for number, _ in asked(3)) == [0, 0, 1, 1, 2, 2]
    with one.faults.network(corrupt=1.0, direction="out"):
        assert asked() == []
    with one.faults.network(delay=0.1, jitter=0.1):
        numbers = [number for number, _ in asked(20)]
        assert sorted(numbers) == list(range(20)) != numbers
    with two.faults.network(bandwidth=5000, direction="in"):
        assert max(seconds for _, seconds in asked()) > 0.5
    for fault in (one.faults.partition(two), two.faults.partition("one", direction="in")):
        with fault:
            assert asked() == []
        assert len(asked()) == 5
    came = two.path("/srv/came").stat().st_size
    with two.faults.partition(one, direction="out"):
        assert asked() == []
    assert two.path("/srv/came").stat().st_size == came + 5, "the other way was open"
