"""Commands by the guest agent while there is one, and by SSH while there is none: it can be stopped, restarted or upgraded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

import attrs

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backend import GUEST_PATH, Channel, Command, Finished
from pytest_vmbottle.channels.guest_agent import AgentEnded, GuestAgent
from pytest_vmbottle.channels.ssh import SshChannel
from pytest_vmbottle.errors import MachineDied, MachineTimeout

__all__ = ["AgentOrSsh"]

_RETURN = 1.0
"""Seconds that an agent which is being restarted is waited for: logging in by SSH takes longer."""
_ENDING = 60.0
"""Seconds that a guest may take to power off once its agent has gone."""
_STATE = Command(argv=("systemctl", "is-system-running"), env=(("PATH", GUEST_PATH),))
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
        with self._told_from_the_end():
            channel, deadline = self._way(deadline)
            return channel.run(command, deadline=deadline)

    @contextmanager
    def _told_from_the_end(self) -> Iterator[None]:
        """Waits for the end of a guest that powers off: its agent is the first to go, and only its end says what has happened."""
        try:
            yield
        except AgentEnded:
            Deadline(_ENDING).poll(self._stays, every=0.2)
            raise

    def _stays(self) -> bool:
        """Tell whether the guest goes on, without its agent or with another one; raises `MachineDied` if it has ended."""
        self.agent.check()
        if self.present():
            return True
        with suppress(MachineDied, MachineTimeout):
            way = self.logged_in() or self.log_in(Deadline(_PATIENCE))
            if way is not None:
                return b"stopping" not in way.run(_STATE, deadline=Deadline(_PATIENCE)).stdout
        return False

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
