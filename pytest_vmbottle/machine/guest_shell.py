"""Commands in a guest, run as its machine's spec says; the base of paths, copies and waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from typing import BinaryIO, Literal, TypedDict

import attrs

from pytest_vmbottle.channels.port import GUEST_PATH, Channel, Command, Finished
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.guest.path import BULK, UNABLE, GuestPath, Shell, operation_of, with_any_bytes
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.machine import guestlog
from pytest_vmbottle.machine.lifecycle import Lifecycle
from pytest_vmbottle.machine.on_terminal import run_on_terminal
from pytest_vmbottle.machine.process import Process
from pytest_vmbottle.result import CommandTimeout, Result, printable
from pytest_vmbottle.shown import redact_variables
from pytest_vmbottle.spec import MachineSpec

__all__ = ["CommandKeywords", "GuestShell", "words_of"]

_ANSWER = 5.0
"""Seconds for the guest to tell why a command was killed."""
# In a guest without a runner the first command in the background logs in by SSH, which without KVM takes several seconds.
_LOGIN_TIME = 60.0
_MARK = "\n[vmbottle: truncated after 16 MiB]\n"
_MAX_COMMAND = 120 << 10
"""Most bytes of a command with its environment: Linux takes 128 KiB for one string, and SSH passes the whole command as one."""
_OWN_TIME = 600.0
_KILL_TIME = 10.0
_MOST_BY_OPERATION = 8 << 20
"""Bytes up to which a file is written by the runner, and not over a disk."""
# Of env(1) and of shells, for a program that they do not find.
_NOT_FOUND = 127
_KILLED = (-9, 128 + 9)
"""Statuses of a killed command, and of a shell whose last command was killed."""
# A daemon that a script started with `&` is the usual reason: it inherits the output, which so has no end.
_HELD = "the command itself had ended, but a background process of it held its output; redirect that with >/dev/null 2>&1, or use spawn"
# A shell changes the folder, because neither the QEMU guest agent nor SSH can be asked to. `exec` keeps the process, so that signals and
# status are the command's own.
_CD = 'cd -- "$1" && shift && exec "$@"'
_AS_USER = read_script(__package__, "as_user.sh")
_IN_GROUP = 'echo $$ >"/sys/fs/cgroup$1/cgroup.procs" && shift && exec "$@"'


class CommandKeywords(TypedDict, total=False):
    """Keywords of a command that its verb passes on to `Machine.exec`."""

    timeout: float
    env: Mapping[str, str] | None
    cwd: str | PurePosixPath | GuestPath | None
    user: str | None
    input: str | bytes | None
    stream: Callable[[str], object] | None
    shell: Literal["sh", "bash"]
    tty: bool


class GuestShell(Shell):
    """Runner of commands in a machine's guest.

    Attributes:
        control_group: The control group that commands are put into, by its path below the root of all; empty for none.
    """

    def __init__(self, lifecycle: Lifecycle, spec: MachineSpec, *, factor: float) -> None:
        """Take the machine's lifecycle, its spec, and the factor of time-outs."""
        self._lifecycle, self._spec, self._factor = lifecycle, spec, factor
        self.timeline = lifecycle.timeline
        self.control_group = ""

    @property
    def channel(self) -> Channel:
        """The channel for commands, of the present instance."""
        return self._lifecycle.channel

    def spawn(self, argv: tuple[str, ...], prepared: Command) -> Process:
        """Start a prepared command, and return while it runs."""
        self._lifecycle.alive()
        # Not over the guest agent, which has no streams: it returns all output at the end of a command.
        channel = self._lifecycle.stream_channel(Deadline(_LOGIN_TIME * self._factor))
        return Process(
            channel, prepared, argv=argv, killer=self.channel, factor=self._factor, ended=lambda status: self._told(argv, status)
        )

    def _told(self, argv: tuple[str, ...], status: int) -> None:
        """Record the end of a command in the background; that of a command which is awaited is in its own event."""
        if not self.timeline.is_busy:
            self.timeline.note("exit", argv=argv, status=status)

    def run(self, argv: tuple[str, ...], prepared: Command, deadline: Deadline, stream: Callable[[str], object] | None = None) -> Result:
        """Run a prepared command to its end.

        Raises:
            CommandTimeout: It was killed at the deadline.
        """
        # Asked first, because channels notice the end of a machine late, and then say nothing of its cause.
        self._lifecycle.alive()
        began = time.monotonic()
        if stream or self.control_group:
            # What is measured is not asked whether it has ended: each question of the guest agent's interrupts it.
            finished = self.spawn(argv, prepared).relay(stream or (lambda _: None), deadline.seconds)
        else:
            finished = self.channel.run(prepared, deadline=deadline)
        result = self._result(argv, finished, time.monotonic() - began)
        if finished.timed_out:
            raise CommandTimeout(result, deadline.seconds)
        return result

    def run_on_terminal(self, argv: tuple[str, ...], prepared: Command, deadline: Deadline) -> Result:
        """Run a prepared command to its end on a terminal of its own, as `run` does without one."""
        self._lifecycle.alive()
        channel = self._lifecycle.stream_channel(deadline, terminals=True)
        began = time.monotonic()
        finished = run_on_terminal(channel, prepared, deadline, kill=lambda: self.kill(prepared))
        result = self._result(argv, finished, time.monotonic() - began)
        if finished.timed_out:
            raise CommandTimeout(result, deadline.seconds)
        return result

    def ask(self, command: str | Sequence[str], deadline: Deadline, user: str | None = None) -> Result:
        """Run an internal command as the spec's user, or another one, whatever its status."""
        argv = words_of(command)
        return self.run(argv, self.command(argv, user=user), deadline)

    def command(
        self,
        argv: tuple[str, ...],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | PurePosixPath | GuestPath | None = None,
        user: str | None = None,
        content: str | bytes | None = None,
    ) -> Command:
        """Return the command for a channel, with the spec's environment, folder and user or those given.

        Raises:
            ValueError: It cannot be given to Linux.
        """
        if not argv:
            raise ValueError("there is no command to run")
        # Nothing of the guest's own is inherited, so that a command has the same environment over each channel.
        environment, folder = {**_environment(), **dict(self._spec.env), **(env or {})}, "" if cwd is None else str(cwd)
        # Before anything is checked or sent: an error may have the words of the command in it.
        redact_variables(environment)
        _check_words([*argv, *environment, *environment.values(), folder, user or ""])
        words = argv if cwd is None else ("/bin/sh", "-c", _CD, "sh", folder, *argv)
        # Channels log in as root, so only another user takes a change.
        who = user or self._spec.user
        if who != "root":
            words = ("/bin/sh", "-c", _AS_USER, "sh", who, *words)
        if self.control_group:
            words = ("/bin/sh", "-c", _IN_GROUP, "sh", self.control_group, *words)
        data = content.encode() if isinstance(content, str) else content or b""
        return Command(argv=words, env=tuple(environment.items()), input=data, gets_group=not self.control_group)

    def kill(self, command: Command) -> None:
        """End a command and all its descendants."""
        self.channel.run(command.killer(), deadline=Deadline(_KILL_TIME * self._factor))

    # Internal scripts run as the spec's user as well, so that paths and copies have that user's rights.
    def script(self, text: str, *words: str) -> Result:
        """Run a shell script with arguments for `GuestPath`; never raise for its status."""
        return self._direct(text, words)

    def feed(self, text: str, *words: str, source: BinaryIO, size: int, framed: bool = False) -> Result:
        """Run a script with `size` bytes of a host file as its input.

        With `framed` the script finds the end of its input itself.
        """
        # Small data goes with the command: a disk, or a login by SSH, costs more than it saves.
        if size < BULK or (size <= _MOST_BY_OPERATION and self._operation(text, words) and self.channel.has_files):
            return self._direct(text, words, source.read(size))
        return self._carry(
            lambda command, deadline: self._lifecycle.bulk.put(source, size, command, deadline=deadline, framed=framed), text, words
        )

    def fetch(self, text: str, *words: str, sink: BinaryIO, size: int) -> Result:
        """Run a script and write its standard output, of about `size` bytes, to a host file."""
        if size < BULK:
            result = self.script(text, *words)
            sink.write(result.stdout_bytes)
            return result
        return self._carry(lambda command, deadline: self._lifecycle.bulk.get(command, sink, size, deadline=deadline), text, words)

    def operation(self, name: str, *words: str, content: bytes = b"") -> Result | None:
        """Have an operation of the runner done (see `Shell.operation`)."""
        if self.control_group or not self.channel.has_files:
            return None
        # The script is for a channel that takes the place of a runner that has ended just now.
        return self._direct(f"exit {UNABLE}", words, content, name)

    def _operation(self, text: str, words: tuple[str, ...], name: str = "") -> tuple[str, ...]:
        """Return the operation that does what a script does; nothing where a control group is to have what that takes."""
        name = "" if self.control_group else name or operation_of(text, words)
        return (name, self._spec.user, *words) if name else ()

    def _direct(self, text: str, words: tuple[str, ...], content: bytes = b"", name: str = "") -> Result:
        operation = self._operation(text, words, name)

        def run(command: Command, deadline: Deadline) -> Finished:
            return self.channel.run(attrs.evolve(command, operation=operation), deadline=deadline)

        return self._carry(run, text, words, content)

    def _carry(self, run: Callable[[Command, Deadline], Finished], text: str, words: tuple[str, ...], content: bytes = b"") -> Result:
        # Names of files may be bytes that are not UTF-8, and the guest agent takes only JSON.
        text, words = with_any_bytes(text, words)
        argv = ("/bin/sh", "-c", text, "sh", *words)
        self._lifecycle.alive()
        began = time.monotonic()
        # Messages of the guest's programs are parsed, so they have to be in one language.
        finished = run(self.command(argv, env={"LC_ALL": "C"}, content=content), Deadline(_OWN_TIME * self._factor))
        result = self._result(argv, finished, time.monotonic() - began)
        if finished.timed_out:
            raise CommandTimeout(result, _OWN_TIME * self._factor)
        return result

    def _result(self, argv: tuple[str, ...], finished: Finished, duration: float) -> Result:
        mark = _MARK if finished.truncated else ""
        return Result(
            argv=argv,
            returncode=finished.returncode,
            # A byte that is not UTF-8 survives in a surrogate, so that `stdout_bytes` gives it back.
            stdout=finished.stdout.decode("utf-8", "surrogateescape") + mark,
            stderr=finished.stderr.decode("utf-8", "surrogateescape"),
            duration=duration,
            truncated=finished.truncated,
            note=self._note(argv[0], finished, duration),
        )

    def _note(self, program: str, finished: Finished, duration: float) -> str:
        """Return additional remarks on a command's end."""
        if finished.outlived:
            return _HELD
        # Guessed only after the failure, because a program may have blanks in its name.
        if finished.returncode == _NOT_FOUND and len(program.split()) > 1:
            return f"{printable(program)!r} is one word of a list, so it is the name of a program; write a whole command as a string"
        # The guest's kernel log is read only if a signal killed the command: it takes another round trip.
        if finished.returncode not in _KILLED or finished.timed_out:
            return ""
        question = Command(argv=("/bin/sh", "-c", guestlog.KILLS), env=(("PATH", GUEST_PATH),))
        # The remark is a help; the command's own outcome must not be lost because of it.
        with suppress(MachineError):
            said = self.channel.run(question, deadline=Deadline(_ANSWER * self._factor)).stdout.decode(errors="replace")
            processes = ", ".join(guestlog.killed(said, duration))
            return processes and f"the guest's OOM killer ended process {processes}"
        return ""


def _environment() -> dict[str, str]:
    return {"PATH": GUEST_PATH, "HOME": "/root", "USER": "root", "LOGNAME": "root", "SHELL": "/bin/sh", "LANG": "C.UTF-8"}


_SHELLS = {"sh": ("sh", "-eu", "-c"), "bash": ("bash", "-euo", "pipefail", "-c")}


def words_of(command: str | Sequence[str], shell: str = "sh") -> tuple[str, ...]:
    """Return the words of a command: a list as it is, a string as a script for a shell.

    Raises:
        ValueError: There is no such shell, or a list is given to one.
    """
    if shell not in _SHELLS:
        raise ValueError(f"shell={shell!r}: takes {' or '.join(map(repr, _SHELLS))}; run another one as a list of words")
    if isinstance(command, str):
        return (*_SHELLS[shell], command)
    if shell != "sh":
        raise ValueError(
            f"shell={shell!r} is for a string, and a list of words runs as it is: leave it out, or write the command as a string"
        )
    return tuple(command)


def _check_words(words: Sequence[str]) -> None:
    total = 0
    for word in words:
        if not isinstance(word, str):
            raise TypeError(f"{word!r} is not a string: a command is a list of strings, or one string for the shell")
        if "\0" in word:
            raise ValueError(f"{word[:80]!r} has a NUL byte in it, and a command cannot have one")
        try:
            # With the NUL at the end of each string, as execve(2) counts.
            total += len(word.encode()) + 1
        except UnicodeEncodeError:
            raise ValueError(f"{word[:80]!r} is not text: a command takes only what UTF-8 can encode") from None
    if total > _MAX_COMMAND:
        raise ValueError(f"the command has {total} bytes, more than {_MAX_COMMAND}: write it to a file with vm.path(), or use input=")
