"""Have a guest let go of a disk, and look at the one that came in its place; the after-restore process runs it, with what it knows.

Nothing is started for it: that would take an emulated guest longer than all of this.
"""

import ctypes
import errno
import fcntl
import os
import socket
import time
from contextlib import suppress

BLKRRPART, BLKFLSBUF = 0x125F, 0x1261
UDEV = ("(udev-worker)", "systemd-udevd", "udevd")
"""Processes that look at each disk, and let it go by themselves."""


def device(serial: str) -> str:
    """Return the name of the disk with a serial number."""
    for name in os.listdir("/sys/block"):
        with suppress(OSError), open("/sys/block/%s/serial" % name) as file:
            if file.read().strip() == serial:
                return name
    raise ValueError("there is no such disk")


def is_on(path: str, name: str) -> bool:
    """Tell whether a path is that of a disk, or of a partition of it."""
    found = os.path.basename(os.path.realpath(path)) if path.startswith("/dev/") else ""
    return found == name or os.path.exists("/sys/block/%s/%s" % (name, found)) if found else False


def is_open(name: str) -> bool:
    """Tell whether a process has a disk open."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has ended
            files = ["/proc/%s/fd/%s" % (pid, number) for number in os.listdir("/proc/%s/fd" % pid)]
            if any(is_on(os.readlink(file), name) for file in files):
                with open("/proc/%s/comm" % pid) as comm:
                    if comm.read().strip() not in UDEV:
                        return True
    return False


def release(serial: str) -> str:
    """Unmount what is on a disk; return "free", or "used" if something still uses it."""
    name, libc = device(serial), ctypes.CDLL(None)
    with open("/proc/self/mounts", "rb") as file:
        mounts = [line.split(b" ")[:2] for line in file]
    # The last one first, since it may lie upon another one.
    for source, folder in reversed(mounts):
        if is_on(os.fsdecode(source), name) and libc.umount2(folder.decode("unicode_escape").encode("latin-1"), 0):
            return "used"
    try:
        # Refused if it, or a partition of it, is mounted, swapped to, or below another device, such as LVM's.
        os.close(os.open("/dev/" + name, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return "used"
    return "used" if is_open(name) else "free"


def changed(serial: str, token: str) -> str:
    """Forget what was on a disk, and wait until it has the names of what is on it now; return "seen"."""
    name, until = device(serial), time.monotonic() + 10
    # Before anything happens, so that no message is missed.
    udev = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15) if os.path.exists("/run/udev/control") else None
    if udev:
        udev.bind((0, 2))
        udev.settimeout(10)
    disk = os.open("/dev/" + name, os.O_RDONLY)
    fcntl.ioctl(disk, BLKFLSBUF)
    while True:
        try:
            fcntl.ioctl(disk, BLKRRPART)
            break
        except OSError as error:
            if error.errno == errno.EINVAL:  # it takes no partitions
                break
            # EBUSY while udev looks at a partition.
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
    os.close(disk)
    with open("/sys/block/%s/uevent" % name, "w") as file:
        file.write("change " + token)
    # What udev has done with the event it tells all who listen, with the event's token.
    while udev and token.encode() not in udev.recv(1 << 16):
        continue
    return "seen"
