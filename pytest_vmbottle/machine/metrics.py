"""Resource figures of a machine, seen from the host and from the guest."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle.channels.port import GUEST_PATH, Command
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host.sizes import format_size

if TYPE_CHECKING:
    from pytest_vmbottle.host import resources as host

__all__ = ["QUESTION", "GuestSample", "Meter", "Sample"]

_FILES = ("/proc/stat", "/proc/meminfo", "/proc/loadavg", "/proc/diskstats", "/proc/net/dev")
QUESTION = Command(argv=("cat", *_FILES), env=(("PATH", GUEST_PATH),))
"""Read the guest's counters: see proc(5), and Documentation/admin-guide/iostats.rst of Linux."""

# The kernel counts in sectors of 512 bytes, whatever a disk's own are (Documentation/admin-guide/iostats.rst).
_SECTOR = 512
# Far more than the files have on a machine with 64 processors and many disks.
_MAX_ANSWER = 1 << 18
# Numbers are bounded, because a guest may answer anything. The last two columns, guest and guest_nice, are left out: user and nice contain
# them (account_guest_time in kernel/sched/cputime.c).
_CPU = re.compile(r"^cpu ((?: +[0-9]{1,20}){8})", re.MULTILINE)
_CPUS = re.compile(r"^cpu[0-9]", re.MULTILINE)
# MemAvailable and not MemFree: the page cache fills free memory without using it up. Linux has it since 3.14.
_MEMORY = re.compile(r"^(MemTotal|MemAvailable): +([0-9]{1,20}) kB$", re.MULTILINE)
_LOAD = re.compile(r"^([0-9]{1,9}\.[0-9]{2}) [0-9.]+ [0-9.]+ [0-9]+/[0-9]+ [0-9]+$", re.MULTILINE)
# Whole disks: their partitions, and what is made of them (dm, md, loop), would count the same bytes again. Fields 6 and 10 are sectors.
_DISK = re.compile(
    r"^ +[0-9]+ +[0-9]+ (?:(?:vd|sd|hd|xvd)[a-z]+|nvme[0-9]+n[0-9]+|mmcblk[0-9]+)"
    r" [0-9]+ [0-9]+ ([0-9]{1,20}) [0-9]+ [0-9]+ [0-9]+ ([0-9]{1,20}) ",
    re.MULTILINE,
)
# The first column is received bytes, the ninth is sent bytes. `lo` is traffic of the guest with itself.
_CARD = re.compile(r"^ *(?!lo:)[^\s:]+: *([0-9]{1,20})(?: +[0-9]+){7} +([0-9]{1,20}) ", re.MULTILINE)


@attrs.frozen(kw_only=True, repr=False)
class GuestSample:
    """Figures of the guest's kernel; None where a figure is unknown.

    Counters run since the guest booted.

    Attributes:
        time: The time of the guest's answer, in seconds on the host's monotonic clock (`time.monotonic`).
        cpu_percent: Time that the guest's processors were busy since the sample before, 100 for one processor; None in the first sample.
        memory_used_bytes: Bytes of memory that are in use and cannot be reclaimed.
        memory_available_bytes: Bytes that programs can still allocate without swapping.
        load: Processes that ran or waited for a disk, averaged over the last minute.
        disk_read_bytes: Bytes read from all its disks.
        disk_write_bytes: Bytes written to all its disks.
        network_received_bytes: Bytes received by all network cards but the loopback.
        network_sent_bytes: Bytes sent by them.
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
        """Return the figures as a line for people."""
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
    """Resource figures of a machine at one moment; None where a figure is unknown.

    Counters run since the machine's process started.

    Attributes:
        time: The time when it was taken, in seconds on the host's monotonic clock (`time.monotonic`).
        cpu_percent: Processor time of the host that the machine used since the sample before, 100 for one processor; None in the first
            sample.
        rss_bytes: Bytes of the host's RAM that it holds. Pages that clones share with their pack count in each clone.
        threads: Number of threads of its process.
        read_bytes: Bytes that the host read from storage for it; what comes from the host's page cache is not counted.
        write_bytes: Bytes that the host wrote to storage for it; files in RAM (tmpfs) do not count. A page that is changed again before the
            host has written it out counts once (Linux counts a page of its cache when it becomes dirty).
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
        """Return all figures by name; the guest's begin with `guest_`."""
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
    """Source of a machine's samples.

    Each sample holds the processor time since the one before, so each consumer needs a meter of its own.

    `host` and `guest` may be called from different threads.

    Attributes:
        pid: The hypervisor's process.
    """

    def __init__(self, pid: int, ask: Callable[[Command], bytes]) -> None:
        """Create a meter without taking a sample.

        Args:
            pid: The hypervisor's process id.
            ask: Function that runs a command in the guest and returns its output.
        """
        from pytest_vmbottle.host import resources as host  # noqa: PLC0415 - whoever measures nothing must not pay for psutil

        self.pid = pid
        self._process = host.Process(pid)
        self._ask = ask
        self._usage: tuple[float, host.Usage] | None = None
        self._jiffies: tuple[int, int] | None = None

    def sample(self) -> Sample | None:
        """Take a sample of both sides; return None if the process has ended."""
        sample = self.host()
        return sample and attrs.evolve(sample, guest=self.guest())

    def host(self) -> Sample | None:
        """Take a sample as the host sees it; return None if the process has ended."""
        now, usage = time.monotonic(), self._process.usage()
        if usage is None:
            return None
        # The figures before are replaced even if they are not used, or the next interval would be the wrong one.
        before, self._usage = self._usage, (now, usage)
        percent = None
        if before is not None and now > before[0]:
            percent = 100 * max(0.0, usage.cpu_seconds - before[1].cpu_seconds) / (now - before[0])
        known = attrs.asdict(usage)
        del known["cpu_seconds"]
        return Sample(time=now, cpu_percent=percent, **known)

    def guest(self) -> GuestSample | None:
        """Take a sample as the guest sees it; return None if its answer is missing or unreadable."""
        try:
            answer = self._ask(QUESTION)
        except MachineError:
            return None
        # Bounded, because a guest may send megabytes.
        text = answer[:_MAX_ANSWER].decode("ascii", "replace")
        # Each figure by itself: a kernel that tells less still gives a sample of the rest.
        load, known = _LOAD.search(text), {**_memory(text), **_sums(text)}
        percent, told = self._busy(text)
        if not told and not load and all(value is None for value in known.values()):
            return None
        return GuestSample(time=time.monotonic(), cpu_percent=percent, load=float(load[1]) if load else None, **known)

    def _busy(self, text: str) -> tuple[float | None, bool]:
        """Return the percent of one processor used since the last answer, and whether the answer had a figure."""
        match = _CPU.search(text)
        if match is None:
            return None, False
        user, nice, system, idle, iowait, irq, softirq, steal = (int(word) for word in match[1].split())
        busy = user + nice + system + irq + softirq
        # Steal is time that the host gave to others: it passed, but the guest was not busy.
        now = (busy, busy + idle + iowait + steal)
        before, self._jiffies = self._jiffies, now
        # The first answer, or counters that stood still or began anew: there is no interval to divide by.
        if before is None or now[1] <= before[1]:
            return None, True
        # Counters of a guest may run backwards after a restore.
        share = max(0, now[0] - before[0]) / (now[1] - before[1])
        return 100 * min(1.0, share) * len(_CPUS.findall(text)), True


def _memory(text: str) -> dict[str, int | None]:
    found = {name: int(amount) << 10 for name, amount in _MEMORY.findall(text)}
    total, available = found.get("MemTotal"), found.get("MemAvailable")
    # Two numbers of a guest, which may contradict each other.
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
