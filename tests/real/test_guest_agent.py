"""A guest agent that is restarted, stopped and started again by what runs through it, or that may run nothing."""

from __future__ import annotations

import pytest

from pytest_vmbottle import Machine, layer
from pytest_vmbottle.channels.guest_agent import AgentEnded
from pytest_vmbottle.channels.port import GUEST_PATH, Command
from pytest_vmbottle.channels.ssh import SshChannel
from pytest_vmbottle.host.deadline import Deadline

pytestmark = pytest.mark.vm("debian-12")
BY = "ps -o comm= -p $PPID"
"""Ancestors of a command."""


@layer("debian-12")
def without_runner(vm: Machine) -> None:
    """Its commands go by the agent: there is nothing that could run ours."""
    vm.exec("mv /usr/bin/python3 /usr/bin/not-python3")
    # Later, for this command runs through it.
    vm.exec("setsid sh -c 'sleep 1; pkill -x vmbottle-runner' >/dev/null 2>&1 &")
    assert Deadline(60).poll(lambda: vm.exec(BY).stdout == "qemu-ga\n")


@pytest.mark.guests
def test_commands_go_on_by_the_runner_whatever_becomes_of_the_agent(vm: Machine) -> None:
    assert vm.exec("systemctl restart qemu-guest-agent; echo on").stdout == "on\n"
    vm.exec("systemctl stop qemu-guest-agent")
    assert vm.exec(BY).stdout == "vmbottle-runner\n"


@pytest.mark.guests
@pytest.mark.vm(without_runner)
def test_commands_go_on_without_a_runner_whatever_becomes_of_the_agent(vm: Machine) -> None:
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


@pytest.mark.guests
@pytest.mark.vm(without_runner)
def test_a_machine_without_runner_and_agent_can_be_written_down_and_restored(vm: Machine) -> None:
    with pytest.raises(AgentEnded):
        vm.exec("systemctl stop qemu-guest-agent", timeout=300)
    written = vm.snapshot("silent")
    vm.exec("touch /root/later")
    vm.restore(written)
    assert vm.exec(["ls", "/root"]).stdout == ""


@layer("debian-12")
def fettered(vm: Machine) -> None:
    forbidden = "guest-file-open,guest-file-close,guest-file-read,guest-file-write,guest-exec,guest-exec-status"
    unit = f"[Service]\nExecStart=\nExecStart=/usr/sbin/qemu-ga --block-rpcs={forbidden}\n"
    vm.path("/etc/systemd/system/qemu-guest-agent.service.d/as-fedora.conf").parent.mkdir()
    vm.path("/etc/systemd/system/qemu-guest-agent.service.d/as-fedora.conf").write_text(unit)
    restart = Command(argv=("sh", "-c", "systemctl daemon-reload; systemctl restart qemu-guest-agent"), env=(("PATH", GUEST_PATH),))
    ssh = vm.lifecycle.instance.channel(deadline=Deadline(120), bulk=True)  # the agent would end the command with itself
    assert ssh.run(restart, deadline=Deadline(60)).returncode == 0


@pytest.mark.vm(fettered)
@pytest.mark.guests
def test_an_agent_that_is_forbidden_to_run_commands_is_not_the_channel(vm: Machine) -> None:
    assert type(vm.lifecycle.channel) is SshChannel
    assert vm.exec(["systemctl", "is-active", "qemu-guest-agent"]).stdout == "active\n"
