"""The switch of a private LAN: frames go where they belong, late or not at all where the cable is bad."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import pytest

from pytest_vmbottle.machine.switch import Impairment, Port, Switch

EVERYBODY = b"\xff" * 6


def mac(number: int) -> bytes:
    return b"\x52\x54\x00\x00\x00" + bytes([number])


def frame(target: bytes, source: bytes, content: bytes = b"hello") -> bytes:
    return target + source + b"\x08\x00" + content


@pytest.fixture
def switch() -> Iterator[Switch]:
    with closing(Switch("test")) as switch:
        yield switch


NAMES = ("one", "two", "three")


@pytest.fixture
def plugged(switch: Switch) -> Iterator[list[tuple[Port, socket.socket]]]:
    """Three machines' ends of their cables."""
    with ExitStack() as stack:
        made = [switch.connect(name) for name in NAMES]
        for _, wire in made:
            stack.enter_context(wire).settimeout(5)
        yield made


def impair(port: Port, impairment: Impairment) -> None:
    """Have a cable do this in both directions."""
    port.outgoing.impairment = port.incoming.impairment = impairment


def received(wire: socket.socket, seconds: float = 0.5) -> list[bytes]:
    """What comes until nothing comes any more."""
    wire.settimeout(seconds)
    frames = []
    with suppress(TimeoutError):
        while True:
            frames.append(wire.recv(2000))
    return frames


def silent(wire: socket.socket) -> bool:
    """Tell whether nothing comes for a while."""
    wire.settimeout(0.2)
    with suppress(TimeoutError):
        wire.recv(100)
        return False
    wire.settimeout(5)
    return True


Plugged = list[tuple[Port, socket.socket]]


def test_a_broadcast_reaches_all_others_and_not_its_sender(plugged: Plugged) -> None:
    (_, one), (_, two), (_, three) = plugged
    sent = frame(EVERYBODY, mac(1))
    one.send(sent)
    assert two.recv(100) == three.recv(100) == sent
    assert silent(one)


def test_an_address_that_was_seen_gets_its_frames_alone(plugged: Plugged) -> None:
    (_, one), (_, two), (_, three) = plugged
    two.send(frame(EVERYBODY, mac(2)))
    one.recv(100)
    three.recv(100)
    one.send(frame(mac(2), mac(1)))
    assert two.recv(100) == frame(mac(2), mac(1))
    assert silent(three)


def test_an_address_that_moved_is_found_at_its_new_port(plugged: Plugged) -> None:
    (_, one), (_, two), (_, three) = plugged
    for wire in (two, three):
        wire.send(frame(mac(1), mac(9)))
        one.recv(100)
    for wire in (two, three):  # its address was unknown at first
        silent(wire)
    one.send(frame(mac(9), mac(1)))
    assert three.recv(100) == frame(mac(9), mac(1))
    assert silent(two)


def test_what_is_too_short_for_a_frame_goes_nowhere(plugged: Plugged) -> None:
    (_, one), (_, two), _ = plugged
    one.send(b"x" * 13)
    one.send(b"")
    assert silent(two)


@pytest.mark.parametrize("impaired", [0, 1])
def test_a_bad_cable_loses_frames_in_both_directions_until_it_is_good_again(plugged: Plugged, impaired: int) -> None:
    (_, one), (_, two), _ = plugged
    impair(plugged[impaired][0], Impairment(loss=1.0))
    one.send(frame(EVERYBODY, mac(1)))
    assert silent(two)
    impair(plugged[impaired][0], Impairment())
    one.send(frame(EVERYBODY, mac(1)))
    assert two.recv(100)


def test_some_of_the_frames_get_through_a_cable_that_loses_half(plugged: Plugged) -> None:
    (port, one), (_, two), _ = plugged
    impair(port, Impairment(loss=0.5))
    for number in range(400):
        one.send(frame(mac(2), mac(1), number.to_bytes(2)))
        time.sleep(0.0002)
    received = 0
    two.settimeout(0.5)
    with suppress(TimeoutError):
        while two.recv(100):
            received += 1
    assert 100 < received < 300


def test_delays_of_both_cables_add_up_and_keep_the_order(plugged: Plugged) -> None:
    (first, one), (second, two), _ = plugged
    impair(first, Impairment(delay=0.2))
    impair(second, Impairment(delay=0.1))
    began = time.monotonic()
    for number in range(5):
        one.send(frame(mac(2), mac(1), bytes([number])))
    assert [two.recv(100)[-1] for _ in range(5)] == list(range(5))
    assert time.monotonic() - began >= 0.3


def test_each_direction_of_a_cable_is_impaired_by_itself(plugged: Plugged) -> None:
    (port, one), (_, two), _ = plugged
    port.incoming.impairment = Impairment(loss=1.0)
    one.send(frame(EVERYBODY, mac(1)))
    assert two.recv(100)
    two.send(frame(mac(1), mac(2)))
    assert silent(one)


def test_a_cable_duplicates_and_corrupts_frames_but_for_their_addresses(plugged: Plugged) -> None:
    (port, one), (_, two), _ = plugged
    port.outgoing.impairment = Impairment(duplicate=1.0, corrupt=1.0)
    sent = frame(mac(2), mac(1), b"x" * 100)
    one.send(sent)
    copies = received(two)
    assert len(copies) == 2
    for copy in copies:
        assert copy[:12] == sent[:12]
        assert sum((ours ^ theirs).bit_count() for ours, theirs in zip(copy, sent, strict=True)) == 1


def test_frames_that_are_held_back_and_those_with_jitter_come_out_of_order(plugged: Plugged) -> None:
    (port, one), (_, two), _ = plugged
    for impairment in (Impairment(reorder=0.3), Impairment(delay=0.05, jitter=0.05)):
        port.outgoing.impairment = impairment
        for number in range(50):
            one.send(frame(mac(2), mac(1), bytes([number])))
            time.sleep(0.001)
        numbers = [copy[-1] for copy in received(two)]
        assert sorted(numbers) == list(range(50))
        assert numbers != sorted(numbers)


def test_a_narrow_cable_carries_so_many_bytes_in_a_second(plugged: Plugged) -> None:
    (port, one), (_, two), _ = plugged
    port.outgoing.impairment = Impairment(bandwidth=50_000)
    began = time.monotonic()
    for _ in range(25):
        one.send(frame(mac(2), mac(1), b"x" * 986))
    for _ in range(25):
        two.recv(2000)
    assert time.monotonic() - began >= 0.49


def test_what_is_cut_off_from_a_machine_reaches_all_others(switch: Switch, plugged: Plugged) -> None:
    (_, one), (_, two), (_, three) = plugged
    switch.cuts = frozenset({(NAMES[0], NAMES[1])})
    one.send(frame(EVERYBODY, mac(1)))
    assert three.recv(100)
    assert silent(two)
    two.send(frame(mac(1), mac(2)))
    assert one.recv(100)


def test_a_machine_that_reads_slowly_gets_all_that_fits_and_holds_up_nobody(plugged: Plugged) -> None:
    (_, one), (_, two), (_, three) = plugged
    large = b"x" * 1500
    for number in range(1000):
        one.send(frame(EVERYBODY, mac(1), number.to_bytes(2) + large))
        assert three.recv(2000)[14:16] == number.to_bytes(2)
    assert [int.from_bytes(two.recv(2000)[14:16]) for _ in range(1000)] == list(range(1000))


def test_what_waits_for_a_machine_that_does_not_read_is_bounded(plugged: Plugged) -> None:
    (_, one), (port, two), (_, three) = plugged
    for _ in range(400):
        one.send(frame(EVERYBODY, mac(1), b"x" * 60_000))
        three.recv(70_000)
    assert port._bytes <= 8 << 20
    assert two.recv(70_000)


def test_addresses_without_end_fill_no_table(switch: Switch, plugged: Plugged) -> None:
    (_, one), (_, two), _ = plugged
    for number in range(3000):
        one.send(frame(mac(2), b"\x02\x00" + number.to_bytes(4)))
        two.recv(100)
    assert len(switch._addresses) <= 1024


def test_a_port_that_was_disconnected_gets_nothing_and_the_others_go_on(switch: Switch, plugged: Plugged) -> None:
    (_, one), (port, two), (_, three) = plugged
    switch.disconnect(port)
    one.send(frame(EVERYBODY, mac(1)))
    assert three.recv(100)
    assert silent(two)


def test_a_machine_that_is_gone_is_no_work_for_the_switch(plugged: Plugged) -> None:
    (_, one), (_, two), (_, three) = plugged
    two.close()
    one.send(frame(EVERYBODY, mac(1)))
    assert three.recv(100)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.25


def test_an_idle_or_blocked_switch_uses_no_processor(plugged: Plugged) -> None:
    (port, one), _, (_, three) = plugged
    for _ in range(1000):  # more than the second machine's socket takes
        one.send(frame(EVERYBODY, mac(1), b"x" * 1000))
        three.recv(2000)
    impair(port, Impairment(delay=50))
    one.send(frame(EVERYBODY, mac(1)))
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.25


def test_a_switch_that_was_held_up_sleeps_again(plugged: Plugged) -> None:
    (_, one), (_, two), (_, three) = plugged
    for _ in range(1000):
        one.send(frame(EVERYBODY, mac(1), b"x" * 1000))
        three.recv(2000)
    for _ in range(1000):
        two.recv(2000)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.25


def test_the_thread_and_the_cables_end_with_the_switch() -> None:
    switch = Switch("ends")
    port, wire = switch.connect("vm")
    switch.close()
    switch.close()
    assert port.wire.fileno() == -1
    assert "vmbottle-lan-ends" not in {thread.name for thread in threading.enumerate()}
    wire.close()


def test_two_switches_have_nothing_to_do_with_each_other(plugged: Plugged) -> None:
    with closing(Switch("test")) as other:
        _, elsewhere = other.connect("vm")
        with elsewhere:
            plugged[0][1].send(frame(EVERYBODY, mac(1)))
            assert plugged[1][1].recv(100)
            assert silent(elsewhere)
