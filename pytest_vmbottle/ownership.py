"""The process that a machine belongs to. A forked child has its memory, but neither its threads nor its children, such as QEMU."""

from __future__ import annotations

import os

import attrs

from pytest_vmbottle.errors import MachineError

__all__ = ["Owner"]


@attrs.frozen
class Owner:
    """The process in which this was made."""

    pid: int = attrs.field(factory=os.getpid)

    @property
    def is_us(self) -> bool:
        """Whether it is this process: not in a forked child."""
        return self.pid == os.getpid()

    def check(self, machine: str) -> None:
        """Returns if it is this process.

        Raises:
            MachineError: It is another one.
        """
        if not self.is_us:
            raise MachineError(
                f"{machine} belongs to process {self.pid} and must be used there; this is process {os.getpid()}, forked from it, which "
                f"may look at its state and pid, and start machines of its own"
            )
