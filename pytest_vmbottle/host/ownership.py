"""Ownership of machines by processes.

A forked child has its parent's memory, but neither its threads nor its children, such as QEMU.
"""

from __future__ import annotations

import os

import attrs

from pytest_vmbottle.errors import MachineError

__all__ = ["Owner"]


@attrs.frozen
class Owner:
    """The process in which this object was made."""

    pid: int = attrs.field(factory=os.getpid)

    @property
    def is_us(self) -> bool:
        """Tell whether this process is the owner; a forked child is not."""
        return self.pid == os.getpid()

    def check(self, machine: str) -> None:
        """Check that this process is the owner.

        Raises:
            MachineError: It is another process.
        """
        if not self.is_us:
            raise MachineError(
                f"{machine} belongs to process {self.pid}: use it there. This process, {os.getpid()}, was forked from it, and may only "
                f"read the machine's state and pid, or start machines of its own"
            )
