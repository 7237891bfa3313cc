"""Memory and file systems of this host, and resource usage of processes."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import attrs
import psutil

from pytest_vmbottle.host.files import read_or_empty

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
"""Numbers above this one mean no limit, in version 1 of control groups."""


@attrs.frozen(kw_only=True)
class ControlGroup:
    """A control group with a memory limit, as set by containers and batch systems.

    Attributes:
        limit: Bytes that its processes may use together.
        used: Bytes that they use, without cached parts of files, which the kernel reclaims if memory is short.
    """

    limit: int
    used: int

    @property
    def free(self) -> int:
        """Bytes that are left, never below 0."""
        return max(0, self.limit - self.used)


def total_memory() -> int:
    """Return the bytes of memory that this process may use.

    That is this host's memory, or the limit of its control groups.
    """
    return min([int(psutil.virtual_memory().total), *(group.limit for group in control_groups())])


def available_memory() -> int:
    """Return the bytes of memory that are available now.

    They can be used without swapping, and without exceeding the limit of a control group.
    """
    return min([int(psutil.virtual_memory().available), *(group.free for group in control_groups())])


def control_groups(membership: Path = _MEMBERSHIP, mounted: Path = _MOUNTED) -> tuple[ControlGroup, ...]:
    """Return the control groups with a memory limit, of this process and above it: see cgroups(7)."""
    found = []
    for line in read_or_empty(membership).splitlines():
        # HIERARCHY:CONTROLLERS:PATH, and no controllers in version 2. A path may have colons of its own.
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top = mounted / "memory" if controllers else mounted
            # In a container the path may be the host's, and what is mounted begins further down: then only `top` is there.
            folder = top / path.lstrip("/")
            # Each level limits all below it, so the tightest of them counts.
            levels = [level for level in (folder, *folder.parents) if level.is_relative_to(top)]
            found += [group for level in levels if (group := _group(level, old=bool(controllers)))]
    return tuple(found)


def _group(folder: Path, *, old: bool) -> ControlGroup | None:
    limit = read_or_empty(folder / ("memory.limit_in_bytes" if old else "memory.max")).strip()
    # Version 2 writes "max" for no limit, and its topmost group has no such file at all.
    if not limit.isdigit() or int(limit) >= _NO_LIMIT:
        return None
    usage = read_or_empty(folder / ("memory.usage_in_bytes" if old else "memory.current")).strip()
    counts = dict(line.split(" ", 1) for line in read_or_empty(folder / "memory.stat").splitlines() if " " in line)
    # In version 1 only the numbers with this prefix include the groups below, as the usage does.
    prefix = "total_" if old else ""
    # The page cache counts as used in a group, although the kernel gives it up when memory is short.
    cached = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return ControlGroup(limit=int(limit), used=max(0, int(usage or 0) - cached))


def file_system(path: Path) -> str:
    """Return the type of a path's file system, as the kernel names it.

    The path need not exist. Empty if the type is unknown.
    """
    mounted = {Path(partition.mountpoint): partition.fstype for partition in psutil.disk_partitions(all=True)}
    resolved = path.resolve()
    for folder in (resolved, *resolved.parents):
        if folder in mounted:
            return str(mounted[folder])
    return ""


def is_network_file_system(path: Path) -> bool:
    """Tell whether a path is on a network file system, whose locks are unreliable."""
    return file_system(path) in _NETWORK


@attrs.frozen(kw_only=True)
class Usage:
    """Resource usage of a process; None where this user may not know.

    Attributes:
        cpu_seconds: Seconds of processor time, of all its threads, since its start.
        rss_bytes: Bytes of memory that it holds in RAM, including shared ones.
        threads: Number of its threads.
        read_bytes: Bytes that were read from storage for it, since its start.
        write_bytes: Bytes that were written to storage for it, since its start.
    """

    cpu_seconds: float
    rss_bytes: int
    threads: int
    read_bytes: int | None
    write_bytes: int | None


class Process:
    """A process of this host, never confused with a later one of the same id."""

    def __init__(self, pid: int) -> None:
        """Take the process that has this id now, if there is one."""
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None

    def usage(self) -> Usage | None:
        """Return its usage, or None if it has ended."""
        try:
            if self._process is None or not self._process.is_running():
                return None
            with self._process.oneshot():
                return self._usage(self._process)
        except psutil.NoSuchProcess:  # a zombie is one too
            return None

    def _usage(self, process: psutil.Process) -> Usage | None:
        # psutil says of a zombie too that it is running.
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
    """Return the seconds since a process was started, by the clock that counts from the boot.

    Infinite if the process is gone.
    """
    try:
        # A program's name may contain blanks and brackets: the fields are counted from the last bracket (proc_pid_stat(5)).
        # The start is field 22, and the first one behind the bracket is field 3.
        started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return math.inf
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
