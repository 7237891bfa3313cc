"""What a machine takes: of the host, as the host sees it, and of what it was given, as its guest sees it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle._os import format_size
from pytest_vmbottle.backend import GUEST_PATH, Command
from pytest_vmbottle.errors import MachineError

if TYPE_CHECKING:
    from pytest_vmbottle import host

__all__ = ["QUESTION", "GuestSample", "Meter", "Sample"]

_FILES = ("/proc/stat", "/proc/meminfo", "/proc/loadavg", "/proc/diskstats", "/proc/net/dev")
QUESTION = Command(argv=("cat", *_FILES), env=(("PATH", GUEST_PATH),))
"""Has a guest tell its figures: see proc(5), and Documentation/admin-guide/iostats.rst of Linux."""

_SECTOR = 512
_MAX_ANSWER = 1 << 18
_CPU = re.compile(r"^cpu ((?: +[0-9]{1,20}){8})", re.MULTILINE)
_CPUS = re.compile(r"^cpu[0-9]", re.MULTILINE)
_MEMORY = re.compile(r"^(MemTotal|MemAvailable): +([0-9]{1,20}) kB$", re.MULTILINE)
_LOAD = re.compile(r"^([0-9]{1,9}\.[0-9]{2}) [0-9.]+ [0-9.]+ [0-9]+/[0-9]+ [0-9]+$", re.MULTILINE)
# Whole disks: their partitions, and what is made of them (dm, md, loop), would count the same bytes again. Fields 6 and 10 are sectors.
_DISK = re.compile(
    r"^ +[0-9]+ +[0-9]+ (?:(?:vd|sd|hd|xvd)[a-z]+|nvme[0-9]+n[0-9]+|mmcblk[0-9]+)"
    r" [0-9]+ [0-9]+ ([0-9]{1,20}) [0-9]+ [0-9]+ [0-9]+ ([0-9]{1,20}) ",
    re.MULTILINE,
)
_CARD = re.compile(r"^ *(?!lo:)[^\s:]+: *([0-9]{1,20})(?: +[0-9]+){7} +([0-9]{1,20}) ", re.MULTILINE)


@attrs.frozen(kw_only=True, repr=False)
class GuestSample:
    """What a guest says of itself; None where it says nothing. Counters run since it was booted.

    Attributes:
        time: When it said so: seconds on the host's monotonic clock (`time.monotonic`).
        cpu_percent: Time that its processors were busy since the sample before, 100 for one; None in the first sample.
        memory_used_bytes: Bytes of its memory that are in use and cannot be given up.
        memory_available_bytes: Bytes that its programs can still have without swapping.
        load: Processes that ran or waited for a disk, on average over the last minute.
        disk_read_bytes: Bytes read from all its disks.
        disk_write_bytes: Bytes written to all its disks.
        network_received_bytes: Bytes that came in through all its network cards but the loopback.
        network_sent_bytes: Bytes that went out.
    """

    time: float
    cpu_percent: float | None = None
    memory_used_bytes: int | None = None
    memory_available_bytes: int | None = None
    load: float | None = None
    disk_read_bytes: int | None = None
    disk_write_bytes: int | None = None
    network_received_bytes: int | None = None
    network_sent_bytes: int | None = None

    def __repr__(self) -> str:
        return f"<GuestSample {self.describe()}>"

    def describe(self) -> str:
        """The figures for people."""
        told = [
            f"cpu {_percent(self.cpu_percent)}",
            f"memory {_size(self.memory_used_bytes)} used, {_size(self.memory_available_bytes)} available",
            f"load {'?' if self.load is None else f'{self.load:.2f}'}",
            f"disk {_size(self.disk_read_bytes)} read, {_size(self.disk_write_bytes)} written",
            f"network {_size(self.network_received_bytes)} in, {_size(self.network_sent_bytes)} out",
        ]
        return ", ".join(told)


@attrs.frozen(kw_only=True, repr=False)
class Sample:
    """What a machine took at one moment; None where that is unknown. Counters run since its process was started.

    Attributes:
        time: When: seconds on the host's monotonic clock (`time.monotonic`).
        cpu_percent: Time of the host's processors that it took since the sample before, 100 for one; None in the first sample.
        rss_bytes: Bytes of the host's RAM that it holds. What clones share of their pack counts in each of them.
        threads: How many threads it has.
        read_bytes: Bytes that the host read from storage for it; what was in the host's cache costs none.
        write_bytes: Bytes that it had the host write to storage; files in RAM (tmpfs) do not count. What is written again before the
            host has written it out counts once (Linux counts a page of its cache when it has to be written from then on).
        guest: The guest's own figures, or None if it did not answer, or was not asked at this moment.
    """

    time: float
    cpu_percent: float | None = None
    rss_bytes: int | None = None
    threads: int | None = None
    read_bytes: int | None = None
    write_bytes: int | None = None
    guest: GuestSample | None = None

    @property
    def figures(self) -> dict[str, float | int | None]:
        """All of them by name; the guest's begin with `guest_`."""
        own = attrs.asdict(self, recurse=False)
        del own["guest"]
        names = (field.name for field in attrs.fields(GuestSample))
        return own | {f"guest_{name}": getattr(self.guest, name, None) for name in names}

    def __repr__(self) -> str:
        told = [
            f"cpu {_percent(self.cpu_percent)}",
            f"rss {_size(self.rss_bytes)}",
            f"{'?' if self.threads is None else self.threads} threads",
            f"{_size(self.read_bytes)} read, {_size(self.write_bytes)} written",
        ]
        return f"<Sample {', '.join(told)}; guest: {self.guest.describe() if self.guest else 'unknown'}>"


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f} %"


def _size(value: int | None) -> str:
    return "?" if value is None else format_size(value)


class Meter:
    """Takes samples of a machine. Each has the processor time since the one before, so whoever samples has a meter of his own.

    The host's part and the guest's may be used by a thread each.

    Attributes:
        pid: The hypervisor's process.
    """

    def __init__(self, pid: int, ask: Callable[[Command], bytes]) -> None:
        """Takes no sample yet.

        Args:
            pid: The hypervisor's process.
            ask: Runs a command in the guest and returns what it printed.
        """
        from pytest_vmbottle import host  # noqa: PLC0415 - whoever measures nothing must not pay for psutil

        self.pid = pid
        self._process = host.Process(pid)
        self._ask = ask
        self._usage: tuple[float, host.Usage] | None = None
        self._jiffies: tuple[int, int] | None = None

    def sample(self) -> Sample | None:
        """A sample of both sides, or None if the process has ended."""
        sample = self.host()
        return sample and attrs.evolve(sample, guest=self.guest())

    def host(self) -> Sample | None:
        """A sample as the host sees it, or None if the process has ended."""
        now, usage = time.monotonic(), self._process.usage()
        if usage is None:
            return None
        before, self._usage = self._usage, (now, usage)
        percent = None
        if before is not None and now > before[0]:
            percent = 100 * max(0.0, usage.cpu_seconds - before[1].cpu_seconds) / (now - before[0])
        known = attrs.asdict(usage)
        del known["cpu_seconds"]
        return Sample(time=now, cpu_percent=percent, **known)

    def guest(self) -> GuestSample | None:
        """A sample as the guest sees it, or None if it does not answer with anything that makes sense."""
        try:
            answer = self._ask(QUESTION)
        except MachineError:
            return None
        text = answer[:_MAX_ANSWER].decode("ascii", "replace")
        load, known = _LOAD.search(text), {**_memory(text), **_sums(text)}
        percent, told = self._busy(text)
        if not told and not load and all(value is None for value in known.values()):
            return None
        return GuestSample(time=time.monotonic(), cpu_percent=percent, load=float(load[1]) if load else None, **known)

    def _busy(self, text: str) -> tuple[float | None, bool]:
        """Percent of one processor since the last answer, and whether there was a figure at all."""
        match = _CPU.search(text)
        if match is None:
            return None, False
        user, nice, system, idle, iowait, irq, softirq, steal = (int(word) for word in match[1].split())
        busy = user + nice + system + irq + softirq
        now = (busy, busy + idle + iowait + steal)
        before, self._jiffies = self._jiffies, now
        if before is None or now[1] <= before[1]:
            return None, True
        share = max(0, now[0] - before[0]) / (now[1] - before[1])
        return 100 * min(1.0, share) * len(_CPUS.findall(text)), True


def _memory(text: str) -> dict[str, int | None]:
    found = {name: int(amount) << 10 for name, amount in _MEMORY.findall(text)}
    total, available = found.get("MemTotal"), found.get("MemAvailable")
    used = None if total is None or available is None else max(0, total - available)
    return {"memory_used_bytes": used, "memory_available_bytes": available}


def _sums(text: str) -> dict[str, int | None]:
    disks, cards = _columns(_DISK, text), _columns(_CARD, text)
    return {
        "disk_read_bytes": disks and disks[0] * _SECTOR,
        "disk_write_bytes": disks and disks[1] * _SECTOR,
        "network_received_bytes": cards and cards[0],
        "network_sent_bytes": cards and cards[1],
    }


def _columns(pattern: re.Pattern[str], text: str) -> tuple[int, int] | None:
    rows = pattern.findall(text)
    return (sum(int(row[0]) for row in rows), sum(int(row[1]) for row in rows)) if rows else None
