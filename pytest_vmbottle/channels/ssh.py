"""The SSH channel, for guests without the QEMU guest agent and for large data.

The guest's host key is pinned before anything is authenticated, nothing of the user's own SSH set-up (agent, keys, known hosts) is used,
and every wait has a limit.
"""

from __future__ import annotations

import logging
import shlex
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from io import BytesIO, StringIO
from typing import BinaryIO, ClassVar

import attrs
import paramiko
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from pytest_vmbottle.channels.outputs import Outputs
from pytest_vmbottle.channels.port import Channel, Command, Finished, Keys, Running, Terminal
from pytest_vmbottle.errors import MachineDied, MachineError, MachineTimeout
from pytest_vmbottle.host.deadline import Deadline

__all__ = ["HostKeyMismatch", "SshChannel", "SshProcess", "SshTerminal", "new_keys"]

_MSG_CHANNEL_REQUEST = 98  # RFC 4254, section 9
_CHUNK = 1 << 18
_GRACE = 10.0
_NO_STATUS = -(1 << 16)
"""Placeholder for the status of a command that has none yet.

paramiko's own -1 is also the status of a command ended by SIGHUP.
"""
_PATIENCE = 15.0
"""Seconds for one login once the guest listens: without KVM its part of the key exchange takes several."""
_LOOK = 0.5
"""Seconds after which a guest that does not answer is checked."""
# Larger than the 2 MiB that paramiko takes by default: a transfer waits less for adjustments of the window.
_WINDOW = 1 << 25
_KEEPALIVE = 5
_LAST_OUTPUT = 0.5
_LAST_WORDS = 2.0
"""Seconds that a program's status may come after the end of its output."""
log = logging.getLogger(__name__)
_QUIET = log.getChild("transport")
_QUIET.setLevel(logging.CRITICAL)


class HostKeyMismatch(MachineError):
    """Something other than our guest answers on its port.

    Nothing was sent to it.
    """


def new_keys() -> Keys:
    """Generate ed25519 keys for a machine and for our login."""
    (user_private, user_public), (host_private, host_public) = _key_pair(), _key_pair()
    return Keys(user_private=user_private, user_public=user_public, host_private=host_private, host_public=host_public)


def _key_pair() -> tuple[str, str]:
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return private.decode(), public.decode()


def _on_request(channel: paramiko.Channel, message: paramiko.Message) -> None:
    """Record a command's death by signal, which paramiko drops (RFC 4254, section 6.10).

    Everything else is left to paramiko.
    """
    start = message.packet.tell()
    kind = message.get_text()
    message.get_boolean()
    if kind == "exit-signal":
        # A name without SIG. One that this host does not know counts as SIGKILL: that a signal ended the command must not be lost.
        number = getattr(signal, f"SIG{message.get_text()}", signal.SIGKILL)
        channel.exit_status = -int(number)
        channel.status_event.set()
        return
    # Rewound, because paramiko's own handler reads the message from its start.
    message.packet.seek(start)
    channel._handle_request(message)  # type: ignore[attr-defined]  # noqa: SLF001


class _Transport(paramiko.Transport):
    # A private table, but paramiko offers no other place to hear of a signal: it has neither a hook nor an attribute for it.
    _channel_handler_table: ClassVar = {
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]  # noqa: SLF001
        _MSG_CHANNEL_REQUEST: _on_request,
    }


class SshChannel(Channel):
    """A login by key on a guest's forwarded port.

    Safe to use from several threads.
    """

    def __init__(self, transport: paramiko.Transport, *, alive: Callable[[], None]) -> None:
        """Take a transport that has logged in; use `connect` to make one."""
        self._transport = transport
        self._alive = alive

    @classmethod
    def connect(
        cls, address: tuple[str, int], keys: Keys, *, user: str = "root", deadline: Deadline, alive: Callable[[], None]
    ) -> SshChannel:
        """Log in as soon as the guest accepts it.

        Raises:
            HostKeyMismatch: The server's host key is not our guest's.
            MachineTimeout: No login succeeded by the deadline.
            MachineDied: From `alive`, which is called between attempts.
        """
        reasons: list[str] = []

        def attempt() -> SshChannel | None:
            return cls.attempt(address, keys, user=user, deadline=deadline, alive=alive, reasons=reasons)

        channel = deadline.poll(attempt, every=0.5, first=0.05)
        if channel is None:
            raise MachineTimeout(f"SSH login on {address[0]}:{address[1]} timed out after {deadline.seconds:g} s; last: {reasons[-1]}")
        return channel

    @classmethod
    def attempt(  # noqa: PLR0913 - what a login takes
        cls,
        address: tuple[str, int],
        keys: Keys,
        *,
        user: str = "root",
        deadline: Deadline,
        alive: Callable[[], None],
        reasons: list[str] | None = None,
    ) -> SshChannel | None:
        """Try to log in once; return None if it fails.

        It fails at once if nothing listens in the guest, because QEMU then drops the connection that it has accepted.

        Args:
            address: The host's address and port that are forwarded to the guest.
            keys: Our key for the login, and the guest's host key.
            user: The user to log in as.
            deadline: Deadline of the attempt.
            alive: Function that is called first, and raises `MachineDied` if the guest can no longer answer.
            reasons: List that gets the reason of a failure.

        Raises:
            HostKeyMismatch: The server's host key is not our guest's.
        """
        alive()
        try:
            # At least a second: of an attempt without any time the reason would always be that it timed out.
            return cls(_login(address, keys, user, Deadline(min(_PATIENCE, max(1.0, deadline.remaining)))), alive=alive)
        except paramiko.AuthenticationException:
            reason = f"the login of {user} was refused: cloud-init must install our key, and sshd_config must not say `PermitRootLogin no`"
        # Refused by QEMU or by the guest: while it boots, both are expected, and only the last reason is told.
        except (paramiko.SSHException, OSError, EOFError) as error:
            reason = str(error) or type(error).__name__
        if reasons is not None:
            reasons[:] = [reason]
        return None

    def run(self, command: Command, *, deadline: Deadline) -> Finished:
        """Run a command to its end (see `Channel.run`)."""
        return self._execute(command, BytesIO(command.input), None, deadline)

    def put(self, source: BinaryIO, command: Command, *, deadline: Deadline) -> Finished:
        """Run a command with a host file as its input."""
        return self._execute(command, source, None, deadline)

    def get(self, command: Command, sink: BinaryIO, *, deadline: Deadline) -> Finished:
        """Run a command and write its standard output to a host file."""
        return self._execute(command, BytesIO(command.input), sink, deadline)

    def terminal(self, *, user: str, kind: str, size: tuple[int, int], deadline: Deadline, command: Command | None = None) -> SshTerminal:
        """Start a login shell or a command on a terminal (see `Channel.terminal`)."""

        def ask(session: paramiko.Channel) -> None:
            session.get_pty(kind, *size)
            # The login is always root's, whose key it is. For another user `runuser` needs no password and no key of his.
            if command is not None:
                session.exec_command(_remote(command))
            elif user == "root":
                session.invoke_shell()
            else:
                session.exec_command(shlex.join(["exec", "runuser", "-l", user]))

        try:
            return SshTerminal(self._open(ask, deadline))
        except (paramiko.SSHException, OSError, EOFError) as error:
            self._alive()
            raise MachineDied(f"no terminal could be opened over SSH: {error}") from error

    def _begin(self, command: Command, deadline: Deadline) -> paramiko.Channel:
        return self._open(lambda session: session.exec_command(_remote(command)), deadline)

    def _open(self, ask: Callable[[paramiko.Channel], None], deadline: Deadline) -> paramiko.Channel:
        """Open a session and send a request in it.

        The guest is checked while paramiko waits for the answers.
        """
        opening: Future[paramiko.Channel] = Future()

        def attempt() -> None:
            try:
                opening.set_result(self._opened(ask, deadline))
            except BaseException as error:
                opening.set_exception(error)

        # A daemon thread: paramiko may hold it until its own time-out, and the interpreter does not wait for it at its end.
        threading.Thread(target=attempt, daemon=True).start()
        try:
            while not wait([opening], _LOOK).done:
                self._alive()
        except BaseException:
            # Nobody waits any more for a session that opens later. It is closed then, or it would count against the server's MaxSessions.
            opening.add_done_callback(lambda late: None if late.exception() else _give_up(late.result()))
            raise
        return opening.result()

    def _opened(self, ask: Callable[[paramiko.Channel], None], deadline: Deadline) -> paramiko.Channel:
        seconds = max(0.1, deadline.remaining)
        session = self._transport.open_session(timeout=seconds, window_size=_WINDOW)
        # Set before the request is sent: the status comes in paramiko's own thread, and must not be overwritten.
        session.exit_status = _NO_STATUS
        # The library waits for the answer to this request without a limit, unless the session is closed.
        limit = threading.Timer(seconds, _give_up, args=(session,))
        limit.daemon = True
        limit.start()
        try:
            ask(session)
        except BaseException:
            _give_up(session)
            raise
        finally:
            limit.cancel()
        return session

    def start(
        self, command: Command, *, stdout: Callable[[bytes], object], stderr: Callable[[bytes], object], deadline: Deadline
    ) -> SshProcess:
        """Start a command (see `Channel.start`)."""
        try:
            session = self._begin(command, deadline)
        except (paramiko.SSHException, OSError, EOFError) as error:
            self._alive()
            if deadline.expired and not self.lost:  # a guest that is busy is not a lost one
                raise MachineTimeout(f"timed out after {deadline.seconds:g} s waiting for SSH to start a command") from error
            raise MachineDied(f"the SSH connection is lost: {error}") from error
        return SshProcess(session, stdout, stderr, alive=self._alive)

    def _execute(self, command: Command, source: BinaryIO, sink: BinaryIO | None, deadline: Deadline, *, killing: bool = False) -> Finished:
        outputs = Outputs()
        process = self.start(command, stdout=(sink or outputs.stdout).write, stderr=outputs.stderr.write, deadline=deadline)
        process.feed(source)
        timed_out = not process.wait_for_all(deadline)
        outlived = timed_out and process.has_ended
        if timed_out and not killing:  # a guest that does not even answer this is not asked again and again
            self._execute(command.killer(), BytesIO(), None, Deadline(_GRACE), killing=True)
            # The killed command's last output is still on its way.
            process.wait_for_all(Deadline(_GRACE))
        try:
            status = -9 if timed_out else process.returncode
        finally:
            process.close()
        if process.unwritten:
            raise process.unwritten[0]
        return attrs.evolve(outputs.finished(command, status=status, timed_out=timed_out), outlived=outlived)

    @property
    def lost(self) -> bool:
        """Tell whether the connection has ended."""
        return not self._transport.is_active()

    def close(self) -> None:
        """Log out."""
        self._transport.close()


class SshProcess(Running):
    """A running command; a thread reads each of its streams (see `Running`).

    Attributes:
        unwritten: Errors that kept output from being written.
    """

    def __init__(
        self,
        session: paramiko.Channel,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        *,
        alive: Callable[[], None],
    ) -> None:
        """Take a session whose command has been started."""
        self._session, self._alive = session, alive
        self._writing = threading.Lock()
        self.unwritten: list[OSError] = []
        self._readers = [
            threading.Thread(target=_drain, args=(receive, sink, self.unwritten), daemon=True)
            for receive, sink in ((session.recv, stdout), (session.recv_stderr, stderr))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def returncode(self) -> int | None:
        """The exit status, -N for signal N, or None while the command runs."""
        # While output can still come, a guest that is gone must not pass for a silent one.
        if any(reader.is_alive() for reader in self._readers):
            self._alive()
        if not self._session.status_event.is_set():
            return None
        if self._session.exit_status == _NO_STATUS:
            self._alive()
            raise MachineDied("the SSH connection was lost while a command ran")
        return self._session.exit_status

    @property
    def has_ended(self) -> bool:
        """Tell whether the command has a status.

        A process that it left behind may still hold its output.
        """
        return self._session.status_event.is_set() and self._session.exit_status != _NO_STATUS

    def wait(self, *, deadline: Deadline) -> int | None:
        """Wait for the status, and then a moment for the rest of the output.

        A process that the command left behind may keep the output open.
        """
        while not self._session.status_event.wait(min(0.5, deadline.remaining)):
            self._alive()
            if deadline.expired:
                return None
        status = self.returncode
        last = Deadline(_LAST_OUTPUT)
        for reader in self._readers:
            reader.join(last.remaining)
        return status

    def wait_for_all(self, deadline: Deadline) -> bool:
        """Wait for the status and the end of both streams; return whether they came by the deadline."""
        for reader in self._readers:
            # In steps, as everywhere here: a lost guest ends no stream, and only `alive` tells of it.
            while reader.is_alive() and not deadline.expired:
                reader.join(min(0.5, deadline.remaining))
                if reader.is_alive():
                    self._alive()
        return not any(reader.is_alive() for reader in self._readers) and self._session.status_event.wait(deadline.remaining)

    def feed(self, source: BinaryIO) -> None:
        """Send a file's content as input, in a thread."""
        threading.Thread(target=_feed, args=(self._session, source), daemon=True).start()

    def write(self, data: bytes, *, deadline: Deadline) -> None:
        """Write input (see `Running.write`)."""
        left = memoryview(data)  # parts of it are no copies
        with self._writing:
            while left:
                if not self._sendable(deadline):
                    raise MachineTimeout(f"the command did not read its input within {deadline.seconds:g} s: bytes left: {len(left)}")
                try:
                    sent = 0 if self._session.status_event.is_set() else self._session.send(bytes(left[:_CHUNK]))
                except OSError:
                    sent = 0
                if not sent:
                    raise BrokenPipeError("the command reads no more input, because it has ended or its input was closed")
                left = left[sent:]

    def _sendable(self, deadline: Deadline) -> bool:
        """Wait until the command can take input or never will again; return false at the deadline."""

        def takes() -> bool:
            if self._session.send_ready() or self._session.status_event.is_set() or self._session.eof_sent:
                return True
            self._alive()
            return False

        return bool(deadline.poll(takes, every=0.02))

    def close_input(self) -> None:
        """Close the input; may be called again."""
        with suppress(OSError, EOFError, paramiko.SSHException):
            self._session.shutdown_write()

    def close(self) -> None:
        """Close the session, since a server allows few per connection; may be called again."""
        _give_up(self._session)


class SshTerminal(Terminal):
    """A program on a terminal in the guest, over SSH (see `Terminal`)."""

    def __init__(self, session: paramiko.Channel) -> None:
        """Take a session with a terminal in which the program was started."""
        self._session = session

    def fileno(self) -> int:
        """Return a descriptor that is readable when there is output."""
        return self._session.fileno()

    def receive(self) -> bytes:
        """Return the program's output; no bytes at its end."""
        return self._session.recv(_CHUNK)

    def send(self, data: bytes) -> None:
        """Send input, if the program is still there."""
        with suppress(OSError, EOFError, paramiko.SSHException):
            self._session.sendall(data)

    def resize(self, columns: int, lines: int) -> None:
        """Tell the guest the window's size, if it still listens."""
        with suppress(OSError, EOFError, paramiko.SSHException):
            self._session.resize_pty(columns, lines)

    @property
    def status(self) -> int | None:
        """The program's exit status, or None if the connection was lost before."""
        # RFC 4254 does not say which comes first, the status or the end of the output.
        self._session.status_event.wait(_LAST_WORDS)
        return None if self._session.exit_status == _NO_STATUS else self._session.exit_status

    def close(self) -> None:
        """Close the session, which hangs up the terminal."""
        _give_up(self._session)


def _login(address: tuple[str, int], keys: Keys, user: str, deadline: Deadline) -> paramiko.Transport:
    sock = socket.create_connection(address, timeout=deadline.remaining)
    # Without it each small packet waits up to 40 ms for the acknowledgement of the one before.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    transport = _Transport(sock)
    # A guest that was reset knows nothing of the connection, and says so only when it is spoken to.
    transport.set_keepalive(_KEEPALIVE)
    # It logs each failed attempt with a traceback, and a guest that boots refuses many.
    transport.set_log_channel(_QUIET.name)
    try:
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = deadline.remaining
        # One kind of key, or the server might show another of its host keys than the one that is pinned.
        transport.get_security_options().key_types = ("ssh-ed25519",)
        transport.start_client(timeout=deadline.remaining)
        server = transport.get_remote_server_key()
        # Before authentication: our key would otherwise be offered to whatever took the port.
        if server.get_base64() != keys.host_public.split()[1]:
            raise HostKeyMismatch(f"the server on {address[0]}:{address[1]} has another host key than the guest's: {server.fingerprint}")
        transport.auth_publickey(user, paramiko.Ed25519Key.from_private_key(StringIO(keys.user_private)))
    except BaseException:
        transport.close()
        raise
    return transport


def _remote(command: Command) -> str:
    environment = [f"{name}={value}" for name, value in command.environment]
    login = f"echo {command.tag} 2>/dev/null >/proc/self/loginuid"  # by the shell itself: what it becomes is a login of its own
    # `env -i`, because sshd adds variables of its own, and all channels have to give the same environment.
    return f"{login}; cd / && exec " + shlex.join(["env", "-i", *environment, *command.argv])


def _feed(session: paramiko.Channel, source: BinaryIO) -> None:
    try:
        while chunk := source.read(_CHUNK):
            session.sendall(chunk)
        session.shutdown_write()
    except (OSError, EOFError) as error:  # the command ended without reading all of it
        log.debug("input not taken: %s", error)


def _drain(receive: Callable[[int], bytes], sink: Callable[[bytes], object], unwritten: list[OSError]) -> None:
    chunk = b"the first"
    while chunk:
        chunk = receive(_CHUNK)
        try:
            if not unwritten:  # else it is read to its end all the same, so that the command is not held up
                sink(chunk)
        except OSError as error:
            unwritten.append(error)


def _give_up(session: paramiko.Channel) -> None:
    """Close a session, even over a lost connection."""
    with suppress(OSError, EOFError, paramiko.SSHException):
        session.close()
