"""Further network cards of a running machine, on private LANs."""

from __future__ import annotations

import socket
from contextlib import suppress

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

    def card(self, mac: str) -> str:
        """Return QEMU's id of a card."""
        return f"card-{self._ports.of(mac)}"

    def plug(self, wire: socket.socket, *, mac: str) -> None:
        """Plug in a card on a connected unix socket, each datagram of which is a frame.

        Raises:
            QmpFailed: QEMU refused it, or all ports are taken.
        """
        deadline, port, netdev = Deadline(_GRACE), self._ports.take(mac), self._netdev(mac)
        try:
            # A descriptor that QEMU keeps under a name, because `netdev_add` takes no descriptor itself.
            self._qmp.lend(wire.fileno(), netdev, deadline=deadline)
            # Of the kinds of `netdev` that take a descriptor this is the one that every QEMU has (net/socket.c).
            self._qmp.execute("netdev_add", type="socket", id=netdev, fd=netdev, deadline=deadline)
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
        self._ports.free(mac)
