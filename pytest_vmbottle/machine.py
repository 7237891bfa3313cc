"""What a test holds: a running machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, TextIO, TypeVar

from pytest_vmbottle import keyboard, openssh, transfer
from pytest_vmbottle._os import Deadline, atomic_file
from pytest_vmbottle.backend import (
    GUEST_PATH,
    Channel,
    Command,
    Console,
    Display,
    Finished,
    Forwarding,
    Instance,
    Link,
    SecureShell,
    Terminals,
)
from pytest_vmbottle.errors import BackendUnavailable, CommandFailed, CommandTimeout, MachineError, MachineTimeout
from pytest_vmbottle.guestpath import BULK, GuestPath
from pytest_vmbottle.result import Result, printable
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.terminal import attach

if TYPE_CHECKING:
    from testinfra.host import Host

__all__ = ["Machine"]

_T = TypeVar("_T")
_MARK = "\n[vmbottle: truncated after 16 MiB]\n"
_MAX_COMMAND = 120 << 10
"""Bytes of a command with its environment: Linux takes 128 KiB for one string, and SSH hands over the whole command as one."""
_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp
_OWN_TIME = 600.0
_LOGIN_TIME = 60.0
_MAX_PORT = 65535
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

        The guest is not asked: where nothing listens, a connection is closed at once.

        Example:
            ``urllib.request.urlopen("http://{}:{}/".format(*vm.forward(80)))``

        Raises:
            ValueError: It is no port number.
            MachineError: The backend cannot, or the machine is gone.
        """
        if type(port) is not int or not 0 < port <= _MAX_PORT:
            raise ValueError(f"port={port!r}: takes the number of a TCP port in the guest, from 1 to {_MAX_PORT}")
        if not isinstance(self._instance, Forwarding):
            raise self._lacking("does not forward ports")
        return self._instance.forward(port)

    def link(self, up: bool) -> None:  # noqa: FBT001 - the only thing there is to say
        """Plugs in the network cable of the machine, or pulls it; the guest sees that its card has no carrier.

        Without it nothing from outside gets an answer: forwarded ports, `ssh_config`, `shell`, and large copies, which go over SSH.
        Commands still run where the guest has the QEMU guest agent, as `debian-12` does.

        Example:
            ``vm.link(False)``, then see how the service takes it, then ``vm.link(True)``

        Raises:
            MachineError: The backend cannot, or the machine is gone.
        """
        if not isinstance(self._instance, Link):
            raise self._lacking("has no network cable to pull")
        self._instance.link(up=bool(up))

    def _lacking(self, what: str) -> MachineError:
        return MachineError(f"the backend {self.backend} {what}", machine=self.name)

    # -- screen and keyboard ---------------------------------------------------------------------------------------------------------

    def screenshot(self, path: str | Path) -> Path:
        """Writes what the screen shows to a file on the host, as PNG, and returns its path.

        Example:
            ``vm.screenshot(tmp_path / "login.png")``

        Raises:
            MachineError: The machine has no display (`display=True` in its mark), its QEMU writes no PNG, or it is gone.
            OSError: The file cannot be written.
        """
        image, dest = self._display().screenshot(), Path(path)
        with atomic_file(dest, mode=0o644) as file:
            file.write(image)
        return dest

    def send_keys(self, *keys: str) -> None:
        r"""Presses keys, one argument after the other.

        An argument is the name of a key (`"ret"`, `"f2"`, `"up"`), or names joined by `-` of which the first is a modifier, held
        down together (`"ctrl-alt-f2"`). Anything else is text, typed on a US keyboard, where a newline is the return key. Names
        are QEMU's. To type a word that is a key's name, give its characters one by one: `*"home"`.

        Example:
            ``vm.send_keys("ctrl-alt-f2", "root\n", "secret", "ret")``

        Raises:
                    ValueError: A combination has an unknown key in it, or a character is not on that keyboard; then nothing is typed.
                    MachineError: The machine has no display (`display=True` in its mark), is paused, or is gone.
        """
        pressed = keyboard.chords(keys)
        self._display().press(pressed)

    def _display(self) -> Display:
        if not self.spec.display:
            raise MachineError(f"the machine {self.name!r} has no display: write display=True in its mark", machine=self.name)
        if not isinstance(self._instance, Display):
            raise self._lacking("makes no machines with a display")
        return self._instance

    # -- other clients ---------------------------------------------------------------------------------------------------------------

    def ssh_config(self) -> Path:
        """Writes an OpenSSH configuration in which the machine goes by its name, and returns its path.

        With it `ssh`, `scp`, `sftp`, `rsync`, Ansible and what else builds on OpenSSH log in as root, with the machine's own key and only
        if it shows its own host key. All files are private, and go with the machine. The port is another one after a restart: ask again.

        Example:
            ``subprocess.run(["rsync", "-a", "-e", f"ssh -F {vm.ssh_config()}", "site/", f"{vm.name}:/srv/"], check=True)``

        Raises:
            MachineError: The backend offers no SSH, OpenSSH cannot be given the path of the machine's folder, or the machine is gone.
        """
        if not isinstance(self._instance, SecureShell):
            raise self._lacking("offers no SSH")
        return openssh.write_config(self._instance.ssh_access(), self.name)

    def shell(self, *, user: str | None = None, stdin: TextIO | None = None, stdout: TextIO | None = None) -> int | None:
        """Gives the terminal to a shell in the guest, for looking around by hand; in a test this takes `pytest -s`.

        What is typed goes to the guest, Ctrl-C and Ctrl-D too, and so does the size of the window; Ctrl-] leaves. Afterwards the terminal
        is as it was. There is no time-out.

        Args:
            user: Whose login shell it is; the spec's user by default.
            stdin: The terminal to read from; `sys.stdin` by default.
            stdout: The terminal to write to; `sys.stdout` by default.

        Returns:
            The status of the shell, -N for signal N; None if it was left.

        Raises:
            MachineError: There is no terminal here, the backend offers none, or the guest cannot be reached.
        """
        deadline = Deadline(_LOGIN_TIME * self._factor)
        channel = self._bulk(deadline)
        if not isinstance(channel, Terminals):
            raise self._lacking("offers no terminals")
        return attach(channel, user=user or self.spec.user, stdin=stdin, stdout=stdout, seconds=deadline.seconds)

    @cached_property
    def host(self) -> Host:
        """The machine as a host of pytest-testinfra, which takes the extra `testinfra`; its commands run as `exec`'s do.

        Example:
            ``assert vm.host.service("ssh").is_running``

        Raises:
            BackendUnavailable: pytest-testinfra is not installed.
        """
        try:
            from pytest_vmbottle.testinfra import connect  # noqa: PLC0415 - an extra, and it loads much
        except ImportError as error:
            reason = f"vm.host takes pytest-testinfra, which cannot be imported: {error}"
            raise BackendUnavailable(reason, "Install it: pip install 'pytest-vmbottle[testinfra]'") from error
        return connect(self)


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
