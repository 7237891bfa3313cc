"""Counts of the instructions that commands take in a guest whose clocks are moved by them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pytest_vmbottle.backends.port import NANOSECONDS_PER_INSTRUCTION
from pytest_vmbottle.channels.port import GUEST_PATH, Command
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.machine.guest_shell import GuestShell

__all__ = ["Instructions", "count_instructions"]

_BEGIN, _END = read_script(__package__, "count_begin.sh"), read_script(__package__, "count_end.sh")
_PATIENCE = 60.0
"""Seconds for the guest to make or remove a control group."""


class Instructions:
    """A count of instructions; `int()` of it is the same as `total`.

    Attributes:
        total: What commands took, with all that they started, in their programs and in the kernel; 0 before the block has ended.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.total = 0

    def __int__(self) -> int:
        return self.total

    def __repr__(self) -> str:
        return f"<Instructions {self.total:,}>"


@contextmanager
def count_instructions(guest: GuestShell) -> Iterator[Instructions]:
    """Count what the commands of a block take (see `Machine.count_instructions`).

    They run in a control group of their own. The processor time of that is exact, and with clocks that follow instructions it is their
    number: what else the guest does meanwhile, and how busy the host is, does not count.
    """
    count = Instructions()
    above = guest.control_group
    group = f"{above}/vmbottle-count-{secrets.token_hex(4)}"
    setting = _ask(guest, _BEGIN, group).strip()
    guest.control_group = group
    try:
        yield count
    except BaseException:
        # The count is of no use any more, and the guest may be gone.
        with suppress(MachineError):
            _ask(guest, _END, group, setting)
        raise
    finally:
        guest.control_group = above
    count.total = int(_ask(guest, _END, group, setting)) * 1000 // NANOSECONDS_PER_INSTRUCTION


def _ask(guest: GuestShell, script: str, *words: str) -> str:
    # As root and not by `GuestShell.command`: a user may make no control groups.
    command = Command(argv=("/bin/sh", "-c", script, "sh", *words), env=(("PATH", GUEST_PATH),), gets_group=False)
    ended = guest.channel.run(command, deadline=Deadline(_PATIENCE))
    if ended.returncode != 0:
        reason = ended.stderr.decode(errors="replace").strip() or f"status {ended.returncode}"
        raise MachineError(f"the guest could not count instructions: {reason}")
    return ended.stdout.decode()
