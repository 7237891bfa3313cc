"""Machines that boot again, on a LAN and as the documentation has it; tests/real/test_power.py has what must hold for each boot."""

from __future__ import annotations

import doctest

import pytest

from pytest_vmbottle import Machine
from pytest_vmbottle.plugin.infra import RETRIES
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


# Nobody can tell from its text that it reboots.
HIDDEN = {
    "write_files": [
        {
            "path": "/usr/local/bin/again",
            "permissions": "0755",
            "content": "#!/bin/sh\n[ -e /var/again ] || { touch /var/again; systemctl reboot; sleep 60; }\n",
        }
    ],
    "runcmd": [["/usr/local/bin/again"]],
}


@pytest.mark.vm("debian-12", user_data=HIDDEN, fresh="boot", timeout=300)
def test_a_guest_that_reboots_in_its_first_boot_is_awaited_and_not_made_again(vm: Machine, request: pytest.FixtureRequest) -> None:
    assert vm.path("/var/again").exists()
    assert RETRIES not in dict(request.node.user_properties)
