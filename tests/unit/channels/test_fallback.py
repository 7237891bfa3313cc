"""Two ways to a guest, of which one comes and goes."""

from __future__ import annotations

from typing import Any, cast

import pytest

from pytest_vmbottle import MachineTimeout
from pytest_vmbottle.channels import fallback
from pytest_vmbottle.channels.fallback import AgentOrSsh
from pytest_vmbottle.channels.port import Command, Finished
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.testing import FakeChannel


class Guest:
    """Has an agent or none, and lets in by SSH or does not."""

    def __init__(self) -> None:
        self.agent, self.ssh, self.lets_in = True, False, True
        self.logins, self.is_ready, self.warned = 0, False, 0

    def log_in(self, _: Deadline) -> Any:
        self.logins += 1
        self.ssh = self.lets_in
        return self._by(b"ssh") if self.ssh else None

    @staticmethod
    def _by(name: bytes) -> Any:
        return FakeChannel(lambda _: Finished(returncode=0, stdout=name))

    @property
    def channel(self) -> AgentOrSsh:
        return AgentOrSsh(
            runner=cast("Any", self),
            agent=cast("Any", self._by(b"agent")),
            present=lambda: self.agent,
            logged_in=lambda: self._by(b"ssh") if self.ssh else None,
            log_in=self.log_in,
        )

    def warn_if_lost(self) -> None:
        self.warned += 1

    def run(self) -> bytes:
        return self.channel.run(Command(argv=("true",)), deadline=Deadline(0.05)).stdout


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Guest:
    monkeypatch.setattr(fallback, "_RETURN", 0.02)
    monkeypatch.setattr(fallback, "_PATIENCE", 0.1)
    return Guest()


def test_commands_go_by_the_agent_while_it_is_there_and_again_when_it_is_back(guest: Guest) -> None:
    assert guest.run() == b"agent"
    guest.agent = False
    warned = guest.warned
    assert (guest.run(), guest.run(), guest.logins, guest.warned) == (b"ssh", b"ssh", 1, warned)
    guest.agent = True
    assert guest.run() == b"agent"


def test_an_agent_that_is_restarted_is_waited_for_before_anybody_logs_in(guest: Guest) -> None:
    asked = iter([False, True])
    channel = AgentOrSsh(
        runner=cast("Any", guest),
        agent=guest.channel.agent,
        present=lambda: next(asked, True),
        logged_in=guest.channel.logged_in,
        log_in=guest.log_in,
    )
    assert channel.run(Command(argv=("true",)), deadline=Deadline(5)).stdout == b"agent"
    assert guest.logins == 0


def test_a_guest_that_answers_by_neither_is_a_time_out(guest: Guest) -> None:
    guest.agent = guest.lets_in = False
    with pytest.raises(MachineTimeout, match="SSH"):
        guest.run()
    assert guest.logins > 1
