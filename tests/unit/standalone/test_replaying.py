"""The private LANs of a capsule's machines, when they are started again."""

from __future__ import annotations

from typing import cast

import attrs
import pytest

from pytest_vmbottle import Capsule, MachineSpec
from pytest_vmbottle.machine.shared_lan import Seat
from pytest_vmbottle.standalone.replaying import lans_of
from pytest_vmbottle.standalone.stored import Stored


@attrs.frozen
class _Stored:
    network: str | bool | list[str]
    name: str

    def spec(self) -> MachineSpec:
        return MachineSpec(source="debian-12", name=self.name, network=self.network)


@attrs.frozen
class _Capsule:
    addresses: dict[str, str]


# By their names in the capsule, where two machines of one name have numbers.
MACHINES = {
    "web": _Stored("front", "web"),
    "web-2": _Stored("back", "web"),
    "db": _Stored("back", "db"),
    "alone": _Stored(network=False, name="alone"),
}


@pytest.mark.parametrize(
    ("addresses", "back"),
    [
        ({"web": "10.77.0.1", "web-2": "10.77.1.1", "db": "10.77.1.2"}, {"web": "10.77.1.1", "db": "10.77.1.2"}),
        # An earlier version wrote none.
        ({}, {"web": "10.78.0.1", "db": "10.78.0.2"}),
    ],
)
def test_machines_come_back_on_their_own_lans_under_their_own_names(addresses: dict[str, str], back: dict[str, str]) -> None:
    front, found = lans_of(cast("Capsule", _Capsule(addresses)), cast("dict[str, Stored]", MACHINES))
    assert (front.name, found.name, dict(front.machines)) == ("front", "back", {"web": "web"})
    assert found.seat("web-2") == Seat(name="web", members=back)
    assert found.seat("db") == Seat(name="db", members=back)


def test_a_machine_on_two_lans_has_its_address_on_each_again() -> None:
    machines = {"web": _Stored("front", "web"), "gate": _Stored(["front", "back"], "gate")}
    capsule = _Capsule({"web": "10.77.0.1", "gate": "10.77.0.2 10.77.1.1"})
    front, back = lans_of(cast("Capsule", capsule), cast("dict[str, Stored]", machines))
    assert (front.name, dict(front.members)) == ("front", {"web": "10.77.0.1", "gate": "10.77.0.2"})
    assert (back.name, dict(back.members), dict(back.machines)) == ("back", {"gate": "10.77.1.1"}, {"gate": "gate"})
