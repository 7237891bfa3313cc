"""Give a guest its way to the network, if it has none; the after-restore process runs it."""

import fcntl
import socket
import struct

GATEWAY = b"\x0a\x00\x02\x02"  # of QEMU's user network
SIOCADDRT, UP_BY_GATEWAY = 0x890B, 3
# The one above that of systemd-networkd's routes, so that the guest prefers what DHCP says later.
METRIC = 1025


def address(of: bytes) -> bytes:
    """Return a struct sockaddr_in."""
    return struct.pack("=HH4s8x", socket.AF_INET, 0, of)


def lead_out() -> str:
    """Add a route to everywhere; return what became of it."""
    with open("/proc/net/route") as file:
        if any(line.split()[1] == "00000000" for line in file):
            return "there"
    anywhere = address(bytes(4))
    # struct rtentry, whose metric is one more than that of the route.
    route = struct.pack("@L16s16s16sHhLPhPLLH", 0, anywhere, address(GATEWAY), anywhere, UP_BY_GATEWAY, 0, 0, 0, METRIC + 1, 0, 0, 0, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCADDRT, route)
    return "added"
