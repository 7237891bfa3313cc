"""Machines that boot again, on a LAN and as the documentation has it; tests/real/test_power.py has what must hold for each boot."""

from __future__ import annotations

import doctest

import pytest

from pytest_vmbottle import Machine
from tests.real.test_docstrings import BOOTED_AGAIN, MACHINES, of, run
from tests.real.test_lan import pings


@pytest.mark.vm("debian-12", name="web", network="lan")
@pytest.mark.vm("debian-12", name="db", network="lan")
def test_a_machine_is_on_its_lan_again_after_a_reboot(vms: dict[str, Machine]) -> None:
    web, db = vms["web"], vms["db"]
    db.reboot()

    assert db.exec("hostname").stdout == "db\n"
    assert pings(web, "db")
    assert pings(db, "web")


@pytest.mark.vm("debian-12")
@of({name: MACHINES[name] for name in sorted(BOOTED_AGAIN)})
def test_the_example_of_a_machine_that_boots_again_is_right(test: doctest.DocTest, vm: Machine) -> None:
    run(test, vm=vm)
