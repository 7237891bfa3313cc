"""Commands in a real guest, over the guest agent and over SSH: the same call gives the same result."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pytest_vmbottle import CommandFailed, CommandSucceeded, CommandTimeout, Machine, MachineError

pytestmark = pytest.mark.vm("debian-12")

AWKWARD = [
    "plain",
    "",
    " spaces  inside ",
    "it's",
    'say "hi"',
    "$HOME ${PATH} $(id) `id`",
    "back\\slash \\n",
    "line one\nline two\n",
    "\ttab",
    "-n",
    "--",
    "-rf /",
    "* ? [a-z] {a,b} ~",
    "a;b|c&d>e<f#g!h%i",
    "grüße 世界 🙂",
    "=x",
    "x" * 30000,
]


def test_arguments_arrive_exactly_as_they_were_given(either: Machine) -> None:
    sent = either.exec(["printf", "%s\\0", *AWKWARD]).stdout.split("\0")[:-1]
    assert sent == AWKWARD


def test_a_string_is_a_shell_script_that_stops_at_the_first_error(either: Machine) -> None:
    result = either.exec("echo one; false; echo two", check=False)
    assert (result.returncode, result.stdout) == (1, "one\n")
    assert "unset" in either.exec('echo "$unset"', check=False).stderr


def test_both_streams_are_kept_apart(either: Machine) -> None:
    result = either.exec("echo out; echo err >&2")
    assert (result.stdout, result.stderr, result.returncode) == ("out\n", "err\n", 0)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "exit 137"], 137),
        (["sh", "-c", "kill -KILL $$"], -9),
        (["sh", "-c", "kill -TERM $$"], -15),
    ],
)
def test_the_status_tells_an_exit_from_a_death_by_signal(either: Machine, command: list[str], status: int) -> None:
    assert either.exec(command, check=False).returncode == status


def test_a_program_that_is_not_there_gives_127_and_one_that_cannot_run_126(either: Machine) -> None:
    missing = either.exec(["no-such-program", "x"], check=False)
    assert (missing.returncode, missing.stderr) == (127, "no-such-program: not found\n")
    refused = either.exec(["/etc/hostname"], check=False)
    assert (refused.returncode, refused.stderr) == (126, "/etc/hostname: cannot be executed\n")


def test_a_failing_command_raises_with_everything_it_printed(either: Machine) -> None:
    with pytest.raises(CommandFailed, match="status 4") as caught:
        either.exec("echo evidence; echo more >&2; exit 4")
    assert caught.value.result.stdout == "evidence\n"
    assert "evidence" in str(caught.value)
    assert "more" in str(caught.value)


def test_a_command_that_has_to_fail_gives_its_result_and_success_is_an_error_with_everything_it_printed(session_vm: Machine) -> None:
    refused = session_vm.fail("cat; cat /nothing", user="nobody", input="asked\n")
    assert (refused.returncode, refused.stdout) == (1, "asked\n")
    with pytest.raises(CommandSucceeded, match="`sh -eu -c 'echo evidence'` succeeded, but had to fail") as caught:
        session_vm.fail("echo evidence")
    assert caught.value.result.stdout == "evidence\n"
    with pytest.raises(CommandTimeout):
        session_vm.fail(["sleep", "1000"], timeout=1)


@pytest.mark.guests
def test_a_command_runs_on_a_terminal_of_its_own(session_vm: Machine) -> None:
    assert session_vm.exec("test -t 0 && test -t 1 && test -t 2 && stty size; echo $TERM >&2", tty=True).stdout == "24 80\r\nxterm\r\n"
    assert session_vm.fail("exit 3", tty=True).returncode == 3
    asked = session_vm.exec(
        "stty -echo; read word; id -un; echo $word; echo $SAID; pwd",
        tty=True,
        input="typed\n",
        user="nobody",
        env={"SAID": "x"},
        cwd="/srv",
    )
    assert asked.stdout.replace("\r\n", " ").endswith("nobody typed x /srv ")
    with pytest.raises(CommandTimeout) as late:
        session_vm.exec("echo begun; sleep 4714", tty=True, timeout=3)
    assert late.value.result.stdout == "begun\r\n"
    assert session_vm.exec(["pgrep", "-f", "sleep 4714"], check=False).stdout == ""
    with pytest.raises(ValueError, match="leave out stream="):
        session_vm.exec(["true"], tty=True, stream=print)


def test_bytes_that_are_no_text_are_kept(either: Machine) -> None:
    every = bytes(range(1, 256))
    octal = "".join(f"\\{byte:03o}" for byte in every)
    assert either.exec(["printf", octal.replace("%", "%%")]).stdout_bytes == every


def test_input_of_any_length_reaches_the_command(either: Machine) -> None:
    for length in (1, 1500, 2000, 2500, 3000, 3500, 5000, 50_000):
        assert either.exec(["wc", "-c"], input=b"x" * length, timeout=20).stdout == f"{length}\n"


def test_input_of_any_bytes_reaches_the_command(either: Machine) -> None:
    data = bytes(range(256)) * 2000
    assert either.exec(["cat"], input=data).stdout_bytes == data
    assert either.exec(["wc", "-c"]).stdout.strip() == "0"


def test_environment_and_folder_are_what_was_asked_for(either: Machine) -> None:
    result = either.exec(["sh", "-c", 'pwd; printf "%s|" "$ONE" "$PATH" "$HOME"'], env={"ONE": "1 'quoted'"}, cwd="/usr/share")
    assert result.stdout == "/usr/share\n1 'quoted'|/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin|/root|"
    assert either.exec(["pwd"]).stdout == "/\n"


def test_nothing_else_is_in_the_environment_on_either_channel(either: Machine) -> None:
    names = {line.partition("=")[0] for line in either.exec(["env"]).stdout.splitlines()}
    assert names == {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "VMBOTTLE_EXEC"}


def test_another_user_can_run_it(either: Machine) -> None:
    home = either.exec("getent passwd nobody | cut -d: -f6").stdout
    result = either.exec(["sh", "-c", "id -un; echo $HOME; echo $USER"], user="nobody")
    assert result.stdout == f"nobody\n{home}nobody\n"
    unknown = either.exec(["true"], user="somebody", check=False)
    assert unknown.returncode == 125
    assert "no user somebody" in unknown.stderr


def test_a_timeout_kills_the_command_with_its_children_and_says_what_it_had_printed(either: Machine) -> None:
    began = time.monotonic()
    with pytest.raises(CommandTimeout) as caught:
        either.exec("echo before; sleep 4711 & setsid sleep 4711 & sleep 4711", timeout=2)
    assert time.monotonic() - began < 40
    assert caught.value.result.stdout == "before\n"
    assert caught.value.result.note == ""
    assert "before" in str(caught.value)
    assert either.exec(["pgrep", "-f", "sleep 4711"], check=False).stdout == ""
    assert either.exec(["echo", "alive"]).stdout == "alive\n"


@pytest.mark.guests
def test_a_timeout_also_kills_what_shed_its_environment_user_and_session_and_says_that_this_held_the_output(either: Machine) -> None:
    either.exec("sleep 4712 >/dev/null 2>&1 &")
    shedding = (
        "env -i setsid sleep 4711 & sudo -u nobody sleep 4711 & su -s /bin/sh nobody -c 'sleep 4711' & (setsid sh -c 'sleep 4711 &' &)"
    )
    # The second time: the first one reads much from the disk.
    usual = [either.exec("sudo -u nobody true; su -s /bin/sh nobody -c true").duration for _ in range(2)][-1]
    with pytest.raises(CommandTimeout, match="background") as caught:
        either.exec(f"{shedding}\necho started", timeout=max(5, 10 * usual))  # on a busy host a guest may be this slow
    assert caught.value.result.stdout == "started\n"
    assert either.exec("ps axo args= | grep -x 'sleep 471[0-9]'").stdout == "sleep 4712\n"
    either.exec("pkill -f 'sleep 471[2]'")


@pytest.mark.guests
def test_a_timeout_also_kills_what_became_another_login(vm: Machine) -> None:
    """As sshd, login and cron do; it takes the rights of root."""
    vm.exec("sleep 4712 >/dev/null 2>&1 &")
    with pytest.raises(CommandTimeout):
        vm.exec("setsid sh -c 'echo 0 > /proc/self/loginuid; exec env -i sleep 4711' & sleep 4711", timeout=5)
    assert vm.exec("ps axo args= | grep -x 'sleep 471[0-9]'").stdout == "sleep 4712\n"
    # Groups go with the last process in them.
    assert len(vm.exec("ls -d /sys/fs/cgroup/vmbottle/*/").stdout.split()) <= 3


def test_commands_of_an_emulated_guest_lie_at_the_same_addresses_each_time_and_services_do_not(session_vm: Machine) -> None:
    """An emulator translates anew what lies elsewhere: `true` would take five times as long."""
    emulated = b"\0tcg," in Path(f"/proc/{session_vm.pid}/cmdline").read_bytes()
    fixed = "00040000\n"  # ADDR_NO_RANDOMIZE, of personality(2)
    assert (session_vm.exec(["cat", "/proc/self/personality"]).stdout == fixed) is emulated
    assert session_vm.exec("cat /proc/sys/kernel/randomize_va_space; cat /proc/1/personality").stdout == "2\n00000000\n"


def test_what_the_oom_killer_ends_is_said_and_it_ends_nothing_else(either: Machine) -> None:
    hungry = "x = b'x' * (200 << 20); open('/proc/sysrq-trigger', 'w').write('f'); import time; time.sleep(100)"
    agent = either.exec("systemctl show -p MainPID qemu-guest-agent").stdout
    left = either.exec("sleep 4713 >/dev/null 2>&1 & echo $!").stdout
    result = either.exec(["python3", "-c", hungry], check=False, timeout=300)
    assert result.returncode == -9
    assert "OOM" in result.note
    assert either.exec("systemctl show -p MainPID qemu-guest-agent").stdout == agent
    either.exec(["kill", left.strip()])


def test_a_whole_command_as_the_only_word_of_a_list_is_hinted_at(either: Machine) -> None:
    with pytest.raises(CommandFailed, match="string"):
        either.exec(["systemctl restart ssh"])


@pytest.mark.parametrize("word", ["a\0b", "\ud800"])
def test_what_no_command_can_be_given_is_refused_before_sending(either: Machine, word: str) -> None:
    with pytest.raises(ValueError, match="command"):
        either.exec(["echo", word])


@pytest.mark.guests
def test_a_hundred_megabytes_of_output_are_cut_with_a_mark_in_bounded_memory(either: Machine) -> None:
    either.exec(["true"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = either.exec("head -c 100000000 /dev/zero; echo done >&2; exit 5", check=False, timeout=300)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert (result.returncode, result.stderr, result.truncated) == (5, "done\n", True)
    assert result.stdout.startswith("\0" * 1000)
    assert result.stdout.endswith("truncated after 16 MiB]\n")
    assert len(result.stdout) < (16 << 20) + 100
    assert grown < 200 << 20


@pytest.mark.guests
def test_a_runner_that_was_killed_is_told_once_and_commands_go_on(vm: Machine, caplog: pytest.LogCaptureFixture) -> None:
    with suppress(MachineError):  # it carries this very command
        vm.exec(["pkill", "-KILL", "-x", "vmbottle-runner"], check=False)
    assert [vm.exec(["echo", "on"]).stdout for _ in range(3)] == ["on\n"] * 3
    assert len([record for record in caplog.records if "runner" in record.message and record.levelname == "WARNING"]) == 1
    vm.reboot()
    assert vm.exec(["echo", "on"]).stdout == "on\n"
    assert len([record for record in caplog.records if "runner" in record.message and record.levelname == "WARNING"]) == 1
