"""Faults of a machine, which begin and end while it runs: its disks, its clock, its processors, its processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, Unpack

from pytest_vmbottle.backends.port import DiskErrors, Instance
from pytest_vmbottle.guest.path import GuestPath
from pytest_vmbottle.host.sizes import parse_size
from pytest_vmbottle.machine.clock import clock_jump
from pytest_vmbottle.machine.fault import CLOCK_FAULTS, FAULTS, Fault, fault, guest_fault
from pytest_vmbottle.machine.lan import DIRECTIONS, Direction, LanMember, impairment_of
from pytest_vmbottle.machine.process_faults import ProcessFaults

if TYPE_CHECKING:
    from pathlib import PurePosixPath

    from pytest_vmbottle.machine.lifecycle import Lifecycle
    from pytest_vmbottle.machine.switch import Impairment

__all__ = ["Faults"]

_SLICE = 0.05
"""Seconds of which processors get a part."""
_MOST_RULES = 4096
"""Most errors that are counted, and most sectors: each is a rule of QEMU's."""
_RATES = 0.9, 1.1
"""What adjtimex(2) takes."""


class _Named(Protocol):
    """A machine, which has a name."""

    name: str


class NetworkFaults(TypedDict, total=False):
    """What may be wrong with a cable; see `Impairment`."""

    delay: float
    jitter: float
    loss: float
    duplicate: float
    reorder: float
    corrupt: float
    bandwidth: float


class Faults:
    """The faults of a machine: `with vm.faults.slow_disk("data", iops=50): ...`."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        """Take the machine."""
        self._lifecycle = lifecycle

    def _fault(self, name: str, begin: Callable[[Instance], AbstractContextManager[object]], /, **told: object) -> Fault:
        return fault(self._lifecycle, name, begin, **told)

    def _in_guest(self, name: str, verb: str, /, *words: object, **told: object) -> Fault:
        return guest_fault(self._lifecycle, name, FAULTS, verb, *words, **told)

    # -- disks -----------------------------------------------------------------------------------------------------------------------

    def disk_errors(
        self, disk: str, *, on: Literal["read", "write", "flush"], after: int = 0, count: int | None = None, sectors: range | None = None
    ) -> Fault:
        """Have requests to a disk fail with EIO.

        What the guest has in its page cache it reads from there.

        Args:
            disk: The name of the disk; `"root"` is the root disk.
            on: Which requests.
            after: How many of them succeed first.
            count: How many fail then; all, by default.
            sectors: The sectors, of 512 bytes, to which requests fail; all, by default. Not together with `after` and `count`.

        Raises:
            ValueError: A value is out of range.

        Example:
            >>> with vm.faults.disk_errors("root", on="write"):
            ...     vm.exec("dd if=/dev/zero of=/srv/file bs=4k count=1 oflag=direct", check=False).returncode
            1
        """
        if on not in ("read", "write", "flush"):
            raise ValueError(f"on={on!r}: takes 'read', 'write' or 'flush'")
        if after < 0 or (count is not None and count < 1) or after + (count or 0) > _MOST_RULES:
            raise ValueError(f"after={after!r}, count={count!r}: takes numbers of requests, at most {_MOST_RULES} in all")
        if sectors is not None and (after or count is not None or not 0 < len(sectors) <= _MOST_RULES):
            raise ValueError(f"sectors={sectors!r}: takes a range of at most {_MOST_RULES}, without `after` and `count`")
        errors = DiskErrors(on=on, after=after, count=count, sectors=sectors)
        told = {"on": on, "after": after, "count": count, "sectors": None if sectors is None else repr(sectors)}
        return self._fault("disk_errors", lambda instance: instance.disk_errors(disk, errors), disk=disk, **told)

    def slow_disk(self, disk: str, *, iops: float = 0, bytes_per_second: float | str = 0, latency: float = 0) -> Fault:
        """Slow a disk down.

        Args:
            disk: The name of the disk; `"root"` is the root disk.
            iops: Most requests in a second.
            bytes_per_second: Most bytes in a second, or a size such as `"1M"`.
            latency: Seconds that each request takes for a program that makes one after the other; the same as `iops=1 / latency`.

        Raises:
            ValueError: No limit is given, or one is not above 0.

        Example:
            >>> with vm.faults.slow_disk("root", latency=0.2):
            ...     vm.exec("dd if=/dev/zero of=/srv/file bs=4k count=5 oflag=direct").duration > 0.5
            True
        """
        rate = parse_size(bytes_per_second) if isinstance(bytes_per_second, str) else bytes_per_second
        if min(iops, rate, latency) < 0 or not (iops or rate or latency):
            raise ValueError("slow_disk() takes iops=, bytes_per_second= or latency=, above 0")
        most = min(limit for limit in (iops or float("inf"), 1 / latency if latency else float("inf")))
        limits = {"iops": 0.0 if most == float("inf") else most, "bytes_per_second": float(rate)}
        return self._fault("slow_disk", lambda instance: instance.slow_disk(disk, **limits), disk=disk, **limits)

    def lying_disk(self, disk: str) -> Fault:
        """Have a tracked disk acknowledge flushes that it does not do, which `power_cut(lose=...)` then brings to light.

        Args:
            disk: The name of a disk of `disks=`, or `"root"` with `track_writes=True` in the mark.
        """
        return self._fault("lying_disk", lambda instance: instance.lying_disk(disk), disk=disk)

    def disk_full(self, path: str | PurePosixPath | GuestPath, *, leave: int | str = 0) -> Fault:
        """Fill the file system of a folder, by a hidden file there.

        Args:
            path: A folder in the guest.
            leave: Bytes that stay free, or a size such as `"1M"`.

        Example:
            >>> with vm.faults.disk_full("/srv"):
            ...     vm.exec("head -c 9 /dev/zero > /srv/file", check=False).stderr.strip().rpartition(": ")[2]
            'No space left on device'
        """
        free = parse_size(leave) if isinstance(leave, str) else leave
        return self._in_guest("disk_full", "disk_full", path, free, path=str(path), leave=free)

    def inodes_full(self, path: str | PurePosixPath | GuestPath) -> Fault:
        """Use up all inodes of a file system, by files in a hidden folder there.

        On a large file system this takes long.

        Args:
            path: A folder in the guest.
        """
        return self._in_guest("inodes_full", "inodes_full", path, path=str(path))

    # -- the private LAN -------------------------------------------------------------------------------------------------------------

    def network(
        self, *, direction: Literal["both", "in", "out"] = "both", lan: str | None = None, **impairment: Unpack[NetworkFaults]
    ) -> Fault:
        """Impair the machine's cable to its private LAN; at the end it is as it was.

        Args:
            direction: Which frames: those to the machine, from it, or both.
            lan: The LAN, if the machine is on several.
            impairment: `delay` and `jitter` in seconds, `bandwidth` in bytes per second; `loss`, `duplicate`, `reorder` and `corrupt` are
                probabilities from 0 to 1, for each frame and direction.

        Raises:
            ValueError: Nothing is given, a value is out of range, or the LAN is not said or another one.
            MachineError: The machine is on no LAN.

        Example:
            >>> with vms["two"].faults.network(delay=0.1, direction="in"):
            ...     vms["one"].exec(["bash", "-c", "exec 3<>/dev/tcp/two/22"]).duration > 0.1
            True
        """
        wanted = impairment_of(**impairment)
        if not impairment:
            raise ValueError("network() takes delay=, jitter=, loss=, duplicate=, reorder=, corrupt= or bandwidth=")
        place = self._lifecycle.place(lan)
        told = {"lan": place.lan, "direction": direction, **impairment}
        return self._fault("network", lambda _: _impaired(place, wanted, _directions(direction)), **told)

    def partition(self, *others: _Named | str, direction: Literal["both", "in", "out"] = "both", lan: str | None = None) -> Fault:
        """Have no frame pass between the machine and others on its private LAN.

        For groups, begin one for each machine of a group, with the machines of the other one.

        Args:
            others: The other machines, or their names.
            direction: `"out"` lets only pass what they send to the machine, `"in"` only what it sends.
            lan: The LAN, if the machine is on several.

        Raises:
            ValueError: One of them is not on the LAN, none is given, or the LAN is not said or another one.
            MachineError: The machine is on no LAN.

        Example:
            >>> with vms["one"].faults.partition("two"):
            ...     vms["one"].exec(["timeout", "2", "bash", "-c", "exec 3<>/dev/tcp/two/22"], check=False).returncode
            124
        """
        names = [other if isinstance(other, str) else other.name for other in others]
        if not names:
            raise ValueError("partition() takes the machines that cannot be reached any more")
        place = self._lifecycle.place(lan)
        told = {"lan": place.lan, "others": names, "direction": direction}
        return self._fault("partition", lambda _: _cut_off(place, names, _directions(direction)), **told)

    # -- memory and processors -------------------------------------------------------------------------------------------------------

    def memory_pressure(self, *, leave: int | str) -> Fault:
        """Take the guest's memory, by a process that the OOM killer spares.

        Args:
            leave: Bytes that stay available, or a size such as `"64M"`.

        Example:
            >>> with vm.faults.memory_pressure(leave="100M"):
            ...     int(vm.exec("awk '/MemAvailable/ {print $2}' /proc/meminfo").stdout) < 200_000
            True
        """
        left = parse_size(leave) if isinstance(leave, str) else leave
        return self._in_guest("memory_pressure", "memory", left, leave=left)

    def cpu_throttle(self, percent: float) -> Fault:
        """Leave the guest's programs so much of its processors; programs of real-time priority in the guest take the rest.

        Args:
            percent: From 5 to 99.

        Raises:
            ValueError: It is out of range.
        """
        return self._in_guest("cpu_throttle", "cpu", _percent(percent), percent=percent)

    def cpu_steal(self, percent: float) -> Fault:
        """Take the processors from the guest for so much of the time, as a host with too many guests does; its clocks go on.

        Args:
            percent: From 1 to 95: how much is taken.

        Raises:
            ValueError: It is out of range.
        """
        taken = 100 - _percent(100 - percent)
        return self._fault("cpu_steal", lambda instance: _stolen(instance.pid, taken / 100), percent=percent)

    def freeze(self, seconds: float) -> Fault:
        """Have the machine stand still for so long when it begins; its clocks have lost that time then.

        Args:
            seconds: How long.

        Example:
            >>> with vm.faults.freeze(1):
            ...     time.time() - float(vm.exec("date +%s.%N").stdout) > 0.5
            True
        """
        return self._fault("freeze", lambda instance: _frozen(instance, seconds), seconds=seconds)

    # -- time ------------------------------------------------------------------------------------------------------------------------

    def clock(self, *, jump: float = 0, rate: float = 1) -> Fault:
        """Set the guest's wall clock forward or back, or let it run fast or slow; at the end it is right again.

        Its monotonic clock never goes back, and keeps its pace if only the wall clock is set.

        Args:
            jump: Seconds by which it is set: below 0 is back.
            rate: Seconds that pass on it in a second, from 0.9 to 1.1.

        Raises:
            ValueError: Nothing is changed, both are, or the rate is out of range.

        Example:
            >>> with vm.faults.clock(jump=3600):
            ...     3590 < int(vm.exec("date +%s").stdout) - time.time() < 3610
            True
        """
        if (jump == 0) == (rate == 1) or not _RATES[0] <= rate <= _RATES[1]:
            raise ValueError(f"jump={jump!r}, rate={rate!r}: takes seconds, or a rate from {_RATES[0]} to {_RATES[1]}")
        return clock_jump(self._lifecycle, jump) if jump else guest_fault(self._lifecycle, "clock", CLOCK_FAULTS, "rate", rate, rate=rate)

    # -- processes -------------------------------------------------------------------------------------------------------------------

    def process(self, target: str | int) -> ProcessFaults:
        """Return the faults of a unit of systemd, or of a process by its number in the guest.

        Example:
            >>> with vm.faults.process("ssh").pause():
            ...     vm.exec("ps -o stat= -C sshd").stdout[0]
            'T'
        """
        return ProcessFaults(self._lifecycle, target)

    def syscall(self, target: str | int, name: str, *, error: str = "EIO", when: str = "") -> Fault:
        """Have a system call of running processes fail, by `strace -e inject` in the guest, which needs strace.

        Args:
            target: A unit of systemd, or the number of a process in the guest; what it starts later is included.
            name: The system call, such as `"fsync"`.
            error: The error that it gets.
            when: Which calls: `"3"` is the third one, `"3+"` all from that one on, `"3+2"` each second one from there (strace(1)).
        """
        told = {"target": target, "name": name, "error": error, "when": when}
        return self._in_guest("syscall", "syscall", target, name, error, when, **told)


def _directions(direction: Literal["both", "in", "out"]) -> tuple[Direction, ...]:
    if direction not in ("both", *DIRECTIONS):
        raise ValueError(f"direction={direction!r}: takes 'both', 'in' (to the machine) or 'out' (from it)")
    return DIRECTIONS if direction == "both" else (direction,)


@contextmanager
def _impaired(place: LanMember, impairment: Impairment, directions: tuple[Direction, ...]) -> Iterator[None]:
    before = {direction: place.cables[direction].impairment for direction in directions}
    place.impair(impairment, directions)
    try:
        yield
    finally:
        for direction, impaired in before.items():
            place.impair(impaired, (direction,))


@contextmanager
def _cut_off(place: LanMember, names: list[str], directions: tuple[Direction, ...]) -> Iterator[None]:
    cuts = place.cut_off(names, directions)
    try:
        yield
    finally:
        place.join(cuts)


@contextmanager
def _frozen(instance: Instance, seconds: float) -> Iterator[None]:
    instance.pause()
    try:
        time.sleep(seconds)
    finally:
        instance.resume()
    yield


@contextmanager
def _stolen(pid: int, part: float) -> Iterator[None]:
    """Stop a process for a part of the time."""
    over = threading.Event()

    def steal() -> None:
        with suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                over.wait(_SLICE * part)
                os.kill(pid, signal.SIGCONT)
                over.wait(_SLICE * (1 - part))

    thief = threading.Thread(target=steal, name="vmbottle-steal", daemon=True)
    thief.start()
    try:
        yield
    finally:
        over.set()
        thief.join()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _percent(value: float) -> float:
    if not 5 <= value <= 99:  # noqa: PLR2004 - less than a twentieth, and a guest does not answer any more
        raise ValueError(f"{value!r} is no percentage of the processors' time that can be left to the guest, 5 to 99")
    return float(value)
