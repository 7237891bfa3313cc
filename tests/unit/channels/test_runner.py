"""Commands over the runner: its program runs here as it does in a guest, on a socket in place of a serial port."""

from __future__ import annotations

import ast
import io
import os
import random
import resource
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from pytest_vmbottle import MachineDied, MachineError
from pytest_vmbottle.channels.guest_agent import AgentEnded
from pytest_vmbottle.channels.port import GUEST_PATH, MAX_OUTPUT, Command, Terminal
from pytest_vmbottle.channels.runner import _SCRIPT, Runner
from pytest_vmbottle.host.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Iterator

_ENV = (("PATH", GUEST_PATH), ("LC_ALL", "C"))


class Guest:
    """The other end: a process with the program, which can be ended."""

    def __init__(self, folder: Path, theirs: socket.socket) -> None:
        # Paths of a guest that a test must not use, and the steps after which nobody could wait for it or see what it says.
        text = _SCRIPT.replace("/run/vmbottle-runner.lock", str(folder / "lock")).replace("/sys/fs/cgroup/vmbottle", str(folder / "group"))
        text = text.replace("if os.fork():\n    os._exit(0)\n", "").replace('"/proc/self/loginuid"', f'"{folder}/login"')
        text = text.replace("os.open(sys.argv[1]", "int(sys.argv[1]) or os.open(sys.argv[1]").replace(
            "    os.dup2(null, fd)\n", "    pass\n"
        )
        (folder / "runner.py").write_text(text)
        self.changes, self.there = 0, True
        # Below a shell that ignores what Ctrl-C sends, as one does for what it starts in the background.
        words = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, str(folder / "runner.py"), str(theirs.fileno())]
        self.process = subprocess.Popen(words, pass_fds=[theirs.fileno()])

    def end(self) -> None:
        """Kill it, as a guest's user may do."""
        self.process.kill()
        self.process.wait()
        self.changes, self.there = self.changes + 1, False

    def alive(self) -> None:
        """A machine that is there."""


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def guest(tmp_path: Path, ends: tuple[socket.socket, socket.socket]) -> Iterator[Guest]:
    guest = Guest(tmp_path, ends[1])
    yield guest
    guest.process.kill()
    guest.process.wait()


@pytest.fixture
def runner(guest: Guest, ends: tuple[socket.socket, socket.socket]) -> Iterator[Runner]:
    runner = Runner(ends[0], alive=guest.alive, changes=lambda: guest.changes, is_there=lambda: guest.there)
    with closing(runner):
        assert runner.adopt(deadline=Deadline(30))
        yield runner


def _has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _sh(text: str, *words: str, content: bytes = b"") -> Command:
    return Command(argv=("sh", "-c", text, "sh", *words), env=_ENV, input=content)


def test_a_command_has_its_status_both_streams_its_environment_and_its_input(runner: Runner) -> None:
    done = runner.run(_sh('cat; echo "$1 $LC_ALL" >&2; exit 7', "word", content=b"\0in\xff"), deadline=Deadline(20))
    assert (done.returncode, done.stdout, done.stderr) == (7, b"\0in\xff", b"word C\n")
    assert runner.run(_sh("kill -9 $$"), deadline=Deadline(20)).returncode == -9
    # Nothing is inherited: neither variables nor what Python ignores.
    assert runner.run(Command(argv=("env",), env=_ENV), deadline=Deadline(20)).stdout.split()[:2] == [
        f"PATH={GUEST_PATH}".encode(),
        b"LC_ALL=C",
    ]
    assert runner.run(_sh("yes | head -n 1; echo ${PIPESTATUS:-}"), deadline=Deadline(20)).stdout.startswith(b"y\n")
    assert runner.run(Command(argv=("sleep", "0.01"), env=_ENV), deadline=Deadline(20)).returncode == 0


@pytest.mark.parametrize(("name", "status", "reason"), [("nonesuch", 127, b"not found"), ("notes", 126, b"cannot be executed")])
def test_a_program_that_cannot_be_started_is_told_as_by_every_channel(
    runner: Runner, tmp_path: Path, name: str, status: int, reason: bytes
) -> None:
    (tmp_path / "notes").write_text("no program")
    done = runner.run(Command(argv=(name,), env=(("PATH", str(tmp_path)),)), deadline=Deadline(20))
    assert (done.returncode, done.stderr) == (status, name.encode() + b": " + reason + b"\n")


def test_large_input_and_output_come_whole_and_too_much_is_cut_and_said(runner: Runner) -> None:
    content = random.Random(1).randbytes(5 << 20)
    assert runner.run(Command(argv=("cat",), env=_ENV, input=content), deadline=Deadline(60)).stdout == content
    with io.BytesIO(content) as source:
        assert runner.put(source, Command(argv=("wc", "-c"), env=_ENV), deadline=Deadline(60)).stdout.split() == [b"%d" % len(content)]
    done = runner.run(_sh(f"head -c {MAX_OUTPUT + 5} /dev/zero"), deadline=Deadline(60))
    assert (len(done.stdout), done.truncated) == (MAX_OUTPUT, True)


def test_commands_run_beside_each_other_and_a_reader_that_takes_nothing_holds_up_nobody_else(runner: Runner) -> None:
    stopped, taken = threading.Event(), list[int]()

    def slow(data: bytes) -> None:
        taken.append(len(data))
        stopped.wait(60)

    flood = runner.start(_sh("head -c 30000000 /dev/zero"), stdout=slow, stderr=lambda _: None, deadline=Deadline(20))
    results = list[bytes]()
    threads = [
        threading.Thread(target=lambda n=n: results.append(runner.run(_sh("sleep 0.2; echo $1", str(n)), deadline=Deadline(30)).stdout))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, results)) == list(range(20))
    assert len(taken) <= 1
    assert flood.returncode is None
    stopped.set()
    assert flood.wait(deadline=Deadline(60)) == 0
    assert sum(taken) == 30_000_000


def test_a_reader_that_is_gone_ends_neither_the_command_nor_the_others(runner: Runner) -> None:
    def gone(data: bytes) -> None:
        raise BrokenPipeError(len(data))

    running = runner.start(_sh("head -c 3000000 /dev/zero; echo on >&2"), stdout=gone, stderr=lambda _: None, deadline=Deadline(20))
    assert running.wait(deadline=Deadline(30)) == 0
    assert runner.run(_sh("echo on"), deadline=Deadline(20)).stdout == b"on\n"


def test_a_command_beside_others_takes_input_until_it_is_closed(runner: Runner) -> None:
    got = bytearray()
    running = runner.start(Command(argv=("cat",), env=_ENV), stdout=got.extend, stderr=lambda _: None, deadline=Deadline(20))
    running.write(b"one ", deadline=Deadline(20))
    running.write(b"x" * (3 << 20), deadline=Deadline(60))
    assert running.returncode is None
    running.close_input()
    assert running.wait(deadline=Deadline(30)) == 0
    assert len(got) == 4 + (3 << 20)
    deaf = runner.start(_sh("exec <&-; sleep 0.5"), stdout=got.extend, stderr=lambda _: None, deadline=Deadline(20))

    def insist() -> None:
        while True:
            deaf.write(b"x" * 4096, deadline=Deadline(20))
            time.sleep(0.01)

    with pytest.raises(BrokenPipeError):
        insist()


def test_a_command_is_killed_at_its_deadline_with_what_it_started(runner: Runner, tmp_path: Path) -> None:
    done = runner.run(_sh(f"sleep 61 & echo $! > {tmp_path}/pid; echo begun; wait"), deadline=Deadline(1))
    assert (done.returncode, done.stdout, done.timed_out, done.outlived) == (-9, b"begun\n", True, False)
    child = int((tmp_path / "pid").read_text())
    assert Deadline(10).poll(lambda: _has_ended(child))
    done = runner.run(_sh("sleep 62 & echo begun"), deadline=Deadline(1))
    assert (done.stdout, done.timed_out, done.outlived) == (b"begun\n", True, True)


def test_a_runner_that_ends_fails_its_commands_at_once_and_is_not_asked_again(runner: Runner, guest: Guest) -> None:
    threading.Timer(0.3, guest.end).start()
    with pytest.raises(AgentEnded):
        runner.run(Command(argv=("sleep", "60"), env=_ENV), deadline=Deadline(30))
    assert not runner.is_ready


@pytest.mark.parametrize(("booted", "said"), [(False, 1), (True, 0)])
def test_the_loss_of_a_runner_is_told_once_but_not_after_a_boot(
    runner: Runner, guest: Guest, caplog: pytest.LogCaptureFixture, *, booted: bool, said: int
) -> None:
    runner.warn_if_lost()
    assert not caplog.records
    guest.end()
    if booted:
        runner.expect_none()
    runner.warn_if_lost()
    runner.warn_if_lost()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * said


def test_what_was_meant_for_another_host_is_dropped_before_the_first_answer(
    guest: Guest, ends: tuple[socket.socket, socket.socket]
) -> None:
    # The end of a frame, and one that looks whole: a clone's port may begin in the middle.
    ends[1].sendall(os.urandom(3000) + struct.pack(">IBI", 3, 17, 1) + b"abc")
    with closing(Runner(ends[0], alive=guest.alive, changes=lambda: 0, is_there=lambda: True)) as runner:
        assert runner.adopt(deadline=Deadline(30))
        assert runner.run(_sh("echo right"), deadline=Deadline(20)).stdout == b"right\n"


@pytest.mark.parametrize(
    "answer",
    [
        struct.pack(">IBI", 1 << 31, 17, 1),
        b"\xff" * 4096,
        struct.pack(">IBI", 4, 19, 1) + b"zero",
        struct.pack(">IBI", 4, 19, 1) + b"9999",
        struct.pack(">IBI", 40, 22, 1) + b"9" * 40,
        b"",
    ],
    ids=["endless", "noise", "word", "status", "number", "end"],
)
def test_a_guest_that_sends_nonsense_ends_the_command_with_an_error(ends: tuple[socket.socket, socket.socket], answer: bytes) -> None:
    ours, theirs = ends
    runner = Runner(ours, alive=lambda: None, changes=lambda: 0, is_there=lambda: True)

    def play() -> None:
        asked = theirs.recv(9 + 16)
        theirs.sendall(struct.pack(">IBI", 16, 21, 0) + asked[9:])
        number = struct.unpack(">IBI", theirs.recv(1 << 16)[:9])[2]
        theirs.sendall(answer.replace(struct.pack(">I", 1), struct.pack(">I", number)))
        theirs.shutdown(socket.SHUT_WR) if not answer else None

    player = threading.Thread(target=play)
    player.start()
    with closing(runner):
        assert runner.adopt(deadline=Deadline(20))
        with pytest.raises((AgentEnded, MachineDied)):
            runner.run(Command(argv=("true",)), deadline=Deadline(20))
    player.join()


@pytest.mark.parametrize(("lost", "kind"), [(MachineDied("its kernel panicked"), MachineDied), (None, AgentEnded)], ids=["panic", "hang"])
def test_a_guest_that_takes_nothing_any_more_ends_the_wait_for_it(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, lost: MachineDied | None, kind: type[Exception]
) -> None:
    monkeypatch.setattr("pytest_vmbottle.channels.runner._STUCK", 1.0)

    def alive() -> None:
        if lost is not None:
            raise lost

    with closing(Runner(ends[0], alive=alive, changes=lambda: 0, is_there=lambda: True)) as runner:
        command = Command(argv=("cat",), input=b"x" * (1 << 20))
        with pytest.raises(kind):
            runner.run(command, deadline=Deadline(30))
        assert not runner.is_ready


def test_nothing_is_cut_in_two_while_it_is_quiet(runner: Runner) -> None:
    done = list[bytes]()
    with runner.quiet(Deadline(20)):
        waiting = threading.Thread(target=lambda: done.append(runner.run(_sh("echo later"), deadline=Deadline(30)).stdout))
        waiting.start()
        time.sleep(0.3)
        assert not done
    waiting.join()
    assert done == [b"later\n"]


def test_a_runner_that_is_not_there_is_not_taken_up(ends: tuple[socket.socket, socket.socket]) -> None:
    with closing(Runner(ends[0], alive=lambda: None, changes=lambda: 0, is_there=lambda: False)) as runner:
        assert not runner.adopt(deadline=Deadline(0.1))
        assert not runner.is_ready
        ends[1].close()
        with pytest.raises(MachineError):
            runner.run(Command(argv=("true",)), deadline=Deadline(5))


def test_a_command_that_is_left_runs_on_and_who_writes_to_it_is_let_go(runner: Runner, tmp_path: Path) -> None:
    script = _sh(f"head -c 5000000 /dev/zero; echo done > {tmp_path}/mark; exec sleep 30")
    running = runner.start(script, stdout=lambda _: time.sleep(0.2), stderr=lambda _: None, deadline=Deadline(20))
    refused = list[type[Exception]]()

    def insist() -> None:
        try:
            running.write(b"x" * (4 << 20), deadline=Deadline(60))
        except BrokenPipeError as error:
            refused.append(type(error))

    writer = threading.Thread(target=insist)
    writer.start()
    time.sleep(0.3)
    assert not (tmp_path / "mark").exists()
    running.close()
    writer.join(20)
    assert refused == [BrokenPipeError]
    assert Deadline(20).poll((tmp_path / "mark").exists)
    runner.run(script.killer(), deadline=Deadline(20))


def test_the_output_of_a_command_that_another_host_has_started_is_read_for_nobody(
    guest: Guest, ends: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    first = Runner(ends[0], alive=guest.alive, changes=lambda: 0, is_there=lambda: True)
    assert first.adopt(deadline=Deadline(30))
    script = _sh(f"sleep 1; head -c 5000000 /dev/zero; echo done > {tmp_path}/mark")
    first.start(script, stdout=lambda _: time.sleep(30), stderr=lambda _: None, deadline=Deadline(20))
    assert first.run(_sh("echo begun"), deadline=Deadline(20)).stdout == b"begun\n"
    # A clone: the guest goes on, and knows nothing of what the first host has heard.
    first._jobs.clear()
    assert Deadline(30).poll((tmp_path / "mark").exists)
    first.close()


def test_output_beyond_what_a_guest_may_send_ends_the_conversation(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    runner = Runner(ours, alive=lambda: None, changes=lambda: 0, is_there=lambda: True)

    def play() -> None:
        asked = theirs.recv(9 + 16)
        theirs.sendall(struct.pack(">IBI", 16, 21, 0) + asked[9:])
        number = struct.unpack(">IBI", theirs.recv(1 << 16)[:9])[2]
        piece = bytes(1 << 16)
        try:
            for _ in range(200):
                theirs.sendall(struct.pack(">IBI", len(piece), 17, number) + piece)
        except OSError:
            return

    player = threading.Thread(target=play)
    player.start()
    stuck = threading.Event()
    with closing(runner):
        assert runner.adopt(deadline=Deadline(20))
        running = runner.start(Command(argv=("true",)), stdout=lambda _: stuck.wait(60), stderr=lambda _: None, deadline=Deadline(20))
        with pytest.raises(AgentEnded, match="more than was taken"):
            running.wait(deadline=Deadline(30))
        stuck.set()
    player.join()


def test_output_that_waits_keeps_its_order_and_does_not_grow_with_its_pieces(runner: Runner) -> None:
    go, got = threading.Event(), list[bytes]()

    def take(data: bytes) -> None:
        go.wait(60)
        got.append(data)

    script = _sh("for i in 1 2 3; do echo out$i; sleep 0.05; echo err$i >&2; sleep 0.05; done")
    running = runner.start(script, stdout=take, stderr=take, deadline=Deadline(20))
    time.sleep(1)
    go.set()
    assert running.wait(deadline=Deadline(30)) == 0
    assert b"".join(got) == b"out1\nerr1\nout2\nerr2\nout3\nerr3\n"


def _seen(terminal: Terminal, *wanted: str, since: str = "") -> str:
    """Read a terminal until all of it was shown."""
    limit = Deadline(20)
    while not all(word in since for word in wanted):
        assert not limit.expired, since
        if select.select([terminal], [], [], 0.5)[0]:
            since += terminal.receive().decode()
    return since


def _on_terminal(runner: Runner, text: str) -> Terminal:
    return runner.terminal(user="root", kind="dumb", size=(91, 33), deadline=Deadline(20), command=_sh(text))


def test_a_command_on_a_terminal_has_its_size_its_keys_and_its_status(runner: Runner) -> None:
    with closing(
        _on_terminal(runner, "trap 'echo INT' INT; tty; stty size; until read -r word; do :; done; echo got $word; cat; stty size; exit 7")
    ) as terminal:
        _seen(terminal, "/dev/pts/", "33 91")
        terminal.send(b"\x03")
        _seen(terminal, "INT")
        terminal.send(b"word\n")
        _seen(terminal, "got word")
        terminal.resize(100, 40)
        terminal.send(b"x" * 300 + b"\n\x04")
        _seen(terminal, "40 100")
        while terminal.receive():
            pass
        assert terminal.status == 7


def test_a_terminal_shows_its_end_and_what_is_left_behind_does_not_hold_it(runner: Runner) -> None:
    with closing(_on_terminal(runner, "sleep 63 & echo last words; kill -9 $$")) as terminal:
        shown = b""
        while data := terminal.receive():
            shown += data
        assert (shown, terminal.status) == (b"last words\r\n", -9)
    with closing(
        runner.terminal(user="root", kind="dumb", size=(9, 9), deadline=Deadline(9), command=Command(argv=("nonesuch",)))
    ) as missing:
        assert "not found" in _seen(missing, "not found")
        assert (missing.receive(), missing.status) == (b"", 127)


def test_a_guest_that_has_no_descriptors_left_refuses_a_command_and_goes_on(runner: Runner, guest: Guest) -> None:
    resource.prlimit(guest.process.pid, resource.RLIMIT_NOFILE, (16, 4096))
    held = [runner.start(Command(argv=("cat",), env=_ENV), stdout=print, stderr=print, deadline=Deadline(20)) for _ in range(6)]
    assert Deadline(20).poll(lambda: held[-1].returncode == 127)
    resource.prlimit(guest.process.pid, resource.RLIMIT_NOFILE, (4096, 4096))
    assert runner.run(_sh("echo on"), deadline=Deadline(20)).stdout == b"on\n"
    for each in held:
        each.close_input()
    assert held[0].wait(deadline=Deadline(20)) == 0


def test_who_has_a_terminal_ends_with_its_connection(runner: Runner, tmp_path: Path) -> None:
    terminal = _on_terminal(runner, f"echo $$ > {tmp_path}/pid; yes")
    _seen(terminal, "y")
    pid = int((tmp_path / "pid").read_text())
    terminal.close()
    assert Deadline(10).poll(lambda: _has_ended(pid))
    assert runner.run(_sh("echo on"), deadline=Deadline(20)).stdout == b"on\n"


_MINIMAL = {
    "contextlib",
    "errno",
    "fcntl",
    "grp",
    "os",
    "pwd",
    "selectors",
    "signal",
    "stat",
    "struct",
    "sys",
    "time",
    "collections.abc",
    "typing",
}
"""Of the modules that Debian's python3-minimal has; it has no `termios`, `socket` and `select` are built in."""


def test_the_program_needs_no_more_of_python_than_a_minimal_debian_has() -> None:
    nodes = [*ast.walk(ast.parse(_SCRIPT))]
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    assert names | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)} <= _MINIMAL
