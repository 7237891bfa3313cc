"""Ports for what is plugged in, by the names of the things."""

from __future__ import annotations

import pytest

from pytest_vmbottle.backends.qemu.hot_ports import HotPorts
from pytest_vmbottle.backends.qemu.qmp import QmpFailed


def test_a_port_that_a_saved_state_names_is_held_and_given_to_nothing_else() -> None:
    ports = HotPorts()
    ports.hold("saved", "hot1")
    assert ports.of("saved") == "hot1"
    assert ports.take("new") != "hot1"
    ports.free("saved")
    assert ports.take("newer") == "hot1"


@pytest.mark.parametrize("port", ["hot0", "hot1", "disk0", "pcie.0", ""])
def test_a_port_that_is_none_or_has_something_in_it_is_refused(port: str) -> None:
    ports = HotPorts()
    ports.hold("first", "hot1")
    with pytest.raises(QmpFailed, match="there is no free port"):
        ports.hold("second", port)
