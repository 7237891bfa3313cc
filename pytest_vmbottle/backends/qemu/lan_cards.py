"""Further network cards of a running machine, on private LANs."""

from __future__ import annotations

import socket
from contextlib import suppress

from pytest_vmbottle.backends.qemu.command_line import HOT_PORTS
from pytest_vmbottle.backends.qemu.hot_ports import HotPorts
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.host.deadline import Deadline

__all__ = ["LanCards"]

_GRACE = 10.0


class LanCards:
    """The cards of a machine on private LANs, by their MAC addresses; each is in a port of its own."""

    def __init__(self, qmp: Qmp, ports: HotPorts) -> None:
        """Take the monitor of a machine that has none, and its ports."""
        self._qmp, self._ports = qmp, ports
        self._macs: list[str] = []

    @property
    def plugged(self) -> dict[str, str]:
        """The ports of the cards, by their MAC addresses."""
        return {mac: self._ports.of(mac) for mac in self._macs}

    def expect(self, mac: str, port: str) -> None:
        """Plug in a card that is in the saved state which is loaded next, on a cable that leads nowhere.

        Raises:
            QmpFailed: QEMU refused it, or there is no such port.
        """
        self._ports.hold(mac, port)
        self._plug(mac, type="hubport", hubid=1 + HOT_PORTS.index(port))

    def card(self, mac: str) -> str:
        """Return QEMU's id of a card."""
        return f"card-{self._ports.of(mac)}"

    def plug(self, wire: socket.socket, *, mac: str) -> None:
        """Plug in a card on a connected unix socket, each datagram of which is a frame.

        Raises:
            QmpFailed: QEMU refused it, or all ports are taken.
        """
        self._ports.take(mac)
        # Of the kinds of `netdev` that take a descriptor this is the one that every QEMU has (net/socket.c).
        self._plug(mac, wire, type="socket", fd=self._netdev(mac))

    def _plug(self, mac: str, wire: socket.socket | None = None, **cable: object) -> None:
        deadline, port, netdev = Deadline(_GRACE), self._ports.of(mac), self._netdev(mac)
        self._macs.append(mac)
        try:
            if wire is not None:
                # A descriptor that QEMU keeps under a name, because `netdev_add` takes no descriptor itself.
                self._qmp.lend(wire.fileno(), netdev, deadline=deadline)
            self._qmp.execute("netdev_add", **cable, id=netdev, deadline=deadline)
            device = {"driver": "virtio-net-pci", "id": self.card(mac), "bus": port, "netdev": netdev, "mac": mac, "romfile": ""}
            self._qmp.execute("device_add", **device, deadline=deadline)
        except QmpFailed:
            self._forget(mac, deadline)
            raise

    def unplugged(self, mac: str) -> bool:
        """Ask the guest to release a card; return whether it is gone."""
        deadline, card = Deadline(_GRACE), self.card(mac)
        with suppress(QmpFailed):  # it was asked before, or the card is gone
            self._qmp.execute("device_del", id=card, deadline=deadline)
        # Looked up instead of waiting for DEVICE_DELETED: `Qmp` keeps no such event.
        there = {each["name"] for each in self._qmp.execute("qom-list", path="/machine/peripheral", deadline=deadline)}
        if card in there:
            return False
        self._forget(mac, deadline)
        return True

    def _netdev(self, mac: str) -> str:
        return f"net-{self._ports.of(mac)}"

    def _forget(self, mac: str, deadline: Deadline) -> None:
        with suppress(QmpFailed):  # it was not made
            self._qmp.execute("netdev_del", id=self._netdev(mac), deadline=deadline)
        self._macs.remove(mac)
        self._ports.free(mac)
