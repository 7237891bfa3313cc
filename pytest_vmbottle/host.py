"""What this computer has, and lets this process have: memory and file systems; and what other processes take of it."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import attrs
import psutil

__all__ = [
    "ControlGroup",
    "Process",
    "Usage",
    "age",
    "available_memory",
    "control_groups",
    "file_system",
    "is_network_file_system",
    "total_memory",
]

_NETWORK = frozenset(
    {"9p", "afs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "lustre", "nfs", "nfs4", "smb3", "smbfs", "virtiofs"}
)
_MEMBERSHIP, _MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60
"""In version 1 of control groups, no limit is a number above this one."""


@attrs.frozen(kw_only=True)
class ControlGroup:
    """A control group with a limit of memory, as containers and batch systems set it.

    Attributes:
        limit: Bytes that its processes may have together.
        used: Bytes that they have, without the cached parts of files, which the kernel gives up where memory is short.
    """

    limit: int
    used: int

    @property
    def free(self) -> int:
        """Bytes that are left, never below 0."""
        return max(0, self.limit - self.used)


def total_memory() -> int:
    """Bytes of memory that this process may have: this computer's, or what its control groups are limited to."""
    return min([int(psutil.virtual_memory().total), *(group.limit for group in control_groups())])


def available_memory() -> int:
    """Bytes that can be had now without swapping, and without being killed for exceeding the limit of a control group."""
    return min([int(psutil.virtual_memory().available), *(group.free for group in control_groups())])


def control_groups(membership: Path = _MEMBERSHIP, mounted: Path = _MOUNTED) -> tuple[ControlGroup, ...]:
    """The control groups, this process's and those above it, whose memory is limited: see cgroups(7)."""
    found = []
    for line in _text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top = mounted / "memory" if controllers else mounted
            # In a container the path may be the host's, and what is mounted begins further down: then only `top` is there.
            folder = top / path.lstrip("/")
            levels = [level for level in (folder, *folder.parents) if level.is_relative_to(top)]
            found += [group for level in levels if (group := _group(level, old=bool(controllers)))]
    return tuple(found)


def _group(folder: Path, *, old: bool) -> ControlGroup | None:
    limit = _text(folder / ("memory.limit_in_bytes" if old else "memory.max")).strip()
    if not limit.isdigit() or int(limit) >= _NO_LIMIT:
        return None
    usage = _text(folder / ("memory.usage_in_bytes" if old else "memory.current")).strip()
    counts = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    prefix = "total_" if old else ""
    cached = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return ControlGroup(limit=int(limit), used=max(0, int(usage or 0) - cached))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def file_system(path: Path) -> str:
    """The type of the file system that a path, existing or not, lies on, as the kernel names it; empty if it cannot be told."""
    mounted = {Path(partition.mountpoint): partition.fstype for partition in psutil.disk_partitions(all=True)}
    resolved = path.resolve()
    for folder in (resolved, *resolved.parents):
        if folder in mounted:
            return str(mounted[folder])
    return ""


def is_network_file_system(path: Path) -> bool:
    """Whether a path lies on a file system whose locks cannot be relied on."""
    return file_system(path) in _NETWORK


@attrs.frozen(kw_only=True)
class Usage:
    """What a process has taken since it began, and what it holds now; None where this user may not know.

    Attributes:
        cpu_seconds: Seconds of processor time, of all its threads.
        rss_bytes: Bytes of memory that it holds in RAM, shared ones among them.
        threads: How many it has.
        read_bytes: Bytes that were read from storage for it.
        write_bytes: Bytes that it had written to storage.
    """

    cpu_seconds: float
    rss_bytes: int
    threads: int
    read_bytes: int | None
    write_bytes: int | None


class Process:
    """A process of this computer, never to be mistaken for a later one with the same number."""

    def __init__(self, pid: int) -> None:
        """Takes the process that has this number now, if there is one."""
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None

    def usage(self) -> Usage | None:
        """What it takes, or None if it has ended."""
        try:
            if self._process is None or not self._process.is_running():
                return None
            with self._process.oneshot():
                return self._usage(self._process)
        except psutil.NoSuchProcess:  # a zombie is one too
            return None

    def _usage(self, process: psutil.Process) -> Usage | None:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        times, counted = process.cpu_times(), _io(process)
        return Usage(
            cpu_seconds=times.user + times.system,
            rss_bytes=process.memory_info().rss,
            threads=process.num_threads(),
            read_bytes=counted[0],
            write_bytes=counted[1],
        )


def _io(process: psutil.Process) -> tuple[int | None, int | None]:
    try:
        counters = process.io_counters()
    except psutil.AccessDenied:
        return None, None
    return counters.read_bytes, counters.write_bytes


def age(pid: int) -> float:
    """Seconds since a process was started, by the clock that counts from the boot; without end if it is gone."""
    try:
        started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return math.inf
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
