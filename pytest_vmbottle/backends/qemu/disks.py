"""Disks of a machine: their files, their ports, and the filters that lie between a disk and its device."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle.backends.port import ROOT_DISK, DataDisk, Disk, DiskErrors, Loss, NotPlugged, Start
from pytest_vmbottle.backends.qemu.command_line import DISK_PORTS, DiskSlot, log_node
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.disks.crash_states import WriteHistory
from pytest_vmbottle.disks.overlay import write_overlay
from pytest_vmbottle.disks.write_log import read_log
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host.account import Account
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import copy_sparse, descriptor
from pytest_vmbottle.host.sizes import format_size

__all__ = ["OVERLAY", "Disks", "lay_disks", "slots"]

OVERLAY = "disk.qcow2"
"""Name of the root disk's file in a machine's folder."""
_GRACE = 10.0
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL
_EVENTS = {"read": "read_aio", "write": "write_aio", "flush": "flush_to_os"}
"""Events of QEMU's format "raw" before a request."""
_UNTRACKED = "no disk is tracked, so nothing is known of what it has not flushed: write track_writes=True in the mark, or disks={...}"
_LONGEST_LOG = 4 << 30
"""Bytes that the logs of a disk may have; on a host's disk with less room, as much as they leave free."""
_LOG, _FAULT = 0, 1
"""Ranks of filters: a request that a fault refuses never came to the disk."""


def slots(source: Start, ports: Mapping[str, str], rundir: Path, *, track_root: bool) -> tuple[DiskSlot, ...]:
    """Return the disks of a machine, the root disk first, each with its port: the one of its saved state, or a free one.

    Raises:
        NotPlugged: There are more disks than ports.
    """
    free = [port for port in DISK_PORTS if port not in ports.values()]
    if len(source.data) > len(free) + len(ports):
        raise NotPlugged(f"a machine has room for {len(DISK_PORTS)} disks beside its root disk, and not for {len(source.data)}")
    root = DataDisk(name=ROOT_DISK, size=source.disk_size, disks=source.disks, saved=True, overlay=source.overlay)
    first = _slot(root, "", rundir / OVERLAY, tracked=track_root, kept=source.kept)
    others = (_slot(disk, ports.get(disk.name) or free.pop(0), rundir / disk.file, kept=source.kept) for disk in source.data)
    return (first, *others)


def _slot(disk: DataDisk, port: str, file: Path, *, tracked: bool = True, kept: bool = False) -> DiskSlot:
    # A log tells what is lost of an overlay only if it has everything that is in it.
    begins = disk.overlay is None and not (kept and file.exists())
    return DiskSlot(disk=disk, port=port, file=file, log=file.with_suffix(".log") if tracked and begins else None)


def lay_disks(found: tuple[DiskSlot, ...], *, kept: bool) -> None:
    """Make the files of disks: empty overlays, or second names of those that are kept.

    Args:
        found: The disks.
        kept: Whether overlays are there already, unless a disk names its own.
    """
    for slot in found:
        _lay(slot, kept=kept)


def _lay(slot: DiskSlot, *, kept: bool) -> None:
    if slot.log is not None:
        slot.log.unlink(missing_ok=True)
        with descriptor(slot.log, _NEW):
            pass
    if slot.disk.overlay is not None:
        # A second name and no copy: what the guest writes is in the kept disk at once, however this process ends.
        with suppress(FileExistsError):  # the machine was off for a while, and starts again in this folder
            os.link(slot.disk.overlay, slot.file)
    elif not (kept and slot.file.exists()):
        # Anew and not over the old file, which has a second name if the machine is kept: nobody waits for it any more there.
        slot.file.unlink(missing_ok=True)
        write_overlay(slot.file, size=slot.disk.size)


@attrs.frozen(eq=False)
class _Filter:
    """A block node between a disk and its device.

    Attributes:
        name: Its name.
        options: Function that returns its arguments for a node below it.
        rank: Its place: those of a higher rank lie above it.
    """

    name: str
    options: Callable[[str], Mapping[str, Any]]
    rank: int


class Disks:
    """The disks of a running machine.

    Attributes:
        lock: Lock that is held while they are changed, and while the machine is stopped for that.
    """

    def __init__(self, qmp: Qmp, plugged: tuple[DiskSlot, ...], *, account: Account | None, alive: Callable[[], None]) -> None:
        """Take over the disks that the machine was started with.

        Args:
            qmp: The machine's monitor.
            plugged: The disks, the root disk first.
            account: The account that QEMU runs as; None if it can open our files.
            alive: Function called while waiting; raises `MachineDied` when the machine is gone.
        """
        self._qmp, self._account, self._alive = qmp, account, alive
        self._plugged = {slot.disk.name: slot for slot in plugged}
        self._rundir = plugged[0].file.parent
        self._files: dict[str, list[int]] = {}
        self._filters: dict[str, list[_Filter]] = {}
        self._lies: dict[str, list[tuple[int, int | None]]] = {}
        self._recordings: dict[Path, str] = {}
        self._ended_logs: dict[str, str] = {}
        self.lock = threading.RLock()

    @property
    def slots(self) -> tuple[DiskSlot, ...]:
        """The disks, the root disk first."""
        return tuple(self._plugged.values())

    @property
    def data(self) -> tuple[DataDisk, ...]:
        """The disks beside the root disk."""
        return tuple(slot.disk for slot in self.slots[1:])

    @property
    def ports(self) -> dict[str, str]:
        """The port of each disk beside the root disk, by the disk's name."""
        return {slot.disk.name: slot.port for slot in self.slots[1:]}

    def slot(self, name: str) -> DiskSlot:
        """Return the disk of a name.

        Raises:
            NotPlugged: There is none.
        """
        try:
            return self._plugged[name]
        except KeyError:
            raise NotPlugged(f"there is no disk {name!r} in this machine, which has {', '.join(self._plugged)}") from None

    # -- in and out ------------------------------------------------------------------------------------------------------------------

    def plug(self, disk: DataDisk) -> None:
        """Plug in a disk (see `Instance.plug_disk`)."""
        if disk.name in self._plugged:
            raise NotPlugged(f"the machine has a disk {disk.name!r} already")
        free = [port for port in DISK_PORTS if port not in self.ports.values()]
        if not free:
            raise NotPlugged(f"a machine has room for {len(DISK_PORTS)} disks beside its root disk: unplug one of {', '.join(self.ports)}")
        slot = _slot(disk, free[0], self._rundir / disk.file)
        slot.file.unlink(missing_ok=True)
        _lay(slot, kept=False)
        try:
            with self.lock:
                self.attach(slot)
        except BaseException:
            slot.file.unlink(missing_ok=True)
            raise

    def attach(self, slot: DiskSlot) -> None:
        """Plug in a disk whose files are there."""
        with self._opened(slot) as opened:
            self._execute("device_add", **slot.device_options())
        self._plugged[slot.disk.name], self._files[slot.disk.name] = slot, opened

    @contextmanager
    def _opened(self, slot: DiskSlot) -> Iterator[list[int]]:
        """Have QEMU open a disk's files, and close them again if the block fails; give the numbers of the sets that have them."""
        opened, added = list[int](), list[str]()
        try:
            for node in self._lent_slot(slot, opened).nodes():
                self._execute("blockdev-add", **node)
                added.append(str(node["node-name"]))
            yield opened
        except QmpFailed as error:
            for name in reversed(added):
                with suppress(QmpFailed):
                    self._execute("blockdev-del", node_name=name)
            self._forget(opened)
            self._alive()
            raise NotPlugged(f"QEMU could not plug in the disk {slot.disk.name!r}: {error}") from error

    def change(self, disk: DataDisk) -> None:
        """Put a disk in the place of another one (see `Instance.change_disk`)."""
        with self.lock:
            before = self.slot(disk.name)
            if self._filters.get(disk.name) or before.disk.size != disk.size:
                raise NotPlugged(f"the disk {disk.name!r} has another size, or faults, and cannot be changed")
            slot = attrs.evolve(_slot(disk, before.port, before.file), turn=before.turn + 1)
            # QEMU has the file open that had the name, until its node is gone.
            before.file.unlink(missing_ok=True)
            _lay(slot, kept=False)
            with self._opened(slot) as opened, self.stopped():
                self._put(before.device, slot.top)
            for node in dict.fromkeys((before.top, before.node)):
                self._execute("blockdev-del", node_name=node)
            self._forget_disk(before)
            self._plugged[disk.name], self._files[disk.name] = slot, opened

    def _forget_disk(self, slot: DiskSlot) -> None:
        """Forget a disk that QEMU does not use any more."""
        name = slot.disk.name
        del self._plugged[name]
        for known in (self._filters, self._lies, self._ended_logs):
            known.pop(name, None)
        self._forget(self._files.pop(name, []))
        if slot.log is not None:
            slot.log.unlink(missing_ok=True)

    def _execute(self, command: str, **arguments: Any) -> Any:
        return self._qmp.execute(command, deadline=Deadline(_GRACE), **arguments)

    def _lent_slot(self, slot: DiskSlot, opened: list[int]) -> DiskSlot:
        """Return a disk with the paths by which QEMU opens its files."""

        def below(disk: Disk) -> Disk:
            return attrs.evolve(disk, path=self._lent(disk.path, opened))

        return attrs.evolve(
            slot,
            disk=attrs.evolve(slot.disk, disks=tuple(map(below, slot.disk.disks))),
            file=self._lent(slot.file, opened, writable=True),
            log=self._lent(slot.log, opened, writable=True) if slot.log is not None else None,
        )

    def _lent(self, path: Path, opened: list[int], *, writable: bool = False) -> Path:
        if self._account is None:
            return path
        with descriptor(path, os.O_RDWR if writable else os.O_RDONLY) as fd:
            opened.append(self._qmp.add_fd(fd, deadline=Deadline(_GRACE)))
        return Path(f"/dev/fdset/{opened[-1]}")

    def _forget(self, opened: list[int]) -> None:
        while opened:
            with suppress(QmpFailed):
                self._execute("remove-fd", fdset_id=opened.pop())

    def unplug(self, name: str, deadline: Deadline) -> None:
        """Remove a disk and its files (see `Instance.unplug_disk`)."""
        with self.lock:
            slot = self.slot(name)
            if not slot.port:
                raise NotPlugged("the root disk cannot be removed")
            with suppress(QmpFailed):  # it was asked before
                self._execute("device_del", id=slot.device)
            nodes = [*(each.name for each in reversed(self._filters.get(name, []))), *dict.fromkeys((slot.top, slot.node))]
            if not deadline.poll(lambda: self._released(nodes), every=0.2, first=0.01):
                raise NotPlugged(f"the guest has not released the disk {name!r} within {deadline.seconds:g} s")
            self._forget_disk(slot)
        slot.file.unlink(missing_ok=True)

    def _released(self, nodes: list[str]) -> bool:
        self._alive()
        while nodes:
            try:
                self._execute("blockdev-del", node_name=nodes[0])
            except QmpFailed as error:
                # Every other refusal counts as one of a device that still uses the node.
                if "Failed to find node" not in str(error):
                    return False
            del nodes[0]
        return True

    # -- filters ---------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def filtered(self, name: str, options: Callable[[str], Mapping[str, Any]], *, rank: int = _FAULT) -> Iterator[None]:
        """Put a filter on a disk for the length of a block; no request is under way when it comes and when it goes.

        Args:
            name: The disk.
            options: Function that returns the filter's arguments for a block node below it.
            rank: Its place: those of a higher rank lie above it.
        """
        added = _Filter(f"filter-{secrets.token_hex(4)}", options, rank)
        _ = self.slot(name)  # raises if there is none
        try:
            with self.stopped():
                self._restack(name, sorted([*self._filters.setdefault(name, []), added], key=lambda each: each.rank))
            yield
        finally:
            # The machine may be gone, and with it all filters; or the disk, which another one may have followed.
            if added in self._filters.get(name, []):
                with suppress(QmpFailed), self.stopped():
                    self._restack(name, [each for each in self._filters[name] if each is not added])

    def _restack(self, name: str, wanted: list[_Filter]) -> None:
        """Set the filters of a disk: those from the first change upwards are made anew."""
        slot, before = self._plugged[name], self._filters[name]
        same = next(
            (number for number, (one, two) in enumerate(zip(before, wanted, strict=False)) if one is not two), min(len(before), len(wanted))
        )
        top = before[same - 1].name if same else slot.top
        if before[same:]:
            self._put(slot.device, top)
        for gone in reversed(before[same:]):
            self._execute("blockdev-del", node_name=gone.name)
        self._filters[name] = wanted[:same]
        for added in wanted[same:]:
            self._execute("blockdev-add", **{**added.options(top), "node-name": added.name})
            self._filters[name].append(added)
            top = added.name
        # QEMU ends itself by an assertion if a device is to use the node that it uses already.
        if wanted[same:]:
            self._put(slot.device, top)

    def _put(self, device: str, node: str) -> None:
        """Have a device use another block node."""
        self._execute("qom-set", path=f"/machine/peripheral/{device}", property="drive", value=node)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the processors for the length of a block, so that no request is under way."""
        with self.lock:
            running = self._execute("query-status")["running"]
            if running:
                self._execute("stop")
            try:
                yield
            finally:
                if running:
                    self._execute("cont")

    @contextmanager
    def recorded(self, name: str, folder: Path) -> Iterator[Path]:
        """Record what the guest writes to a disk, for the length of a block (see `Instance.record_writes`)."""
        slot, log, opened = self.slot(name), folder / "writes.log", list[int]()
        with descriptor(log, _NEW):
            pass
        lent = self._lent(log, opened, writable=True)
        try:
            with ExitStack() as stack:
                with self.stopped():
                    # A stopped machine has written its caches to the file (QEMU's `vm_stop`).
                    with descriptor(slot.file, os.O_RDONLY) as disk, descriptor(folder / slot.file.name, _NEW) as copy:
                        copy_sparse(disk, copy)
                    stack.enter_context(self.filtered(name, lambda below: log_node("", below, lent), rank=_LOG))
                self._recordings[log] = name
                yield log
            if self._recordings.pop(log, None) is None:
                raise MachineError(f"so much was written to the disk {name!r} that its recording was ended: record less of it at once")
        except QmpFailed as error:
            self._alive()
            raise MachineError(f"QEMU could not record what is written to the disk {name!r}: {error}") from error
        finally:
            self._recordings.pop(log, None)
            self._forget(opened)

    def bound_logs(self) -> list[str]:
        """End the logs of disks that have become too long; return what is to be told of them (see `Instance.bound_logs`)."""
        with self.lock:
            found = [(slot, reason) for slot in self.slots if (reason := _too_long(self._logs(slot)))]
            # While the machine stands still nothing is written, and its state may be saved just now.
            if not found or not self._execute("query-status")["running"]:
                return []
            return [self._end_logs(slot, reason) for slot, reason in found]

    def _logs(self, slot: DiskSlot) -> list[Path]:
        tracked = [] if slot.log is None else [slot.log]
        return tracked + [log for log, name in self._recordings.items() if name == slot.disk.name]

    def _end_logs(self, slot: DiskSlot, reason: str) -> str:
        name, logs, filters = slot.disk.name, self._logs(slot), self._filters.setdefault(slot.disk.name, [])
        with self.stopped():
            self._restack(name, [])
            if slot.log is not None:
                self._put(slot.device, slot.node)
                self._execute("blockdev-del", node_name=slot.top)
                self._plugged[name] = attrs.evolve(slot, log=None)
            self._restack(name, [each for each in filters if each.rank != _LOG])
        for log in logs:
            # QEMU may still have it open, in a set of descriptors.
            os.truncate(log, 0)
            log.unlink()
            self._recordings.pop(log, None)
        told = f"what is written to the disk {name!r} is not recorded any more, since {reason}"
        if slot.log is not None:
            self._ended_logs[name] = f"{told}; it is again after vm.restore(), or vm.power_cut() and vm.start()"
        return told

    # -- faults ----------------------------------------------------------------------------------------------------------------------

    def errors(self, name: str, errors: DiskErrors) -> AbstractContextManager[None]:
        """Have requests to a disk fail, for the length of a block (see `Instance.disk_errors`)."""
        rules = _rules(errors)

        def options(below: str) -> dict[str, Any]:
            # The format above is what tells the filter of each request (block/raw-format.c), by which it counts.
            return {"driver": "raw", "file": {"driver": "blkdebug", "image": below, **rules}}

        return self.filtered(name, options)

    @contextmanager
    def slow(self, name: str, *, iops: float, bytes_per_second: float) -> Iterator[None]:
        """Limit what a disk takes in a second, for the length of a block (see `Instance.slow_disk`)."""
        group = f"group-{secrets.token_hex(4)}"
        limits = {"iops-total": max(1, round(iops)) if iops else 0, "bps-total": max(1, round(bytes_per_second)) if bytes_per_second else 0}
        self._execute("object-add", qom_type="throttle-group", id=group, limits=limits)
        try:
            with self.filtered(name, lambda below: {"driver": "throttle", "throttle-group": group, "file": below}):
                yield
        finally:
            with suppress(QmpFailed):
                self._execute("object-del", id=group)

    @contextmanager
    def lying(self, name: str) -> Iterator[None]:
        """Count no flush of a tracked disk as one, for the length of a block (see `Instance.lying_disk`)."""
        log = self.slot(name).log
        if log is None:
            raise NotPlugged(self._ended_logs.get(name, _UNTRACKED))
        told = self._lies.setdefault(name, [])
        begin = log.stat().st_size
        told.append((begin, None))
        try:
            yield
        finally:
            told.remove((begin, None))
            with suppress(FileNotFoundError):  # it was unplugged
                told.append((begin, log.stat().st_size))

    def check_tracked(self) -> None:
        """Raise `NotPlugged` if no disk is tracked, or one is not any more."""
        for reason in self._ended_logs.values():
            raise NotPlugged(reason)
        if not any(slot.log for slot in self.slots):
            raise NotPlugged(_UNTRACKED)

    def lose(self, loss: Loss) -> None:
        """Take from the tracked disks of a machine that has ended what they had not flushed (see `Instance.cut_losing`)."""
        for slot in self.slots:
            if slot.log is not None:
                _lose(slot, slot.log, loss, self._lies.get(slot.disk.name, []))


def _too_long(logs: list[Path]) -> str:
    """Return why logs of a disk have become too long; empty if they have not."""
    size = sum(log.stat().st_size for log in logs)
    free = shutil.disk_usage(logs[0]).free if size else 0
    return f"the log had {format_size(size)}, with {format_size(free)} free on the host's disk" if size > min(free, _LONGEST_LOG) else ""


def _lose(slot: DiskSlot, log: Path, loss: Loss, lies: Iterable[tuple[int, int | None]]) -> None:
    def lied(end: int) -> bool:
        return any(begin < end and (until is None or end <= until) for begin, until in lies)

    entries = read_log(log)
    history = WriteHistory(attrs.evolve(entry, flush=False, fua=False) if lied(entry.end) else entry for entry in entries)
    state = history.after_power_cut(torn=loss == "torn")
    # The overlay was empty when the log began, so that what is left of the log is what is left of the overlay.
    slot.file.unlink()
    with log.open("rb") as data:
        write_overlay(slot.file, size=slot.disk.size, block=history.block, blocks=history.content(state), data=data)


def _rules(errors: DiskErrors) -> dict[str, list[dict[str, Any]]]:
    """Return rules of blkdebug, which fails requests by state and goes to another state with each request."""
    error = {"iotype": errors.on, "errno": errno.EIO}
    if errors.sectors is not None:
        return {"inject-error": [{**error, "event": "none", "sector": sector} for sector in errors.sectors]}
    if errors.count is None and not errors.after:
        return {"inject-error": [{**error, "event": "none"}]}
    event, first = _EVENTS[errors.on], errors.after + 1
    last = first + (errors.count or 1)
    # A rule that is not used up stays, so one that is for all is met once.
    once = errors.count is not None
    inject = [{**error, "event": event, "state": state, "once": once} for state in range(first, last)]
    steps = [{"event": event, "state": state, "new_state": state + 1} for state in range(1, last if once else first)]
    return {"inject-error": inject, "set-state": steps}
