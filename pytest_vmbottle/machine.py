"""What a test holds: a running machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

from pytest_vmbottle import transfer
from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backend import GUEST_PATH, Channel, Command, Console, Finished, Forwarding, Instance
from pytest_vmbottle.errors import CommandFailed, CommandTimeout, MachineError, MachineTimeout
from pytest_vmbottle.guestpath import BULK, GuestPath
from pytest_vmbottle.lan import Body, Lan, Place
from pytest_vmbottle.result import Result, printable
from pytest_vmbottle.spec import MachineSpec

__all__ = ["Machine"]

_T = TypeVar("_T")
_MARK = "\n[vmbottle: truncated after 16 MiB]\n"
_MAX_COMMAND = 120 << 10
"""Bytes of a command with its environment: Linux takes 128 KiB for one string, and SSH hands over the whole command as one."""
_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp
_OWN_TIME = 600.0
_CD = 'cd -- "$1" && shift && exec "$@"'
_AS_USER = r"""
user=$1; shift
home=$(getent passwd "$user" | cut -d: -f6)
[ -n "$home" ] || { echo "there is no user $user in the guest" >&2; exit 125; }
exec runuser -u "$user" -- env HOME="$home" USER="$user" LOGNAME="$user" "$@"
"""


class Machine:
    """A running machine, with everything a test does to it. It is made by the fixtures and by `vm_factory`, which also end it.

    Attributes:
        name: What the test calls it.
        id: What nothing else on this host is called.
        spec: What it is: its `MachineSpec`.
        backend: The name of the backend that runs it.
        console: Its serial console.
    """

    def __init__(self, instance: Instance, spec: MachineSpec, *, id: str, backend: str, channel: Channel, factor: float = 1.0) -> None:  # noqa: A002, PLR0913
        """Takes a running instance whose channel has answered.

        Args:
            instance: The VM as its backend sees it.
            spec: What it is.
            id: A name for it that nothing else has.
            backend: The backend's name.
            channel: What commands go through.
            factor: What all time-outs are multiplied with.
        """
        self.name = spec.name
        self.id = id
        self.spec = spec
        self.backend = backend
        self.console: Console = instance.console
        self._instance = instance
        self._channel = channel
        self._factor = factor
        self._place: Place | None = None

    @property
    def pid(self) -> int:
        """The hypervisor's process id on the host."""
        return self._instance.pid

    def __repr__(self) -> str:
        return f"<Machine {self.name} ({self.id}), {self.backend} pid {self.pid}>"

    # -- commands --------------------------------------------------------------------------------------------------------------------

    def exec(  # noqa: PLR0913 - the keywords are those of subprocess.run
        self,
        command: str | Sequence[str],
        *,
        check: bool = True,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        cwd: str | PurePosixPath | GuestPath | None = None,
        user: str | None = None,
        input: str | bytes | None = None,  # noqa: A002 - subprocess.run's word
    ) -> Result:
        """Runs a command in the guest and waits for its end.

        Args:
            command: A list of words runs as it is; a string is a script for `sh -eu -c`.
            check: Whether a status other than 0 raises.
            timeout: Seconds until it is killed, with everything it started.
            env: Environment variables besides the standard ones and those of the spec.
            cwd: Where to run it; `/` by default.
            user: Who runs it; the spec's user by default.
            input: What its standard input gives.

        Raises:
            CommandFailed: The status was not 0.
            CommandTimeout: It took too long; what it had printed is in the error's `result`.
            MachineError: The guest is gone.
            ValueError: A word has a NUL byte in it or is no text, or all of it is longer than Linux takes.
        """
        __tracebackhide__ = True
        argv = ("sh", "-eu", "-c", command) if isinstance(command, str) else tuple(command)
        content = input.encode() if isinstance(input, str) else input or b""
        prepared = self._command(argv, env=env or {}, cwd=None if cwd is None else str(cwd), user=user, content=content)
        began = time.monotonic()
        finished = self._channel.run(prepared, deadline=Deadline(timeout * self._factor))
        result = _result(argv, finished, time.monotonic() - began)
        if finished.timed_out:
            raise CommandTimeout(result, timeout * self._factor)
        if check and not result.ok:
            raise CommandFailed(result)
        return result

    def _command(self, argv: tuple[str, ...], *, env: Mapping[str, str], cwd: str | None, user: str | None, content: bytes) -> Command:
        if not argv:
            raise ValueError("there is no command to run")
        environment = {**_environment(), **dict(self.spec.env), **env}
        _check_words([*argv, *environment, *environment.values(), cwd or "", user or ""])
        words = argv if cwd is None else ("/bin/sh", "-c", _CD, "sh", cwd, *argv)
        who = user or self.spec.user
        if who != "root":
            words = ("/bin/sh", "-c", _AS_USER, "sh", who, *words)
        return Command(argv=words, env=tuple(environment.items()), input=content)

    def script(self, text: str, *words: str) -> Result:
        """Runs a shell script with arguments as the spec's user, for the verbs of `GuestPath`; never raises for its status."""
        return self._carry(lambda command, deadline: self._channel.run(command, deadline=deadline), text, words)

    def feed(self, text: str, *words: str, source: BinaryIO, size: int) -> Result:
        """The same with `size` bytes of a host file as its input."""
        if size < BULK:
            content = source.read(size)
            return self._carry(lambda command, deadline: self._channel.run(command, deadline=deadline), text, words, content)
        return self._carry(lambda command, deadline: self._bulk(deadline).put(source, command, deadline=deadline), text, words)

    def fetch(self, text: str, *words: str, sink: BinaryIO, size: int) -> Result:
        """The same with its standard output, of about `size` bytes, going to a host file."""
        if size < BULK:
            result = self.script(text, *words)
            sink.write(result.stdout_bytes)
            return result
        return self._carry(lambda command, deadline: self._bulk(deadline).get(command, sink, deadline=deadline), text, words)

    def _carry(self, run: Callable[[Command, Deadline], Finished], text: str, words: tuple[str, ...], content: bytes = b"") -> Result:
        argv = ("/bin/sh", "-c", text, "sh", *words)
        began = time.monotonic()
        finished = run(self._command(argv, env={}, cwd=None, user=None, content=content), Deadline(_OWN_TIME * self._factor))
        result = _result(argv, finished, time.monotonic() - began)
        if finished.timed_out:
            raise CommandTimeout(result, _OWN_TIME * self._factor)
        return result

    def _bulk(self, deadline: Deadline) -> Channel:
        return self._instance.channel(deadline=deadline, bulk=True)

    # -- files -----------------------------------------------------------------------------------------------------------------------

    def path(self, path: str | PurePosixPath) -> GuestPath:
        """An absolute path in the guest."""
        return GuestPath(path, shell=self)

    def cp(self, src: str | Path | GuestPath, dst: str | Path | GuestPath) -> None:
        """Copies a file or a tree, with modes and symbolic links, to the guest or from it.

        A destination that is a folder means a place in it, as with `cp -r`. What arrives gets its final name when all of it is there.

        Args:
            src: Where from.
            dst: Where to. Exactly one of the two is a `GuestPath`.

        Raises:
            FileNotFoundError: The source, or the folder it is to go to, does not exist.
            TransferError: The copy broke off, or the guest sent what must not be written on the host.
            TypeError: Both sides are on the host, or both in a guest.
        """
        __tracebackhide__ = True
        if isinstance(dst, GuestPath) and not isinstance(src, GuestPath):
            transfer.copy_in(Path(src), dst)
        elif isinstance(src, GuestPath) and not isinstance(dst, GuestPath):
            transfer.copy_out(src, Path(dst))
        else:
            raise TypeError("exactly one side of a copy is in the guest: write it as vm.path('/...')")

    # -- waiting ---------------------------------------------------------------------------------------------------------------------

    def wait_until(self, check: str | Sequence[str] | Callable[[], _T | None], *, timeout: float = 60, every: float = 0.25) -> _T | Result:
        """Waits until a command succeeds, or until a function returns something true; returns its result.

        Args:
            check: A command as for `exec`, or a function without arguments.
            timeout: Seconds to wait at most.
            every: Seconds between two attempts, at most.

        Raises:
            MachineTimeout: It did not come true; the message has the last answer and the console's last lines.
        """
        __tracebackhide__ = True
        if callable(check):
            name = getattr(check, "__name__", "<lambda>").replace("<lambda>", "the condition")
            return self._wait(check, f"{name} to come true", timeout, every)
        command = check
        answers: list[Result] = []

        def succeeds() -> Result | None:
            answers[:] = [self.exec(command, check=False)]
            return answers[0] if answers[0].ok else None

        def last() -> str:
            return answers[0].describe()

        return self._wait(succeeds, f"{command!r} to succeed", timeout, every, last)

    def wait_for_unit(self, unit: str, *, timeout: float = 60) -> None:
        """Waits until a systemd unit is active.

        Raises:
            MachineError: It failed, does not exist, or is inactive with nothing queued to start it: at once, with its last journal lines.
            MachineTimeout: It was not active in time.
        """
        __tracebackhide__ = True
        state: dict[str, str] = {}

        def active() -> bool:
            shown = self.exec(["systemctl", "show", "-p", "LoadState,ActiveState,SubState,Job,Result", "--", unit], check=False)
            state.update({key: value for key, _, value in (line.partition("=") for line in shown.stdout.splitlines())})
            hopeless = state.get("ActiveState") == "failed" or (state.get("ActiveState") == "inactive" and not state.get("Job"))
            if hopeless or state.get("LoadState") == "not-found":
                raise self._hopeless(unit, state)
            return state.get("ActiveState") == "active"

        self._wait(active, f"the unit {unit} to be active", timeout, 0.25, state.__str__)

    def _hopeless(self, unit: str, state: Mapping[str, str]) -> MachineError:
        journal = self.exec(["journalctl", "--no-pager", "-n", "20", "-u", unit], check=False).stdout
        seen = ", ".join(f"{key}={value}" for key, value in state.items())
        return MachineError(f"the unit {unit} will not become active: {seen}\n--- its journal ---\n{printable(journal)}", machine=self.name)

    def wait_for_port(self, port: int, *, timeout: float = 60) -> None:
        """Waits until something in the guest listens on a TCP port.

        Raises:
            MachineTimeout: Nothing did in time.
        """
        __tracebackhide__ = True
        suffix = f":{port:04X}"

        def listening() -> bool:
            table = self.exec("cat /proc/net/tcp /proc/net/tcp6 2>/dev/null || true").stdout
            rows = (line.split() for line in table.splitlines())
            return any(len(row) > 3 and row[1].endswith(suffix) and row[3] == _LISTEN for row in rows)  # noqa: PLR2004 - columns

        self._wait(listening, f"something to listen on port {port}", timeout, 0.25)

    def wait_for_file(self, path: str | PurePosixPath | GuestPath, *, timeout: float = 60) -> GuestPath:
        """Waits until a file or folder exists, and returns its path.

        Raises:
            MachineTimeout: It did not in time.
        """
        __tracebackhide__ = True
        place = path if isinstance(path, GuestPath) else self.path(path)
        self._wait(place.exists, f"{place} to exist", timeout, 0.25)
        return place

    def _wait(self, check: Callable[[], _T | None], what: str, timeout: float, every: float, last: Callable[[], str] = lambda: "") -> _T:
        __tracebackhide__ = True
        deadline = Deadline(timeout * self._factor)
        answer = deadline.poll(check, every=every, first=0.02)
        if answer is None:
            seen = last()
            message = f"waited {deadline.seconds:g} s for {what}" + (f"; the last answer was\n{seen}" if seen else "")
            raise MachineTimeout(message, machine=self.name, console_tail=self.console.tail(20))
        return answer

    # -- the host's side -------------------------------------------------------------------------------------------------------------

    def forward(self, port: int) -> tuple[str, int]:
        """The host's address and port that lead to a TCP port of the guest; only this host can use them.

        Raises:
            MachineError: The backend cannot.
        """
        if not isinstance(self._instance, Forwarding):
            raise MachineError(f"the backend {self.backend} does not forward ports", machine=self.name)
        return self._instance.forward(port)

    # -- the private LAN -------------------------------------------------------------------------------------------------------------

    @contextmanager
    def on(self, lan: Lan) -> Iterator[None]:
        """Has the machine on a private LAN for the length of a block; the fixtures see to it where the spec says `network="name"`."""
        body = Body(instance=lambda: self._instance, channel=lambda: self._channel, factor=self._factor)
        with lan.joined(self.name, body) as place:
            self._place = place
            try:
                yield
            finally:
                self._place = None

    @property
    def address(self) -> str | None:
        """Its IPv4 address on its private LAN; None if it is on none.

        Example:
            `vms["web"].exec(["ping", "-c1", vms["db"].address])`
        """
        return None if self._place is None else self._place.address

    def impair(self, *, delay: float = 0.0, loss: float = 0.0) -> None:
        """Makes the machine's cable to its private LAN a bad one, from now on and in both directions; `impair()` makes it good again.

        Args:
            delay: Seconds that each frame takes, up to 60: a round trip takes two of them longer.
            loss: The probability that a frame is lost, from 0 to 1.

        Raises:
            MachineError: It is on no LAN.
            ValueError: A number makes no sense.

        Example:
            `vms["db"].impair(delay=0.1, loss=0.2)`
        """
        if self._place is None:
            raise MachineError('it is on no private LAN: put network="lan" into its mark', machine=self.name)
        self._place.impair(delay=delay, loss=loss)


def _environment() -> dict[str, str]:
    return {"PATH": GUEST_PATH, "HOME": "/root", "USER": "root", "LOGNAME": "root", "SHELL": "/bin/sh", "LANG": "C.UTF-8"}


def _check_words(words: Sequence[str]) -> None:
    total = 0
    for word in words:
        if not isinstance(word, str):
            raise TypeError(f"{word!r} is not a string: a command is a list of strings, or one string for the shell")
        if "\0" in word:
            raise ValueError(f"{word[:80]!r} has a NUL byte in it, which no command can be given")
        try:
            total += len(word.encode()) + 1
        except UnicodeEncodeError:
            raise ValueError(f"{word[:80]!r} is not text: a command takes what UTF-8 can write") from None
    if total > _MAX_COMMAND:
        raise ValueError(f"the command has {total} bytes, more than {_MAX_COMMAND}: write it to a file with vm.path(), or use input=")


def _result(argv: tuple[str, ...], finished: Finished, duration: float) -> Result:
    mark = _MARK if finished.truncated else ""
    return Result(
        argv=argv,
        returncode=finished.returncode,
        stdout=finished.stdout.decode("utf-8", "surrogateescape") + mark,
        stderr=finished.stderr.decode("utf-8", "surrogateescape"),
        duration=duration,
        truncated=finished.truncated,
    )
