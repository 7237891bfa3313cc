"""Capsules of failed tests: their machines as they are at the failure, before any teardown."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from pytest_vmbottle.errors import VMBottleError
from pytest_vmbottle.standalone.capsules import Capsule
from pytest_vmbottle.standalone.stored import Stored

if TYPE_CHECKING:
    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.plugin.session import Session

__all__ = ["save_capsule"]

_LABEL = "failed"


def save_capsule(session: Session, test: str, error: str) -> str:
    """Save the machines of a test, and return the command that starts them again, or why there is none.

    Args:
        session: The run.
        test: The id of the test.
        error: The first line of its error.
    """
    machines: dict[str, tuple[Stored, str]] = {}
    addresses: dict[str, str] = {}
    lines = list[str]()
    try:
        for machine in session.machines:
            try:
                name = _free(machine.name, machines)
                machines[name] = _saved(session, machine)
                if machine.addresses:
                    addresses[name] = " ".join(machine.addresses.values())
            # It must not hide the test's own error, nor keep the others out.
            except (VMBottleError, OSError) as reason:
                lines.append(f"{machine.name} is not in the capsule: {str(reason).partition(chr(10))[0]}")
        if machines:
            capsule = Capsule.save(session.catalog.root, machines, test=test, error=error, addresses=addresses)
            lines.append(_command(session, capsule))
    except (VMBottleError, OSError) as reason:
        lines.append(f"the machines could not be saved: {str(reason).partition(chr(10))[0]}")
    finally:
        for stored, _ in machines.values():
            if stored.start.saved is not None:  # the capsule has links to its files
                shutil.rmtree(stored.start.saved, ignore_errors=True)
    return "\n".join(lines)


def _command(session: Session, capsule: Capsule) -> str:
    command = session.by_hand(f"vmbottle {f'--catalog {session.catalog.root} ' if session.options.catalog else ''}replay {capsule.name}")
    session.capsules.append(command)
    return command


def _saved(session: Session, machine: Machine) -> tuple[Stored, str]:
    provisioner = session.provisioner(machine.backend)
    stored = Stored.of(machine.snapshot(_LABEL), provisioner.origin(machine.spec), _LABEL)
    return stored, provisioner.fingerprint(machine.spec)


def _free(name: str, taken: dict[str, tuple[Stored, str]]) -> str:
    number = 1
    while (found := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return found
