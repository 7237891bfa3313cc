"""Second network card of a running machine, on a private LAN."""

from __future__ import annotations

import socket
from contextlib import suppress

from pytest_vmbottle.backends.qemu.command_line import LAN_PORT
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.host.deadline import Deadline

__all__ = ["LAN_CARD", "plug_card", "unplugged"]

LAN_CARD = "lan"
_NETDEV = "lan0"
_GRACE = 10.0


def plug_card(qmp: Qmp, wire: socket.socket, *, mac: str) -> None:
    """Plug in a card on a connected unix socket, each datagram of which is a frame.

    Raises:
        QmpFailed: QEMU refused it.
    """
    deadline = Deadline(_GRACE)
    # A descriptor that QEMU keeps under a name, because `netdev_add` takes no descriptor itself.
    qmp.lend(wire.fileno(), _NETDEV, deadline=deadline)
    # Of the kinds of `netdev` that take a descriptor this is the one that every QEMU has (net/socket.c).
    qmp.execute("netdev_add", type="socket", id=_NETDEV, fd=_NETDEV, deadline=deadline)
    try:
        device = {"driver": "virtio-net-pci", "id": LAN_CARD, "bus": LAN_PORT, "netdev": _NETDEV, "mac": mac, "romfile": ""}
        qmp.execute("device_add", **device, deadline=deadline)
    except QmpFailed:
        with suppress(QmpFailed):
            qmp.execute("netdev_del", id=_NETDEV, deadline=deadline)
        raise


def unplugged(qmp: Qmp) -> bool:
    """Ask the guest to release the card; return whether it is gone."""
    deadline = Deadline(_GRACE)
    with suppress(QmpFailed):  # it was asked before, or the card is gone
        qmp.execute("device_del", id=LAN_CARD, deadline=deadline)
    # Looked up instead of waiting for DEVICE_DELETED: `Qmp` keeps no such event.
    there = {each["name"] for each in qmp.execute("qom-list", path="/machine/peripheral", deadline=deadline)}
    if LAN_CARD in there:
        return False
    with suppress(QmpFailed):
        qmp.execute("netdev_del", id=_NETDEV, deadline=deadline)
    return True
