"""Folders of the host in a running machine, by virtiofs: each has a device, and a process that serves it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import attrs

from pytest_vmbottle.backends.qemu.hot_ports import HotPorts
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.shown import printable

__all__ = ["LACKED", "Shares", "find_server"]

_GRACE = 10.0
# Where Debian, Fedora and Arch keep it, which is in no search path. QEMU before 8.0 brought one of its own.
_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
_OF_QEMU = "/usr/lib/qemu/virtiofsd"
_SOCKET, _LOG = "share", "virtiofsd.log"
_SAID = 300


LACKED = "shares= needs the program virtiofsd, and that is not here"
"""Reason why folders cannot be shared on this host."""


def find_server() -> str | None:
    """Return the program that serves a folder, or None if there is none."""
    return shutil.which("virtiofsd") or next((place for place in _PLACES if os.access(place, os.X_OK)), None)


@attrs.frozen(kw_only=True)
class _Share:
    """A folder that is plugged in: its names in QEMU, and its server."""

    device: str
    chardev: str
    server: subprocess.Popen[bytes]


class Shares:
    """The shared folders of a machine, by their tags; each is in a port of its own."""

    def __init__(self, qmp: Qmp, ports: HotPorts, rundir: Path) -> None:
        """Take the monitor of a machine that has none, its ports, and its folder."""
        self._qmp, self._ports, self._rundir = qmp, ports, rundir
        self._shares: dict[str, _Share] = {}

    def plug(self, folder: Path, *, tag: str) -> None:
        """Plug in a folder.

        Raises:
            BackendUnavailable: There is no program that serves it.
            QmpFailed: QEMU refused it, or all ports are taken.
        """
        server, wire = _serve(folder, self._rundir)
        port = self._ports.take(tag)
        share = self._shares[tag] = _Share(device=f"share-{port}", chardev=f"line-{port}", server=server)
        deadline = Deadline(_GRACE)
        try:
            # By a descriptor, so that QEMU needs no rights in the machine's folder.
            with closing(wire):
                self._qmp.lend(wire.fileno(), share.chardev, deadline=deadline)
            address = {"type": "fd", "data": {"str": share.chardev}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            self._qmp.execute("chardev-add", id=share.chardev, backend=backend, deadline=deadline)
            device = {"driver": "vhost-user-fs-pci", "id": share.device, "bus": port, "chardev": share.chardev, "tag": tag}
            self._qmp.execute("device_add", **device, deadline=deadline)
        except QmpFailed as error:
            with suppress(QmpFailed):  # it was not made
                self._qmp.execute("chardev-remove", id=share.chardev, deadline=deadline)
            self._forget(tag)
            said = (self._rundir / _LOG).read_text(errors="replace").strip()[-_SAID:]
            raise type(error)(f"{error}; virtiofsd said: {printable(said) or 'nothing'}") from error

    def unplugged(self, tag: str) -> bool:
        """Ask the guest to release a folder; return whether it is gone."""
        deadline, device = Deadline(_GRACE), self._shares[tag].device
        with suppress(QmpFailed):  # it was asked before, or the device is gone
            self._qmp.execute("device_del", id=device, deadline=deadline)
        there = {each["name"] for each in self._qmp.execute("qom-list", path="/machine/peripheral", deadline=deadline)}
        if device in there:
            return False
        try:
            self._qmp.execute("chardev-remove", id=self._shares[tag].chardev, deadline=deadline)
        except QmpFailed:  # the device is freed a moment later
            return False
        self._forget(tag)
        return True

    def close(self) -> None:
        """End the servers, after QEMU has ended; may be called again."""
        while self._shares:
            _end(self._shares.popitem()[1].server)

    def _forget(self, tag: str) -> None:
        self._ports.free(tag)
        _end(self._shares.pop(tag).server)


def _serve(folder: Path, rundir: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the server of a folder; return it, and a connection to it.

    It ends with the connection, and so with QEMU, whatever ends that.
    """
    program = find_server()
    if program is None:
        raise BackendUnavailable(LACKED, "Install it: apt-get install virtiofsd")
    with socket.socket(socket.AF_UNIX) as listening, (rundir / _LOG).open("ab") as log:
        # By a descriptor of the folder, since the path of a socket has at most 107 bytes.
        place = os.open(rundir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        name = f"/proc/self/fd/{place}/{_SOCKET}"
        wire = socket.socket(socket.AF_UNIX)
        try:
            listening.bind(name)
            listening.listen(1)
            wire.connect(name)
        finally:
            (rundir / _SOCKET).unlink(missing_ok=True)
            os.close(place)
        # Nothing is kept in the guest that may have changed here.
        argv = [*_as_root(program), program, f"--fd={listening.fileno()}", "-o", f"source={folder},cache=none"]
        server = subprocess.Popen(  # noqa: S603 - argv list, no shell
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listening.fileno()],
            start_new_session=True,
            cwd="/",
        )
    return server, wire


def _as_root(program: str) -> Sequence[str]:
    # That of QEMU runs only as root. Where we are not root it is in a user namespace, in which we are; it can do no more than we can.
    unshare = shutil.which("unshare")
    alone = os.geteuid() != 0 and program == _OF_QEMU and unshare is not None
    return (unshare, "--user", "--map-root-user", "--") if alone and unshare else ()


def _end(server: subprocess.Popen[bytes]) -> None:
    # With the process that it has in a namespace of its own: both are in the session that was made for it.
    if server.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    server.wait()
