"""Factory of backends, for tests and for the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_vmbottle.backends.port import Backend
    from pytest_vmbottle.settings import Settings

__all__ = ["NAMES", "make"]

NAMES = ("qemu", "smolvm")
"""Names of this package's backends."""

log = logging.getLogger(__name__)


def make(name: str, settings: Settings, *, folder: Path, warn: Callable[[str], None] = log.warning) -> Backend | None:
    """Make a backend of this package; None if it has none of this name.

    Args:
        name: `qemu` or `smolvm`.
        settings: What machines are to be run with.
        folder: Where it keeps what it proves, and machines of its own.
        warn: Takes a sentence that somebody should read.
    """
    # Imported here and not above: each brings what the other has no need of.
    proofs, kind = folder / "proofs", settings.pack_kind
    if name == "smolvm":
        from pytest_vmbottle.backends.smolvm import SmolvmBackend

        return SmolvmBackend(state=folder / "smolvm", proofs=proofs, pack_kind=kind, images=settings.images, warn=warn)
    if name != "qemu":
        return None
    from pytest_vmbottle.backends.qemu import QemuBackend

    return QemuBackend(accelerator=settings.accelerator, pack_kind=kind, account=settings.account, proofs=proofs)
