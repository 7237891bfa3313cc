"""Making of what the selected tests need, before any of them runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.plugin.collection import specs_of
from pytest_vmbottle.plugin.session import SESSION

if TYPE_CHECKING:
    import pytest

    from pytest_vmbottle.catalog.packs import Pack
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["warm"]


def warm(session: pytest.Session) -> list[Pack]:
    """Build or pull the packs of all tests of a session, and return those that are now there, each once.

    Machines that this computer cannot run are left out, and told.

    Raises:
        VMBottleError: A pack could not be made.
    """
    ours = session.config.stash[SESSION]
    packs: dict[str, Pack] = {}
    # By their text, since equal specs may be different objects; in the order of the tests.
    specs = {repr(spec): spec for item in session.items for spec in specs_of(item)}
    for number, spec in enumerate(specs.values(), 1):
        why = _unable(session, spec)
        if why is not None:
            ours.say(f"{number} of {len(specs)}: {spec.name} is left out: {why}")
            continue
        began = time.monotonic()
        pack = ours.provisioner(spec.backend).prepare(spec)
        ours.say(f"{number} of {len(specs)}: {pack.manifest.name if pack else spec.image} is ready, {time.monotonic() - began:.1f} s")
        if pack is not None:
            packs[pack.key] = pack
    return list(packs.values())


def _unable(session: pytest.Session, spec: MachineSpec) -> str | None:
    ours = session.config.stash[SESSION]
    try:
        return ours.unsupported_reason(spec)
    except BackendUnavailable as error:
        return str(error)
