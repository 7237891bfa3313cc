"""Port of a channel: commands in a guest, and the values that they exchange."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import BinaryIO

import attrs

from pytest_vmbottle.errors import Unsupported
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script

__all__ = ["GUEST_PATH", "MAX_OUTPUT", "Channel", "Command", "Finished", "Keys", "Running", "Terminal", "not_run"]

MAX_OUTPUT = 16 << 20
"""Most bytes kept of each stream of a command, the limit of the QEMU guest agent too (GUEST_EXEC_MAX_OUTPUT in qga/commands.c)."""


GUEST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Search path for programs in a guest."""


@attrs.frozen(kw_only=True, repr=False)
class Keys:
    """OpenSSH keys of a machine: ours for the login, and its own host key. The representation hides them."""

    user_private: str
    user_public: str
    host_private: str
    host_public: str

    def __repr__(self) -> str:
        return "<Keys>"


_LOGINS = range(0x70000000, 0x7FFE0000)
"""Login numbers that no user and no container has (UIDs and GIDs in systemd's documentation)."""

_KILL = read_script(__package__, "kill.sh")


@attrs.frozen(kw_only=True)
class Command:
    """A command for a channel: argv, whole environment, and input.

    Attributes:
        argv: Program and arguments; the program is looked up in the guest's standard path.
        env: The complete environment, nothing is inherited.
        input: The whole content of its standard input.
        operation: The operation on files that gives the same, for channels that have those: its name, the user and the words.
        tag: The number that marks all processes of this command, so that a time-out can end them. The runner starts it in a control
            group of that name. The kernel's audit hands down the number of a login (/proc/self/loginuid), which neither another user,
            another session, a clean environment nor another control group sheds; it is in their environment for kernels without it.
        gets_group: Whether it gets that control group. Not one that goes into another: to make groups, move and remove them interferes
            with what it does, by instructions that are a tenth of a per cent in one count and none in the next.
    """

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    input: bytes = b""
    operation: tuple[str, ...] = ()
    gets_group: bool = True
    # Random, so that the processes of two commands are never confused, not even after a restore.
    tag: str = attrs.field(factory=lambda: str(secrets.choice(_LOGINS)))

    @property
    def environment(self) -> tuple[tuple[str, str], ...]:
        """The environment with the tag in it."""
        return (*self.env, ("VMBOTTLE_EXEC", self.tag))

    def killer(self, signal: str = "KILL") -> Command:
        """Return the command that sends a signal to this one and its descendants.

        Its status is 3 if there was no process to send it to.
        """
        # A command with a tag of its own, so that it does not find itself among those to kill.
        return Command(argv=("/bin/sh", "-c", _KILL, "sh", self.tag, signal), env=(("PATH", GUEST_PATH),))


@attrs.frozen(kw_only=True)
class Finished:
    """Outcome of a command.

    Attributes:
        returncode: Its status, or -N for signal N.
        stdout: At most `MAX_OUTPUT` bytes.
        stderr: Likewise.
        truncated: Whether there was more.
        timed_out: Whether it was killed at its deadline.
        outlived: Whether it had ended by itself before, and only a process that it left behind, which held its output, was killed.
    """

    returncode: int
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False
    timed_out: bool = False
    outlived: bool = False


def not_run(finished: Finished, command: Command) -> Finished:
    """Return the same outcome for every program that could not be started: status 127 (not found) or 126 (not executable)."""
    reasons = {127: "not found", 126: "cannot be executed"}
    reason = reasons.get(finished.returncode)
    # A command may end with 127 itself, but only `env` begins its message like this.
    if reason is None or not finished.stderr.startswith(b"env: "):
        return finished
    return attrs.evolve(finished, stderr=f"{command.argv[0]}: {reason}\n".encode())


class Channel(ABC):
    """A channel for commands in a guest. All channels give the same answer to the same command.

    A method that a channel does not override raises `Unsupported`.
    """

    @abstractmethod
    def run(self, command: Command, *, deadline: Deadline) -> Finished:
        """Run a command to its end, or kill it in the guest at the deadline.

        Raises:
            MachineError: The guest cannot be reached any more.
        """

    def put(self, source: BinaryIO, command: Command, *, deadline: Deadline) -> Finished:
        """Run a command with a host file of any size as its input."""
        raise Unsupported("this channel cannot transfer files")

    def get(self, command: Command, sink: BinaryIO, *, deadline: Deadline) -> Finished:
        """Run a command and write its standard output, of any size, to a host file."""
        raise Unsupported("this channel cannot transfer files")

    def start(
        self,
        command: Command,
        *,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        deadline: Deadline,
    ) -> Running:
        """Start a command beside others.

        Its streams go to the two functions, in other threads, with `b""` at their ends.

        Its input stays open.
        """
        raise Unsupported(f"this channel does not run {command.argv[0]!r} in the background: use exec, or systemd-run in the guest")

    @property
    def has_files(self) -> bool:
        """Tell whether it has operations on files, which take no programs in the guest, and much data."""
        return False

    def streaming(self, *, deadline: Deadline, terminals: bool = False) -> Channel | None:
        """Return a channel for commands that take input while they run, or also for terminals.

        None where another one has to be asked for (`Instance.channel`).
        """
        return None

    def terminal(self, *, user: str, kind: str, size: tuple[int, int], deadline: Deadline, command: Command | None = None) -> Terminal:
        """Start a user's login shell on a terminal, or a command.

        Args:
            user: A user of the guest.
            kind: The kind of terminal: the variable `TERM`.
            size: Columns and lines.
            deadline: Deadline of its start.
            command: The command to run in place of a shell; it has its own user.

        Raises:
            MachineError: The guest cannot be reached any more.
        """
        raise Unsupported("this channel does not offer terminals")

    def close(self) -> None:
        """Close the connection; the guest runs on."""


class Running(ABC):
    """A command that runs in a guest while its caller does something else."""

    @property
    @abstractmethod
    def returncode(self) -> int | None:
        """The status, or -N for signal N; None while the command runs.

        Raises:
            MachineError: The guest cannot be reached any more, so the status or the rest of the output is lost.
        """

    @abstractmethod
    def wait(self, *, deadline: Deadline) -> int | None:
        """Wait for the status; return None if there is none by the deadline."""

    @abstractmethod
    def write(self, data: bytes, *, deadline: Deadline) -> None:
        """Write to the command's input.

        Raises:
            BrokenPipeError: The command reads no more input.
            MachineTimeout: The command did not read it by the deadline.
        """

    @abstractmethod
    def close_input(self) -> None:
        """End the input."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection to the command."""


class Terminal(ABC):
    """A program in a guest on a terminal of its own."""

    @abstractmethod
    def fileno(self) -> int:
        """Return a descriptor that is readable when `receive` has output."""

    @abstractmethod
    def receive(self) -> bytes:
        """Return new output; nothing at its end."""

    @abstractmethod
    def send(self, data: bytes) -> None:
        """Type into the terminal."""

    @abstractmethod
    def resize(self, columns: int, lines: int) -> None:
        """Tell the guest the size of the window."""

    @property
    @abstractmethod
    def status(self) -> int | None:
        """The program's status, -N for signal N, or None if it is not known."""

    @abstractmethod
    def close(self) -> None:
        """Hang up the terminal."""
