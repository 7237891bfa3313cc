"""What is around a machine: its ports, its files, its monitor, whoever answers where its SSH server should; no guest is needed for that.

The machines are started as those of tests are, with the whole command line; their processor runs three instructions and waits.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from io import StringIO
from pathlib import Path

import paramiko
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_vmbottle import CatalogError, Machine, MachineSpec, MachineTimeout
from pytest_vmbottle.backends.port import Disk, Start
from pytest_vmbottle.backends.qemu.command_line import Emulator, board_of
from pytest_vmbottle.backends.qemu.features import probe_features
from pytest_vmbottle.backends.qemu.instance import QemuInstance
from pytest_vmbottle.backends.qemu.launch import start
from pytest_vmbottle.backends.qemu.qmp import QmpFailed
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.channels import ssh
from pytest_vmbottle.channels.port import Command, Finished
from pytest_vmbottle.channels.ssh import SshChannel, new_keys
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.provision.seed import write_seed
from pytest_vmbottle.testing import FakeBackend, FakeChannel, FakeInstance

Rounds = Callable[[str, int], range]
Begin = Callable[[str], AbstractContextManager[QemuInstance]]

HALT = b"\xfa\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa"
"""A boot sector: no interrupts, halt, and again if something wakes it."""
SPEC = MachineSpec(source="any", memory="32M", arch="x86_64")


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    binary, board = Path(shutil.which("qemu-system-x86_64") or ""), board_of("x86_64")
    dialect = probe_features(binary, workdir=tmp_path_factory.mktemp("dialect"))
    return Emulator(binary=binary, board=board, accelerator=board.tcg, dialect=dialect)


@pytest.fixture
def begin(emulator: Emulator, catalog: Catalog, tmp_path: Path) -> Begin:
    """Starts a machine in the test's catalog."""
    disk, seed, keys = tmp_path / "disk.raw", tmp_path / "seed.iso", new_keys()
    disk.write_bytes(HALT.ljust(1 << 20, b"\0"))
    write_seed(seed, hostname="vm", keys=keys)

    @contextmanager
    def begin(name: str) -> Iterator[QemuInstance]:
        source = Start(
            disks=(Disk(path=disk, format="raw"),), disk_size=1 << 20, kernel=None, initrd=None, cmdline="", seed=seed, keys=keys
        )
        with catalog.rundir(name) as rundir:
            instance = start(emulator, SPEC, source=source, rundir=rundir, deadline=Deadline(60))
            try:
                yield instance
            finally:
                instance.stop()

    return begin


# -- ports -----------------------------------------------------------------------------------------------------------------------------


def _listening(pid: int) -> list[tuple[str, int]]:
    """The addresses of all kinds that a process waits on for others."""
    found = psutil.Process(pid).net_connections("inet")
    return [(each.laddr.ip, each.laddr.port) for each in found if each.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)]


@contextmanager
def _grabbing() -> Iterator[None]:
    """Others, who take ports and give them back all the time."""
    over = threading.Event()

    def grab() -> None:
        while not over.is_set():
            with ExitStack() as stack:
                for _ in range(50):
                    stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(grab) for _ in range(2)]
        try:
            yield
        finally:
            over.set()
    for other in others:
        other.result()


def test_machines_started_at_once_have_ports_of_their_own_that_only_this_host_reaches(begin: Begin, rounds: Rounds) -> None:
    for number in rounds("D1", 1):
        with _grabbing(), ExitStack() as stack, ThreadPoolExecutor(32) as pool:
            machines = list(pool.map(lambda n: stack.enter_context(begin(f"vm-{number}-{n}")), range(32)))  # noqa: B023 - used here only
            told = [machine.forward(port) for machine in machines for port in (22, 8080)]
            heard = {machine.pid: _listening(machine.pid) for machine in machines}

        assert len(set(told)) == 64
        assert sorted(each for all_of_one in heard.values() for each in all_of_one) == sorted(told)
        assert {address for address, _ in told} == {"127.0.0.1"}


# -- the monitor -----------------------------------------------------------------------------------------------------------------------


def test_not_even_the_monitor_can_have_qemu_run_a_program(begin: Begin, tmp_path: Path) -> None:
    with begin("vm") as machine:
        status = Path(f"/proc/{machine.pid}/status").read_text()
        with suppress(QmpFailed):
            machine._qmp.execute("migrate", uri=f"exec:touch {tmp_path}/ran", deadline=Deadline(20))
        ended = Deadline(20).poll(lambda: machine.exitcode)

    assert "Seccomp:\t2\n" in status
    assert ended == -31  # SIGSYS
    assert not (tmp_path / "ran").exists()


def test_nobody_can_reach_the_monitor_by_a_name(begin: Begin) -> None:
    with begin("vm") as machine:
        sockets = psutil.Process(machine.pid).net_connections("unix")

    assert len(sockets) >= 4
    assert {str(each.laddr) for each in sockets} == {""}


# -- files -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_whatever_the_umask_only_this_user_can_read_what_machines_have(begin: Begin, root: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with begin("vm"), Catalog(root).lock("thing", deadline=Deadline(9), waiting=print):
            modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in (root, *root.rglob("*"))}
            folders = {path for path in modes if path.is_dir()}
    finally:
        os.umask(before)

    assert {path for path, mode in modes.items() if path in folders and mode != 0o700} == set()
    assert {path for path, mode in modes.items() if path not in folders and mode & 0o177} == set()
    assert {path.name for path in modes} >= {"vm", "vm.json", "thing.lock", "thing.holder", "disk.qcow2", "console.log", "qemu.log"}


@pytest.mark.parametrize("name", ["locks/thing.lock", "locks/thing.holder", "run/1-aa.lock", "run/1-aa", "run/1-aa/vm", "run/1-aa/vm.json"])
def test_a_symbolic_link_in_the_place_of_a_file_of_ours_is_not_followed(catalog: Catalog, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (canary / "vm").mkdir(parents=True)
    (canary / "vm" / "kept").write_text("kept")
    (canary / "vm.json").write_text("kept")
    file = canary / "vm.json" if "." in name else canary / ("vm" if name.endswith("vm") else "")
    link = catalog.root / name
    link.parent.mkdir(parents=True, mode=0o700)
    if name.startswith("run/"):
        lock = catalog.root / "run" / "1-aa.lock"
        if lock != link:
            lock.touch(mode=0o600)
    link.symlink_to(file)
    with suppress(CatalogError), catalog.lock("thing", deadline=Deadline(60), waiting=print):
        catalog.gc()
    catalog.gc()

    assert (canary / "vm" / "kept").read_text() == "kept"
    assert (canary / "vm.json").read_text() == "kept"
    for left in catalog.root.glob("run/*"):  # a link that was not followed may be kept for somebody to look at
        left.unlink() if left.is_symlink() or left.is_file() else shutil.rmtree(left)


# -- whoever answers -------------------------------------------------------------------------------------------------------------------


@contextmanager
def _server(serve: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """A server that does this with everybody who connects."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, suppress(OSError):
                        serve(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _drip(connection: socket.socket) -> None:
    for byte in b"SSH-2.0-" + b"x" * 1000:
        connection.sendall(bytes([byte]))
        threading.Event().wait(0.1)


def _greet_and_reset(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
    connection.recv(100)
    _reset(connection)


def _greet_and_babble(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n" + b"\xff" * 100_000)


@pytest.mark.parametrize(
    "serve", [_drip, *(pytest.param(serve, marks=pytest.mark.guests) for serve in (_reset, _greet_and_reset, _greet_and_babble))]
)
def test_a_server_that_plays_games_is_given_up_in_time_with_a_typed_error(
    serve: Callable[[socket.socket], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "_PATIENCE", 0.5)
    with _server(serve) as address, pytest.raises(MachineTimeout):
        SshChannel.connect(address, new_keys(), deadline=Deadline(1.5), alive=lambda: None)


def test_an_impostor_is_never_told_a_key_however_often_he_tries(rounds: Rounds) -> None:
    keys, tried = new_keys(), []

    class Impostor(paramiko.ServerInterface):
        def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
            tried.append((username, key))
            return paramiko.AUTH_SUCCESSFUL  # type: ignore[attr-defined,no-any-return]

    def serve(connection: socket.socket) -> None:
        transport = paramiko.Transport(connection)
        transport.add_server_key(paramiko.Ed25519Key.from_private_key(StringIO(new_keys().host_private)))
        with suppress(paramiko.SSHException, EOFError):
            transport.start_server(server=Impostor())
            transport.join(5)
        transport.close()

    with _server(serve) as address:
        for _ in rounds("D3", 5):
            with pytest.raises(ssh.HostKeyMismatch):
                SshChannel.connect(address, keys, deadline=Deadline(20), alive=lambda: None)

    assert tried == []


# -- commands --------------------------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40), max_size=6)


def test_any_words_reach_a_program_as_they_are(rounds: Rounds) -> None:
    @settings(max_examples=len(rounds("D5", 40)))
    @given(WORDS)
    def arrive(words: list[str]) -> None:
        line = ssh._remote(Command(argv=("printf", "%s\\0", *words), env=(("PATH", os.environ["PATH"]),)))
        printed = subprocess.run(["sh", "-c", line], check=True, stdout=subprocess.PIPE).stdout.decode()
        assert printed.split("\0")[:-1] == (words or [""])

    arrive()


def test_what_no_program_can_be_given_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    sent: list[Command] = []

    def answer(command: Command) -> Finished:
        sent.append(command)
        return Finished(returncode=0)

    instance = FakeInstance(FakeBackend(answer), tmp_path)
    machine = Machine(instance, SPEC, id="vm-1", backend="fake", channel=FakeChannel(answer))

    @given(st.lists(st.text(max_size=9)), st.sampled_from(["\0", "a\0b", "\ud800", "x" * (121 << 10)]))
    def refuse(words: list[str], bad: str) -> None:
        with pytest.raises(ValueError, match=r"NUL|not text|more than"):
            machine.exec(["program", *words, bad])

    refuse()
    assert sent == []
