"""Waiting for things in a real guest: it ends at once when the thing can no longer happen."""

from __future__ import annotations

import time

import pytest

from pytest_vmbottle import Machine, MachineError, MachineTimeout

pytestmark = pytest.mark.vm("debian-12")


def test_a_unit_that_becomes_active_is_waited_for(session_vm: Machine) -> None:
    session_vm.exec(["systemd-run", "--unit=slow", "--service-type=notify", "sh", "-c", "sleep 1; systemd-notify --ready; sleep 1000"])
    session_vm.wait_for_unit("slow")
    assert session_vm.exec(["systemctl", "is-active", "slow"]).stdout == "active\n"


def test_a_unit_that_failed_ends_the_wait_at_once_with_its_journal(session_vm: Machine) -> None:
    session_vm.exec("systemd-run --unit=broken sh -c 'echo the reason; exit 3'; sleep 1")
    began = time.monotonic()
    with pytest.raises(MachineError, match="ActiveState=failed") as caught:
        session_vm.wait_for_unit("broken", timeout=300)
    assert "the reason" in str(caught.value)
    assert time.monotonic() - began < 100


@pytest.mark.parametrize("unit", ["no-such.service", "systemd-networkd-wait-online.service"])
def test_a_unit_that_nobody_starts_ends_the_wait_at_once(session_vm: Machine, unit: str) -> None:
    with pytest.raises(MachineError, match=f"{unit} will not become active"):
        session_vm.wait_for_unit(unit, timeout=300)


def test_a_port_and_a_file_are_waited_for(session_vm: Machine) -> None:
    session_vm.exec("systemd-run sh -c 'sleep 1; touch /tmp/here; exec python3 -m http.server 8123'")
    assert session_vm.wait_for_file("/tmp/here").exists()
    session_vm.wait_for_port(8123)
    assert "8123" in session_vm.exec("ss -ltn").stdout


def test_a_wait_in_vain_says_what_for_how_long_and_what_was_seen_last(session_vm: Machine) -> None:
    with pytest.raises(MachineTimeout, match=r"waited 0\.5 s for something to listen on port 81"):
        session_vm.wait_for_port(81, timeout=0.5)
    with pytest.raises(MachineTimeout, match=r"waited 0\.5 s for /none to exist"):
        session_vm.wait_for_file("/none", timeout=0.5)
    with pytest.raises(TimeoutError, match=r"(?s)waited 0\.5 s for 'echo so far; false' to succeed; the last answer was.*so far"):
        session_vm.wait_until("echo so far; false", timeout=0.5)


def test_a_condition_of_ones_own_is_waited_for_and_its_value_returned(session_vm: Machine) -> None:
    seen: list[str] = []

    def third() -> list[str] | None:
        seen.append(session_vm.exec("echo again").stdout)
        return seen if len(seen) == 3 else None

    assert session_vm.wait_until(third) == ["again\n"] * 3
    result = session_vm.wait_until(["test", "-e", "/etc/hostname"])
    assert result.ok


def test_the_console_has_what_the_guest_wrote_to_it_with_control_characters_made_visible(session_vm: Machine) -> None:
    session_vm.exec(r"printf 'first\nred \033[31m\nlast\n' > /dev/ttyS0")
    session_vm.wait_until(lambda: "last" in session_vm.console.text)
    assert session_vm.console.tail(2) == "red \\x1b[31m\nlast"
