"""Memory of a guest, as a file that QEMU maps."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pytest_vmbottle.backends.port import Start
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host import resources as host
from pytest_vmbottle.host.account import Account
from pytest_vmbottle.host.files import copy_sparse, descriptor
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.spec import MachineSpec

__all__ = ["RAM_FILE", "Ram"]

RAM_FILE = "ram.img"
"""Name of the RAM file in a pack, and in a machine's folder."""


class Ram:
    """File with a guest's memory: the pack's own, written by nobody, or one for this machine alone.

    A machine's own RAM is anonymous memory (memfd), so that it is gone with its last user whatever happens. Where
    the host has not enough of it, it is a file in the machine's folder. QEMU opens it by name, so one that runs as another user gets
    no part of the pack, but a copy.
    """

    def __init__(self, spec: MachineSpec, source: Start, rundir: Path, account: Account | None) -> None:
        """Open the file, and copy its initial content into it."""
        whole = source.ram or source.saved
        bottled = whole / RAM_FILE if whole is not None and (whole / RAM_FILE).exists() else None
        # Shared from the page cache by all clones, with pages of their own only where they write. A build must not share: its RAM is saved.
        # Nor can it be private where another process has to see it: one that shares a folder with the guest.
        self.private = bottled is not None and not source.building and account is None and not spec.shares
        self.fd = -1
        if bottled is not None and self.private:
            self.path = bottled
            return
        # Checked before, because a memfd can have any size: the host would run out of memory only when the guest touches its pages.
        self.fd = _anonymous(rundir) if spec.memory < host.available_memory() else _file(rundir / RAM_FILE, spec)
        # Through /proc, because a memfd has no name; QEMU needs one, or the RAM would go into the saved state.
        self.path = Path(f"/proc/self/fd/{self.fd}")
        # A memfd gets its size here, and its pages only as the guest touches them.
        os.ftruncate(self.fd, spec.memory)
        if account is not None:
            os.fchown(self.fd, account.uid, account.gid)
        if bottled is not None:
            with descriptor(bottled, os.O_RDONLY) as saved:
                copy_sparse(saved, self.fd)

    def close(self) -> None:
        """Release the file; may be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _anonymous(rundir: Path) -> int:
    return os.memfd_create(f"vmbottle-{rundir.name}", os.MFD_CLOEXEC)


def _file(path: Path, spec: MachineSpec) -> int:
    """Create a file with all of its blocks allocated.

    If a disk had no room for a page that is touched, the kernel would kill QEMU (SIGBUS).
    """
    size, free = format_size(spec.memory), shutil.disk_usage(path.parent).free
    hint = "reduce memory=, free disk space (vmbottle pack prune), or choose another folder with --vm-catalog"
    if free < spec.memory:
        reason = f"this host does not have {size} of free memory, and {path.parent} has only {format_size(free)} for a RAM file"
        raise MachineError(f"{reason}: {hint}", machine=spec.name)
    path.unlink(missing_ok=True)  # from when the same machine ran before
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, spec.memory)
    except OSError as error:
        os.close(fd)
        raise MachineError(f"cannot allocate {size} of RAM in {path.parent}: {error.strerror}; {hint}", machine=spec.name) from error
    return fd
