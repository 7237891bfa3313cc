"""Who is on a private LAN, and what its guests are told, with machines that only write down what they were asked."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from pytest_vmbottle.channels.port import Channel, Command, Finished
from pytest_vmbottle.errors import MachineError, SpecError, Unsupported
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.machine.lan import Lan, LanGuest, Lans, impairment_of
from pytest_vmbottle.testing import FakeBackend, FakeChannel, FakeInstance


class Cabled(FakeInstance):
    """A machine that can be given a card."""

    def __init__(self) -> None:
        self.wires: list[socket.socket] = []
        self.macs: list[str] = []
        self.commands: list[Command] = []
        self.answer = Finished(returncode=0)

    def plug_card(self, wire: socket.socket, *, mac: str) -> None:
        self.wires.append(wire.dup())
        self.macs.append(mac)

    def run(self, command: Command) -> Finished:
        self.commands.append(command)
        return self.answer

    def channel(self, *, deadline: Deadline, bulk: bool = False) -> Channel:  # noqa: ARG002
        return FakeChannel(self.run)

    @property
    def body(self) -> LanGuest:
        return LanGuest(instance=lambda: self, channel=lambda: self.channel(deadline=Deadline(1)), factor=1.0)


@pytest.fixture
def lan() -> Iterator[Lan]:
    with closing(Lans()) as lans:
        yield lans["lan"]


@pytest.fixture
def machines() -> Iterator[list[Cabled]]:
    made = [Cabled() for _ in range(3)]
    yield made
    for machine in made:
        for wire in machine.wires:
            wire.close()


def test_machines_get_addresses_in_the_order_in_which_they_join_and_all_are_told(lan: Lan, machines: list[Cabled]) -> None:
    one, two, _ = machines
    with lan.joined("web", one.body) as web, lan.joined("db", two.body) as db:
        assert (web.address, web.mac) == ("10.77.0.1", "52:54:0a:4d:00:01")
        assert (db.address, db.mac) == ("10.77.0.2", "52:54:0a:4d:00:02")
        assert one.macs == [web.mac]
        assert one.commands[-1].argv[-1] == two.commands[-1].argv[-1] == "10.77.0.1 web\n10.77.0.2 db"


def test_frames_go_from_one_machines_card_to_the_others(lan: Lan, machines: list[Cabled]) -> None:
    one, two, _ = machines
    with lan.joined("web", one.body) as web, lan.joined("db", two.body):
        one.wires[0].send(b"\xff" * 20)
        two.wires[0].settimeout(5)
        assert two.wires[0].recv(100) == b"\xff" * 20
        web.impair(impairment_of(loss=1))
        one.wires[0].send(b"\xff" * 20)
        two.wires[0].settimeout(0.2)
        with pytest.raises(TimeoutError):
            two.wires[0].recv(100)


@pytest.mark.parametrize("name", ["db", "DB"])
def test_a_name_is_taken_once_and_free_again_when_its_machine_is_gone(lan: Lan, machines: list[Cabled], name: str) -> None:
    one, two, _ = machines
    with lan.joined("db", one.body):
        with pytest.raises(SpecError, match=f"'{name}'"), lan.joined(name, two.body):
            pass
        assert not two.macs
    with lan.joined(name, two.body) as place:
        assert place.address == "10.77.0.2"


def test_addresses_run_out_with_a_sentence(lan: Lan, machines: list[Cabled]) -> None:
    for number in range(254):
        with lan.joined(f"m{number}", machines[0].body):
            machines[0].wires.pop().close()
    with pytest.raises(SpecError, match="'lan'"), lan.joined("m", machines[1].body):
        pass


def test_lans_of_one_test_have_addresses_of_their_own(machines: list[Cabled]) -> None:
    with closing(Lans()) as lans, lans["a"].joined("x", machines[0].body) as x, lans["b"].joined("x", machines[1].body) as y:
        assert (x.address, y.address) == ("10.77.0.1", "10.77.1.1")
        assert lans["a"] is lans["a"]


def test_a_machine_on_two_lans_has_a_card_on_each_and_knows_all_names_those_of_the_first_first(machines: list[Cabled]) -> None:
    router, other, _ = machines
    body = router.body
    with closing(Lans()) as lans, lans["front"].joined("gate", body) as front, lans["back"].joined("gate", body) as back:
        assert router.macs == [front.mac, back.mac]
        assert body.macs == router.commands[-2].argv[-2:] == (front.mac, back.mac)  # all are left alone by the guest
        assert router.commands[-1].argv[-4:] == (back.mac, "10.77.1.1/24", "gate", "10.77.0.1 gate\n10.77.1.1 gate")
        with lans["front"].joined("web", other.body):
            assert router.commands[-1].argv[-1] == "10.77.0.1 gate\n10.77.0.2 web\n10.77.1.1 gate"
            assert other.commands[-1].argv[-1] == "10.77.0.1 gate\n10.77.0.2 web"
            front.impair(impairment_of(loss=1))
            other.wires[0].send(b"\xff" * 20)
            back.cut_off([], ("in",))
            router.wires[0].settimeout(0.2)
            with pytest.raises(TimeoutError):
                router.wires[0].recv(100)
    assert body.places == []


def test_a_backend_without_cards_is_named_as_the_reason(lan: Lan, tmp_path: object) -> None:
    machine = FakeInstance.__new__(FakeInstance)
    channel = FakeChannel(FakeBackend().handler)
    body = LanGuest(instance=lambda: machine, channel=lambda: channel, factor=1.0)
    with pytest.raises(Unsupported, match="LAN"), lan.joined("web", body):
        pass
    assert tmp_path


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Finished(returncode=3), "packages="),
        (Finished(returncode=4, stderr=b"RTNETLINK: no\n"), "RTNETLINK: no"),
        (Finished(returncode=1), "status 1"),
        (Finished(returncode=-9, timed_out=True), "time"),
    ],
)
def test_a_guest_that_cannot_be_on_a_lan_is_told_why_and_leaves_its_name(
    lan: Lan, machines: list[Cabled], answer: Finished, reason: str
) -> None:
    machines[0].answer = answer
    with pytest.raises(MachineError, match=reason), lan.joined("web", machines[0].body):
        pass
    with lan.joined("web", machines[1].body):
        assert machines[1].commands[-1].argv[-1] == "10.77.0.2 web"


def test_a_machine_that_cannot_be_told_does_not_keep_others_from_joining(lan: Lan, machines: list[Cabled]) -> None:
    one, two, _ = machines
    with lan.joined("web", one.body):
        one.answer = Finished(returncode=1)
        with lan.joined("db", two.body) as place:
            assert place.address == "10.77.0.2"


def test_a_machine_that_was_started_anew_gets_a_new_card_and_the_same_address(lan: Lan, machines: list[Cabled]) -> None:
    old, new, other = machines
    now = [old]
    body = LanGuest(instance=lambda: now[0], channel=lambda: now[0].channel(deadline=Deadline(1)), factor=1.0)
    with lan.joined("web", body) as place, lan.joined("db", other.body):
        place.impair(impairment_of(delay=0.3))
        place.settle()
        assert len(old.macs) == 1  # the same machine keeps its card
        now[0] = new
        place.settle()
        assert new.macs == old.macs
        new.wires[0].send(b"\xff" * 20)
        other.wires[0].settimeout(0.1)
        with pytest.raises(TimeoutError):  # the cable is as bad as it was
            other.wires[0].recv(100)
        other.wires[0].settimeout(5)
        assert other.wires[0].recv(100)


@pytest.mark.parametrize(("delay", "loss"), [(-1, 0), (61, 0), (0, -0.1), (0, 1.1), (float("nan"), 0), (0, float("nan"))])
def test_impairments_that_make_no_sense_are_refused(delay: float, loss: float) -> None:
    with pytest.raises(ValueError, match=r"delay|loss"):
        impairment_of(delay=delay, loss=loss)


def test_the_switches_end_with_the_lans() -> None:
    before = set(threading.enumerate())
    with closing(Lans()) as lans:
        _ = lans["a"]
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) <= before


def test_a_misspelt_impairment_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"los=.*loss.*bandwidth"):
        impairment_of(los=0.1)
