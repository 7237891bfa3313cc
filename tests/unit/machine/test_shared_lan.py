"""Private LANs of machines in processes of their own: each of them has the LAN from the folder alone."""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.machine.lan import LanMember
from pytest_vmbottle.machine.shared_lan import Seat, SharedLans
from tests.conftest import line, process
from tests.unit.machine.test_lan import Cabled

HELD = """
import sys, time
from pathlib import Path
from tests.unit.machine.test_lan import Cabled
from pytest_vmbottle.machine.shared_lan import SharedLans

with SharedLans(Path(sys.argv[1]))["lan"].joined("killed", Cabled().body) as place:
    print(place.address, flush=True)
    time.sleep(600)
"""
Join = Callable[..., tuple[LanMember, Cabled]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    # Longer than the path of a socket may be.
    return tmp_path / ("long" * 30) / "lans"


@pytest.fixture
def join(root: Path) -> Iterator[Join]:
    """Function that lets a machine join a LAN, as a process of its own does."""
    with ExitStack() as stack:

        def join(name: str, lan: str = "lan") -> tuple[LanMember, Cabled]:
            machine = Cabled()
            place = stack.enter_context(SharedLans(root)[lan].joined(name, machine.body))
            stack.enter_context(machine.wires[0])
            return place, machine

        yield join


def frame(target: str, source: str, text: bytes = b"hello world") -> bytes:
    return bytes.fromhex(target.replace(":", "") + source.replace(":", "")) + text


def received(machine: Cabled, seconds: float = 10) -> bytes:
    machine.wires[0].settimeout(seconds)
    return machine.wires[0].recv(1 << 17)


def knows(machine: Cabled, hosts: str) -> bool:
    return machine.commands[-1].argv[-1] == hosts


def test_members_have_addresses_of_one_network_and_know_each_other_as_they_come_and_go(root: Path, join: Join) -> None:
    web, one = join("web")
    machine = Cabled()
    with SharedLans(root)["lan"].joined("db", machine.body) as db:
        assert web.address.rpartition(".")[0] == db.address.rpartition(".")[0]
        both = f"{web.address} web\n{db.address} db"
        assert machine.commands[-1].argv[-1] == both
        assert Deadline(10).poll(lambda: knows(one, both))
    for wire in machine.wires:
        wire.close()
    assert Deadline(10).poll(lambda: knows(one, f"{web.address} web"))


def test_a_frame_goes_to_the_member_that_it_is_for_or_to_all(join: Join) -> None:
    (web, one), (db, two), (_, three) = join("web"), join("db"), join("cache")
    one.wires[0].send(frame("ff:ff:ff:ff:ff:ff", web.mac))
    assert received(two) == received(three) == frame("ff:ff:ff:ff:ff:ff", web.mac)
    large = frame(db.mac, web.mac, os.urandom(65000))
    one.wires[0].send(large)
    assert received(two) == large
    two.wires[0].send(frame(web.mac, db.mac))
    assert received(one) == frame(web.mac, db.mac)
    with pytest.raises(TimeoutError):
        received(three, 0.2)


def test_lans_of_two_names_do_not_see_each_other(join: Join) -> None:
    (web, one), (_, two) = join("web"), join("web", "another")
    one.wires[0].send(frame("ff:ff:ff:ff:ff:ff", web.mac))
    with pytest.raises(TimeoutError):
        received(two, 0.2)


@pytest.mark.parametrize("name", ["web", "WEB"])
def test_a_name_is_taken_once(join: Join, name: str) -> None:
    join("web")
    with pytest.raises(SpecError, match=name):
        join(name)


def test_only_this_user_reaches_the_sockets(root: Path, join: Join) -> None:
    join("web")
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (root, root / "lan")} == {0o700}


def test_the_place_of_a_member_whose_process_was_killed_is_free(root: Path, join: Join) -> None:
    with process(HELD, root) as held:
        address = line(held)
        assert SharedLans(root)["lan"].hosts == f"{address} killed"
        held.send_signal(signal.SIGKILL)
        held.wait()
    place, machine = join("killed")
    assert (place.address, machine.commands[-1].argv[-1]) == (address, f"{address} killed")


def test_nothing_is_left_when_all_have_gone(root: Path) -> None:
    machine = Cabled()
    with SharedLans(root)["lan"].joined("web", machine.body):
        (wire,) = machine.wires
        assert len(list((root / "lan").iterdir())) == 2
    wire.close()
    assert not list((root / "lan").iterdir())
    assert isinstance(wire, socket.socket)


def test_a_machine_takes_its_certain_place_under_another_name_and_knows_all_others_from_the_beginning(root: Path) -> None:
    members = {"web": "10.77.3.1", "db": "10.77.3.9"}
    machine = Cabled()
    with SharedLans(root, {"lan": Seat(name="db", members=members)})["lan"].joined("replay-db", machine.body) as place:
        assert (place.name, place.address, place.mac) == ("db", "10.77.3.9", "52:54:0a:4d:03:09")
        # Before the other one has come.
        assert machine.commands[-1].argv[-3:] == ("10.77.3.9/24", "db", "10.77.3.1 web\n10.77.3.9 db")
        with (
            pytest.raises(SpecError, match="'db' already"),
            SharedLans(root, {"lan": Seat(name="db", members=members)})["lan"].joined("x", machine.body),
        ):
            pass
    for wire in machine.wires:
        wire.close()


def test_a_machine_is_on_two_lans_whose_addresses_differ_and_on_no_two_with_the_same(root: Path) -> None:
    machine = Cabled()
    body = machine.body
    lans = SharedLans(root, {"same": Seat(name="web", members={"web": "10.77.3.2"}), "too": Seat(name="web", members={"web": "10.77.3.3"})})
    with lans["lan"].joined("web", body) as place, lans["same"].joined("web", body) as other:
        assert machine.macs == [place.mac, other.mac]
        assert machine.commands[-1].argv[-1] == f"{place.address} web\n10.77.3.2 web"
        with pytest.raises(SpecError, match=r"'same' and 'too' have the same addresses, 10\.77\.3\.0/24"), lans["too"].joined("web", body):
            pass
    assert not list((root / "too").iterdir())
    for wire in machine.wires:
        wire.close()
