"""The channels of a QEMU guest: its agent, SSH, or one until the other is there."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import attrs

from pytest_vmbottle.channels.fallback import AgentOrSsh
from pytest_vmbottle.channels.guest_agent import GuestAgent
from pytest_vmbottle.channels.port import GUEST_PATH, Channel, Command, Keys
from pytest_vmbottle.channels.runner import Runner
from pytest_vmbottle.channels.ssh import HostKeyMismatch, SshChannel
from pytest_vmbottle.errors import MachineTimeout
from pytest_vmbottle.host.deadline import Deadline

__all__ = ["GuestChannels", "Host"]

_GRACE = 10.0
_LATE = 60.0
"""Seconds that an installed agent may start later than SSH; after that nobody will start it."""


@attrs.frozen(kw_only=True)
class Host:
    """Functions of the hypervisor that the channels of a guest use.

    Attributes:
        alive: Function that returns if the guest can still answer, and raises if not.
        agent_is_there: Function that tells whether something in the guest has opened the agent's port.
        runner_is_there: Function that tells whether something in the guest has opened the runner's port.
        agent_changes, runner_changes: Functions that return how often those ports were opened and closed.
        ssh_address: Function that returns the host's address and port that lead to the guest's SSH server.
        keys: Keys for the login.
        emulated: Whether the guest's processor is emulated.
    """

    alive: Callable[[], None]
    agent_is_there: Callable[[], bool]
    runner_is_there: Callable[[], bool]
    agent_changes: Callable[[], int]
    runner_changes: Callable[[], int]
    ssh_address: Callable[[], tuple[str, int]]
    keys: Keys
    emulated: bool


class GuestChannels:
    """The channels of one guest; safe to use from several threads.

    Attributes:
        has_agent: Whether the guest has an agent that runs commands; None if nobody has looked since it was booted.
        agent: The conversation with it.
        runner: The conversation with our own program, in a guest that came from a pack.
    """

    def __init__(self, agent: socket.socket, runner: socket.socket, host: Host) -> None:
        """Take our ends of both ports; nothing is asked yet."""
        self._host = host
        self.agent = GuestAgent(agent, alive=host.alive, changes=host.agent_changes)
        self.runner = Runner(runner, alive=host.alive, changes=host.runner_changes, is_there=host.runner_is_there, emulated=host.emulated)
        self._agent_or_ssh = AgentOrSsh(
            runner=self.runner,
            agent=self.agent,
            present=host.agent_is_there,
            logged_in=self._logged_in,
            log_in=lambda deadline: self._log_in(deadline, [""]),
        )
        self.has_agent: bool | None = None
        self._agent_due: Deadline | None = None
        self._ssh: SshChannel | None = None
        # Reentrant: `get` holds it while the search for an agent logs in by SSH, which takes it again.
        self._lock = threading.RLock()

    def get(self, deadline: Deadline, *, bulk: bool = False) -> Channel:
        """Return the agent for short commands, SSH for much data or where there is no agent.

        Raises:
            MachineTimeout: Neither answered by the deadline; the message says what SSH said last.
        """
        with self._lock:
            if self.has_agent is None:
                self.has_agent = self._find_agent(deadline)
            return self._ssh_channel(deadline) if bulk or not self.has_agent else self._agent_or_ssh

    def start_runner(self, deadline: Deadline) -> None:
        """Have a runner in the guest, if its Python can run it: a pack that is saved without one has each clone start its own."""
        self.runner.start_in(self.get(deadline), deadline=deadline)

    def adopt(self, *, has_agent: bool, login: int | None, has_runner: bool, deadline: Deadline) -> None:
        """Go on with the agent and the runner that a guest had when it was saved."""
        self.has_agent = has_agent
        if has_runner:
            self.runner.adopt(deadline=Deadline(min(_GRACE, deadline.remaining)))
        if has_agent and self._host.agent_is_there():
            # Proves that the agent came back with the guest, before a test's first command finds out.
            self.agent.sync(deadline=deadline)
            if login is not None:
                self.agent.adopt(login)

    def forget(self) -> None:
        """Look anew for what there is, as after a reboot."""
        self.runner.expect_none()
        with self._lock:
            self.has_agent = self._agent_due = None
            self._log_out()

    def close(self) -> None:
        """Close the connections; may be called again."""
        self.agent.close()
        self.runner.close()
        if self._ssh is not None:
            self._ssh.close()

    def _find_agent(self, deadline: Deadline) -> bool:
        """Wait for the first channel that the guest offers; return whether it is the agent."""
        said = ["it did not answer"]
        found = deadline.poll(lambda: self._look(deadline, said), every=0.2)
        if found is None:
            raise MachineTimeout(f"neither the guest agent nor SSH answered within {deadline.seconds:.0f} s; SSH last: {said[-1]}")
        return found is self.agent

    def _look(self, deadline: Deadline, said: list[str]) -> Channel | None:
        able = None
        with suppress(MachineTimeout):
            # An agent that does not answer is found out in 2 s, so that SSH is tried in turn while the guest boots.
            able = self.agent.runs_commands(deadline=Deadline(min(2.0, deadline.remaining)))
        if able:
            self._log_out()
            return self.agent
        ssh = self._log_in(deadline, said)
        if ssh is None:
            # None means that no agent answered; False that one did, and is of no use.
            said[-1] += " (and the agent may not run commands)" if able is False else ""
            return None
        # Counted from the first login by SSH: until then the guest is booting, and no agent is late.
        self._agent_due = self._agent_due or Deadline(_LATE)
        if able is None and not self._agent_due.expired and _has_agent_installed(ssh):
            return None  # it has not been started yet
        return ssh

    def _logged_in(self) -> SshChannel | None:
        with self._lock:
            if self._ssh is not None and self._ssh.lost:
                self._log_out()
            return self._ssh

    def _log_in(self, deadline: Deadline, said: list[str]) -> SshChannel | None:
        """Return the SSH connection; if there is none yet, note the reason."""
        with self._lock:
            try:
                self._ssh = self._logged_in() or SshChannel.attempt(
                    self._host.ssh_address(), self._host.keys, deadline=deadline, alive=self._host.alive, reasons=said
                )
            except HostKeyMismatch as error:  # the image's own key, until cloud-init has put the machine's in its place
                said[:] = [str(error)]
            return self._ssh

    def _log_out(self) -> None:
        if self._ssh is not None:
            self._ssh.close()
            self._ssh = None

    def _ssh_channel(self, deadline: Deadline) -> SshChannel:
        with self._lock:
            if self._logged_in() is None:
                self._ssh = SshChannel.connect(self._host.ssh_address(), self._host.keys, deadline=deadline, alive=self._host.alive)
            return self._ssh  # type: ignore[return-value]


def _has_agent_installed(ssh: Channel) -> bool:
    script = "command -v qemu-ga >/dev/null"
    return ssh.run(Command(argv=("sh", "-c", script), env=(("PATH", GUEST_PATH),)), deadline=Deadline(_GRACE)).returncode == 0
