"""Hot-plug port of a running machine for one disk at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pytest_vmbottle.backends.port import NotPlugged
from pytest_vmbottle.backends.qemu.command_line import SCRATCH_PORT
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host.deadline import Deadline

__all__ = ["DiskPort"]

_DEVICE, _NODE = "scratch", "scratch0"
_GRACE = 10.0
"""Seconds for a guest to release a disk; an emulated guest takes 0.1 s."""


class DiskPort:
    """Port for one disk at a time; safe to use from several threads, which wait for each other."""

    def __init__(self, qmp: Qmp, *, alive: Callable[[], None]) -> None:
        """Take the machine's monitor.

        Args:
            qmp: The monitor.
            alive: Function called while waiting; raises `MachineDied` when the machine is gone.
        """
        self._qmp, self._alive = qmp, alive
        self._lock = threading.Lock()
        self._files: int | None = None

    @contextmanager
    def reserved(self, deadline: Deadline) -> Iterator[None]:
        """Reserve the port, empty, for the length of a block.

        Waits until nobody else uses it.

        Raises:
            NotPlugged: The guest has not released the last disk.
        """
        if not self._lock.acquire(timeout=deadline.remaining):
            raise NotPlugged("timed out waiting for the machine's disk port: another copy uses it")
        try:
            # The guest may have kept the last disk beyond the end of its block.
            if not self.empty():
                raise NotPlugged("the guest has not released the disk that was plugged in before")
            yield
        finally:
            self._lock.release()

    @contextmanager
    def disk(self, file: int, *, serial: str, writable: bool, deadline: Deadline) -> Iterator[Callable[[], int]]:
        """Plug a disk in for the length of a block (see `Instance.disk`)."""
        with self.reserved(deadline):
            try:
                self._plug(file, serial, writable=writable)
                yield self._moved
            finally:
                self.empty()

    def _plug(self, file: int, serial: str, *, writable: bool) -> None:
        try:
            self._files = self._qmp.add_fd(file, deadline=Deadline(_GRACE))
            # No other process is kept from the file, which may be a user's own, and nothing of it needs to survive the host.
            source = {"driver": "file", "filename": f"/dev/fdset/{self._files}", "locking": "off", "read-only": not writable}
            disk = {"driver": "raw", "node-name": _NODE, "read-only": not writable, "cache": {"no-flush": True}, "file": source}
            self._qmp.execute("blockdev-add", **disk, deadline=Deadline(_GRACE))
            # Where the host's disk is full the guest gets an error; by default QEMU would stop the machine.
            device = {"driver": "virtio-blk-pci", "id": _DEVICE, "bus": SCRATCH_PORT, "drive": _NODE, "serial": serial}
            self._qmp.execute("device_add", **device, werror="report", rerror="report", deadline=Deadline(_GRACE))
        except QmpFailed as error:
            self._alive()
            raise NotPlugged(f"QEMU could not plug in a disk: {error}") from error

    def _moved(self) -> int:
        for used in self._qmp.execute("query-blockstats", deadline=Deadline(_GRACE)):
            if used.get("node-name") == _NODE:
                return int(used["stats"]["rd_bytes"]) + int(used["stats"]["wr_bytes"])
        return 0

    def empty(self, seconds: float = _GRACE) -> bool:
        """Remove the disk if there is one; return whether the port is empty."""
        if self._files is None:
            return True
        with suppress(QmpFailed):  # refused while an earlier request is under way, and where there is no such device
            # Only a request: the guest's kernel has to release the device, and QEMU does not wait for that.
            self._qmp.execute("device_del", id=_DEVICE, deadline=Deadline(_GRACE))
        if not Deadline(seconds).poll(self._freed, every=0.2, first=0.01):
            return False
        with suppress(QmpFailed):
            # The fd set outlives the device, and would keep the file open in QEMU.
            self._qmp.execute("remove-fd", fdset_id=self._files, deadline=Deadline(_GRACE))
        self._files = None
        return True

    def _freed(self) -> bool:
        """Tell whether QEMU has freed the disk: some time after the guest released it, or when the machine is gone."""
        try:
            self._alive()
        except MachineError:
            return True
        try:
            self._qmp.execute("blockdev-del", node_name=_NODE, deadline=Deadline(_GRACE))
        except QmpFailed as error:
            # Every other refusal counts as one of a device that still uses the node.
            return "Failed to find node" in str(error)
        return True
