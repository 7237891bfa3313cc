"""Other people's programs reach a machine: OpenSSH, rsync, testinfra, and a person at a terminal."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle import Machine, MachineDied, MachineError

if TYPE_CHECKING:
    from pytest_vmbottle.catalog.catalog import Catalog
    from tests.real.conftest import Person

pytestmark = pytest.mark.vm("debian-12")


def run(*argv: str | Path, typed: str = "") -> subprocess.CompletedProcess[str]:
    """A program as a user with an SSH set-up of his own would run it: none of that may play a part."""
    env = {**os.environ, "SSH_AUTH_SOCK": "/nowhere", "HOME": "/nowhere"}
    return subprocess.run([*map(str, argv)], input=typed, env=env, capture_output=True, text=True, check=False, timeout=120)


# -- OpenSSH and what builds on it -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(session_vm: Machine) -> Path:
    return session_vm.ssh_config()


def test_ssh_runs_commands_with_both_streams_and_the_status(config: Path) -> None:
    done = run("ssh", "-F", config, "vm", "id -un; cat; echo bad >&2; exit 7", typed="typed\n")

    assert (done.stdout, done.stderr, done.returncode) == ("root\ntyped\n", "bad\n", 7)


def test_a_user_with_a_password_cannot_log_in_with_it(config: Path, session_vm: Machine) -> None:
    session_vm.exec("useradd -m bob && echo bob:secret | chpasswd")

    refused = run("ssh", "-v", "-F", config, "-l", "bob", "-o", "IdentityFile=none", "vm", "true")

    assert refused.returncode == 255
    assert "Authentications that can continue: publickey\n" in refused.stderr.replace("\r", "")


@pytest.mark.guests
def test_scp_and_sftp_copy_both_ways(config: Path, session_vm: Machine, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)))
    to, fro = run("scp", "-F", config, tmp_path / "a", "vm:/root/a"), run("scp", "-F", config, "vm:/root/a", tmp_path / "b")
    sftp = run("sftp", "-b", "-", "-F", config, "vm", typed=f"rename /root/a /root/c\nget /root/c {tmp_path}/c\n")

    assert (to.returncode, fro.returncode, sftp.returncode) == (0, 0, 0), (to.stderr, fro.stderr, sftp.stderr)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes() == session_vm.path("/root/c").read_bytes() == bytes(range(256))


def test_the_configuration_says_who_may_log_in_and_whom_to_trust_and_all_of_it_is_private(config: Path, session_vm: Machine) -> None:
    shown = dict(line.split(" ", 1) for line in run("ssh", "-G", "-F", config, "vm").stdout.splitlines() if " " in line)
    files = [config, Path(shown["identityfile"]), Path(shown["userknownhostsfile"])]

    assert (shown["hostname"], shown["port"]) == tuple(map(str, session_vm.forward(22)))
    assert (shown["identitiesonly"], shown["identityagent"], shown["forwardagent"]) == ("yes", "none", "no")
    assert shown["stricthostkeychecking"] in ("true", "yes")
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600] * 3
    assert {file.parent.stat().st_mode & 0o777 for file in files} == {0o700}
    assert {file.parent.name for file in files} == {session_vm.id}


def test_a_server_with_another_key_than_the_machines_is_refused(config: Path) -> None:
    known = config.with_name("ssh_known_hosts")
    name, kind, key = known.read_text().split()[:3]
    known.write_text(f"{name} {kind} {key[:-8]}{key[-8:][::-1]}\n")
    done = run("ssh", "-F", config, "vm", "true")

    assert done.returncode == 255
    assert "verification failed" in done.stderr


@pytest.mark.guests
def test_the_configuration_is_written_anew_and_goes_with_its_machine(vm: Machine) -> None:
    first = vm.ssh_config()
    first.write_text("broken")

    assert run("ssh", "-F", vm.ssh_config(), "vm", "true").returncode == 0
    vm.lifecycle.instance.stop()
    with pytest.raises(MachineDied, match="QEMU"):
        vm.ssh_config()


@pytest.fixture
def guests_rsync(session_vm: Machine, tmp_path: Path) -> str:
    """This computer's rsync with its libraries, brought to a guest that has none: how it is called there."""
    program = shutil.which("rsync")
    assert program
    (tmp_path / "rsync").mkdir()
    libraries = [word for word in run("ldd", program).stdout.split() if word.startswith("/")]
    for file in {program, *libraries}:
        shutil.copy(Path(file).resolve(), tmp_path / "rsync" / Path(file).name)
    session_vm.cp(tmp_path / "rsync", session_vm.path("/opt"))
    loader = next(Path(word).name for word in libraries if "ld-linux" in word)
    return f"/opt/rsync/{loader} --library-path /opt/rsync /opt/rsync/rsync"


@pytest.mark.guests
def test_rsync_brings_a_tree_and_then_only_what_changed(config: Path, session_vm: Machine, tmp_path: Path, guests_rsync: str) -> None:
    tree = tmp_path / "tree"
    (tree / "sub dir").mkdir(parents=True)
    (tree / "sub dir" / "file").write_text("one\n")
    (tree / "link").symlink_to("sub dir/file")
    words = (
        "rsync",
        "-a",
        "--delete",
        "--itemize-changes",
        f"--rsync-path={guests_rsync}",
        "-e",
        f"ssh -F {config}",
        f"{tree}/",
        "vm:/srv/tree",
    )
    first = run(*words)
    (tree / "sub dir" / "file").write_text("another\n")
    second = run(*words)

    assert (first.returncode, second.returncode) == (0, 0), (first.stderr, second.stderr)
    assert session_vm.exec(["cat", "/srv/tree/link"]).stdout == "another\n"
    assert [line.split(maxsplit=1)[1] for line in second.stdout.splitlines()] == ["sub dir/file"]


@pytest.mark.guests
def test_ansible_finds_the_machine_by_its_name(config: Path, tmp_path: Path) -> None:
    ansible = Path(sys.executable).with_name("ansible")
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "ANSIBLE_LOCAL_TEMP": str(tmp_path / "t"),
        "ANSIBLE_SSH_ARGS": f"-F {config}",
        "ANSIBLE_TIMEOUT": "120",  # seconds of connecting; its own 10 are few for a guest on a busy host
        "LC_ALL": "C.UTF-8",
    }
    argv = [str(ansible), "-i", "vm,", "vm", "-m", "ansible.builtin.ping"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=300)

    assert done.returncode == 0, done.stdout + done.stderr
    assert '"ping": "pong"' in done.stdout


@pytest.mark.guests
def test_testinfra_asks_the_machine(session_vm: Machine) -> None:
    host = session_vm.host

    assert host.file("/etc/passwd").exists
    assert host.file("/etc/passwd").mode == 0o644
    assert not host.file("/etc/no such; file").exists
    assert host.service("ssh").is_running
    assert not host.service("nonsense").is_running
    assert host.package("openssh-server").is_installed
    assert not host.package("nginx").is_installed
    assert host.user("root").home == "/root"
    assert host.socket("tcp://22").is_listening
    assert host.system_info.distribution == "debian"
    assert host.check_output("echo %s", "Größe 'a'") == "Größe 'a'"
    assert host.run("exit 3").rc == 3


@pytest.mark.guests
def test_testinfra_connects_by_the_configuration_too(config: Path) -> None:
    import testinfra

    host = testinfra.get_host("ssh://vm", ssh_config=str(config), controlpersist=0)

    assert host.file("/etc/debian_version").content_string.startswith("12.")


# -- a person at a terminal ------------------------------------------------------------------------------------------------------------


class Shell(threading.Thread):
    """`vm.shell()` at a person's terminal."""

    def __init__(self, machine: Machine, person: Person, user: str | None = None) -> None:
        super().__init__(daemon=True)
        self._machine, self._person, self._user = machine, person, user
        self.before = termios.tcgetattr(person.terminal)
        self.outcome: object = "it runs"
        self.start()

    def run(self) -> None:
        with open(self._person.terminal, closefd=False) as stdin, open(self._person.terminal, "w", closefd=False) as stdout:
            try:
                self.outcome = self._machine.shell(user=self._user, stdin=stdin, stdout=stdout)
            except MachineError as error:
                self.outcome = error

    def ended(self) -> object:
        """Return the output, once the shell is over and the terminal is as it was."""
        self.join(60)
        assert not self.is_alive(), self._person.seen
        assert termios.tcgetattr(self._person.terminal) == self.before
        return self.outcome


@pytest.mark.guests
def test_a_shell_has_ctrl_c_and_ctrl_d_and_ends_with_its_status(session_vm: Machine, person: Person) -> None:
    shell = Shell(session_vm, person)
    person.sees("Ctrl-]")
    person.type("tty; sleep 4242\r")
    person.sees("/dev/pts/")
    sleeping = ["pgrep", "-f", "-x", "sleep 4242"]
    session_vm.wait_until(sleeping)
    person.type("\x03")
    person.sees("# ")
    assert not session_vm.exec(sleeping, check=False).ok
    person.type("(echo status $?; exit 7)\r")
    person.sees("status 130")
    person.sees("# ")
    person.type("\x04")

    assert shell.ended() == 7


def test_a_shell_knows_the_size_of_the_window_also_when_that_changes(session_vm: Machine, person: Person) -> None:
    shell = Shell(session_vm, person)
    person.sees("# ")
    program = "trap 'echo window $(stty size)' WINCH; echo now $(stty size); while :; do sleep 0.1; done"
    person.type(f"exec sh -c {shlex.quote(program)}\r")
    person.sees("now 30 100")
    person.resize(132, 43)
    person.sees("window 43 132")
    person.type("\x03")

    assert shell.ended() in (-signal.SIGINT, 130)


def test_a_shell_is_left_by_a_key_although_the_guest_does_not_answer(session_vm: Machine, person: Person) -> None:
    shell = Shell(session_vm, person, user="nobody")
    person.sees("not available")  # what its login shell says
    assert shell.ended() == 1

    shell = Shell(session_vm, person)
    person.sees("#")
    session_vm.lifecycle.instance.pause()
    try:
        person.type("echo lost\r\x1d")
        assert shell.ended() is None
    finally:
        session_vm.lifecycle.instance.resume()


@pytest.mark.guests
def test_a_shell_whose_machine_ends_says_so_and_gives_the_terminal_back(vm: Machine, person: Person) -> None:
    shell = Shell(vm, person)
    person.sees("#")
    os.kill(vm.pid, signal.SIGKILL)
    outcome = shell.ended()

    assert isinstance(outcome, MachineDied)


def test_without_a_terminal_a_shell_says_how_to_have_one(session_vm: Machine, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+") as file, pytest.raises(MachineError, match="pytest -s"):
        session_vm.shell(stdin=file, stdout=file)


@pytest.mark.guests
def test_a_test_run_with_s_can_stop_for_a_shell(vm_catalog: Catalog, tmp_path: Path, person: Person) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.vm('debian-12')\ndef test_it(vm):\n    assert vm.shell() == 5\n    assert vm.path('/seen').exists()\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    argv = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", f"--vm-catalog={vm_catalog.root}", str(tmp_path)]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), person.terminal)
    with subprocess.Popen(argv, cwd=tmp_path, env=env, start_new_session=True, **streams) as process:  # type: ignore[call-overload]
        person.sees("Ctrl-]", seconds=200)
        person.type("touch /seen; exit 5\r")
        person.sees("1 passed", seconds=100)
    assert process.returncode == 0


# -- the network cable -----------------------------------------------------------------------------------------------------------------


def greeting(address: tuple[str, int], seconds: float) -> bytes:
    """Return an SSH server's greeting, or nothing."""
    with socket.create_connection(address, timeout=seconds) as connection:
        try:
            return connection.recv(4)
        except TimeoutError:
            return b""


def test_nothing_gets_through_while_the_cable_is_pulled_and_then_again(vm: Machine) -> None:
    address = vm.forward(22)
    assert greeting(address, 60) == b"SSH-"

    vm.link(up=False)
    vm.wait_until("test $(cat /sys/class/net/eth0/carrier) = 0")
    assert greeting(address, 3) == b""

    vm.link(up=True)
    vm.wait_until("test $(cat /sys/class/net/eth0/carrier) = 1 && ip route get 10.0.2.2")
    assert greeting(address, 60) == b"SSH-"


@pytest.mark.parametrize("port", [0, 65536, -1, True, "22", 22.0, None])
def test_what_is_no_port_is_not_forwarded(session_vm: Machine, port: object) -> None:
    with pytest.raises(ValueError, match="port"):
        session_vm.forward(port)  # type: ignore[arg-type]


def test_a_machine_that_is_gone_says_so_whatever_is_asked_of_it(vm: Machine, tmp_path: Path) -> None:
    os.kill(vm.pid, signal.SIGKILL)
    for ask in (lambda: vm.forward(8080), lambda: vm.link(up=False), vm.ssh_config, vm.shell):
        with pytest.raises(MachineDied, match="-9"):
            ask()
    assert not list(tmp_path.iterdir())


FAILS = """
    import pytest

    @pytest.mark.vm("debian-12")
    def test_fails(vm):
        vm.path("/run/evidence").write_text("found it\\n")
        assert vm.exec("cat /run/evidence").stdout == ""
"""


@pytest.mark.guests
def test_the_machine_of_a_failed_test_can_be_looked_at_from_the_debugger(inner: pytest.Pytester, person: Person) -> None:
    inner.makepyfile(FAILS)
    terminal = person.terminal
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", "--pdb", "-p", "no:cacheprovider"], stdin=terminal, stdout=terminal, stderr=terminal
    ) as pytest_run:
        person.sees(r"\(Pdb\) ", 180)
        person.type("vm.shell()\r")
        person.sees("# ")
        person.type("cat /run/evidence; exit 4\r")
        person.sees("found it")
        person.sees(r"\(Pdb\) ")
        person.type("q\r")
        person.sees("1 failed")
        assert pytest_run.wait(60) == pytest.ExitCode.INTERRUPTED
