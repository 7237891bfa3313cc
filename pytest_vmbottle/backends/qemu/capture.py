"""Recording of a network card's traffic, by a filter in QEMU (net/dump.c)."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_vmbottle.backends.qemu.command_line import NETDEV
from pytest_vmbottle.backends.qemu.qmp import Qmp
from pytest_vmbottle.host.account import Account
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import descriptor

__all__ = ["begin", "end"]

_FILTER = "capture"
_GRACE = 10.0
_FRAME = 1 << 16
"""Bytes of a frame that are recorded."""


def begin(qmp: Qmp, path: Path, account: Account | None) -> None:
    """Record all frames from now on in a new file.

    Raises:
        QmpFailed: QEMU refused it.
    """
    deadline = Deadline(_GRACE)
    with descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
        if account is not None:
            # QEMU opens the file anew through /proc, which checks the rights of the file, not those of the descriptor.
            os.fchown(file, account.uid, account.gid)
        # Opened by us: a QEMU that runs as somebody else cannot reach the machine's folder.
        name = qmp.pass_file(file, deadline=deadline)
        qmp.execute("object-add", qom_type="filter-dump", id=_FILTER, netdev=NETDEV, file=str(name), maxlen=_FRAME, deadline=deadline)


def end(qmp: Qmp) -> None:
    """Stop the recording; raise as `begin` does."""
    qmp.execute("object-del", id=_FILTER, deadline=Deadline(_GRACE))
