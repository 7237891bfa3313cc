"""Disks of a machine beside its root disk: their ports, their files, and the log of what is written to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

from pytest_vmbottle.backends.port import DataDisk, NotPlugged, Start
from pytest_vmbottle.backends.qemu.command_line import DISK_PORTS, ROOT_DISK, DataSlot, overlay_node
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.disks.overlay import write_overlay
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host.account import Account
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import copy_sparse, descriptor

__all__ = ["DataDisks", "lay_overlay", "slots"]

_GRACE = 10.0
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL


def lay_overlay(path: Path, *, size: int, kept: bool, own: Path | None) -> None:
    """Make the overlay of a disk: an empty one, or a second name of the one that is kept.

    Args:
        path: The file.
        size: Bytes of the disk.
        kept: Whether it is there already, unless `own` is given.
        own: A file that becomes the overlay.
    """
    if own is not None:
        # A second name and no copy: what the guest writes is in the kept disk at once, however this process ends.
        with suppress(FileExistsError):  # the machine was off for a while, and starts again in this folder
            os.link(own, path)
    elif not (kept and path.exists()):
        # Anew and not over the old file, which has a second name if the machine is kept: nobody waits for it any more there.
        path.unlink(missing_ok=True)
        write_overlay(path, size=size)


def slots(source: Start, ports: Mapping[str, str], rundir: Path) -> tuple[DataSlot, ...]:
    """Return the disks of a machine, each with its port: the one of its saved state, or a free one.

    Raises:
        NotPlugged: There are more disks than ports.
    """
    free = [port for port in DISK_PORTS if port not in ports.values()]
    if len(source.data) > len(free) + len(ports):
        raise NotPlugged(f"a machine has room for {len(DISK_PORTS)} disks beside its root disk, and not for {len(source.data)}")
    return tuple(DataSlot(disk=disk, port=ports.get(disk.name) or free.pop(0), file=rundir / disk.file) for disk in source.data)


class DataDisks:
    """The disks of a running machine."""

    def __init__(self, qmp: Qmp, plugged: tuple[DataSlot, ...], *, root: Path, account: Account | None, alive: Callable[[], None]) -> None:
        """Take over the disks that the machine was started with.

        Args:
            qmp: The machine's monitor.
            plugged: The disks.
            root: The file of the root disk's overlay.
            account: The account that QEMU runs as; None if it can open our files.
            alive: Function called while waiting; raises `MachineDied` when the machine is gone.
        """
        self._qmp, self._plugged, self._account, self._alive, self._root = (
            qmp,
            {slot.disk.name: slot for slot in plugged},
            account,
            alive,
            root,
        )
        self._files: dict[str, list[int]] = {}

    @property
    def slots(self) -> tuple[DataSlot, ...]:
        """The disks, each with its port."""
        return tuple(self._plugged.values())

    def _slot(self, name: str) -> DataSlot:
        try:
            return self._plugged[name]
        except KeyError:
            known = ", ".join(self._plugged) or "none"
            raise NotPlugged(f"there is no disk {name!r} in this machine; beside the root disk it has {known}") from None

    # -- in and out ------------------------------------------------------------------------------------------------------------------

    def plug(self, disk: DataDisk) -> None:
        """Plug in a disk (see `Instance.plug_disk`)."""
        if disk.name in self._plugged:
            raise NotPlugged(f"the machine has a disk {disk.name!r} already")
        taken = {slot.port for slot in self._plugged.values()}
        free = [port for port in DISK_PORTS if port not in taken]
        if not free:
            raise NotPlugged(
                f"a machine has room for {len(DISK_PORTS)} disks beside its root disk: unplug one of {', '.join(self._plugged)}"
            )
        slot = DataSlot(disk=disk, port=free[0], file=self._root.with_name(disk.file))
        lay_overlay(slot.file, size=disk.size, kept=False, own=disk.overlay)
        try:
            self.attach(slot)
        except BaseException:
            slot.file.unlink(missing_ok=True)
            raise

    def attach(self, slot: DataSlot) -> None:
        """Plug in a disk whose overlay is there."""
        opened: list[int] = []
        try:
            below = tuple(attrs.evolve(disk, path=self._lent(disk.path, opened)) for disk in slot.disk.disks)
            node = overlay_node(slot.node, self._lent(slot.file, opened, writable=True), below)
            self._qmp.execute("blockdev-add", **node, deadline=Deadline(_GRACE))
            try:
                self._qmp.execute("device_add", **slot.device_options(), deadline=Deadline(_GRACE))
            except QmpFailed:
                with suppress(QmpFailed):
                    self._qmp.execute("blockdev-del", node_name=slot.node, deadline=Deadline(_GRACE))
                raise
        except QmpFailed as error:
            self._forget(opened)
            self._alive()
            raise NotPlugged(f"QEMU could not plug in the disk {slot.disk.name!r}: {error}") from error
        self._plugged[slot.disk.name], self._files[slot.disk.name] = slot, opened

    def _lent(self, path: Path, opened: list[int], *, writable: bool = False) -> Path:
        """Return the path by which QEMU opens a file."""
        if self._account is None:
            return path
        with descriptor(path, os.O_RDWR if writable else os.O_RDONLY) as fd:
            opened.append(self._qmp.add_fd(fd, deadline=Deadline(_GRACE)))
        return Path(f"/dev/fdset/{opened[-1]}")

    def _forget(self, opened: list[int]) -> None:
        while opened:
            with suppress(QmpFailed):
                self._qmp.execute("remove-fd", fdset_id=opened.pop(), deadline=Deadline(_GRACE))

    def unplug(self, name: str, deadline: Deadline) -> None:
        """Remove a disk and its file (see `Instance.unplug_disk`)."""
        slot = self._slot(name)
        with suppress(QmpFailed):  # it was asked before
            self._qmp.execute("device_del", id=slot.device, deadline=Deadline(_GRACE))
        if not deadline.poll(lambda: self._released(slot), every=0.2, first=0.01):
            raise NotPlugged(f"the guest has not released the disk {name!r} within {deadline.seconds:g} s")
        del self._plugged[name]
        self._forget(self._files.pop(name, []))
        slot.file.unlink(missing_ok=True)

    def _released(self, slot: DataSlot) -> bool:
        self._alive()
        try:
            self._qmp.execute("blockdev-del", node_name=slot.node, deadline=Deadline(_GRACE))
        except QmpFailed as error:
            # Every other refusal counts as one of a device that still uses the node.
            return "Failed to find node" in str(error)
        return True

    # -- the log of writes -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def recorded(self, name: str, folder: Path) -> Iterator[Path]:
        """Record what the guest writes to a disk, for the length of a block (see `Instance.record_writes`)."""
        device, node, file = (ROOT_DISK, "disk0", self._root) if name == ROOT_DISK else self._place(name)
        log, opened = folder / "writes.log", list[int]()
        with descriptor(log, _NEW):
            pass
        filtered = f"log-{device}"
        options = {
            "driver": "blklogwrites",
            "node-name": filtered,
            "file": node,
            "log": {"driver": "file", "filename": str(self._lent(log, opened, writable=True)), "cache": {"no-flush": True}},
            "log-sector-size": 512,
        }
        try:
            with self._stopped():
                self._qmp.execute("blockdev-add", **options, deadline=Deadline(_GRACE))
                # A stopped machine has written its caches to the file (QEMU's `vm_stop`).
                with descriptor(file, os.O_RDONLY) as disk, descriptor(folder / file.name, _NEW) as copy:
                    copy_sparse(disk, copy)
                self._put(device, filtered)
            try:
                yield log
            finally:
                with suppress(QmpFailed), self._stopped():
                    self._put(device, node)
                    self._qmp.execute("blockdev-del", node_name=filtered, deadline=Deadline(_GRACE))
        except QmpFailed as error:
            self._alive()
            raise MachineError(f"QEMU could not record what is written to the disk {name!r}: {error}") from error
        finally:
            self._forget(opened)

    def _place(self, name: str) -> tuple[str, str, Path]:
        slot = self._slot(name)
        return slot.device, slot.node, slot.file

    def _put(self, device: str, node: str) -> None:
        """Have a device use another block node."""
        self._qmp.execute("qom-set", path=f"/machine/peripheral/{device}", property="drive", value=node, deadline=Deadline(_GRACE))

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        """Stop the processors for the length of a block, so that no request is under way."""
        running = self._qmp.execute("query-status", deadline=Deadline(_GRACE))["running"]
        if running:
            self._qmp.execute("stop", deadline=Deadline(_GRACE))
        try:
            yield
        finally:
            if running:
                self._qmp.execute("cont", deadline=Deadline(_GRACE))
