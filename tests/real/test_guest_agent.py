"""A guest agent that is restarted, stopped and started again by what runs through it."""

from __future__ import annotations

import pytest

from pytest_vmbottle import Machine
from pytest_vmbottle._os import Deadline
from pytest_vmbottle.channels.guest_agent import AgentEnded

pytestmark = pytest.mark.vm("debian-12")
BY = "ps -o comm= -p $PPID"
"""What has started a command."""


def test_commands_go_on_whatever_becomes_of_the_agent(vm: Machine) -> None:
    left = vm.exec("sleep 4720 >/dev/null 2>&1 & echo $!").stdout.strip()
    with pytest.raises(AgentEnded):
        vm.exec("systemctl restart qemu-guest-agent; sleep 4721", timeout=300)
    assert vm.exec(["ps", "-o", "args=", "-p", left]).stdout == "sleep 4720\n"

    vm.wait_until("systemctl is-active qemu-guest-agent")
    with pytest.raises(AgentEnded):
        vm.exec("systemctl stop qemu-guest-agent", timeout=300)
    assert vm.exec(BY).stdout == "sshd\n"
    assert vm.exec(["ps", "-o", "args=", "-p", left]).stdout == "sleep 4720\n"

    vm.exec("systemctl start qemu-guest-agent")
    assert Deadline(60).poll(lambda: vm.exec(BY).stdout == "qemu-ga\n")
    assert vm.exec("cat /proc/self/cgroup").stdout == "0::/vmbottle\n"


def test_a_machine_without_its_agent_can_be_written_down_and_restored(vm: Machine) -> None:
    with pytest.raises(AgentEnded):
        vm.exec("systemctl stop qemu-guest-agent", timeout=300)
    written = vm.snapshot("silent")
    vm.exec("touch /root/later")
    vm.restore(written)
    assert vm.exec(["ls", "/root"]).stdout == ""
