"""Private LANs: the machines of a test that see each other, by name, and nothing else.

A machine is poured from the same pack as any other. Then it is given a second card, which leads to a switch in this process, with an
address that no other clone has; the guest is told its host name and those of the others.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backend import GUEST_PATH, Cabling, Channel, Command, Finished, Instance
from pytest_vmbottle.errors import MachineError, SpecError
from pytest_vmbottle.switch import Impairment, Port, Switch

__all__ = ["Lan", "Lans", "Place"]

log = logging.getLogger(__name__)

_SECONDS = 60.0
_NETWORK = ipaddress.ip_network("10.77.0.0/16")
"""What LANs are parts of, by a third byte of their own; QEMU's user network is 10.0.2.0/24."""
_NO_IP, _NO_ADDRESS = 3, 4
_MAX_DELAY = 60.0

# Whoever sets up network cards in the guest is told to leave ours alone: it would ask for an address by DHCP, and take ours away.
_SPARE = rf"""
command -v ip >/dev/null || exit {_NO_IP}
if [ -d /run/systemd/netif ]; then
  mkdir -p /run/systemd/network
  printf '[Match]\nMACAddress=%s\n\n[Link]\nUnmanaged=yes\n' "$1" > /run/systemd/network/00-vmbottle-lan.network
  networkctl reload || true
fi
if [ -d /run/NetworkManager ]; then
  mkdir -p /run/NetworkManager/conf.d
  printf '[keyfile]\nunmanaged-devices=mac:%s\n' "$1" > /run/NetworkManager/conf.d/00-vmbottle-lan.conf
  nmcli general reload conf || true
fi
"""
# `cp -a` keeps owner, mode and label; the new file takes the place of the old one at once, so that no look-up finds half of it.
_HOSTS = r"""
hosts() {
  cp -a /etc/hosts /etc/hosts.vmbottle &&
  { printf '# vmbottle: the LAN\n%s\n# vmbottle: end\n' "$1"; sed '/^# vmbottle: the LAN$/,/^# vmbottle: end$/d' /etc/hosts; } \
    > /etc/hosts.vmbottle && mv /etc/hosts.vmbottle /etc/hosts
}
"""
_TELL = _HOSTS + 'hosts "$1"'
# The card appears when the guest has noticed it, and gets its final name when udev has seen it.
_SETTLE = (
    _HOSTS
    + rf"""
mac=$1 address=$2 name=$3
card() {{
  for each in /sys/class/net/*; do
    read -r found 2>/dev/null < "$each/address" && [ "$found" = "$mac" ] && [ -e "$each/device" ] && card=${{each##*/}} && return 0
  done
  return 1
}}
until card; do sleep 0.1; done
if command -v udevadm >/dev/null; then udevadm settle --timeout=20; card; fi
ip link set dev "$card" up || exit {_NO_ADDRESS}
ip addr show dev "$card" | grep -qF " $address " || ip addr add "$address" dev "$card" || exit {_NO_ADDRESS}
echo "$name" > /proc/sys/kernel/hostname && echo "$name" > /etc/hostname
hosts "$4"
"""
)


class Place:
    """One machine's place on a LAN.

    Attributes:
        name: The machine's name, which is its host name there.
        address: Its IPv4 address.
        mac: The address of its card.
    """

    def __init__(self, lan: Lan, name: str, address: ipaddress.IPv4Interface, *, body: Body) -> None:
        """Reserves it; `settle` takes it."""
        self.name = name
        self.address = str(address.ip)
        self.mac = "52:54:" + address.ip.packed.hex(":")
        self._lan, self._interface, self._body = lan, str(address), body
        self._plugged: Cabling | None = None
        self._port: Port | None = None
        self._impairment = Impairment()

    def settle(self) -> None:
        """Gives the machine its card and has its guest set up what it is on the LAN; again after a boot, or when it was started anew.

        Raises:
            MachineError: The backend has no LANs, or the guest cannot be on one.
        """
        instance = self._body.instance()
        if not isinstance(instance, Cabling):
            raise MachineError(f"its backend has no private LANs: {self.name!r} cannot have network={self._lan.name!r}", machine=self.name)
        self._script(_SPARE, self.mac)
        if instance is not self._plugged:
            self._plug(instance)
        self._script(_SETTLE, self.mac, self._interface, self.name, self._lan.hosts)

    def tell(self) -> None:
        """Has the guest know who is on the LAN."""
        self._script(_TELL, self._lan.hosts)

    def impair(self, *, delay: float, loss: float) -> None:
        """Makes the machine's cable a bad one, or with zeros a good one.

        Raises:
            ValueError: A number makes no sense.
        """
        if not 0 <= delay <= _MAX_DELAY:
            raise ValueError(f"delay={delay!r}: takes seconds from 0 to {_MAX_DELAY:g}")
        if not 0 <= loss <= 1:
            raise ValueError(f"loss={loss!r}: takes a probability from 0 to 1")
        self._impairment = Impairment(delay=delay, loss=loss)
        if self._port is not None:
            self._port.impairment = self._impairment

    def unplug(self) -> None:
        """Takes the card out of the machine, until it settles again.

        Raises:
            MachineError: The guest does not let go of it.
        """
        instance = self._body.instance()
        if isinstance(instance, Cabling) and instance is self._plugged:
            instance.unplug_card(deadline=Deadline(_SECONDS * self._body.factor))
        self.leave()

    def leave(self) -> None:
        """Gives up the place at the switch."""
        if self._port is not None:
            self._lan.switch.disconnect(self._port)
        self._plugged = self._port = None

    def _plug(self, instance: Cabling) -> None:
        self.leave()
        port, wire = self._lan.switch.connect()
        port.impairment = self._impairment
        self._port = port
        with wire:
            instance.plug_card(wire, mac=self.mac)
        self._plugged = instance

    def _script(self, text: str, *words: str) -> None:
        command = Command(argv=("/bin/sh", "-c", text, "sh", *words), env=(("PATH", GUEST_PATH),))
        finished = self._body.channel().run(command, deadline=Deadline(_SECONDS * self._body.factor))
        if finished.timed_out or finished.returncode:
            raise MachineError(f"the machine {self.name!r} cannot be on the LAN {self._lan.name!r}: {_reason(finished)}", machine=self.name)


def _reason(finished: Finished) -> str:
    said = " ".join(finished.stderr.decode(errors="replace").split())[-500:]
    if finished.returncode == _NO_IP:
        return "its guest has no program `ip`: add it, as with packages=['iproute2']"
    if finished.timed_out:
        return "its guest did not find the new network card in time; its kernel must know PCI hot-plug and virtio_net"
    what = "the guest could not give its card an address" if finished.returncode == _NO_ADDRESS else "the guest could not be set up"
    return f"{what}: {said or f'status {finished.returncode}'}"


@attrs.frozen(kw_only=True)
class Body:
    """What a machine consists of now; both are others when it was started anew.

    Attributes:
        instance: Gives the VM as its backend sees it.
        channel: Gives what commands go through.
        factor: What all time-outs are multiplied with.
    """

    instance: Callable[[], Instance]
    channel: Callable[[], Channel]
    factor: float


class Lan:
    """One private LAN: a switch, and who is on it."""

    def __init__(self, name: str, network: ipaddress.IPv4Network) -> None:
        """Starts the switch; `close` ends it."""
        self.name = name
        self.switch = Switch(name)
        self._prefix = network.prefixlen
        self._free = network.hosts()
        self._places: list[Place] = []

    @property
    def hosts(self) -> str:
        """Who is on it, in the form of /etc/hosts."""
        return "\n".join(f"{place.address} {place.name}" for place in self._places)

    @contextmanager
    def joined(self, name: str, body: Body) -> Iterator[Place]:
        """Has a machine on it for the length of a block.

        Raises:
            SpecError: There is one of this name already.
            MachineError: The machine cannot be on a LAN.
        """
        place = self._reserve(name, body)
        others = tuple(self._places)
        self._places.append(place)
        try:
            place.settle()
            for other in others:
                _tell(other)
            yield place
        finally:
            self._places.remove(place)
            place.leave()

    def _reserve(self, name: str, body: Body) -> Place:
        if name.lower() in {place.name.lower() for place in self._places}:
            raise SpecError(f"the LAN {self.name!r} has a machine named {name!r} already: give this one another name=")
        address = next(self._free, None)
        if address is None:
            raise SpecError(f"the LAN {self.name!r} has given out all of its addresses")
        return Place(self, name, ipaddress.IPv4Interface(f"{address}/{self._prefix}"), body=body)

    def close(self) -> None:
        """Ends it."""
        self.switch.close()


def _tell(place: Place) -> None:
    try:
        place.tell()
    except MachineError as error:  # switched off or paused, perhaps: that is its test's affair, and does not concern who joins
        log.warning("the machine %r was not told who joined its LAN: %s", place.name, error)


class Lans:
    """The private LANs of one test, by name: each is there when its first machine joins, and all end with the test."""

    def __init__(self) -> None:
        """Makes none yet."""
        self._lans: dict[str, Lan] = {}
        self._networks = _NETWORK.subnets(new_prefix=24)

    def __getitem__(self, name: str) -> Lan:
        """The LAN of this name, made if need be."""
        if name not in self._lans:
            network = next(self._networks, None)
            if not isinstance(network, ipaddress.IPv4Network):
                raise SpecError("a test has at most 256 LANs")
            self._lans[name] = Lan(name, network)
        return self._lans[name]

    def close(self) -> None:
        """Ends them; may be called again."""
        while self._lans:
            self._lans.popitem()[1].close()
