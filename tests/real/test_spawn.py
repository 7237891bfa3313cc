"""Commands that run beside the test, in a real guest."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from pytest_vmbottle import CommandTimeout, Machine, MachineDied, MachineError
from pytest_vmbottle.channels.ssh import SshChannel

pytestmark = pytest.mark.vm("debian-12")


def test_output_comes_while_the_command_runs_and_it_reads_what_it_is_given(session_vm: Machine) -> None:
    with session_vm.spawn("echo one; read word; echo got $word; echo aside >&2; exec sleep 4714") as process:
        assert next(process.stdout) == "one\n"
        assert process.poll() is None
        process.stdin.write("something\n")
        assert next(process.stdout) == "got something\n"
        assert next(process.stderr) == "aside\n"
        assert (process.stdout.text, process.returncode) == ("one\ngot something\n", None)
    assert process.wait() == -9
    assert list(process.stdout) == []


def test_kill_ends_what_the_command_has_started_at_once_also_where_it_was_only_just_begun(session_vm: Machine) -> None:
    early = session_vm.spawn("sleep 4715")
    early.kill()
    process = session_vm.spawn("sleep 4715 & setsid sleep 4715 & echo begun; wait")
    assert next(process.stdout) == "begun\n"
    process.kill()
    process.kill()
    assert (early.returncode, process.returncode) == (-9, -9)
    assert session_vm.exec(["pgrep", "-f", "sleep 4715"], check=False).stdout == ""


def test_another_signal_can_be_caught_and_one_that_does_not_exist_is_refused(session_vm: Machine) -> None:
    process = session_vm.spawn("trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.1; done")
    assert next(process.stdout) == "ready\n"
    with pytest.raises(ValueError, match="'NONE'"):
        process.kill("NONE")
    process.kill("SIGUSR1")
    assert process.wait(timeout=60) == 5
    assert "caught\n" in list(process.stdout)


@pytest.mark.guests
def test_a_wait_that_takes_too_long_leaves_the_command_running(session_vm: Machine) -> None:
    with session_vm.spawn("echo so far; sleep 4716") as process:
        assert next(process.stdout) == "so far\n"
        with pytest.raises(CommandTimeout, match=r"(?m)^so far$"):
            process.wait(timeout=0.3)
        assert process.poll() is None
        assert session_vm.exec(["pgrep", "-f", "sleep 4716"]).ok


def test_bytes_of_all_kinds_go_in_and_come_out_and_the_streams_end(session_vm: Machine) -> None:
    every = bytes(range(256)) * 4000
    process = session_vm.spawn(["cat"], input=every)
    assert "".join(process.stdout).encode("utf-8", "surrogateescape") == every
    assert (process.wait(), list(process.stderr)) == (0, [])
    assert session_vm.spawn(["cat"], input="").wait(timeout=60) == 0
    with pytest.raises(BrokenPipeError):
        process.stdin.write("more")


def test_the_keywords_of_exec_hold_and_a_program_that_is_not_there_ends_with_127(session_vm: Machine) -> None:
    process = session_vm.spawn('id -un; pwd; echo "$ONE"', user="nobody", cwd="/usr", env={"ONE": "1"})
    assert (list(process.stdout), process.wait()) == (["nobody\n", "/usr\n", "1\n"], 0)
    assert session_vm.spawn(["no-such-program"]).wait() == 127


@pytest.mark.guests
def test_several_run_beside_each_other_and_beside_commands(session_vm: Machine) -> None:
    def said(number: int) -> list[str]:
        return list(session_vm.spawn(f"for i in 1 2 3; do echo {number}-$i; sleep 0.1; done").stdout)

    with ThreadPoolExecutor(4) as pool:
        all_said = pool.map(said, range(4))
        assert session_vm.exec(["echo", "here"]).stdout == "here\n"
        assert list(all_said) == [[f"{number}-{i}\n" for i in (1, 2, 3)] for number in range(4)]


@pytest.mark.guests
def test_output_that_nobody_reads_does_not_hold_the_command_up_and_its_end_is_kept(session_vm: Machine) -> None:
    process = session_vm.spawn("head -c 20000000 /dev/zero; echo end")
    assert process.wait(timeout=300) == 0
    session_vm.wait_until(lambda: process.stdout.ended)
    assert len(process.stdout.text) == 16 << 20
    assert process.stdout.text.endswith("\0end\n")
    lines = list(process.stdout)
    assert lines[0] == f"[vmbottle: {20000004 - (16 << 20)} bytes left out]\n"
    assert max(map(len, lines)) <= 1 << 20


@pytest.mark.guests
def test_a_lost_connection_ends_it_with_an_error_and_the_next_command_gets_a_new_one(session_vm: Machine, either: Machine) -> None:
    over_ssh = isinstance(either.guest.channel, SshChannel)
    process = either.spawn("echo here; sleep 4717")
    assert next(process.stdout) == "here\n"
    # The command that ends what carries it has no status itself.
    with suppress(MachineError):
        session_vm.exec("pkill -KILL -x sshd; systemctl restart ssh" if over_ssh else "pkill -KILL -x vmbottle-runner", check=False)
    with pytest.raises(MachineError, match="SSH" if over_ssh else "runner ended"):
        process.wait(timeout=300)
    assert list(session_vm.spawn("echo again; pkill -f 'sleep 471[7]'").stdout) == ["again\n"]


@pytest.mark.guests
def test_it_needs_no_ssh_in_the_guest_also_after_a_reboot(vm: Machine) -> None:
    vm.exec("systemctl mask --now ssh.service ssh.socket; pkill -x sshd", check=False)
    for _ in range(2):
        assert vm.spawn(["cat"], input="typed").wait(timeout=60) == 0
        assert vm.exec("cat", input="typed", stream=lambda _: None).stdout == "typed"
        vm.reboot()


@pytest.mark.guests
def test_it_ends_with_its_machine(vm: Machine) -> None:
    process = vm.spawn("echo here; sleep 4718")
    assert next(process.stdout) == "here\n"
    vm.lifecycle.instance.stop()
    with pytest.raises(MachineDied):
        process.wait(timeout=300)
    process.close()
    assert list(process.stdout) == []


def test_exec_passes_its_output_on_while_it_runs_and_gives_the_same_result(session_vm: Machine) -> None:
    came: list[tuple[str, float]] = []
    script = r"printf 'red \033[31m\n'; sleep 2; echo late >&2; cat; exit 3"
    result = session_vm.exec(script, input="fed", check=False, stream=lambda line: came.append((line, time.monotonic())))
    assert sorted(line for line, _ in came) == ["fed", "late\n", "red \\x1b[31m\n"]
    assert came[-1][1] - came[0][1] > 1
    assert (result.returncode, result.stdout, result.stderr) == (3, "red \x1b[31m\nfed", "late\n")
    plain = session_vm.exec(script, input="fed", check=False)
    assert (plain.argv, plain.returncode, plain.stdout, plain.stderr) == (result.argv, 3, result.stdout, result.stderr)


@pytest.mark.guests
def test_exec_that_passes_output_on_is_killed_at_its_deadline_or_where_nobody_takes_it(session_vm: Machine) -> None:
    with pytest.raises(CommandTimeout) as caught:
        session_vm.exec("echo begun; setsid sleep 4719 & sleep 4719", timeout=3, stream=lambda _: None)
    assert caught.value.result.stdout == "begun\n"

    def refuse(line: str) -> None:
        raise RuntimeError(line)

    with pytest.raises(RuntimeError, match="begun"):
        session_vm.exec("echo begun; sleep 4719", stream=refuse)
    assert session_vm.exec(["pgrep", "-f", "sleep 4719"], check=False).stdout == ""
