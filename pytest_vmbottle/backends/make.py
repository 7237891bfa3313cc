"""The one place where backends are made, for tests and for the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_vmbottle.backend import Backend, PackKind
    from pytest_vmbottle.backends.qemu import Account

__all__ = ["make"]

log = logging.getLogger(__name__)


def make(  # noqa: PLR0913 - what all backends are told
    name: str,
    *,
    folder: Path,
    accelerator: str = "auto",
    pack_kind: PackKind | None = None,
    account: Account | None = None,
    images: Mapping[str, str] | None = None,
    warn: Callable[[str], None] = log.warning,
) -> Backend | None:
    """Makes a backend of this package; None if it has none of this name.

    Args:
        name: `qemu` or `smolvm`.
        folder: Where it keeps what it proves, and machines of its own.
        accelerator: How guest code is run, or `auto`.
        pack_kind: The only kind of pack that is wanted, if any.
        account: Who a hypervisor runs as, if not who starts it.
        images: What names of images stand for, where the backend has images of its own.
        warn: Takes a sentence that somebody should read.
    """
    # Imported here and not above: each brings what the other has no need of.
    if name == "smolvm":
        from pytest_vmbottle.backends.smolvm import SmolvmBackend

        return SmolvmBackend(state=folder / "smolvm", proofs=folder / "proofs", pack_kind=pack_kind, images=dict(images or {}), warn=warn)
    if name != "qemu":
        return None
    from pytest_vmbottle.backends.qemu import QemuBackend

    return QemuBackend(accelerator=accelerator, pack_kind=pack_kind, account=account, proofs=folder / "proofs")
