"""Commands by the guest agent while there is one, and by SSH while there is none: it can be stopped, restarted or upgraded."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

import attrs

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backend import Channel, Command, Finished
from pytest_vmbottle.channels.guest_agent import GuestAgent
from pytest_vmbottle.channels.ssh import SshChannel
from pytest_vmbottle.errors import MachineTimeout

__all__ = ["AgentOrSsh"]

_RETURN = 1.0
"""Seconds that an agent which is being restarted is waited for: logging in by SSH takes longer."""
_PATIENCE = 20.0
"""Seconds that it may take to find another way, where a command has less."""


@attrs.frozen(kw_only=True)
class AgentOrSsh:
    """The channel of a guest whose agent may come and go.

    Attributes:
        agent: The conversation with it, whichever agent that is.
        present: Tells whether there is one now: whether its port is open in the guest.
        logged_in: Gives the SSH connection that there is already.
        log_in: Tries to get one.
    """

    agent: GuestAgent
    present: Callable[[], bool]
    logged_in: Callable[[], SshChannel | None]
    log_in: Callable[[Deadline], SshChannel | None]

    def _way(self, deadline: Deadline) -> tuple[Channel, Deadline]:
        """What to speak by, and until when: what it takes to find another way is not the command's time."""
        way = self._known() or Deadline(_RETURN).poll(self._known)
        if way is not None:
            return way, deadline
        limit = Deadline(max(_PATIENCE, deadline.remaining))
        way = limit.poll(lambda: self._known() or self.log_in(limit), every=0.2)
        if way is None:
            raise MachineTimeout(f"the guest agent has ended, and SSH did not let us in within {limit.seconds:.0f} s")
        return way, Deadline(deadline.seconds)

    def _known(self) -> Channel | None:
        return self.agent if self.present() else self.logged_in()

    def run(self, command: Command, *, deadline: Deadline) -> Finished:
        """Runs a command to its end (see `Channel.run`)."""
        channel, deadline = self._way(deadline)
        return channel.run(command, deadline=deadline)

    def put(self, source: BinaryIO, command: Command, *, deadline: Deadline) -> Finished:
        """Runs a command with a host file as its input."""
        channel, deadline = self._way(deadline)
        return channel.put(source, command, deadline=deadline)

    def get(self, command: Command, sink: BinaryIO, *, deadline: Deadline) -> Finished:
        """Runs a command and writes its standard output to a host file."""
        channel, deadline = self._way(deadline)
        return channel.get(command, sink, deadline=deadline)

    def close(self) -> None:
        """Gives up the agent's line; SSH is closed by who logged in."""
        self.agent.close()
