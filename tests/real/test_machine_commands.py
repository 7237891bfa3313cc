"""`vmbottle machine`: real machines that outlive the command that started them, used by other processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import psutil
import pytest

from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.host.deadline import Deadline
from tests.conftest import is_gone

if TYPE_CHECKING:
    from tests.real.conftest import Person

COMMAND = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from pytest_vmbottle.__main__ import main; main()"
FACTOR = "3"

Ended = subprocess.CompletedProcess[bytes]


@attrs.frozen
class Commands:
    """The command `vmbottle machine`, in processes of its own, with one catalog."""

    root: Path

    def argv(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-P", "-c", COMMAND, "machine", *map(str, words)]

    def environment(self) -> dict[str, str]:
        paths = os.pathsep.join(str(Path(each).absolute()) for each in sys.path if each)
        # By this and not by `--catalog`, with which no command takes the quick way.
        return {**os.environ, "PYTHONPATH": paths, "VMBOTTLE_TIMEOUT_FACTOR": FACTOR, "VMBOTTLE_CATALOG": str(self.root)}

    def run(self, *words: str | Path, stdin: bytes = b"", status: int = 0) -> Ended:
        ended = subprocess.run(self.argv(*words), input=stdin, capture_output=True, timeout=500, env=self.environment(), check=False)
        assert ended.returncode == status, (words, ended)
        assert b"Traceback" not in ended.stderr
        return ended

    def begin(self, *words: str, **streams: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.argv(*words), env=self.environment(), start_new_session=True, **streams)

    def exec(self, name: str, *words: str, stdin: bytes = b"") -> str:
        return self.run("exec", name, "--", *words, stdin=stdin).stdout.decode()

    def start(self, name: str, *words: str) -> Mapping[str, Any]:
        started: Mapping[str, Any] = json.loads(self.run("start", "debian-12", "--name", name, "--json", *words).stdout)
        return started

    def about(self, name: str) -> Mapping[str, Any] | None:
        return next((each for each in json.loads(self.run("ls", "--json").stdout) if each["name"] == name), None)


@pytest.fixture(scope="session")
def commands(vm_catalog: Catalog) -> Commands:
    return Commands(vm_catalog.root)


@pytest.fixture
def name(commands: Commands, request: pytest.FixtureRequest) -> Iterator[str]:
    """A name for a machine, of which nothing is left."""
    name = f"t{os.getpid()}-{abs(hash(request.node.name)) % 10**6}"
    yield name
    with suppress(AssertionError):
        commands.run("rm", "--force", name)


@pytest.fixture(scope="module")
def web(commands: Commands) -> Iterator[str]:
    """A machine that several tests use."""
    name = f"web{os.getpid()}"
    commands.start(name, "--port", "8000")
    yield name
    commands.run("rm", "--force", name)


def test_a_started_machine_is_listed_by_another_process_with_where_its_ports_lead(commands: Commands, web: str) -> None:
    listed = commands.about(web)

    assert listed is not None
    assert (listed["state"], listed["source"], listed["reason"]) == ("running", "debian-12", "")
    assert psutil.Process(listed["pid"]).ppid() == listed["keeper"]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", listed["ports"]["8000"])
    assert web.encode() in commands.run("ls").stdout
    assert json.loads(commands.run("argv", web, "--json").stdout)[0].endswith("qemu-system-x86_64")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run programs as somebody else")
@pytest.mark.guests
def test_the_environment_says_who_qemu_runs_as_without_pytest_too(commands: Commands, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMBOTTLE_RUN_AS", "nobody")
    started = commands.start(name)

    assert psutil.Process(started["pid"]).username() == "nobody"
    assert commands.exec(name, "id", "-un") == "root\n"


def test_a_keeper_has_no_terminal_no_folder_and_a_private_socket(commands: Commands, web: str) -> None:
    listed = commands.about(web)
    assert listed is not None
    keeper = psutil.Process(listed["keeper"])

    assert os.getsid(keeper.pid) == keeper.pid
    assert keeper.terminal() is None
    assert keeper.cwd() == "/"
    assert (commands.root / "machines" / web).stat().st_mode & 0o777 == 0o700
    assert (commands.root / "machines" / web / "socket").stat().st_mode & 0o077 == 0


def test_a_command_has_its_own_status_and_both_streams_as_they_are(commands: Commands, web: str) -> None:
    ended = commands.run("exec", web, "--", "sh", "-c", r"printf 'a\0\377\r\n'; printf 'b\033' >&2; exit 3", status=3)

    assert (ended.stdout, ended.stderr) == (b"a\0\xff\r\n", b"b\x1b")
    assert commands.run("exec", web, "--", "sh", "-c", "kill -TERM $$", status=128 + signal.SIGTERM).stdout == b""
    assert commands.run("exec", web, "--", "nosuch", status=127).stdout == b""


def test_a_command_gets_its_input_user_folder_and_environment(commands: Commands, web: str) -> None:
    data = os.urandom(300_000)
    assert commands.run("exec", web, "--", "cat", stdin=data).stdout == data

    told = commands.run("exec", "-u", "nobody", "-w", "/tmp", "-e", "WHO=me", web, "--", "sh", "-c", "id -un; pwd; echo $WHO")
    assert told.stdout == b"nobody\n/tmp\nme\n"


def test_output_comes_as_it_is_made_and_goes_on_until_its_reader_has_enough(commands: Commands, web: str) -> None:
    with commands.begin("exec", web, "--", "sh", "-c", "echo begun; cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        running.stdin.write(b"more\n")
        running.stdin.flush()
        assert running.stdout.readline() == b"more\n"
        running.stdin.close()
        # To its end, before the output is closed: a command whose reader has gone is ended.
        assert running.stdout.read() == b""
    assert running.returncode == 0

    with commands.begin("exec", web, "--", "yes", "endless", stdout=subprocess.PIPE) as endless:
        assert endless.stdout is not None
        assert endless.stdout.readline() == b"endless\n"
    assert endless.returncode != 0
    assert commands.run("exec", web, "--", "pgrep", "-f", "^yes endless", status=1).stdout == b""


@pytest.fixture
def deaf(commands: Commands, web: str) -> Iterator[str]:
    """The machine, for a while without a server for SSH."""
    commands.exec(web, "sh", "-c", "systemctl mask --now ssh.service ssh.socket; pkill -x sshd; ! pgrep -x sshd")
    yield web
    commands.exec(web, "sh", "-c", "systemctl unmask ssh.service ssh.socket; systemctl start ssh")


def test_a_command_with_input_needs_no_ssh_in_the_guest(commands: Commands, deaf: str) -> None:
    data = os.urandom(3 << 20)
    ended = commands.run("exec", deaf, "--", "sh", "-c", "cat; echo aside >&2; exit 7", stdin=data, status=7)
    assert (ended.stdout, ended.stderr) == (data, b"aside\n")
    # It need not read all of it, and what it does not read ends nothing.
    assert commands.run("exec", deaf, "--", "head", "-c", "5", stdin=data).stdout == data[:5]
    assert commands.run("exec", deaf, "--", "sh", "-c", "exec <&-; sleep 1; exit 3", stdin=data, status=3).stdout == b""


@pytest.mark.guests
@pytest.mark.parametrize("rebooted", [False, True], ids=["cloned", "rebooted"])
def test_a_command_with_input_that_is_not_over_ends_with_who_asked_for_it(commands: Commands, deaf: str, *, rebooted: bool) -> None:
    if rebooted:
        commands.run("reboot", deaf)
        # The first command with input starts a runner: the one of the pack has ended with its boot.
        assert commands.exec(deaf, "pgrep", "-x", "vmbottle-runner")
    argv = ("exec", deaf, "--", "sh", "-c", "echo begun; cat; exec sleep 4720")
    with commands.begin(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        running.send_signal(signal.SIGINT)
    assert running.returncode != 0
    commands.exec(deaf, "timeout", "30", "sh", "-c", "while pgrep -f '^sh -c echo begun'; do sleep 0.2; done")
    with commands.begin("exec", "--timeout", "2", *argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as late:
        assert late.wait(120) == 124
    with commands.begin("exec", deaf, "--", "yes", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as endless:
        assert endless.stdout is not None
        assert endless.stdout.readline() == b"y\n"
        endless.stdout.close()
        assert endless.wait(120) != 0
    left = "pgrep -x yes; pgrep -f 'sleep 472[0]'; pgrep -x vmbottle-runner > /dev/null && echo nothing else"
    assert commands.exec(deaf, "sh", "-c", left) == "nothing else\n"


@pytest.mark.guests
def test_a_terminal_needs_no_ssh_in_the_guest_and_ends_with_its_client(commands: Commands, deaf: str, person: Person) -> None:
    words = ("-t", "-u", "nobody", "-w", "/tmp", deaf, "--", "sh", "-c", "tty; id -un; pwd; exec sleep 4721")
    running = commands.begin("exec", *words, stdin=person.terminal, stdout=person.terminal, stderr=person.terminal)
    person.sees(r"/dev/pts/\d+\s+nobody\s+/tmp")
    running.kill()
    running.wait()
    commands.exec(deaf, "timeout", "30", "sh", "-c", "while pgrep -f 'sleep 472[1]'; do sleep 0.2; done")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.guests)])
def test_a_command_ends_in_the_guest_when_whoever_asked_for_it_is_gone(commands: Commands, web: str, number: int) -> None:
    with commands.begin("exec", web, "--", "sh", "-c", f"echo begun; exec sleep 1000{number}", stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        running.send_signal(number)

    assert running.returncode != 0
    commands.exec(web, "timeout", "30", "sh", "-c", f"while pgrep -f '^sleep 1000{number}$'; do sleep 0.2; done")


@pytest.mark.guests
def test_a_command_is_killed_at_its_time_out(commands: Commands, web: str) -> None:
    ended = commands.run("exec", web, "--timeout", "2", "--", "sh", "-c", "echo begun; exec sleep 2000", status=124)

    assert ended.stdout == b"begun\n"
    assert b"2 s" in ended.stderr
    assert commands.run("exec", web, "--", "pgrep", "-f", "^sleep 2000", status=1).stdout == b""


def test_files_and_trees_are_copied_both_ways(commands: Commands, web: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below" / "program").write_bytes(os.urandom(100_000))
    (tree / "below" / "program").chmod(0o750)
    (tree / "link").symlink_to("below/program")
    commands.run("cp", tree, f"{web}:/srv")
    commands.run("cp", f"{web}:/srv/tree", tmp_path / "back")

    assert (tmp_path / "back" / "below" / "program").read_bytes() == (tree / "below" / "program").read_bytes()
    assert (tmp_path / "back" / "below" / "program").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "back" / "link").readlink() == Path("below/program")
    assert b"No such file" in commands.run("cp", f"{web}:/nowhere", tmp_path, status=1).stderr
    assert b"No such file" in commands.run("cp", tmp_path / "nowhere", f"{web}:/srv", status=1).stderr


def test_the_console_is_shown_and_followed(commands: Commands, web: str) -> None:
    with commands.begin("console", web, "-f", stdout=subprocess.PIPE) as following:
        assert following.stdout is not None
        commands.exec(web, "sh", "-c", r"printf 'a \033[31mline\n' > /dev/console")
        assert any(rb"a \x1b[31mline" in line for line in following.stdout)
        following.send_signal(signal.SIGINT)
    assert following.returncode == 130
    assert rb"a \x1b[31mline" in commands.run("console", web).stdout


def test_text_is_typed_on_the_console_and_the_monitor_answers(commands: Commands, web: str) -> None:
    commands.run("exec", web, "sh", "-c", "(exec </dev/ttyS0 >/dev/ttyS0 2>&1; read word; echo it was $word) >/dev/null &")
    commands.run("send-console", web, "sesame")
    assert Deadline(60).poll(lambda: b"it was sesame" in commands.run("console", web).stdout)

    commands.exec(web, "sh", "-c", r"printf '\033cready at last' > /dev/tty1")
    assert commands.run("text", web, "--tty", "1").stdout == b"ready at last\n"
    assert b"display=True" in commands.run("text", web, status=1).stderr
    assert Path(commands.run("gdb", web).stdout.decode().strip()).is_socket()
    assert json.loads(commands.run("qmp", web, "query-status").stdout)["running"] is True
    assert b"info" in commands.run("qmp", web, "human-monitor-command", '{"command-line": "help info"}').stdout
    assert b"no-such-command" in commands.run("qmp", web, "no-such-command", status=1).stderr


def test_metrics_have_both_sides(commands: Commands, web: str) -> None:
    figures = json.loads(commands.run("metrics", web, "--json").stdout)

    assert figures["rss_bytes"] > 0
    assert figures["cpu_percent"] is not None
    assert figures["guest_memory_used_bytes"] > 0


@pytest.mark.guests
@pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no OpenSSH client")
def test_openssh_logs_in_with_the_configuration_and_with_its_file(commands: Commands, web: str, tmp_path: Path) -> None:
    path = commands.run("ssh-config", "--path", web).stdout.decode().strip()
    (tmp_path / "cfg").write_bytes(commands.run("ssh-config", web).stdout)

    for config in (path, tmp_path / "cfg"):
        ended = subprocess.run(["ssh", "-F", config, web, "echo $((6*7))"], capture_output=True, text=True, timeout=120, check=False)
        assert (ended.returncode, ended.stdout) == (0, "42\n"), ended.stderr


def test_the_packs_and_the_image_of_a_machine_are_not_removed(commands: Commands, web: str) -> None:
    assert commands.about(web) is not None
    command = [sys.executable, "-P", "-c", COMMAND, "--catalog", str(commands.root)]
    ended = subprocess.run([*command, "image", "rm", "debian-12"], capture_output=True, env=commands.environment(), check=False)
    listed = subprocess.run([*command, "pack", "ls", "--json"], capture_output=True, env=commands.environment(), check=True)
    argv = " ".join(json.loads(commands.run("argv", web, "--json").stdout))
    used = [pack for pack in json.loads(listed.stdout) if "path" in pack and pack["path"] in argv]

    assert ended.returncode == 1
    assert b"is in use" in ended.stderr
    assert used
    assert all(pack["in_use"] for pack in used)


def test_a_name_is_taken_once(commands: Commands, web: str) -> None:
    refused = commands.run("start", "debian-12", "--name", web, status=1)

    assert b"vmbottle machine stop" in refused.stderr
    assert commands.exec(web, "echo", "still there") == "still there\n"


def test_a_shell_is_a_real_terminal_with_ctrl_c_ctrl_d_and_the_size_of_the_window(commands: Commands, web: str, person: Person) -> None:
    before = termios.tcgetattr(person.terminal)
    shell = commands.begin("shell", web, stdin=person.terminal, stdout=person.terminal, stderr=person.terminal)
    person.sees(re.escape("Ctrl-]"))
    person.type("sh -c 'tty; stty size; exec sleep 3000'\r")  # between two commands of its own, the shell would lose the key
    person.sees("/dev/pts/")
    person.sees("30 100")
    person.type("\x03")
    person.sees("# ")  # what is typed before the prompt may be lost with what Ctrl-C flushes
    person.type("echo status $?\r")
    person.sees("status 130")
    person.resize(132, 43)
    person.type("until stty size | grep '^43 132'; do sleep 0.1; done\r")
    person.sees(r"\r43 132")
    person.sees("# ")
    person.type("(exit 7); echo left with $?\r")
    person.sees("left with 7")
    person.sees("# ")  # before it, the key would be read by nobody
    person.type("(exit 7)\r")
    person.sees("# ")
    person.type("\x04")

    assert person.watches(shell) == 7
    assert termios.tcgetattr(person.terminal) == before


def test_a_shell_without_a_terminal_says_so(commands: Commands, web: str) -> None:
    assert b"needs a terminal" in commands.run("shell", web, status=1).stderr


# -- how machines end ------------------------------------------------------------------------------------------------------------------


@pytest.mark.guests
def test_a_machine_is_shut_down_remembered_and_removed(commands: Commands, name: str) -> None:
    pid = commands.start(name)["pid"]
    refused = commands.run("rm", name, status=1)
    assert b"--force" in refused.stderr
    commands.run("stop", name)
    stopped = commands.about(name)

    assert is_gone(pid)
    assert stopped is not None
    assert (stopped["state"], stopped["reason"]) == ("stopped", "it was shut down as asked")
    assert b"reboot: Power down" in commands.run("console", name).stdout
    assert b"not running" in commands.run("exec", name, "--", "true", status=1).stderr
    commands.run("rm", name)
    assert commands.about(name) is None
    assert not (commands.root / "machines" / name).exists()


@pytest.mark.guests
def test_a_machine_that_powers_itself_off_is_off_and_one_that_is_killed_an_error(commands: Commands, name: str) -> None:
    started = commands.start(name)
    commands.exec(name, "systemd-run", "sh", "-c", "sleep 1; poweroff")
    assert Deadline(120).poll(lambda: is_gone(started["keeper"]), every=0.2)
    off = commands.about(name)
    commands.run("rm", name)
    pid = commands.start(name)["pid"]
    os.kill(pid, signal.SIGKILL)
    assert Deadline(60).poll(lambda: (commands.about(name) or {})["state"] == "error", every=0.2)
    lost = commands.about(name)

    assert off is not None
    assert lost is not None
    assert (off["state"], off["reason"]) == ("off", "the guest powered itself off")
    assert lost["reason"].startswith("QEMU ended with status -9")


@pytest.mark.guests
def test_a_command_in_a_machine_whose_kernel_panicked_fails_at_once_with_that_reason(commands: Commands, name: str) -> None:
    commands.start(name)
    crash = commands.run("exec", name, "--", "sh", "-c", "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger", status=1)
    later = commands.run("exec", name, "--", "true", status=1)

    assert b"panic" in crash.stderr
    assert b"panic" in later.stderr


@pytest.mark.guests
def test_a_killed_keeper_takes_its_machine_along_and_is_never_taken_for_running(commands: Commands, name: str, vm_catalog: Catalog) -> None:
    started = commands.start(name)
    running = commands.begin("exec", name, "--", "sleep", "1000", stderr=subprocess.PIPE)
    argv, environment = commands.argv("exec", name, "--", "pgrep", "sleep"), commands.environment()
    assert Deadline(60).poll(lambda: subprocess.run(argv, check=False, env=environment).returncode == 0)
    os.kill(started["keeper"], signal.SIGKILL)

    assert Deadline(20).poll(lambda: is_gone(started["pid"]), every=0.05)
    listed = commands.about(name)
    assert listed is not None
    assert (listed["state"], listed["reason"]) == ("stopped", "its daemon died, and the machine with it")
    assert b"its daemon died" in running.communicate(timeout=60)[1]
    assert running.returncode == 1
    commands.run("rm", name)
    assert not list(vm_catalog.root.glob(f"run/{started['keeper']}-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_start_that_is_interrupted_leaves_nothing(commands: Commands, name: str, number: int) -> None:
    folder = commands.root / "machines" / name
    starting = commands.begin("start", "debian-12", "--name", name, "--boot", stderr=subprocess.PIPE)
    found: list[psutil.Process] = []

    def has_begun() -> bool:
        with suppress(psutil.NoSuchProcess):  # one that only asked QEMU what it can do may end while we look
            found[:] = [each for each in psutil.Process(starting.pid).children(recursive=True) if "-name" in each.cmdline()]
        return bool(found)

    assert Deadline(120).poll(has_begun, every=0.05)
    starting.send_signal(number)
    starting.communicate(timeout=120)

    assert Deadline(60).poll(lambda: is_gone(found[0].pid), every=0.05)
    if number == signal.SIGINT:
        assert starting.returncode == 130
        assert not folder.exists()
    else:  # there was nobody to remove what the keeper had of it, once that too has ended

        def is_over() -> bool:
            listed = commands.about(name)
            return listed is None or listed["state"] == "stopped"

        assert Deadline(60).poll(is_over)


@pytest.mark.guests
def test_two_starts_with_one_name_give_one_machine(commands: Commands, name: str) -> None:
    ended: list[int] = []
    starts = [commands.begin("start", "debian-12", "--name", name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    threads = [threading.Thread(target=lambda each=each: ended.append(each.wait(500))) for each in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(ended) == [0, 1]
    assert commands.exec(name, "echo", "one") == "one\n"


@pytest.mark.guests
def test_a_machine_that_cannot_be_started_says_why_and_leaves_nothing(commands: Commands, name: str) -> None:
    refused = commands.run("start", "debian-12", "--name", name, "--memory", "9999G", status=1)

    assert b"memory=" in refused.stderr
    assert commands.about(name) is None
