"""The channel of the QEMU guest agent, over virtio-serial.

It needs no network and no login, and answers fastest.

The protocol is one JSON object per line, with `guest-sync-delimited` to start over (docs/interop/qemu-ga-ref in QEMU's documentation).
"""

from __future__ import annotations

import base64
import json
import logging
import secrets
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from pytest_vmbottle.channels.port import GUEST_PATH, MAX_OUTPUT, Channel, Command, Finished, not_run
from pytest_vmbottle.errors import MachineDied, MachineError, MachineTimeout
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["AgentEnded", "AgentRefused", "GuestAgent"]

_T = TypeVar("_T")
_GRACE = 10.0
"""Seconds that the agent itself may take to reply, besides the command's time."""
_MAX_REPLY = 3 * MAX_OUTPUT
"""Bytes of one reply: both streams in base64 take at most 8/3 of `MAX_OUTPUT`. A longer reply is a hostile guest's."""
_AT_ONCE = 3000
"""Bytes of a request that may follow others before these are answered.

The agent reads 4096 bytes at a time. It was seen to wait for ever for the rest of a request that began in the middle of them.
"""
_MAX_PARTS = 50_000
"""Brackets, commas and colons of one reply: each may cost a hundred times its size when it is parsed. Real replies have some hundreds."""


log = logging.getLogger(__name__)

_APART = read_script(__package__, "leave_unit.sh")
_Request = tuple[str, dict[str, Any]]


class AgentRefused(MachineDied):
    """The agent answered a call with an error."""


class AgentEnded(MachineError):
    """The agent ended or was replaced before it answered; the guest runs on."""


class GuestAgent(Channel):
    """A connection to the guest agent.

    Safe to use from several threads.

    Attributes:
        login: The agent's handle of /proc/self/loginuid, which sets the login of the processes that it starts; None if it has no handle.
    """

    def __init__(self, sock: socket.socket, *, alive: Callable[[], None], changes: Callable[[], int] = lambda: 0) -> None:
        """Take a connected socket.

        Args:
            sock: The host's end of the agent's port.
            alive: Function that is called while waiting, and raises `MachineDied` if the guest can no longer answer.
            changes: Function that returns how often an agent has opened or closed the port in the guest.
        """
        self._sock = sock
        self._alive = alive
        self._changes = changes
        self._settled: int | None = None
        self.login: int | None = None
        self._buffer = bytearray()
        self._lock = threading.Lock()
        self._unread = False

    def check(self) -> None:
        """Raise `MachineDied` if the guest can no longer answer."""
        self._alive()

    def sync(self, *, deadline: Deadline) -> None:
        """Wait until the agent answers, and discard old replies.

        Raises:
            MachineTimeout: The agent does not answer.
            MachineDied: The guest can no longer answer.
        """
        with self._lock:
            self._sync(deadline)

    def _sync(self, deadline: Deadline) -> None:
        while True:
            # An answer that came late belongs to an earlier question. A random token tells them apart.
            # Of 48 bits, which every JSON parser keeps exactly: beyond 53 some read numbers as floats.
            token = secrets.randbits(48)
            # The leading 0xFF makes the agent forget half a request that an earlier connection may have left behind.
            self._send("guest-sync-delimited", b"\xff" + _message("guest-sync-delimited", {"id": token}), deadline)
            if self._synced(token, Deadline(min(deadline.remaining, 2.0))):
                self._unread = False
                return
            if deadline.expired:
                raise MachineTimeout("the guest agent does not answer")

    def runs_commands(self, *, deadline: Deadline) -> bool:
        """Wait until the agent answers; return whether it may run commands.

        Fedora and its relatives forbid it to theirs.

        Raises:
            MachineTimeout: The agent does not answer.
            MachineDied: The guest can no longer answer, or its answer is invalid.
        """
        self.sync(deadline=deadline)
        (line,) = self._exchange([("guest-info", {})], Deadline(_GRACE))
        allowed = _answer("guest-info", line, lambda answer: {each["name"] for each in answer["supported_commands"] if each["enabled"]})
        return allowed >= {"guest-exec", "guest-exec-status"}

    def _synced(self, token: int, deadline: Deadline) -> bool:
        while (line := self._line(deadline)) is not None:
            # The answer to this call alone begins with 0xFF: what stands before it in its line is the rest of an older one.
            _, _, last = line.rpartition(b"\xff")
            try:
                if _parsed(last).get("return") == token:
                    return True
            except _NONSENSE:
                continue  # the rest of an older answer
        return False

    def call(self, name: str, *, deadline: Deadline, **arguments: Any) -> Any:
        """Call one function of the agent and return its answer.

        Underscores in argument names stand for dashes.

        Raises:
            AgentRefused: The agent answered with an error.
        """
        request = {key.replace("_", "-"): value for key, value in arguments.items()}
        (line,) = self._exchange([(name, request)], deadline)
        return _answer(name, line, lambda answer: answer)

    def _exchange(self, requests: list[_Request], deadline: Deadline, since: int | None = None) -> list[bytes]:
        """Send several calls at once, and return their answers.

        All must come from the same agent: the one that was there after `since` changes.
        """
        last = requests[-1][0]
        lines: list[bytes] = []
        with self._lock:
            if self._unread:
                self._sync(deadline)
            # Whatever ends this before the answers are there, a time-out or Ctrl-C, leaves them to whoever calls next.
            self._unread = True
            # Counted, because a new agent reads the same port: it would answer for a process that only the old one knew.
            before = self._changes() if since is None else since

            def unchanged() -> None:
                self._alive()
                if self._changes() != before:
                    raise AgentEnded(f"the guest agent ended before it answered {last}: it was stopped or restarted, or the guest reboots")

            for sent, (name, arguments) in enumerate(requests):
                message = _message(name, arguments)
                # A long request waits for all answers to those before it, so that it begins when the agent reads anew.
                if len(message) > _AT_ONCE:
                    lines += [self._next(requests, deadline, unchanged) for _ in range(sent - len(lines))]
                self._send(name, message, deadline)
            lines += [self._next(requests, deadline, unchanged) for _ in range(len(requests) - len(lines))]
            self._unread = False
        return lines

    def _next(self, requests: list[_Request], deadline: Deadline, check: Callable[[], None]) -> bytes:
        line = self._line(deadline, check)
        if line is None:
            raise MachineTimeout(f"the guest agent did not answer {requests[-1][0]} within {deadline.seconds:g} s")
        return line

    def _send(self, name: str, message: bytes, deadline: Deadline) -> None:
        try:
            # Never 0, which would make the socket non-blocking instead of giving it no time.
            self._sock.settimeout(max(0.01, deadline.remaining))
            self._sock.sendall(message)
        except TimeoutError as error:
            raise MachineTimeout(f"timed out sending {name} to the guest agent: its buffer stays full") from error
        except OSError as error:
            raise self._lost(str(error)) from error

    def _lost(self, reason: str) -> MachineDied:
        """Return the error for a closed connection.

        If the hypervisor is ending, its end says more, so it is awaited for a moment.
        """
        Deadline(2.0).poll(self._alive, every=0.05)
        return MachineDied(f"the connection to the guest agent is closed: {reason}")

    def _line(self, deadline: Deadline, check: Callable[[], None] | None = None) -> bytes | None:
        """Return the next line, or None at the deadline.

        `check` is called while waiting, and may raise.
        """
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            # Searched from where the last search ended: a large reply comes in hundreds of pieces.
            searched = len(self._buffer)
            # A guest that never ends a line would fill the host's memory.
            if searched > _MAX_REPLY:
                raise MachineDied(f"the guest agent sent more than {_MAX_REPLY} bytes without an end of line")
            if not self._receive(deadline, check or self._alive):
                return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _receive(self, deadline: Deadline, check: Callable[[], None]) -> bool:
        while not deadline.expired:
            # Small steps, because `check` is what notices a guest that died, and a dead one sends no end.
            self._sock.settimeout(max(0.001, min(0.5, deadline.remaining)))
            try:
                received = self._sock.recv(1 << 18)
            except TimeoutError:
                check()
                continue
            except OSError as error:
                raise self._lost(str(error)) from error
            if not received:
                raise self._lost("by the hypervisor")
            self._buffer += received
            return True
        return False

    def run(self, command: Command, *, deadline: Deadline) -> Finished:
        """Run a command to its end (see `Channel.run`)."""
        try:
            pid = self._start(command, deadline)
        except AgentRefused as error:
            # For a program that cannot be started the agent has an error, where a shell has a status.
            code = 126 if "Permission denied" in str(error) else 127
            return not_run(Finished(returncode=code, stderr=b"env: " + str(error).encode()), command)
        status = self._status(pid, deadline)
        if status is not None:
            return status
        # The agent has no call to end a process: another command does it, in the guest.
        self._status(self._start(command.killer(), Deadline(_GRACE)), Deadline(_GRACE))
        status = self._status(pid, Deadline(_GRACE))
        # Without a status something outlived the kill and holds the pipes, and the agent keeps to itself what they gave.
        return Finished(returncode=-9, timed_out=True) if status is None else _killed(status)

    def _open(self, path: str, mode: str, deadline: Deadline) -> int:
        (line,) = self._exchange([("guest-file-open", {"path": path, "mode": mode})], deadline)
        return _answer("guest-file-open", line, int)

    def _start(self, command: Command, deadline: Deadline) -> int:
        limit = Deadline(deadline.remaining + _GRACE)
        if self._settled != self._changes():
            self._settle(limit)
        logging_in = self._as_login(command.tag)
        # All in one exchange, so that no other thread's command gets this login.
        *logged_in, started = self._exchange([*logging_in, _exec(command)], limit)
        try:
            for (name, _), line in zip(logging_in, logged_in, strict=True):
                _answer(name, line, lambda answer: answer)
        except AgentRefused as error:
            log.info("processes that a command starts can be recognised only by their environment: %s", error)
            self.login = None
        return _answer("guest-exec", started, _pid)

    def adopt(self, login: int | None) -> None:
        """Take over an agent that was in use before the guest was saved.

        `login` is the handle that it had then.
        """
        self._settled, self.login = self._changes(), login

    def _settle(self, deadline: Deadline) -> None:
        """Move the agent out of its unit's control group, and open the login handle; once for each agent.

        Commands then outlive the unit, and what the OOM killer does to them does not end the unit.
        """
        # Taken before the calls: if the agent is replaced meanwhile, the new one is settled too.
        found, login = self._changes(), None
        try:
            (started,) = self._exchange([_exec(Command(argv=("/bin/sh", "-c", _APART), env=(("PATH", GUEST_PATH),)))], deadline)
            self._status(_answer("guest-exec", started, _pid), deadline)
            login = self._open("/proc/self/loginuid", "w", deadline)
        except AgentRefused as error:
            log.info("processes that a command starts can be recognised only by their environment: %s", error)
        self._settled, self.login = found, login

    def _as_login(self, tag: str) -> list[_Request]:
        """Return the calls that give the next process a login of its own.

        They need no extra process in the guest, which would be slow.
        """
        if self.login is None:
            return []
        number = base64.b64encode(tag.encode()).decode()
        return [
            ("guest-file-write", {"handle": self.login, "buf-b64": number}),
            ("guest-file-seek", {"handle": self.login, "offset": 0, "whence": 0}),  # this also writes it out
        ]

    def _status(self, pid: int, deadline: Deadline) -> Finished | None:
        """Wait for a process's end; return None if it has not ended by the deadline."""
        began, since = time.monotonic(), self._changes()
        pause = 0.001
        while True:
            status = self._asked_of(pid, since, Deadline(deadline.remaining + _GRACE))
            if status is not None:
                return status
            if deadline.expired:
                return None
            self._alive()
            time.sleep(min(pause, deadline.remaining))
            # Every question costs the guest time that its command could use; what is lost by asking late is an eighth, or a few ms.
            pause = min(2 * pause, max(0.008, (time.monotonic() - began) / 8), 0.05)

    def _asked_of(self, pid: int, since: int, deadline: Deadline) -> Finished | None:
        try:
            (line,) = self._exchange([("guest-exec-status", {"pid": pid})], deadline, since)
            return _answer("guest-exec-status", line, _ended)
        except (AgentRefused, AgentEnded) as error:  # what has started a process knows it
            raise AgentEnded(
                "the guest agent ended while a command ran: it was stopped or restarted, or the guest reboots; "
                "the command may still run there, but its status is lost"
            ) from error

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()


def _message(name: str, arguments: dict[str, Any]) -> bytes:
    return json.dumps({"execute": name, "arguments": arguments} if arguments else {"execute": name}).encode() + b"\n"


def _exec(command: Command) -> _Request:
    # Without the member a command's input is /dev/null, which ends at once as an empty one does.
    extra = {"input-data": base64.b64encode(command.input).decode()} if command.input else {}
    return "guest-exec", {
        "path": command.argv[0],
        "arg": list(command.argv[1:]),
        "env": [f"{name}={value}" for name, value in command.environment],
        "capture-output": True,
        **extra,
    }


# Whatever Python may make of an answer that is not what it should be.
_NONSENSE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def _parsed(line: bytes) -> Any:
    # Counted before parsing: nested brackets would exhaust Python's memory or its stack.
    if sum(map(line.count, (b"[", b"{", b",", b":"))) > _MAX_PARTS:
        raise ValueError("too many parts")
    return json.loads(line)


def _answer(name: str, line: bytes, read: Callable[[Any], _T]) -> _T:
    """Parse an answer with `read`.

    A guest may send anything.

    Raises:
        AgentRefused: The answer is an error.
        MachineDied: The answer is invalid.
    """
    try:
        answer = _parsed(line)
        if "error" in answer:
            raise AgentRefused(f"the guest agent refused {name}: {answer['error'].get('desc', answer['error'])}")
        return read(answer["return"])
    except _NONSENSE as error:
        raise MachineDied(f"the guest agent's answer to {name} is invalid: {bytes(line[:80])!r}") from error


def _within(number: object, least: int, most: int) -> int:
    # The type first: a float would pass the comparison, and go on as a status.
    if not isinstance(number, int) or not least <= number <= most:
        raise ValueError(f"{number!r:.40} is not a number from {least} to {most}")
    return number


def _pid(started: Any) -> int:
    return _within(started["pid"], 1, 1 << 31)


def _ended(status: Any) -> Finished | None:
    """Return the outcome of a process, or None if it has not ended."""
    if not status["exited"]:
        return None
    stdout, stderr = (base64.b64decode(status.get(f"{stream}-data", ""), validate=True) for stream in ("out", "err"))
    return Finished(
        # Every number is checked: a guest may answer with a status that no process can have.
        returncode=-_within(status["signal"], 1, 255) if "signal" in status else _within(status.get("exitcode", 0), 0, 255),
        stdout=stdout[:MAX_OUTPUT],
        stderr=stderr[:MAX_OUTPUT],
        truncated=bool(status.get("out-truncated") or status.get("err-truncated")) or max(len(stdout), len(stderr)) > MAX_OUTPUT,
    )


def _killed(finished: Finished) -> Finished:
    """Return the outcome of a command that was killed at its deadline.

    A command that the kill did not end had ended before, and left something that held its output.
    """
    return attrs.evolve(finished, returncode=-9, timed_out=True, outlived=finished.returncode != -signal.SIGKILL)
