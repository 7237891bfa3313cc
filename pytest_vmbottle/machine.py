"""What a test holds: a running machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from pytest_vmbottle import transfer
from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backend import GUEST_PATH, Channel, Command, Console, Finished, Forwarding, Instance, State
from pytest_vmbottle.errors import CommandFailed, CommandTimeout, MachineError, MachineTimeout
from pytest_vmbottle.guestpath import BULK, GuestPath
from pytest_vmbottle.power import Power, Supply
from pytest_vmbottle.result import Result, printable
from pytest_vmbottle.spec import MachineSpec

if TYPE_CHECKING:
    from pytest_vmbottle.packs import Pack

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

    def __init__(  # noqa: PLR0913
        self,
        instance: Instance,
        spec: MachineSpec,
        *,
        id: str,  # noqa: A002
        backend: str,
        channel: Channel,
        factor: float = 1.0,
        supply: Supply | None = None,
    ) -> None:
        """Takes a running instance whose channel has answered.

        Args:
            instance: The VM as its backend sees it.
            spec: What it is.
            id: A name for it that nothing else has.
            backend: The backend's name.
            channel: What commands go through.
            factor: What all time-outs are multiplied with.
            supply: What it is started again with; without, it cannot be.
        """
        self.name = spec.name
        self.id = id
        self.spec = spec
        self.backend = backend
        self.console: Console = instance.console
        self._power = Power(instance, channel, spec=spec, supply=supply)
        self._factor = factor

    @property
    def instance(self) -> Instance:
        """The VM as its backend sees it, for those who extend this; another one after `start` and `restore`.

        Raises:
            MachineError: The machine is off.
        """
        return self._power.instance

    _instance = instance

    @property
    def _channel(self) -> Channel:
        return self._power.channel

    @property
    def pid(self) -> int:
        """The hypervisor's process id on the host; another one after `start` and `restore`.

        Raises:
            MachineError: The machine is off.
        """
        return self._instance.pid

    @property
    def state(self) -> State:
        """What it is doing: `"running"`, `"paused"`, `"off"`, or `"died"` if its kernel panicked or its hypervisor failed.

        Example:
            ``assert vm.state == "running"``
        """
        return self._power.state

    def __repr__(self) -> str:
        doing = self.state
        return f"<Machine {self.name} ({self.id}), {self.backend} {doing if doing is State.OFF else f'pid {self.pid}'}>"

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

    # -- power and time --------------------------------------------------------------------------------------------------------------

    def reboot(self, *, timeout: float | None = None) -> None:
        """Reboots the guest in order, and returns when it is ready again: in another boot, which its boot id proves.

        Args:
            timeout: Seconds for all of it; by default what the spec gives a boot.

        Raises:
            MachineTimeout: It was not ready in time.
            MachineDied: It panicked, or powered off instead.
            MachineError: It is off.

        Example:
            ``vm.exec("echo overcommit_memory=1 > /etc/sysctl.d/x.conf"); vm.reboot()``
        """
        __tracebackhide__ = True
        self._power.reboot(self._deadline(timeout))

    def poweroff(self, *, timeout: float = 90) -> None:
        """Shuts the guest down in order; then the machine is off, and everything but `start`, `restore` and `state` says so.

        Args:
            timeout: Seconds until the machine has to be off.

        Raises:
            MachineTimeout: It was not. It may still be shutting down; `power_cut` ends it.
            MachineError: It is off already.

        Example:
            ``vm.poweroff(); vm.start()``
        """
        __tracebackhide__ = True
        self._power.off(Deadline(timeout * self._factor))

    def start(self, *, timeout: float | None = None) -> None:
        """Boots a machine that is off, or died, from its own disk as it was left; returns when it is ready.

        Args:
            timeout: Seconds for the boot; by default what the spec gives one.

        Raises:
            MachineTimeout: It was not ready in time, and is off again.
            MachineError: It is on.

        Example:
            ``vm.power_cut(); vm.start()``
        """
        __tracebackhide__ = True
        self._power.start(self._deadline(timeout))

    def power_cut(self) -> None:
        """Pulls the plug: the machine is off at once, and what the guest had not written out (`sync`) is lost, as on real hardware.

        Raises:
            MachineError: It is off already.

        Example:
            ``vm.exec("dd if=/dev/urandom of=/srv/db bs=1M count=8"); vm.power_cut(); vm.start()``
        """
        __tracebackhide__ = True
        self._power.cut()

    def pause(self) -> None:
        """Stops the processors. Until `resume` no command can be run, and the guest's clock stands still.

        Raises:
            MachineError: It is off.

        Example:
            ``vm.pause(); time.sleep(5); vm.resume()``
        """
        self._power.pause()

    def resume(self) -> None:
        """Lets the processors run on; the guest's clock is behind by the time of the pause.

        Raises:
            MachineError: It is off.
        """
        self._power.resume()

    def snapshot(self, name: str) -> Pack:
        """Writes the running machine down, RAM and disk, and lets it go on; it stands still for about a second.

        Args:
            name: What people call it.

        Returns:
            What `restore` takes, and `vm_factory` as a source. Its files, in `path`, are gone with the machine.

        Raises:
            CatalogError: There was no room for it. The machine goes on, and nothing is left of it.
            MachineError: The machine is off or paused, or its guest has no Python 3, which wakes it after a restore.

        Example:
            ``before = vm.snapshot("before"); vm.exec("rm -rf /srv"); vm.restore(before)``
        """
        __tracebackhide__ = True
        return self._power.snapshot(name)

    def restore(self, pack: Pack | None = None) -> None:
        """Takes the machine back to a snapshot, as often as one likes: its memory, its disk and what ran. Its clock is right.

        It may be off, paused or have died. What led to it from the host, such as `forward`, does so again.

        Args:
            pack: What `snapshot` returned; without, the machine is as fresh as it was given to the test.

        Raises:
            CatalogError: The snapshot is gone with the machine that it was made of.
            SpecError: The snapshot is of a machine with other processors or memory.
            MachineError: It could not be restored, and the machine is off.

        Example:
            ``vm.restore()``
        """
        __tracebackhide__ = True
        self._power.restore(pack)

    def close(self) -> None:
        """Ends it for good; who made it calls this."""
        self._power.stop()

    def _deadline(self, timeout: float | None) -> Deadline | None:
        return None if timeout is None else Deadline(timeout * self._factor)

    # -- the host's side -------------------------------------------------------------------------------------------------------------

    def forward(self, port: int) -> tuple[str, int]:
        """The host's address and port that lead to a TCP port of the guest; only this host can use them.

        Raises:
            MachineError: The backend cannot.
        """
        if not isinstance(self._instance, Forwarding):
            raise MachineError(f"the backend {self.backend} does not forward ports", machine=self.name)
        return self._instance.forward(port)


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
