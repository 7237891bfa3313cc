"""Sockets of a guest: questions about them, and the answers."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from pytest_vmbottle.host.package_data import read_script

__all__ = ["CONNECT", "NO_CLIENT", "TABLES", "UNIX", "TcpSocket", "listeners", "tcp_sockets"]

TABLES = "cat /proc/net/tcp /proc/net/tcp6 2>/dev/null || true"
"""Prints the tables of TCP sockets."""
UNIX = read_script(__package__, "unix_sockets.sh")
"""Prints the unix sockets that take connections or datagrams; fails unless the one that it is given is among them."""
CONNECT = read_script(__package__, "connect.sh")
"""Connects to a TCP port, given by address and number."""
NO_CLIENT = 127
"""Status of `CONNECT` in a guest that has no program for it."""
_LISTEN, _CONNECTED = "0A", ("01", "08")  # TCP_LISTEN, TCP_ESTABLISHED and TCP_CLOSE_WAIT in /proc/net/tcp


@attrs.frozen
class TcpSocket:
    """A socket in /proc/net/tcp."""

    local: str
    remote: str
    state: str

    @property
    def port(self) -> int:
        """Its port in the guest."""
        # Numbers in these tables are hexadecimal (proc_net_tcp.txt of Linux).
        return int(self.local.rpartition(":")[2], 16)

    @property
    def is_local(self) -> bool:
        """Tell whether both ends are in the guest."""
        # Both ends have the same address then: the loopback's, or the machine's own.
        return self.local.rpartition(":")[0] == self.remote.rpartition(":")[0]

    @property
    def is_listening(self) -> bool:
        """Tell whether it takes connections."""
        return self.state == _LISTEN

    @property
    def is_connected(self) -> bool:
        """Tell whether it is one end of a connection."""
        return self.state in _CONNECTED


def tcp_sockets(tables: str) -> list[TcpSocket]:
    """Return the sockets in the output of `TABLES`."""
    # Both tables, because a socket of IPv6 usually takes IPv4 as well.
    rows = (line.split() for line in tables.splitlines())
    return [TcpSocket(row[1], row[2], row[3]) for row in rows if len(row) > 3 and row[0] != "sl"]  # noqa: PLR2004 - columns


def listeners(ports: Iterable[int]) -> str:
    """Return ports that have a listener in words, for a message."""
    return "ports with a listener: " + (", ".join(map(str, sorted(ports))) or "none")
