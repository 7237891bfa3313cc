"""Waiting for things in a real guest: it ends at once when the thing can no longer happen."""

from __future__ import annotations

import re
import time
from typing import assert_type

import pytest

from pytest_vmbottle import CommandFailed, Machine, MachineDied, MachineError, MachineTimeout, Result

pytestmark = pytest.mark.vm("debian-12")


def test_a_unit_that_becomes_active_is_waited_for(session_vm: Machine) -> None:
    session_vm.exec(["systemd-run", "--unit=slow", "--service-type=notify", "sh", "-c", "sleep 1; systemd-notify --ready; sleep 1000"])
    session_vm.wait_for_unit("slow")
    assert session_vm.exec(["systemctl", "is-active", "slow"]).stdout == "active\n"


def test_what_is_waited_for_is_returned_with_its_own_type(session_vm: Machine) -> None:
    assert assert_type(session_vm.wait_until("echo there"), Result).stdout == "there\n"
    assert assert_type(session_vm.wait_until(lambda: 5), int) == 5


@pytest.mark.guests
def test_a_unit_that_failed_ends_the_wait_at_once_with_its_journal(session_vm: Machine) -> None:
    session_vm.exec("systemd-run --unit=broken sh -c 'echo the reason; exit 3'; sleep 1")
    began = time.monotonic()
    with pytest.raises(MachineError, match="ActiveState=failed") as caught:
        session_vm.wait_for_unit("broken", timeout=300)
    assert "the reason" in str(caught.value)
    assert time.monotonic() - began < 100


@pytest.mark.guests
def test_a_wait_in_vain_tells_of_units_that_failed_or_keep_being_restarted_meanwhile(session_vm: Machine) -> None:
    session_vm.exec("systemd-run --unit=spoilt sh -c 'echo the cause; exit 3'")
    session_vm.exec(
        "systemd-run --unit=restless -p Restart=always -p RestartSec=100ms -p StartLimitBurst=1000 sh -c 'echo once more; exit 4'"
    )
    session_vm.wait_until("[ $(systemctl show -P NRestarts restless) -gt 0 ] && systemctl is-failed spoilt")
    with pytest.raises(MachineTimeout) as caught:
        session_vm.wait_for_port(9, timeout=0.3)
    session_vm.exec("systemctl stop restless; systemctl reset-failed")
    for said in ("spoilt.service", "the cause", "restless.service", "once more"):
        assert said in str(caught.value)


@pytest.mark.parametrize("unit", ["no-such.service", "systemd-networkd-wait-online.service"])
def test_a_unit_that_nobody_starts_ends_the_wait_at_once(session_vm: Machine, unit: str) -> None:
    with pytest.raises(MachineError, match=unit):
        session_vm.wait_for_unit(unit, timeout=300)


def test_a_unit_that_runs_once_is_waited_for_until_it_is_over(session_vm: Machine) -> None:
    session_vm.exec("systemd-run --no-block --unit=once --service-type=oneshot sh -c 'sleep 1; touch /tmp/over'")  # it is forgotten then
    session_vm.exec("systemd-run --no-block --unit=kept --service-type=oneshot --remain-after-exit sh -c 'sleep 1; touch /tmp/kept'")
    session_vm.wait_for_unit("once", finished=True)
    assert session_vm.path("/tmp/over").exists()
    session_vm.wait_for_unit("kept", finished=True)
    assert session_vm.path("/tmp/kept").exists()
    assert session_vm.unit("kept").property("SubState") == "exited"
    session_vm.unit("kept").stop()

    with pytest.raises(MachineTimeout, match=r"the unit ssh to have run and be over.*\n.*SubState=running"):
        session_vm.wait_for_unit("ssh", finished=True, timeout=0.3)
    with pytest.raises(MachineError, match=r"the unit never-was will not run.*systemd-run with --wait"):
        session_vm.wait_for_unit("never-was", finished=True, timeout=300)


def test_a_unit_has_a_state_and_properties_and_can_be_started_and_stopped(session_vm: Machine) -> None:
    session_vm.exec("systemd-run --unit=patient -p ExecStop='echo one' -p ExecStop='echo two' --remain-after-exit sleep 1000")
    unit = session_vm.unit("patient")
    assert (unit.state, unit.property("SubState"), unit.properties["Id"]) == ("active", "running", "patient.service")
    assert unit.property("ExecStop").count("argv[]=echo") == 2
    with pytest.raises(LookupError, match="patient has no property 'Colour'"):
        unit.property("Colour")
    before = unit.property("MainPID")
    unit.restart()
    assert unit.property("MainPID") not in (before, "0")
    unit.stop()
    assert unit.state == "not-found"  # a transient unit is forgotten
    with pytest.raises(CommandFailed, match="patient"):
        unit.start()


@pytest.mark.guests
def test_a_unit_of_a_user_is_waited_for_as_that_user(session_vm: Machine) -> None:
    session_vm.exec("useradd --create-home alice && loginctl enable-linger alice")
    session_vm.wait_for_unit("default.target", user="alice")
    home = session_vm.path("/home/alice/.config/systemd/user/hers.service")
    session_vm.write_files({home: "[Service]\nExecStart=sleep 1000\n"}, owner="alice")
    hers = session_vm.unit("hers", user="alice")
    hers.start()
    session_vm.wait_for_unit("hers", user="alice")
    assert session_vm.path("/proc").joinpath(hers.property("MainPID")).owner() == "alice"
    assert session_vm.unit("hers").state == "not-found"  # it is none of the system
    hers.stop()
    with pytest.raises(MachineError, match=r"the unit hers will not become active: .*ActiveState=inactive"):
        session_vm.wait_for_unit("hers", user="alice", timeout=300)
    with pytest.raises(MachineError, match="there is no user bob in the guest"):
        session_vm.wait_for_unit("hers", user="bob", timeout=300)
    with pytest.raises(MachineTimeout, match="Failed to connect to bus"):
        session_vm.wait_for_unit("hers", user="nobody", timeout=0.3)


@pytest.mark.guests
def test_a_port_is_waited_for_until_it_is_closed(session_vm: Machine) -> None:
    session_vm.exec("systemd-run --unit=brief python3 -m http.server 8126")
    session_vm.wait_for_port(8126)
    with pytest.raises(MachineTimeout, match=r"nothing to listen on port 8126.*\n.*8126"):
        session_vm.wait_for_port(8126, closed=True, timeout=0.3)
    session_vm.exec("systemd-run sh -c 'sleep 1; systemctl stop brief'")
    session_vm.wait_for_port(8126, closed=True)
    assert "8126" not in session_vm.exec("ss -ltn").stdout


@pytest.mark.guests
def test_a_port_is_waited_for_at_an_address_that_the_guest_reaches(session_vm: Machine) -> None:
    session_vm.exec("systemd-run --unit=bound sh -c 'sleep 1; exec python3 -m http.server --bind 127.0.0.7 8127'")
    session_vm.wait_for_port(8127, address="127.0.0.7")
    session_vm.wait_for_port(8127, address="127.0.0.8", closed=True)
    with pytest.raises(MachineTimeout, match=r"port 8127 of localhost(?s:.*)refused"):
        session_vm.wait_for_port(8127, address="localhost", timeout=0.3)
    session_vm.unit("bound").stop()
    session_vm.wait_for_port(8127, address="127.0.0.7", closed=True)
    with pytest.raises(ValueError, match="without address= and closed="):
        session_vm.wait_for_port(8127, forwarded=True, closed=True)


LISTEN = """
import socket, sys, time
kind, name, late = sys.argv[1:]
server = socket.socket(socket.AF_UNIX, getattr(socket, kind))
server.bind(name.replace("@", "\\0"))
time.sleep(float(late))
if kind != "SOCK_DGRAM":
    server.listen()
time.sleep(1000)
"""


def test_a_unix_socket_is_waited_for_until_something_listens(session_vm: Machine) -> None:
    session_vm.path("/tmp/listen.py").write_text(LISTEN)
    with session_vm.spawn(["python3", "/tmp/listen.py", "SOCK_STREAM", "/var/run/late.sock", "2"]):
        session_vm.wait_for_file("/run/late.sock")
        session_vm.wait_for_socket("/run/late.sock")  # by another path to it
        assert session_vm.exec(["python3", "-c", "import socket; socket.socket(socket.AF_UNIX).connect('/run/late.sock')"]).ok
    assert session_vm.path("/run/late.sock").exists()
    with pytest.raises(MachineTimeout, match=r"something to listen on /run/late.sock(?s:.*)/run/systemd/private"):
        session_vm.wait_for_socket("/run/late.sock", timeout=0.3)
    with (
        session_vm.spawn(["python3", "/tmp/listen.py", "SOCK_DGRAM", "/run/letters", "0"]),
        session_vm.spawn(["python3", "/tmp/listen.py", "SOCK_SEQPACKET", "@nowhere", "0"]),
    ):
        session_vm.wait_for_socket(session_vm.path("/run/letters"))
        session_vm.wait_for_socket("@nowhere")


def test_a_port_and_a_file_are_waited_for(session_vm: Machine) -> None:
    session_vm.exec("systemd-run sh -c 'sleep 1; touch /tmp/here; exec python3 -m http.server 8123'")
    assert session_vm.wait_for_file("/tmp/here").exists()
    session_vm.wait_for_port(8123)
    assert "8123" in session_vm.exec("ss -ltn").stdout


def test_a_wait_in_vain_says_what_for_how_long_and_what_was_seen_last(session_vm: Machine) -> None:
    with pytest.raises(MachineTimeout, match="port 81"):
        session_vm.wait_for_port(81, timeout=0.3)
    with pytest.raises(MachineTimeout, match="/none"):
        session_vm.wait_for_file("/none", timeout=0.3)
    with pytest.raises(TimeoutError, match=r"(?m)^so far$"):
        session_vm.wait_until("echo so far; false", timeout=2)


def test_a_condition_of_ones_own_is_waited_for_and_its_value_returned(session_vm: Machine) -> None:
    seen: list[str] = []

    def third() -> list[str] | None:
        seen.append(session_vm.exec("echo again").stdout)
        return seen if len(seen) == 3 else None

    assert session_vm.wait_until(third) == ["again\n"] * 3
    result = session_vm.wait_until(["test", "-e", "/etc/hostname"])
    assert result.ok


@pytest.mark.guests
def test_a_command_that_hangs_does_not_outlast_the_wait(session_vm: Machine) -> None:
    with pytest.raises(MachineTimeout, match=r"(?m)^begun$"):
        session_vm.wait_until("echo begun; sleep 4713", timeout=2)
    assert session_vm.exec(["pgrep", "-f", "sleep 4713"], check=False).stdout == ""


@pytest.mark.guests
def test_a_port_that_only_the_guest_itself_can_reach_is_not_taken_for_one_that_the_host_can(session_vm: Machine) -> None:
    session_vm.exec("systemd-run python3 -m http.server --bind 127.0.0.1 8124; systemd-run python3 -m http.server 8125")
    session_vm.wait_for_port(8124)
    session_vm.wait_for_port(8125, forwarded=True)
    with pytest.raises(MachineTimeout, match="8124, 8125"):
        session_vm.wait_for_port(8124, forwarded=True, timeout=3)


def test_words_on_the_console_are_awaited_one_after_another(session_vm: Machine) -> None:
    session_vm.exec("printf 'unit one: up\\nunit two: half' > /dev/ttyS0")
    assert session_vm.wait_for_console(re.compile(r"unit (\w+): up"))[1] == "one"
    session_vm.wait_for_console("two: ha")
    session_vm.spawn("sleep 0.5; echo '-way (really)' > /dev/ttyS0")
    session_vm.wait_for_console("lf-way (really)")
    with pytest.raises(MachineTimeout, match="'half-way'"):
        session_vm.wait_for_console("half-way", timeout=0.3)


def test_a_guest_that_powers_off_is_waited_for_and_every_other_wait_ends_at_once(vm: Machine) -> None:
    with pytest.raises(MachineTimeout):
        vm.wait_for_shutdown(timeout=0.2)
    vm.exec("(sleep 0.5; echo o > /proc/sysrq-trigger) >/dev/null 2>&1 &")
    began = time.monotonic()
    with pytest.raises(MachineDied, match="status 0"):
        vm.wait_for_file("/none", timeout=300)
    assert time.monotonic() - began < 100
    vm.wait_for_shutdown()
    with pytest.raises(MachineDied):
        vm.exec(["true"])
