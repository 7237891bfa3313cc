"""Private LANs whose machines are in processes of their own, without a process for the LAN itself.

Each member's process has a switch with two ports: its machine, and a way to the other members. Those are sockets in a folder, to which only
this user can send. Whoever joins or leaves tells the others, which look into the folder then.

::

    lans/NAME/7       locked by the process of the member 7 as long as that lives; its text is the machine's name there
    lans/NAME/7.sock  takes frames for it; an empty datagram says that somebody came or went
"""

from __future__ import annotations

import ipaddress
import logging
import os
import selectors
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Self

import attrs

from pytest_vmbottle.errors import MachineError, SpecError
from pytest_vmbottle.host.digests import digest
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.host.locks import is_locked, locked, try_lock
from pytest_vmbottle.machine.lan import Lan, LanGuest, LanMember
from pytest_vmbottle.machine.switch import MAX_FRAME, is_group, target_of

__all__ = ["Seat", "SharedLan", "SharedLans"]

log = logging.getLogger(__name__)

_MEMBERS = range(1, 255)
_PATIENCE = 0.05
"""Seconds in which a socket takes a frame."""


@attrs.frozen(kw_only=True)
class Seat:
    """The place of a machine on a LAN whose members are known beforehand.

    Attributes:
        name: Its name there, which need not be the machine's.
        members: The addresses of all members, itself included, by their names; all in one /24.
    """

    name: str
    members: Mapping[str, str]

    @property
    def network(self) -> ipaddress.IPv4Network:
        """The network of its address."""
        return ipaddress.IPv4Interface(f"{self.members[self.name]}/24").network

    @property
    def names(self) -> dict[int, str]:
        """The names of all members, by their numbers, which are the last bytes of their addresses."""
        return {ipaddress.IPv4Address(address).packed[-1]: name for name, address in self.members.items()}


class SharedLans:
    """The private LANs of all machines of a catalog, by name."""

    def __init__(self, root: Path, seats: Mapping[str, Seat] = MappingProxyType({})) -> None:
        """Take the folder for them, which need not exist, and the places of a machine on those on which it has a certain one."""
        self._root, self._seats = root, seats

    def __getitem__(self, name: str) -> SharedLan:
        """Return the LAN of this name, for one machine, with which it ends."""
        if name in self._seats:
            return SharedLan(name, self._seats[name].network, private_dir(self._root / name), self._seats[name])
        # One of 256 networks, beside those of the LANs of tests. Two LANs may have the same one; no machine is on both (`LanGuest.at`).
        network = ipaddress.IPv4Network(f"10.78.{int(digest(name)[:2], 16)}.0/24")
        return SharedLan(name, network, private_dir(self._root / name))


class SharedLan(Lan):
    """One private LAN, as the process of one of its machines sees it."""

    def __init__(self, name: str, network: ipaddress.IPv4Network, folder: Path, seat: Seat | None = None) -> None:
        """Start a switch of its own.

        Args:
            name: Its name.
            network: Its addresses, a /24.
            folder: The folder of its members.
            seat: The place of the machine, if it has a certain one.
        """
        super().__init__(name, network)
        self._network, self._folder, self._seat = network, folder, seat

    @property
    def hosts(self) -> str:
        """Return its members in the form of /etc/hosts."""
        # All that are known beforehand, so that no command runs in a guest which has not got the names of those that come a moment later.
        known = self._seat.names if self._seat is not None else {}
        return "\n".join(f"{self._network[number]} {name}" for number, name in sorted({**known, **_members(self._folder)}.items()))

    @contextmanager
    def joined(self, name: str, body: LanGuest) -> Iterator[LanMember]:
        """Join a machine to the LAN for a block (see `Lan.joined`), and tell the others when it comes and goes."""
        with ExitStack() as stack:
            stack.callback(self.close)
            name = self._seat.name if self._seat is not None else name
            number = stack.enter_context(_membership(self._folder, name, self.name, self._seat))
            place = LanMember(self, name, ipaddress.IPv4Interface(f"{self._network[number]}/{self._network.prefixlen}"), body=body)
            mailbox = stack.enter_context(_Mailbox(self._folder, number))
            uplink = stack.enter_context(_Uplink(self, mailbox, number))
            stack.enter_context(body.at(place))
            place.settle()
            stack.enter_context(_names_followed(place, uplink.changed))
            mailbox.send_all(b"")
            yield place


def _members(folder: Path) -> dict[int, str]:
    """Return the names of the members whose processes live."""
    found = {}
    for path in folder.glob("[0-9]*"):
        if path.name.isdecimal() and is_locked(path):
            with suppress(OSError):
                found[int(path.name)] = path.read_text()
    return {number: name for number, name in found.items() if name}


@contextmanager
def _membership(folder: Path, name: str, lan: str, seat: Seat | None) -> Iterator[int]:
    """Be a member of a LAN for a block, which gets its number.

    Raises:
        SpecError: A machine of this name is a member already, or there are too many.
    """
    with locked(folder):  # so that no two take one name
        # Host names have no case (RFC 4343).
        if name.lower() in {other.lower() for other in _members(folder).values()}:
            raise SpecError(f"the LAN {lan!r} has a machine named {name!r} already: give this one another name")
        wanted = [number for number, each in seat.names.items() if each == name] if seat is not None else _MEMBERS
        number, fd = _free_place(folder, lan, wanted)
        (folder / str(number)).write_text(name)
    try:
        yield number
    finally:
        (folder / str(number)).unlink(missing_ok=True)
        os.close(fd)
        with _Mailbox(folder) as others:
            others.send_all(b"")


def _free_place(folder: Path, lan: str, wanted: Iterable[int]) -> tuple[int, int]:
    """Return the number of the first place that nobody has, and the descriptor that holds it."""
    for number in wanted:
        fd = try_lock(folder / str(number), create=True)
        if fd is not None:
            return number, fd
    raise SpecError(f"the LAN {lan!r} has no free address left")


class _Mailbox:
    """A socket that sends to the members of a LAN."""

    def __init__(self, folder: Path, number: int = 0) -> None:
        """Open it.

        Args:
            folder: The folder of the LAN.
            number: The member that receives by it; by default it only sends.
        """
        self._folder, self._number = folder, number
        # By a descriptor, since the path of a socket has at most 107 bytes, and that of a catalog may be longer.
        self._place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        # A member that does not read must not hold up the others for long: its frames are lost, as on any network.
        self.socket.settimeout(_PATIENCE)
        if number:
            self._file.unlink(missing_ok=True)  # of a process that was killed
            self.socket.bind(self._path(number))

    @property
    def _file(self) -> Path:
        return self._folder / f"{self._number}.sock"

    def _path(self, number: int) -> str:
        return f"/proc/self/fd/{self._place}/{number}.sock"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        if self._number:
            self._file.unlink(missing_ok=True)
        os.close(self._place)

    def send(self, number: int, frame: bytes) -> None:
        """Send a frame to a member, or an empty one: the others have changed."""
        with suppress(OSError):  # it is gone, or has more to read than it can hold
            self.socket.sendto(frame, self._path(number))

    def send_all(self, frame: bytes) -> None:
        """Send a frame to all other members."""
        for path in self._folder.glob("[0-9]*.sock"):
            if path.stem.isdecimal() and int(path.stem) != self._number:
                self.send(int(path.stem), frame)


class _Uplink:
    """The way from a switch to those of the other members, for the length of a block, with a thread of its own.

    Attributes:
        changed: Set when somebody came or went.
    """

    def __init__(self, lan: Lan, mailbox: _Mailbox, number: int) -> None:
        """Take the LAN, the mailbox of our member, and its number."""
        self._lan, self._mailbox, self._number = lan, mailbox, number
        self.changed, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"vmbottle-uplink-{lan.name}", daemon=True)

    def __enter__(self) -> Self:
        self._port, self._wire = self._lan.switch.connect("the other machines")
        self._wire.settimeout(_PATIENCE)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._mailbox.send(self._number, b"")  # which wakes the thread
        self._thread.join()
        self._lan.switch.disconnect(self._port)
        self._wire.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._mailbox.socket, selectors.EVENT_READ, self._take)
            selector.register(self._wire, selectors.EVENT_READ, self._pass_on)
            while not self._over.is_set():
                for key, _ in selector.select():
                    with suppress(OSError):  # nothing is there after all, or the switch has ended
                        key.data()

    def _take(self) -> None:
        """Take a frame from another member, for ours."""
        frame = self._mailbox.socket.recv(MAX_FRAME)
        if frame:
            self._wire.send(frame)
        else:
            self.changed.set()

    def _pass_on(self) -> None:
        """Give a frame of ours to the member that it is for, or to all."""
        frame = self._wire.recv(MAX_FRAME)
        target = target_of(frame)
        if is_group(target):
            self._mailbox.send_all(frame)
        else:  # the last byte of a member's address is its number (see `LanMember.mac`)
            self._mailbox.send(target[-1], frame)


@contextmanager
def _names_followed(place: LanMember, changed: threading.Event) -> Iterator[None]:
    """Have the guest know the names of those who come and go, for a block."""
    over = threading.Event()

    def follow() -> None:
        while changed.wait() and not over.is_set():
            changed.clear()
            try:
                place.tell()
            except MachineError as error:  # switched off or paused: it gets the names when it is on again
                log.warning("the machine %r could not update the host names of its LAN: %s", place.name, error)

    thread = threading.Thread(target=follow, name=f"vmbottle-names-{place.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        changed.set()
        thread.join()
