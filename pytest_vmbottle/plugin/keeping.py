"""Machines of tests that live on after the run: each is restored from a snapshot, in a daemon of its own."""

from __future__ import annotations

import re
from itertools import count
from typing import TYPE_CHECKING

from pytest_vmbottle.errors import VMBottleError
from pytest_vmbottle.settings import SETTINGS
from pytest_vmbottle.standalone.client import Kept
from pytest_vmbottle.standalone.stored import Stored

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.plugin.session import Session

__all__ = ["keep"]

_LABEL = "kept"
_NAME = 32
"""Characters of a machine's name, before what makes it unique."""
_PATIENCE = 15.0
"""Seconds to wait for memory: a run must not stand still for machines that only may be wanted."""


def keep(session: Session, machine: Machine, test: str) -> str:
    """Have a copy of a machine live on, and return the command for its shell, or why there is none.

    The machine itself ends with its test, whose process holds it. So a snapshot of it, RAM included, is restored by a daemon. The copy is
    on no private LAN, and other ports of the host lead to it.

    Args:
        session: The run.
        machine: The machine, which goes on.
        test: The test's name.
    """
    try:
        snapshot = machine.snapshot(f"kept of {test}")
        place = Kept(_free(session.catalog.machines, test, machine.name))
        order = {
            "catalog": str(session.catalog.root),
            "folder": str(session.config.rootpath),
            "settings": _settings(session),
            # Without a LAN, whose switch is a thread of this process.
            "keywords": {"name": place.name, "source": str(machine.spec.image), "network": machine.spec.nat},
            "seconds": session.options.keep_seconds,
            "memory_seconds": _PATIENCE,
        }
        # It returns when the copy runs, so this machine may end from here on. Without what was done beforehand: that is in the snapshot.
        origin = session.provisioner(machine.backend).origin(machine.spec)
        place.start(order, session.say, snapshot=Stored.of(snapshot, origin, _LABEL))
    except (VMBottleError, OSError) as error:
        # It must not hide the test's own error.
        return f"{machine.name} could not be kept: {str(error).partition(chr(10))[0]}"
    catalog = f"--catalog {session.catalog.root} " if session.options.catalog else ""
    command = session.by_hand(f"vmbottle {catalog}machine shell {place.name}")
    session.kept.append(command)
    return command


def _free(machines: Path, test: str, machine: str) -> Path:
    """Return the folder of the first name that no machine has."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", test if machine == "vm" else f"{test}-{machine}").strip("-")[:_NAME].rstrip("-")
    # A name of a machine begins with a letter.
    stem = plain if plain[:1].isalpha() else f"vm-{plain}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    return next(machines / name for name in names if not (machines / name).exists())


def _settings(session: Session) -> dict[str, str]:
    """Return the run's settings as the daemon reads them."""
    options = session.options
    given = {
        "backend": options.backend,
        "accel": options.accelerator,
        # By name: the daemon looks the account up again.
        "run-as": str(options.account.name) if options.account else "",
        "timeout-factor": str(options.timeout_factor),
        "memory-budget": "" if options.memory_budget is None else str(options.memory_budget),
    }
    return {setting.name: given[setting.name] for setting in SETTINGS if given.get(setting.name)}
