"""A channel that uses the guest agent while it is there, and SSH otherwise.

An agent can be stopped, restarted or upgraded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import attrs

from pytest_vmbottle.channels.guest_agent import AgentEnded, GuestAgent
from pytest_vmbottle.channels.piecewise import PiecewiseProcess
from pytest_vmbottle.channels.port import GUEST_PATH, Channel, Command, Finished, Running
from pytest_vmbottle.channels.runner import Runner
from pytest_vmbottle.channels.ssh import SshChannel
from pytest_vmbottle.errors import MachineDied, MachineError, MachineTimeout
from pytest_vmbottle.host.deadline import Deadline

__all__ = ["AgentOrSsh"]

_RETURN = 1.0
"""Seconds to wait for an agent that is being restarted: logging in by SSH takes longer."""
_ENDING = 60.0
"""Seconds that a guest may take to power off once its agent has gone."""
# It prints "stopping" from the moment that a shutdown or reboot begins (systemctl(1)).
_STATE = Command(argv=("systemctl", "is-system-running"), env=(("PATH", GUEST_PATH),))
_START = 60.0
"""Seconds for the start of a runner: Python takes 15 in a guest whose host is emulated, and a guest without Python says so at once."""
_PATIENCE = 20.0
"""Seconds for finding another channel, even if the command has less."""


@attrs.frozen(kw_only=True)
class AgentOrSsh(Channel):
    """The channel of a guest whose agent may come and go.

    Attributes:
        runner: The channel to our own program, the quickest where it is there.
        agent: The channel to the agent, whichever agent that is.
        present: Function that tells whether an agent has its port open in the guest now.
        logged_in: Function that returns the existing SSH connection, if any.
        log_in: Function that tries to make one.
    """

    runner: Runner
    agent: GuestAgent
    present: Callable[[], bool]
    logged_in: Callable[[], SshChannel | None]
    log_in: Callable[[Deadline], SshChannel | None]

    def _way(self, deadline: Deadline) -> tuple[Channel, Deadline]:
        """Choose the channel for a command; return it with the command's deadline.

        Time for finding another channel is not taken from the command's.
        """
        if self.runner.is_ready:
            return self.runner, deadline
        way: Channel | None = self._known() or Deadline(_RETURN).poll(self._known)
        if way is self.agent:  # which is gone too where the guest powers off
            self.runner.warn_if_lost()
        if way is not None:
            return way, deadline
        # An agent that is started again meanwhile is as welcome as a login, so both are tried in turn.
        limit = Deadline(max(_PATIENCE, deadline.remaining))
        way = limit.poll(lambda: self._known() or self.log_in(limit), every=0.2)
        if way is None:
            raise MachineTimeout(f"the guest agent has ended, and SSH login timed out after {limit.seconds:.0f} s")
        return way, Deadline(deadline.seconds)

    def _known(self) -> Channel | None:
        return self.agent if self.present() else self.logged_in()

    def run(self, command: Command, *, deadline: Deadline) -> Finished:
        """Run a command to its end (see `Channel.run`)."""
        with self._told_from_the_end():
            channel, deadline = self._way(deadline)
            return channel.run(command, deadline=deadline)

    def start(
        self, command: Command, *, stdout: Callable[[bytes], object], stderr: Callable[[bytes], object], deadline: Deadline
    ) -> Running:
        """Start a command without input (see `Channel.start`): over SSH if there is a login, else piece by piece."""
        if self.runner.is_ready:
            return self.runner.start(command, stdout=stdout, stderr=stderr, deadline=deadline)
        if (ssh := self.logged_in()) is not None:
            return ssh.start(command, stdout=stdout, stderr=stderr, deadline=deadline)
        return PiecewiseProcess(self, command, stdout=stdout, stderr=stderr)

    @property
    def has_files(self) -> bool:
        """Tell whether the runner is there and has them (see `Channel.has_files`)."""
        return self.runner.has_files

    def streaming(self, *, deadline: Deadline, terminals: bool = False) -> Channel | None:
        """Return the runner, which is started anew where the guest has booted since (see `Channel.streaming`)."""
        limit = Deadline(min(_START, deadline.remaining))
        with suppress(MachineError):
            if self.runner.is_ready or (self.present() and self.runner.start_in(self.agent, deadline=limit, again=False)):
                return self.runner if self.runner.has_terminals or not terminals else None
        return None

    @contextmanager
    def _told_from_the_end(self) -> Iterator[None]:
        """Wait for the end of a guest that is powering off, after its agent has ended.

        The agent is the first to go, and only the guest's end explains it.
        """
        try:
            yield
        except AgentEnded:
            Deadline(_ENDING).poll(self._stays, every=0.2)
            raise

    def _stays(self) -> bool:
        """Tell whether the guest goes on, without its agent or with another one.

        Raises `MachineDied` if it has ended.
        """
        self.agent.check()
        # An agent that has been started again proves that the guest does not power off.
        if self.present():
            return True
        # A lost login proves nothing: a guest that powers off drops it, and so does one that is only busy. The next look tells.
        with suppress(MachineDied, MachineTimeout):
            way = self.logged_in() or self.log_in(Deadline(_PATIENCE))
            if way is not None:
                return b"stopping" not in way.run(_STATE, deadline=Deadline(_PATIENCE)).stdout
        return False

    def close(self) -> None:
        """Close the agent's socket; the owner of the SSH login closes that."""
        self.agent.close()
