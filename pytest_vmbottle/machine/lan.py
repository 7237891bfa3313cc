"""Private LANs that join the machines of a test.

The machines on a LAN see each other, by name, and nothing else.

A machine is cloned from the same pack as any other. Then it gets one more network card for each of its LANs, connected to a switch in this
process, with an address that no other clone has; the guest gets its own host name and those of the others.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol

import attrs

from pytest_vmbottle.backends.port import Instance
from pytest_vmbottle.channels.port import GUEST_PATH, Channel, Command, Finished
from pytest_vmbottle.errors import MachineError, SpecError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.machine.switch import Cable, Impairment, Port, Switch

__all__ = ["DIRECTIONS", "Direction", "Lan", "LanGuest", "LanMember", "LanTable", "Lans", "impairment_of"]

Direction = Literal["in", "out"]
DIRECTIONS: tuple[Direction, ...] = ("in", "out")
"""Directions of a machine's cable: to the machine, and from it."""

log = logging.getLogger(__name__)

# The script lan_settle.sh waits for the card without a limit of its own. This is its limit.
_SECONDS = 60.0
_NETWORK = ipaddress.ip_network("10.77.0.0/16")
"""The range that LANs are taken from, a /24 each; QEMU's user network is 10.0.2.0/24."""
# Statuses of the scripts lan_spare.sh and lan_settle.sh.
_NO_IP, _NO_ADDRESS = 3, 4
_MAX_DELAY = 60.0
_IMPAIRMENTS = tuple(field.name for field in attrs.fields(Impairment))

_SPARE = read_script(__package__, "lan_spare.sh")
_TELL = read_script(__package__, "lan_tell.sh")
_SETTLE = read_script(__package__, "lan_settle.sh")


def impairment_of(**values: float) -> Impairment:
    """Return an impairment, checked.

    Raises:
        ValueError: A value is out of range.
    """
    for name, value in values.items():
        if name not in _IMPAIRMENTS:
            raise ValueError(f"{name}= is nothing that a cable can have; it takes {', '.join(_IMPAIRMENTS)}")
        if name in ("delay", "jitter"):
            if not 0 <= value <= _MAX_DELAY:
                raise ValueError(f"{name}={value!r}: takes seconds from 0 to {_MAX_DELAY:g}")
        elif name == "bandwidth":
            if value < 0:
                raise ValueError(f"{name}={value!r}: takes bytes in a second, or 0 for no limit")
        elif not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r}: takes a probability from 0 to 1")
    return Impairment(**values)


class LanMember:
    """A machine's membership of a LAN.

    Attributes:
        name: The machine's name, which is its host name there.
        cables: The two directions of its cable.
        address: Its IPv4 address.
        mac: The MAC address of its card.
        network: The addresses of the LAN.
    """

    def __init__(self, lan: Lan, name: str, address: ipaddress.IPv4Interface, *, body: LanGuest) -> None:
        """Reserve name and address; `settle` connects the machine."""
        self.name = name
        self.address, self.network = str(address.ip), address.network
        # Derived from its address, so that no two cards on a LAN have the same.
        self.mac = "52:54:" + address.ip.packed.hex(":")
        self._lan, self._interface, self._body = lan, str(address), body
        # The instance that has the card: after a start or a restore it is another one, which has none.
        self._plugged: Instance | None = None
        self._port: Port | None = None
        self.cables: Mapping[Direction, Cable] = {direction: Cable() for direction in DIRECTIONS}

    def settle(self) -> None:
        """Plug in the machine's card and configure it in the guest.

        To be called again after a boot, or with another instance.

        Raises:
            MachineError: The backend has no LANs, or the guest cannot be on one.
        """
        # Taken once, so that the check and the plugging are about the same instance.
        instance = self._body.instance()
        # Before the card is there: DHCP clients of the guest would take it as soon as they see it.
        self._script(_SPARE, lambda: self._body.macs)
        if instance is not self._plugged:
            self._plug(instance)
        self._script(_SETTLE, lambda: (self.mac, self._interface, self.name, self._body.hosts))

    def tell(self) -> None:
        """Write the names of all machines on the guest's LANs to its hosts file."""
        self._script(_TELL, lambda: (self._body.hosts,))

    @property
    def lan(self) -> str:
        """The name of the LAN."""
        return self._lan.name

    @property
    def hosts(self) -> str:
        """The machines on the LAN in the form of /etc/hosts."""
        return self._lan.hosts

    def impair(self, impairment: Impairment, directions: Iterable[Direction] = DIRECTIONS) -> None:
        """Set what becomes of the frames on the machine's cable.

        Args:
            impairment: What becomes of them.
            directions: In which directions.
        """
        for direction in directions:
            # Of the cable and not of the port: a restart plugs in a new port, which gets the same cable.
            self.cables[direction].impairment = impairment

    def cut_off(self, names: Iterable[str], directions: Iterable[Direction]) -> frozenset[tuple[str, str]]:
        """Have no frame pass between the machine and others; return the pairs that were cut anew, for `join`.

        Raises:
            ValueError: There is no such machine on the LAN.
        """
        return self._lan.cut(self.name, names, directions)

    def join(self, cuts: frozenset[tuple[str, str]]) -> None:
        """Let frames pass again."""
        self._lan.switch.cuts -= cuts

    def leave(self) -> None:
        """Disconnect from the switch."""
        if self._port is not None:
            self._lan.switch.disconnect(self._port)
        self._plugged = self._port = None

    def _plug(self, instance: Instance) -> None:
        # The port of the instance before. Its frames would wait for a machine that is gone.
        self.leave()
        port, wire = self._lan.switch.connect(self.name)
        port.outgoing, port.incoming = self.cables["out"], self.cables["in"]
        # Noted before it is used, so that `leave` finds it if the card cannot be plugged in.
        self._port = port
        # The hypervisor has its own copy of the descriptor afterwards.
        with wire:
            instance.plug_card(wire, mac=self.mac)
        self._plugged = instance

    def _script(self, text: str, words: Callable[[], Iterable[str]]) -> None:
        # One at a time, with words of the moment: those of two LANs write the same files of the guest, and may come from two threads.
        with self._body.lock:
            # The text goes to `sh -c`, its arguments as words of their own: no name can become a part of the script.
            command = Command(argv=("/bin/sh", "-c", text, "sh", *words()), env=(("PATH", GUEST_PATH),))
            finished = self._body.channel().run(command, deadline=Deadline(_SECONDS * self._body.factor))
        if finished.timed_out or finished.returncode:
            raise MachineError(f"the machine {self.name!r} cannot be on the LAN {self._lan.name!r}: {_reason(finished)}", machine=self.name)


def _reason(finished: Finished) -> str:
    said = " ".join(finished.stderr.decode(errors="replace").split())[-500:]
    if finished.returncode == _NO_IP:
        return "its guest has no program `ip`: add it, for example with packages=['iproute2']"
    if finished.timed_out:
        return "its guest did not find the new network card in time; its kernel must know PCI hot-plug and virtio_net"
    what = "the guest could not give its card an address" if finished.returncode == _NO_ADDRESS else "the guest could not be set up"
    return f"{what}: {said or f'status {finished.returncode}'}"


@attrs.frozen(kw_only=True)
class LanGuest:
    """A machine that may be on LANs, with access to its present instance and channel, which a restart replaces.

    Attributes:
        instance: Function that returns the backend's instance.
        channel: Function that returns the channel for commands.
        factor: The factor of all time-outs.
        places: Its places on LANs, in the order of joining.
        lock: Held while something is set up in the guest.
    """

    instance: Callable[[], Instance]
    channel: Callable[[], Channel]
    factor: float
    places: list[LanMember] = attrs.field(factory=list)
    lock: threading.Lock = attrs.field(factory=threading.Lock)

    @property
    def hosts(self) -> str:
        """The machines on all of its LANs in the form of /etc/hosts, those of its first LAN first."""
        return "\n".join(place.hosts for place in self.places)

    @property
    def macs(self) -> tuple[str, ...]:
        """The MAC addresses of its cards on LANs."""
        return tuple(place.mac for place in self.places)

    @contextmanager
    def at(self, place: LanMember) -> Iterator[None]:
        """Have the machine at a place for a block, after which it is disconnected there.

        Raises:
            SpecError: It is on another LAN with the same addresses.
        """
        for other in self.places:
            if place.network == other.network:
                both = f"the private LANs {other.lan!r} and {place.lan!r} have the same addresses, {place.network}"
                raise SpecError(f"{both}, and a machine cannot be on both of them: give one of them another name")
        self.places.append(place)
        try:
            yield
        finally:
            self.places.remove(place)
            place.leave()


class Lan:
    """One private LAN: a switch and its members."""

    def __init__(self, name: str, network: ipaddress.IPv4Network) -> None:
        """Start the switch; `close` ends it."""
        self.name = name
        self.switch = Switch(name)
        self._prefix = network.prefixlen
        # A generator: each address is given once, so that no late frame for a machine that left reaches another one.
        self._free = network.hosts()
        self._places: list[LanMember] = []

    @property
    def hosts(self) -> str:
        """Return its members in the form of /etc/hosts."""
        return "\n".join(f"{place.address} {place.name}" for place in self._places)

    @contextmanager
    def joined(self, name: str, body: LanGuest) -> Iterator[LanMember]:
        """Join a machine to the LAN for a block.

        Raises:
            SpecError: A machine of this name is on the LAN already, or the machine is on one with the same addresses.
            MachineError: The machine cannot be on a LAN.
        """
        place = self._reserve(name, body)
        # Those who were there before. The new machine gets all names when it settles.
        others = tuple(self._places)
        # Added before it is settled, so that the guest's hosts file has its own name too.
        self._places.append(place)
        try:
            with body.at(place):
                place.settle()
                for other in others:
                    _tell(other)
                yield place
        finally:
            self._places.remove(place)

    def _reserve(self, name: str, body: LanGuest) -> LanMember:
        # Host names have no case (RFC 4343).
        if name.lower() in {place.name.lower() for place in self._places}:
            raise SpecError(f"the LAN {self.name!r} has a machine named {name!r} already: give this one another name=")
        address = next(self._free, None)
        if address is None:
            raise SpecError(f"the LAN {self.name!r} has no free address left")
        return LanMember(self, name, ipaddress.IPv4Interface(f"{address}/{self._prefix}"), body=body)

    def cut(self, name: str, others: Iterable[str], directions: Iterable[Direction]) -> frozenset[tuple[str, str]]:
        """Have no frame pass between a machine and others (see `LanMember.cut_off`)."""
        known, names, ways = {place.name for place in self._places}, tuple(others), tuple(directions)
        strange = sorted(set(names) - known)
        if strange or name in names:
            there = ", ".join(sorted(known - {name}))
            raise ValueError(f"{', '.join(strange) or name} is no other machine on the LAN {self.name!r}, which has {there}")
        wanted = {(name, other) if way == "out" else (other, name) for other in names for way in ways}
        # Only those: what another fault has cut stays cut when this one ends.
        new = frozenset(wanted) - self.switch.cuts
        self.switch.cuts |= new
        return new

    def close(self) -> None:
        """Stop the switch."""
        self.switch.close()


def _tell(place: LanMember) -> None:
    try:
        place.tell()
    except MachineError as error:  # switched off or paused, perhaps: that is its test's affair, and does not concern who joins
        log.warning("the machine %r could not update the host names of its LAN: %s", place.name, error)


class LanTable(Protocol):
    """Private LANs by name."""

    def __getitem__(self, name: str, /) -> Lan:
        """Return the LAN of a name, made if need be."""


class Lans:
    """The private LANs of one test, by name.

    Each is created when its first machine joins; all end with the test.
    """

    def __init__(self) -> None:
        """Create the table, without a LAN."""
        self._lans: dict[str, Lan] = {}
        # Lazy, and each network is used once in a test: no two LANs share addresses, so a machine that reaches another LAN by mistake finds
        # nobody.
        self._networks = _NETWORK.subnets(new_prefix=24)

    def __getitem__(self, name: str) -> Lan:
        """Return the LAN of this name, created on first use."""
        if name not in self._lans:
            network = next(self._networks, None)
            if not isinstance(network, ipaddress.IPv4Network):
                raise SpecError("a test has at most 256 LANs")
            self._lans[name] = Lan(name, network)
        return self._lans[name]

    def close(self) -> None:
        """Close all LANs; may be called again."""
        # Taken out before it is closed, so that a second call has nothing to do.
        while self._lans:
            self._lans.popitem()[1].close()
