"""Screen, keyboard and network cable of a machine."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pytest_vmbottle.backends.port import Chord
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host.deadline import Deadline

__all__ = ["press", "screenshot", "set_link"]

_GRACE = 10.0
_HOLD, _PACE = 0.02, 0.05
"""Seconds to hold a key, and seconds between two keys. A PS/2 keyboard buffers no more than five or six that its guest has not read."""


def screenshot(qmp: Qmp, folder: Path, kind: Literal["png", "ppm"]) -> bytes:
    """Return a screenshot, through a file in the machine's own folder.

    Raises:
        QmpFailed: This QEMU writes no PNG, or is gone.
    """
    file = folder / f"screen-{secrets.token_hex(4)}.{kind}"
    try:
        with file.open("xb") as opened:  # QEMU may run as somebody who cannot write here
            lent = qmp.add_fd(opened.fileno(), deadline=Deadline(_GRACE))
        qmp.execute("screendump", filename=f"/dev/fdset/{lent}", format=kind, deadline=Deadline(_GRACE))
        qmp.execute("remove-fd", fdset_id=lent, deadline=Deadline(_GRACE))
        return file.read_bytes()
    except QmpFailed as error:
        raise QmpFailed(f"{error} (screenshots need QEMU 7.1 or later, built with libpng)") from error
    finally:
        file.unlink(missing_ok=True)


def press(qmp: Qmp, chords: Iterable[Chord]) -> None:
    """Press keys, one chord after the other.

    Raises:
        MachineError: The machine is paused, so that the keys would be lost.
        QmpFailed: QEMU knows no such key, or is gone.
    """
    # QEMU accepts keys for a paused machine and drops them without an error.
    if not qmp.execute("query-status", deadline=Deadline(_GRACE))["running"]:
        raise MachineError("cannot press keys while the machine is paused, because they would be lost: resume it first")
    for chord in chords:
        keys = [{"type": "qcode", "data": key} for key in chord]
        qmp.execute("send-key", keys=keys, hold_time=round(_HOLD * 1000), deadline=Deadline(_GRACE))
        # QEMU answers as soon as it has queued the keys, not when they are released.
        time.sleep(_PACE)


def set_link(qmp: Qmp, card: str, *, up: bool) -> None:
    """Plug in a card's cable or pull it; raise `QmpFailed` on failure."""
    qmp.execute("set_link", name=card, up=up, deadline=Deadline(_GRACE))
