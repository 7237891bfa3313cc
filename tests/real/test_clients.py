"""Other people's programs reach a machine: OpenSSH, rsync, testinfra, and a person at a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle import Machine, MachineDied, MachineError
from pytest_vmbottle._os import Deadline

if TYPE_CHECKING:
    from pytest_vmbottle.catalog import Catalog

pytestmark = pytest.mark.vm("debian-12")


def run(*argv: str | Path, input: str = "") -> subprocess.CompletedProcess[str]:
    """A program as a user with an SSH set-up of his own would run it: none of that may play a part."""
    env = {**os.environ, "SSH_AUTH_SOCK": "/nowhere", "HOME": "/nowhere"}
    return subprocess.run([*map(str, argv)], input=input, env=env, capture_output=True, text=True, check=False, timeout=120)


# -- OpenSSH and what builds on it -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(session_vm: Machine) -> Path:
    return session_vm.ssh_config()


def test_ssh_runs_commands_with_both_streams_and_the_status(config: Path) -> None:
    done = run("ssh", "-F", config, "vm", "id -un; cat; echo bad >&2; exit 7", input="typed\n")

    assert (done.stdout, done.stderr, done.returncode) == ("root\ntyped\n", "bad\n", 7)


def test_scp_and_sftp_copy_both_ways(config: Path, session_vm: Machine, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)))
    to, fro = run("scp", "-F", config, tmp_path / "a", "vm:/root/a"), run("scp", "-F", config, "vm:/root/a", tmp_path / "b")
    sftp = run("sftp", "-b", "-", "-F", config, "vm", input=f"rename /root/a /root/c\nget /root/c {tmp_path}/c\n")

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


def test_the_configuration_is_written_anew_and_goes_with_its_machine(vm_factory: object, vm: Machine) -> None:
    first = vm.ssh_config()
    first.write_text("broken")

    assert run("ssh", "-F", vm.ssh_config(), "vm", "true").returncode == 0
    vm._instance.stop()
    with pytest.raises(MachineDied, match="QEMU ended"):
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


def test_rsync_brings_a_tree_and_then_only_what_changed(
    config: Path, session_vm: Machine, tmp_path: Path, guests_rsync: str
) -> None:
    tree = tmp_path / "tree"
    (tree / "sub dir").mkdir(parents=True)
    (tree / "sub dir" / "file").write_text("one\n")
    (tree / "link").symlink_to("sub dir/file")
    words = ("rsync", "-a", "--delete", "--itemize-changes", f"--rsync-path={guests_rsync}", "-e", f"ssh -F {config}", f"{tree}/", "vm:/srv/tree")
    first = run(*words)
    (tree / "sub dir" / "file").write_text("another\n")
    second = run(*words)

    assert (first.returncode, second.returncode) == (0, 0), (first.stderr, second.stderr)
    assert session_vm.exec(["cat", "/srv/tree/link"]).stdout == "another\n"
    assert [line.split(maxsplit=1)[1] for line in second.stdout.splitlines()] == ["sub dir/file"]


def test_ansible_finds_the_machine_by_its_name(config: Path, tmp_path: Path) -> None:
    ansible = Path(sys.executable).with_name("ansible")
    env = {**os.environ, "HOME": str(tmp_path), "ANSIBLE_LOCAL_TEMP": str(tmp_path / "t"), "ANSIBLE_SSH_ARGS": f"-F {config}"}
    argv = [str(ansible), "-i", "vm,", "vm", "-m", "ansible.builtin.ping"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=300)

    assert done.returncode == 0, done.stdout + done.stderr
    assert '"ping": "pong"' in done.stdout


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


def test_testinfra_connects_by_the_configuration_too(config: Path) -> None:
    import testinfra

    host = testinfra.get_host("ssh://vm", ssh_config=str(config), controlpersist=0)

    assert host.file("/etc/debian_version").content_string.startswith("12.")
