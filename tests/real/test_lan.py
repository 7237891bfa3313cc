"""Private LANs: machines poured from one pack that see each other by name, and nothing else."""

from __future__ import annotations

import socket
from contextlib import ExitStack, closing

import pytest

from pytest_vmbottle import Machine, MachineError, MachineFactory, SpecError
from pytest_vmbottle.machine.lan import Lans

_MIB = 1 << 20
# The image has no program `ping`.
_PING = """
import os, socket, struct, sys, time
def checksum(packet):
    total = sum(struct.unpack(f"!{len(packet) // 2}H", packet))
    return ~((total >> 16) + (total & 0xFFFF)) & 0xFFFF
def request(number):
    return struct.pack("!BBHHH", 8, 0, number, os.getpid() & 0xFFFF, 1)
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
    sock.settimeout(float(sys.argv[2]))
    began = time.monotonic()
    sock.sendto(request(checksum(request(0))), (sys.argv[1], 0))
    while True:
        answer = sock.recv(1024)[20:]
        if answer[0] == 0 and answer[4:6] == request(0)[4:6]:
            break
    print(time.monotonic() - began)
"""
_ECHO = """
import socket, sys
with socket.create_server(("", 9)) as server, server.accept()[0] as client, client.makefile("rwb") as stream:
    stream.write(stream.read(int(sys.argv[1])))
"""
_SEND = """
import os, socket, sys
data = os.urandom(int(sys.argv[1]))
with socket.create_connection(("db", 9)) as sock, sock.makefile("rwb") as stream:
    stream.write(data)
    stream.flush()
    print(stream.read(len(data)) == data)
"""


def connects(machine: Machine, name: str, port: int = 22, *, wait: float = 30) -> bool:
    """Tell whether a port of a name or address can be connected to; a shell starts much sooner than Python."""
    return machine.exec(["timeout", str(wait), "bash", "-c", f": < /dev/tcp/{name}/{port}"], check=False).ok


def pings(machine: Machine, name: str, *, wait: float = 3) -> bool:
    """Tell whether a name or address answers."""
    return machine.exec(["python3", "-c", _PING, name, str(wait)], check=False).ok


def round_trip(machine: Machine, name: str) -> float:
    """Seconds until a name answered."""
    return float(machine.exec(["python3", "-c", _PING, name, "20"]).stdout)


def carrier(machine: Machine) -> str:
    """Return the carrier state of the guest's second card."""
    return machine.exec("cat $(grep -l 52:54:0a /sys/class/net/*/address | xargs dirname)/carrier").stdout.strip()


def cards(machine: Machine) -> set[str]:
    return set(machine.exec("cat /sys/class/net/e*/address").stdout.split())


@pytest.mark.vm("debian-12", name="web", network="lan")
@pytest.mark.vm("debian-12", name="db", network="lan")
def test_clones_on_one_lan_see_each_other_by_name_and_nothing_else(vms: dict[str, Machine], vm_factory: MachineFactory) -> None:
    web, db = vms["web"], vms["db"]
    assert len(cards(web) | cards(db)) == 3  # that by which the host reaches them is the same in all
    assert (web.exec("hostname").stdout, db.exec("hostname").stdout) == ("web\n", "db\n")
    assert web.address != db.address
    assert web.exec("getent hosts db").stdout.split() == [db.address, "db"]
    assert connects(web, "db")
    assert connects(db, "web")

    outside = vm_factory("debian-12", name="outside", network="another")
    assert outside.address not in (web.address, db.address)
    assert connects(outside, "localhost")
    assert not connects(outside, str(db.address), wait=2)
    assert not connects(db, str(outside.address), wait=2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not connects(web, "10.0.2.2", server.getsockname()[1], wait=3)


@pytest.mark.vm("debian-12", name="web", network="lan")
@pytest.mark.vm("debian-12", name="db", network="lan")
@pytest.mark.guests
def test_a_machine_that_comes_late_is_on_the_lan_too_and_its_name_is_taken(vms: dict[str, Machine], vm_factory: MachineFactory) -> None:
    late = vm_factory("debian-12", name="late", network="lan")
    assert pings(vms["web"], "late")
    assert pings(late, "db")
    with pytest.raises(SpecError, match="'LATE'"):
        vm_factory("debian-12", name="LATE", network="lan")


@pytest.mark.vm("debian-12", name="web", network="lan")
@pytest.mark.vm("debian-12", name="db", network="lan")
@pytest.mark.guests
def test_a_lan_carries_much_and_is_cut_lossy_and_slow_as_one_likes(vms: dict[str, Machine]) -> None:
    web, db = vms["web"], vms["db"]
    db.exec(["systemd-run", "python3", "-c", _ECHO, str(4 * _MIB)])
    db.wait_for_port(9)
    assert web.exec(["python3", "-c", _SEND, str(4 * _MIB)]).stdout == "True\n"

    db.link(up=False)
    db.wait_until(lambda: carrier(db) == "0")
    assert not pings(web, "db", wait=1)
    db.link(up=True)
    db.wait_until(lambda: carrier(db) == "1")
    web.wait_until(lambda: pings(web, "db"))

    db.impair(loss=1.0)
    assert not pings(web, "db", wait=1)
    assert carrier(db) == "1"  # the guest does not see how bad its cable is
    db.impair(delay=0.4)
    assert round_trip(web, "db") >= 0.8
    db.impair()
    assert round_trip(web, "db") < 0.8
    with pytest.raises(ValueError, match="loss=2"):
        db.impair(loss=2)


@pytest.mark.vm("debian-12")
@pytest.mark.guests
def test_lans_of_one_name_in_two_tests_at_once_are_two_lans(vm: Machine, vm_factory: MachineFactory) -> None:
    vm.name = "mine"
    other, third = (vm_factory("debian-12", name=name) for name in ("other", "third"))
    with ExitStack() as stack:
        here, there = (stack.enter_context(closing(Lans())) for _ in range(2))
        for machine, lans in ((vm, here), (other, there), (third, there)):
            stack.enter_context(machine.lifecycle.on(lans["lan"]))
        assert vm.address == other.address
        assert pings(other, "third")
        assert "third" not in vm.path("/etc/hosts").read_text()
        assert not pings(vm, str(third.address), wait=1)


@pytest.mark.guests
@pytest.mark.vm("debian-12")
def test_a_guest_without_the_program_ip_is_told_what_it_lacks_and_stays_off_the_lan(vm: Machine) -> None:
    program = vm.exec('readlink -f "$(command -v ip)"').stdout.strip()
    vm.exec(["mv", program, "/root/ip"])
    with closing(Lans()) as lans:
        with (
            pytest.raises(MachineError, match="iproute2"),
            vm.lifecycle.on(lans["lan"]),
        ):
            pass
        with pytest.raises(MachineError, match="LAN"):
            vm.impair(loss=0.5)
        vm.exec(["mv", "/root/ip", program])
        with vm.lifecycle.on(lans["lan"]):
            assert vm.exec("getent ahostsv4 vm").stdout.split()[0] == vm.address


@pytest.mark.vm("debian-12", name="web", network="lan")
@pytest.mark.vm("debian-12", name="db", network="lan")
@pytest.mark.guests
def test_a_machine_is_on_its_lan_again_after_a_snapshot_and_a_restore(vms: dict[str, Machine]) -> None:
    web, db = vms["web"], vms["db"]
    before = db.snapshot("before")
    assert pings(web, "db")
    address, seen = db.address, cards(db)
    db.restore(before)
    assert (db.address, cards(db)) == (address, seen)
    assert pings(web, "db")
    db.impair(loss=1.0)
    db.restore()
    assert not pings(web, "db", wait=1)  # it is the same cable
    db.impair()
    assert pings(db, "web")


@pytest.mark.vm("debian-12", name="gate", network=["front", "back"])
@pytest.mark.vm("debian-12", name="web", network="front")
@pytest.mark.vm("debian-12", name="db", network="back")
@pytest.mark.guests
def test_a_machine_on_two_lans_reaches_both_routes_between_them_and_has_faults_on_one(vms: dict[str, Machine]) -> None:
    gate, web, db = (vms[name] for name in ("gate", "web", "db"))
    assert dict(gate.addresses) == {"front": gate.address, "back": "10.77.1.1"}
    assert gate.exec("getent ahostsv4 gate").stdout.split()[0] == gate.address
    assert pings(gate, "web")
    assert pings(gate, "db")
    assert not pings(web, str(db.address), wait=1)

    gate.exec("echo 1 > /proc/sys/net/ipv4/ip_forward")
    web.exec(["ip", "route", "add", "10.77.1.0/24", "via", str(gate.address)])
    db.exec(["ip", "route", "add", "10.77.0.0/24", "via", gate.addresses["back"]])
    assert pings(web, str(db.address))

    with pytest.raises(ValueError, match="front, back: say which one"):
        gate.link(up=False)
    gate.link(up=False, lan="back")
    assert pings(web, "gate")
    assert not pings(gate, "db", wait=1)
    gate.link(up=True, lan="back")
    gate.wait_until(lambda: pings(gate, "db"))
    with gate.faults.partition("web", lan="front"):
        assert not pings(gate, "web", wait=1)
        assert pings(gate, "db")
    with gate.faults.network(loss=1, lan="back"):
        assert pings(gate, "web")
        assert not pings(gate, "db", wait=1)


@pytest.mark.vm("debian-12", name="gate", network=["front", "back"])
@pytest.mark.vm("debian-12", name="db", network="back")
@pytest.mark.guests
def test_a_machine_is_on_its_two_lans_again_after_a_restore_and_so_is_its_fork(vms: dict[str, Machine]) -> None:
    gate = vms["gate"]
    addresses, seen, before = gate.addresses, cards(gate), gate.snapshot("before")
    gate.restore(before)
    assert (gate.addresses, cards(gate)) == (addresses, seen)
    assert len(seen) == 3
    assert pings(gate, "db")
    fork = gate.fork("other")
    fork.join_lan()
    assert fork.addresses.keys() == gate.addresses.keys()
    assert pings(fork, "db")
