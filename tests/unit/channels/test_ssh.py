"""Commands by SSH, against a real server in this process that runs them on this host."""

from __future__ import annotations

import errno
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import attrs
import paramiko
import pytest

from pytest_vmbottle import MachineDied, MachineTimeout
from pytest_vmbottle.channels import outputs, ssh
from pytest_vmbottle.channels.port import GUEST_PATH, Command, Finished, Keys
from pytest_vmbottle.channels.ssh import HostKeyMismatch, SshChannel, new_keys
from pytest_vmbottle.host.deadline import Deadline

Handler = Callable[[paramiko.Channel, str], None]

# What paramiko raises of a client that has gone: the second where the socket itself refuses.
GONE = (OSError, EOFError)


def execute(channel: paramiko.Channel, command: str) -> None:
    """Does what an SSH server does with a command."""
    process = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        threads = [
            threading.Thread(target=step, daemon=True)
            for step in (lambda: _take(channel, process), lambda: _give(process.stdout, channel.sendall))
        ]
        for thread in threads:
            thread.start()
        _give(process.stderr, channel.sendall_stderr)
        threads[1].join()
        status = process.wait()
        with suppress(*GONE):
            if status < 0:
                _tell_signal(channel, {9: "KILL", 15: "TERM", 6: "ABRT"}[-status])
            else:
                channel.send_exit_status(status)
            channel.close()
        threads[0].join()


def _take(channel: paramiko.Channel, process: subprocess.Popen[bytes]) -> None:
    with suppress(*GONE):
        while data := channel.recv(1 << 15):
            assert process.stdin is not None
            process.stdin.write(data)
            process.stdin.flush()
    with suppress(OSError):
        assert process.stdin is not None
        process.stdin.close()


def _give(source: Any, send: Callable[[bytes], object]) -> None:
    with suppress(*GONE):
        while data := source.read1(1 << 15):
            send(data)


def _tell_signal(channel: paramiko.Channel, name: str) -> None:
    message = paramiko.Message()
    message.add_byte(bytes([98]))  # SSH_MSG_CHANNEL_REQUEST
    message.add_int(channel.remote_chanid)
    message.add_string("exit-signal")
    message.add_boolean(b=False)
    message.add_string(name)
    message.add_boolean(b=False)
    message.add_string("")
    message.add_string("")
    channel.transport._send_user_message(message)  # type: ignore[union-attr]


def _start_when_answered(channel: paramiko.Channel, thread: threading.Thread) -> None:
    """Starts a thread when the client was told that its command begins: a command that ended before would have no beginning."""
    transport: Any = channel.transport
    send = transport._send_user_message

    def send_and_start(message: paramiko.Message) -> None:
        send(message)
        if message.asbytes()[:1] == bytes([99]):  # SSH_MSG_CHANNEL_SUCCESS
            transport._send_user_message = send
            thread.start()

    transport._send_user_message = send_and_start


class Server(paramiko.ServerInterface):
    """An SSH server that knows one key, and notes who tries what."""

    def __init__(self, host_private: str, user_public: str, handler: Handler = execute) -> None:
        self.tried: list[str] = []
        self.commands: list[str] = []
        self.handler = handler
        self.silent = False
        self.most_sessions = 10
        self._sessions: list[paramiko.Channel] = []
        self._host = paramiko.Ed25519Key.from_private_key(StringIO(host_private))
        self._user = user_public.split()[1]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.transports: list[paramiko.Transport] = []
        self._threads: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                transport = paramiko.Transport(connection)
                transport.set_log_channel("vmbottle.tests")
                transport.add_server_key(self._host)
                self.transports.append(transport)
                with suppress(paramiko.SSHException, EOFError):
                    transport.start_server(event=threading.Event(), server=self)

    def get_allowed_auths(self, username: str) -> str:  # noqa: ARG002
        return "publickey,password,keyboard-interactive"

    def check_auth_none(self, username: str) -> int:  # noqa: ARG002
        self.tried.append("none")
        return paramiko.common.AUTH_FAILED

    def check_auth_password(self, username: str, password: str) -> int:  # noqa: ARG002
        self.tried.append("password")
        return paramiko.common.AUTH_FAILED

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.tried.append(f"{username} {key.get_base64()}")
        return paramiko.common.AUTH_SUCCESSFUL if key.get_base64() == self._user else paramiko.common.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:  # noqa: ARG002
        self._sessions = [session for session in self._sessions if not session.closed]
        if len(self._sessions) >= self.most_sessions:  # as sshd with its MaxSessions
            return paramiko.common.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self.commands.append(command.decode())
        self._sessions.append(channel)
        if self.silent:
            time.sleep(2)
        thread = threading.Thread(target=self.handler, args=(channel, command.decode()), daemon=True)
        self._threads.append(thread)
        _start_when_answered(channel, thread)
        return True

    def close(self) -> None:
        self._listener.close()
        for transport in self.transports:
            transport.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(5)


@pytest.fixture(scope="module")
def keys() -> Keys:
    return new_keys()


@pytest.fixture
def server(keys: Keys) -> Iterator[Server]:
    made = Server(keys.host_private, keys.user_public)
    yield made
    made.close()


@pytest.fixture
def channel(server: Server, keys: Keys) -> Iterator[SshChannel]:
    made = connect(server, keys)
    yield made
    made.close()


def connect(server: Server, keys: Keys, seconds: float = 20) -> SshChannel:
    return SshChannel.connect(server.address, keys, deadline=Deadline(seconds), alive=lambda: None)


def command(*argv: str, **more: Any) -> Command:
    return Command(argv=argv, env=(("PATH", GUEST_PATH),), **more)


def run(channel: SshChannel, *argv: str, seconds: float = 20, **more: Any) -> Finished:
    return channel.run(command(*argv, **more), deadline=Deadline(seconds))


# -- who is let in ---------------------------------------------------------------------------------------------------------------------


def test_an_impostor_with_another_host_key_is_told_nothing(keys: Keys) -> None:
    impostor = Server(new_keys().host_private, keys.user_public)
    try:
        with pytest.raises(HostKeyMismatch, match="SHA256:"):
            connect(impostor, keys)
        assert impostor.tried == []
        assert impostor.commands == []
    finally:
        impostor.close()


def test_only_the_machines_own_key_is_offered_whatever_the_user_has(
    server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home" / ".ssh"
    home.mkdir(parents=True)
    (home / "id_ed25519").write_text(new_keys().user_private)
    (home / "config").write_text("Host *\n  User somebody\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(tmp_path / "agent"))
        agent.listen()
        agent.settimeout(0)
        connect(server, keys).close()
        with pytest.raises(BlockingIOError):  # nobody has asked the user's agent for anything
            agent.accept()

    assert server.tried == [f"root {keys.user_public.split()[1]}"]


def test_a_guest_that_does_not_let_us_in_is_given_up_with_what_it_said_last(server: Server, keys: Keys) -> None:
    stranger = attrs.evolve(new_keys(), host_public=keys.host_public)

    with pytest.raises(MachineTimeout, match="PermitRootLogin"):
        connect(server, stranger, 1)
    assert {attempt.split()[1] for attempt in server.tried} == {stranger.user_public.split()[1]}


@pytest.mark.parametrize(
    "greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-half", b"\0" * 5000], ids=["silence", "web", "half", "zeros"]
)
def test_something_that_is_no_ssh_server_is_given_up_in_time(keys: Keys, greeting: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "_PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken: list[socket.socket] = []

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    taken.append(connection)
                    connection.sendall(greeting)

        threading.Thread(target=accept, daemon=True).start()
        with pytest.raises(MachineTimeout):
            SshChannel.connect(listener.getsockname(), keys, deadline=Deadline(1), alive=lambda: None)
        for connection in taken:
            connection.close()


def test_a_port_where_nobody_listens_is_tried_until_somebody_does(keys: Keys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(MachineTimeout, match="Connection refused"):
        SshChannel.connect(address, keys, deadline=Deadline(1), alive=lambda: None)


def test_a_machine_that_dies_while_we_knock_is_not_waited_for(keys: Keys) -> None:
    calls: list[int] = []

    def alive() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MachineDied("the kernel panicked")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(MachineDied, match="panicked"):
        SshChannel.connect(address, keys, deadline=Deadline(60), alive=alive)


# -- commands --------------------------------------------------------------------------------------------------------------------------


def test_words_arrive_as_they_are_with_their_environment_and_no_other(channel: SshChannel) -> None:
    words = ["a b", "", "$HOME", "`id`", "-n", "new\nline", "ünï", "'\"\\", "*", ";", "#"]
    assert run(channel, "printf", "%s|", *words).stdout.decode() == "".join(f"{word}|" for word in words)

    printed = channel.run(Command(argv=("env",), env=(("PATH", GUEST_PATH), ("A", "x y\n'z")), tag="1900000000"), deadline=Deadline(20))
    assert printed.stdout.decode() == f"PATH={GUEST_PATH}\nA=x y\n'z\nVMBOTTLE_EXEC=1900000000\n"


def test_streams_are_apart_and_bytes_are_kept(channel: SshChannel) -> None:
    finished = run(channel, "sh", "-c", r"printf '\377\000\r\n'; printf err >&2; exit 7")

    assert (finished.returncode, finished.stdout, finished.stderr, finished.truncated) == (7, b"\xff\0\r\n", b"err", False)


def test_input_of_any_size_is_given_and_ends(channel: SshChannel) -> None:
    content = bytes(range(256)) * 8000
    assert run(channel, "cat", input=content).stdout == content
    assert run(channel, "cat").stdout == b""
    assert channel.put(BytesIO(content), command("sh", "-c", "wc -c"), deadline=Deadline(20)).stdout.strip() == str(len(content)).encode()


def test_a_command_that_does_not_read_its_input_ends_all_the_same(channel: SshChannel) -> None:
    assert run(channel, "true", input=bytes(4 << 20)).returncode == 0


def test_output_of_any_size_goes_to_a_file(channel: SshChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "MAX_OUTPUT", 1000)
    sink = BytesIO()
    finished = channel.get(command("head", "-c", "300000", "/dev/zero"), sink, deadline=Deadline(20))

    assert (finished.returncode, len(sink.getvalue()), finished.stdout, finished.truncated) == (0, 300_000, b"", False)


@pytest.mark.parametrize(("size", "truncated"), [(999, False), (1000, False), (1001, True), (500_000, True)])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_kept_up_to_the_limit_and_the_command_still_ends(
    channel: SshChannel, monkeypatch: pytest.MonkeyPatch, size: int, truncated: object, stream: str
) -> None:
    monkeypatch.setattr(outputs, "MAX_OUTPUT", 1000)
    redirect = "" if stream == "stdout" else " >&2"
    finished = run(channel, "sh", "-c", f"head -c {size} /dev/zero | tr '\\0' x{redirect}; exit 3")

    assert getattr(finished, stream) == b"x" * min(size, 1000)
    assert (finished.truncated, finished.returncode) == (truncated, 3)


@pytest.mark.parametrize(("name", "number"), [("KILL", 9), ("TERM", 15), ("ABRT", 6)])
def test_a_command_that_dies_by_a_signal_has_its_number_negative(channel: SshChannel, name: str, number: int) -> None:
    assert run(channel, "sh", "-c", f"ulimit -c 0; echo before; kill -{name} $$").returncode == -number


def test_a_program_that_is_not_there_or_cannot_be_run_has_the_shells_status_and_a_plain_sentence(
    channel: SshChannel, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("x")
    missing, refused = run(channel, "no-such-program"), run(channel, str(tmp_path))

    assert (missing.returncode, missing.stderr) == (127, b"no-such-program: not found\n")
    assert (refused.returncode, refused.stderr) == (126, f"{tmp_path}: cannot be executed\n".encode())


def test_commands_of_several_threads_do_not_mix(channel: SshChannel) -> None:
    results: dict[int, bytes] = {}

    def work(number: int) -> None:
        results[number] = run(channel, "sh", "-c", f"sleep 0.1; echo {number}").stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == {number: f"{number}\n".encode() for number in range(8)}


# -- time ------------------------------------------------------------------------------------------------------------------------------


def test_a_command_that_takes_too_long_is_killed_with_its_children_and_its_output_kept(channel: SshChannel) -> None:
    finished = run(channel, "sh", "-c", "echo begun; sleep 4321 & echo $!; sleep 4321", seconds=1)
    begun, child = finished.stdout.split()

    assert (finished.timed_out, finished.returncode, begun) == (True, -9, b"begun")
    assert Deadline(60).poll(lambda: not alive(int(child)))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def drip(channel: paramiko.Channel, command: str) -> None:
    if "kill -s" in command:  # ours, to kill the other one
        execute(channel, command)
        return
    with suppress(*GONE):
        while True:
            channel.sendall(b"x")
            time.sleep(0.05)


def test_a_command_that_drips_output_for_ever_is_given_up_at_its_deadline(
    server: Server, channel: SshChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "_GRACE", 0.3)
    server.handler = drip
    finished = run(channel, "anything", seconds=0.5)

    assert finished.timed_out
    assert set(finished.stdout) == {ord("x")}


@pytest.mark.parametrize("where", ["after the command was taken", "before"])
def test_a_server_that_falls_silent_is_given_up(server: Server, channel: SshChannel, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(ssh, "_GRACE", 0.3)
    server.handler = lambda *_: None
    server.silent = where == "before"
    ended = threading.Event()
    seen: list[object] = []

    def work() -> None:
        try:
            seen.append(run(channel, "anything", seconds=0.5).timed_out)
        except MachineTimeout:
            seen.append("nothing was begun")
        ended.set()

    threading.Thread(target=work, daemon=True).start()
    assert ended.wait(60)
    assert seen == [True if where != "before" else "nothing was begun"]


@pytest.mark.parametrize(
    "how", [lambda server: server.transports[-1].close(), lambda server: server.transports[-1].sock.close()], ids=["closes", "drops"]
)
def test_a_connection_that_ends_while_a_command_runs_is_a_lost_machine(
    server: Server, channel: SshChannel, how: Callable[[Server], None]
) -> None:
    server.handler = lambda *_: how(server)

    with pytest.raises(MachineDied, match="SSH"):
        run(channel, "anything")
    with pytest.raises(MachineDied, match="SSH"):
        run(channel, "again")


class _Full(BytesIO):
    def write(self, _: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_on_the_host_is_raised_where_the_output_was_wanted(channel: SshChannel) -> None:
    with pytest.raises(OSError, match="No space left"):
        channel.get(command("head", "-c", "300000", "/dev/zero"), _Full(), deadline=Deadline(20))
    assert run(channel, "echo", "still here").stdout == b"still here\n"


# -- commands beside each other --------------------------------------------------------------------------------------------------------


class Started:
    """A command that was started, and what it has said."""

    def __init__(self, channel: SshChannel, *argv: str) -> None:
        self.command = command(*argv)
        self.out: list[bytes] = []
        self.err: list[bytes] = []
        self.running = channel.start(self.command, stdout=self.out.append, stderr=self.err.append, deadline=Deadline(20))

    def said(self, text: bytes) -> bool:
        return bool(Deadline(60).poll(lambda: text in b"".join(self.out), every=0.01))


def test_output_comes_while_a_command_runs_and_ends_with_an_empty_piece(channel: SshChannel) -> None:
    started = Started(channel, "sh", "-c", "echo one; read x; echo $x; echo err >&2; exit 4")
    assert started.said(b"one\n")
    assert started.running.returncode is None
    assert started.running.wait(deadline=Deadline(0.1)) is None
    started.running.write(b"two\n", deadline=Deadline(60))
    assert started.running.wait(deadline=Deadline(10)) == 4
    assert (b"".join(started.out), b"".join(started.err)) == (b"one\ntwo\n", b"err\n")
    assert (started.out[-1], started.err[-1]) == (b"", b"")
    with pytest.raises(BrokenPipeError):
        started.running.write(b"more", deadline=Deadline(60))
    started.running.close()


def test_any_number_of_commands_can_leave_something_behind_that_holds_their_session(
    server: Server, channel: SshChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "_LAST_OUTPUT", 0.05)
    server.handler = lambda session, _: session.send_exit_status(0)  # and the session stays open, as with `sleep 500 &`
    for _ in range(server.most_sessions + 1):
        started = Started(channel, "anything")
        assert started.running.wait(deadline=Deadline(60)) == 0
        started.running.close()
        started.running.close()
        assert started.running.returncode == 0


def test_a_command_that_is_refused_holds_no_session(server: Server, channel: SshChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "check_channel_exec_request", lambda session, _: server._sessions.append(session))
    for _ in range(server.most_sessions):
        with pytest.raises(MachineDied):
            Started(channel, "anything")
    monkeypatch.undo()
    assert run(channel, "echo", "there").stdout == b"there\n"


def test_input_that_is_not_taken_is_given_up_at_its_deadline(server: Server, channel: SshChannel) -> None:
    server.handler = lambda *_: None
    started = Started(channel, "anything")
    with pytest.raises(MachineTimeout, match=r"0\.3 s"):
        started.running.write(bytes(64 << 20), deadline=Deadline(0.3))
    started.running.close()


def test_a_command_whose_connection_is_lost_says_so_when_it_is_asked(server: Server, channel: SshChannel) -> None:
    server.handler = lambda *_: None
    started = Started(channel, "anything")
    assert not channel.lost
    server.transports[-1].close()
    assert Deadline(60).poll(lambda: channel.lost)
    with pytest.raises(MachineDied, match="SSH"):
        started.running.wait(deadline=Deadline(60))
    with pytest.raises(MachineDied, match="SSH"):
        _ = started.running.returncode


def test_a_guest_that_is_lost_without_a_word_is_seen_while_its_command_is_waited_for(server: Server, keys: Keys) -> None:
    gone = threading.Event()

    def alive() -> None:
        if gone.is_set():
            raise MachineDied("the kernel panicked")

    channel = SshChannel.connect(server.address, keys, deadline=Deadline(20), alive=alive)
    server.handler = lambda *_: None
    started = Started(channel, "anything")
    assert started.running.returncode is None
    gone.set()
    with pytest.raises(MachineDied, match="panicked"):
        started.running.wait(deadline=Deadline(60))
    with pytest.raises(MachineDied, match="panicked"):
        _ = started.running.returncode
    channel.close()


def test_a_guest_that_is_lost_while_a_command_begins_is_not_waited_for(server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = threading.Event()

    def alive() -> None:
        if lost.is_set():
            raise MachineDied("the kernel panicked")

    channel = SshChannel.connect(server.address, keys, deadline=Deadline(20), alive=alive)
    monkeypatch.setattr(server.transports[-1].packetizer, "send_message", lambda *_: None)  # it hears, and says nothing
    lost.set()
    began = time.monotonic()
    with pytest.raises(MachineDied, match="panicked"):
        run(channel, "anything", seconds=20)
    assert time.monotonic() - began < 10
    channel.close()
