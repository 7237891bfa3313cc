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
    machines: dict[str, dict[str, str]] = {}
    for name, each in stored.items():
        spec = each.spec()
        if spec.lan is not None:
            machines.setdefault(spec.lan, {})[name] = spec.name
    return [ReplayedLan(name=lan, members=_addresses(capsule, names), machines=names) for lan, names in machines.items()]


def _addresses(capsule: Capsule, names: Mapping[str, str]) -> dict[str, str]:
    known = {there: capsule.addresses[name] for name, there in names.items() if name in capsule.addresses}
    # Capsules of earlier versions have none. Then theirs are new ones.
    return known if len(known) == len(names) else {there: f"10.78.0.{number}" for number, there in enumerate(names.values(), 1)}
