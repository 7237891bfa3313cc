"""The private LANs of a capsule's machines, when they are started again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle.machine.shared_lan import Seat

if TYPE_CHECKING:
    from pytest_vmbottle.standalone.capsules import Capsule
    from pytest_vmbottle.standalone.stored import Stored

__all__ = ["ReplayedLan", "lans_of"]


@attrs.frozen(kw_only=True)
class ReplayedLan:
    """A private LAN of the test.

    Attributes:
        name: Its name in the test.
        members: The addresses of its machines, by their names there.
        machines: The names of its machines there, by their names in the capsule.
    """

    name: str
    members: Mapping[str, str]
    machines: Mapping[str, str]

    def seat(self, machine: str) -> Seat:
        """Return the place of a machine of the capsule."""
        return Seat(name=self.machines[machine], members=self.members)


def lans_of(capsule: Capsule, stored: Mapping[str, Stored]) -> list[ReplayedLan]:
    """Return the LANs of a capsule's machines, with the addresses that they had in the test.

    Args:
        capsule: The capsule.
        stored: The boot source of each machine, by its name in the capsule.
    """
    names: dict[str, dict[str, str]] = {}
    known: dict[str, dict[str, str]] = {}
    for name, each in stored.items():
        spec = each.spec()
        # One of no more LANs than it has addresses: it may have had trouble to join.
        addresses = dict(zip(spec.lans, capsule.addresses.get(name, "").split(), strict=False))
        for lan in spec.lans:
            names.setdefault(lan, {})[name] = spec.name
            if lan in addresses:
                known.setdefault(lan, {})[spec.name] = addresses[lan]
    return [ReplayedLan(name=lan, members=_members(machines, known.get(lan, {})), machines=machines) for lan, machines in names.items()]


def _members(machines: Mapping[str, str], known: dict[str, str]) -> dict[str, str]:
    # Capsules of earlier versions have no addresses. Then theirs are new ones.
    return known if len(known) == len(machines) else {there: f"10.78.0.{number}" for number, there in enumerate(machines.values(), 1)}
