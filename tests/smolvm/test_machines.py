"""Machines of the real smolvm: how they begin and end, what they reach, what is kept of them."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pytest_vmbottle import Machine, MachineDied, MachineError, SmolvmError, layer
from pytest_vmbottle.backends.smolvm import Engine
from pytest_vmbottle.backends.smolvm.engine import Creation
from pytest_vmbottle.backends.smolvm.instance import Maker
from pytest_vmbottle.backends.smolvm.vmm import Vmm
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.spec.pack_kind import PackKind

pytestmark = pytest.mark.vm(backend="smolvm", memory="256M", timeout=300)


@layer("smolvm", backend="smolvm", memory="256M", run=["echo one > /root/one"], timeout=300)
def prepared(vm: Machine) -> None:
    vm.path("/root/two").write_text("two\n")


@pytest.mark.vm(prepared, ports=[80], env={"WHO": "me"}, files={"/etc/three": "three\n"})
def test_a_layer_is_packed_and_its_machines_have_what_was_prepared_their_ports_and_nothing_else(vm: Machine) -> None:
    assert vm.exec("cat /root/one /root/two /etc/three; echo $WHO").stdout == "one\ntwo\nthree\nme\n"
    vm.spawn("while true; do echo hello | nc -l -p 80 || true; done")
    vm.wait_for_port(80)
    with socket.create_connection(vm.forward(80), timeout=30) as connection:
        assert connection.recv(10) == b"hello\n"
    with pytest.raises(MachineError, match=r"ports=\[80, 81\]"):
        vm.forward(81)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reached = vm.exec(f"for host in 10.0.2.2 100.96.0.1; do nc -w 3 $host {port} </dev/null && echo $host; done", check=False)
    assert not reached.stdout, "network=False, and it reached this host"


_PLACES = ["/etc", "/home", "/opt", "/root", "/srv", "/usr/local/bin", "/var/lib", "/var/tmp", "/new/place", "/workspace", "/workspace/a/b"]
_WRITE = """
mkdir -p "$1"
cd "$1"
echo "$1" > kept
ln -s kept link
ln kept hard
mkfifo fifo
chown 1234:4321 kept
chown -h 1234 link
chmod 4751 kept
mkdir -m 1777 empty
head -c 300000 /dev/urandom > random
md5sum random > sum
"""
_READ = """
cd "$1"
cat kept
readlink link
stat -c '%a %u %g %h' kept
stat -c '%u %F' link
stat -c '%a' empty
test -p fifo
md5sum -c -s sum
"""


@layer("smolvm", backend="smolvm", memory="256M", run=["mkdir -p /workspace && echo kept > /workspace/run"], timeout=300)
def written(vm: Machine) -> None:
    vm.exec(["sh", "-eu", "-c", f'for place; do (set -- "$place"; {_WRITE}) done', "sh", *_PLACES])
    vm.exec("mv /etc/hosts /etc/moved; rm -r /etc/network; echo more >> /etc/passwd")


@pytest.mark.vm(written)
def test_a_pack_has_all_that_a_layer_wrote(vm: Machine) -> None:
    for place in _PLACES:
        read = vm.exec(["sh", "-eu", "-c", _READ, "sh", place]).stdout
        assert read == f"{place}\nkept\n4751 1234 4321 2\n1234 symbolic link\n1777\n"
    assert vm.exec("cat /workspace/run; tail -n 1 /etc/passwd; test -e /etc/moved -a ! -e /etc/network").stdout == "kept\nmore\n"


@pytest.mark.vm(disk="12G", nested=True, timeout=900)
def test_a_machine_has_the_disk_and_the_kvm_that_were_asked_for(vm: Machine) -> None:
    vm.exec(["test", "-c", "/dev/kvm"])
    size = int(vm.exec("df -Pk / | tail -n 1").stdout.split()[1])
    assert size > 11 << 20, "the disk of / is smaller than 12 GiB less its file system"


def test_a_machine_is_rebooted_written_down_taken_back_cut_off_and_started_again(vm: Machine) -> None:
    kept, workspace = vm.path("/root/kept"), vm.path("/workspace/kept")
    boot = vm.path("/proc/sys/kernel/random/boot_id").read_text()
    kept.write_text("kept\n")
    vm.exec("mkdir -p /workspace && cp /root/kept /workspace")
    vm.reboot()
    assert vm.path("/proc/sys/kernel/random/boot_id").read_text() != boot
    before = vm.snapshot("before")
    kept.unlink()
    workspace.unlink()
    vm.restore(before)
    assert (kept.read_text(), workspace.read_text()) == ("kept\n", "kept\n")
    process, lost = vm.spawn(["sleep", "4711"]), vm.pid
    vm.exec("sync")
    vm.power_cut()
    assert vm.state == "off"
    with pytest.raises(MachineError):
        process.wait(timeout=60)
    vm.start()
    assert (kept.read_text(), vm.pid != lost) == ("kept\n", True)
    vm.poweroff()
    assert vm.state == "off"


def test_a_machine_whose_process_is_killed_has_died_and_the_next_command_says_so(vm: Machine) -> None:
    os.kill(vm.pid, signal.SIGKILL)
    with pytest.raises(MachineDied):
        vm.exec(["true"])
    assert vm.state == "died"


def test_files_and_trees_go_in_and_out_and_what_it_takes_is_measured(session_vm: Machine, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below" / "data").write_bytes(os.urandom(100_000))
    (tree / "link").symlink_to("below/data")
    session_vm.cp(tree, session_vm.path("/root/tree"))
    session_vm.cp(session_vm.path("/root/tree"), tmp_path / "back")
    assert (tmp_path / "back" / "below" / "data").read_bytes() == (tree / "below" / "data").read_bytes()
    assert (tmp_path / "back" / "link").readlink() == Path("below/data")
    packed = session_vm.archive("/root/tree", tmp_path / "tree.tar.gz")
    with tarfile.open(packed) as archive:
        assert {"tree/below/data", "tree/link"} <= set(archive.getnames())
    sample = session_vm.metrics()
    assert sample.rss_bytes
    assert sample.guest is not None
    assert sample.guest.memory_used_bytes
    assert "smolvm" in session_vm.console.text
    session_vm.pause()
    assert session_vm.state == "paused"
    session_vm.resume()
    assert session_vm.exec(["echo", "on"]).stdout == "on\n"
    with pytest.raises(MachineError, match="systemd"):
        session_vm.wait_for_unit("nginx")


def test_commands_files_and_console_are_in_the_timeline(session_vm: Machine) -> None:
    session_vm.exec(["echo", "recorded"])
    session_vm.path("/root/recorded").write_text("x")
    events = session_vm.lifecycle.timeline.events()

    assert ["echo", "recorded"] in [event.get("argv") for event in events]
    assert "/root/recorded" in [event.get("path") for event in events]
    assert {"power", "console", "metrics"} <= {event["kind"] for event in events}


def test_a_shell_runs_on_a_terminal_of_the_guests(session_vm: Machine) -> None:
    deadline = Deadline(120)
    channel = session_vm.lifecycle.instance.channel(deadline=deadline)
    terminal = channel.terminal(user="root", kind="xterm", size=(100, 30), deadline=deadline)

    def heard() -> bytes:
        return terminal.receive() if select.select([terminal], [], [], deadline.remaining)[0] else b""

    try:
        said = b""
        while b"# " not in said and (data := heard()):  # its prompt: what is typed before smolvm has set its terminal up is lost
            said += data
        terminal.send(b"stty size; echo $((6*7)) $(whoami); exit 3\n")
        while data := heard():
            said += data
        assert b"30 100" in said
        assert b"42 root" in said
        assert terminal.status == 3
    finally:
        terminal.close()


@contextmanager
def known(engine: Engine, name: str) -> Iterator[Creation]:
    """A small machine that smolvm knows, for the length of a block."""
    made_of = Creation(memory=256 << 20)
    try:
        engine.create(name, made_of)
        yield made_of
    finally:
        engine.delete(name)


@contextmanager
def running(engine: Engine, name: str) -> Iterator[Vmm]:
    """One that runs, for the length of a block."""
    maker = Maker(engine=engine, kind=PackKind.DISK, warn=print, source_of=lambda *_: "")
    with known(engine, name) as made_of:
        vmm = Vmm(maker.start_twice(name, made_of, deadline=Deadline(300)), leash=True)
        try:
            yield vmm
        finally:
            vmm.let_go()


def test_four_at_once_make_five_machines_each(engine: Engine) -> None:
    def make(number: int) -> bool:
        with ExitStack() as stack:
            for each in range(4):
                stack.enter_context(known(engine, f"many-{number}-{each}"))
            return stack.enter_context(running(engine, f"many-{number}-runs")).is_running

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(make, range(4))) == [True] * 4


def test_what_smolvm_refuses_is_an_error_with_its_words_and_never_a_status_of_the_guest(engine: Engine) -> None:
    with pytest.raises(SmolvmError, match="nope") as caught:
        engine.start("nope")
    assert (caught.value.code, caught.value.returncode) == ("NOT_FOUND", 1)
    assert "--name nope" in str(caught.value)
    assert engine.delete("nope") is False


def test_ram_goes_by_checkpoint_to_a_machine_that_those_of_tests_are_branched_from(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\nfrom pytest_vmbottle import layer\n"
        "@layer('smolvm', backend='smolvm', memory='256M')\n"
        "def warm(vm):\n    vm.exec('echo ram > /dev/shm/ram')\n"
        "@pytest.mark.vm(warm)\n@pytest.mark.parametrize('time', [1, 2])\n"
        "def test_it(vm, time):\n    assert vm.exec('cat /dev/shm/ram; echo more >> /dev/shm/ram').stdout == 'ram\\n'\n"
    )
    argv = [sys.executable, "-m", "pytest", "-q", "--vm-pack=template", "--vm-backend=smolvm", "test_it.py"]
    ended = subprocess.run(argv, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 passed" in ended.stdout


def test_a_machine_that_runs_is_packed_only_if_it_may_be_stopped(engine: Engine, tmp_path: Path, environment: dict[str, str]) -> None:
    argv = [sys.executable, "-c", "from pytest_vmbottle.cli import main; main()", "pack", "build", "--from-machine", "frozen"]
    argv += ["--state-dir", str(engine.state), "-o", str(tmp_path / "dev")]

    def build(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*argv, *words], check=False, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
        )

    with running(engine, "frozen") as vmm:
        assert "--no-stop" in build().stderr
        assert "was not packed" in build("--no-stop").stderr
        done = build("--yes")
        assert done.stdout.strip() == str(tmp_path / "dev.smolmachine"), done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["dev.smolmachine"]
        assert vmm.wait(Deadline(30))


def test_killing_pytest_leaves_no_machine_neither_running_nor_known_to_smolvm(
    engine: Engine, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest, pathlib, time\n@pytest.mark.vm(backend='smolvm', memory='256M')\n"
        "def test_it(vm):\n    pathlib.Path('new').write_text(f'{vm.pid} {vm.id}'); pathlib.Path('new').rename('pid'); time.sleep(600)\n"
    )
    argv = [sys.executable, "-m", "pytest", "-q", "test_it.py"]
    run = subprocess.Popen(argv, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    try:
        assert Deadline(200).poll((tmp_path / "pid").exists, every=0.2)
        pid, name = (tmp_path / "pid").read_text().split()
        assert name in {each.name for each in engine.machines()}
        assert Path(f"/proc/{pid}").exists()
    finally:
        run.kill()
        run.wait()
    assert Deadline(20).poll(lambda: not Path(f"/proc/{pid}").exists(), every=0.1), "the machine outlived its owner"
    assert Deadline(60).poll(lambda: name not in {each.name for each in engine.machines()}, every=0.5), "smolvm still has the machine"
    gc = [sys.executable, "-c", "from pytest_vmbottle.cli import main; main()", "gc"]
    swept = subprocess.run(gc, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert (swept.returncode, name in swept.stdout) == (0, False), swept.stderr
