"""What this computer has: memory and file systems."""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ["available_memory", "file_system", "total_memory"]

_NETWORK = frozenset(
    {"9p", "afs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "lustre", "nfs", "nfs4", "smb3", "smbfs", "virtiofs"}
)


def total_memory() -> int:
    """Bytes of memory of this computer."""
    return int(psutil.virtual_memory().total)


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    return int(psutil.virtual_memory().available)


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
