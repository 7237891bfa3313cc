"""What a test holds: a running machine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol, TextIO, TypeVar, Unpack, overload

from pytest_vmbottle import fileset, guestlog, host, keyboard, openssh, transfer
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
    State,
    Terminals,
    Watching,
)
from pytest_vmbottle.errors import BackendUnavailable, CommandTimeout, MachineDied, MachineError
from pytest_vmbottle.guestpath import BULK, GuestPath, with_any_bytes
from pytest_vmbottle.lan import Body, Lan, Place
from pytest_vmbottle.metrics import Meter, Sample
from pytest_vmbottle.power import Power, Supply
from pytest_vmbottle.process import Process
from pytest_vmbottle.recording import Recording
from pytest_vmbottle.result import Matches, Result, printable
from pytest_vmbottle.search import Query
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.terminal import attach
from pytest_vmbottle.waits import Wait

if TYPE_CHECKING:
    from testinfra.host import Host

    from pytest_vmbottle.channels.bulk import Bulk
    from pytest_vmbottle.packs import Snapshot
    from pytest_vmbottle.spec import MachineKeywords, Source

__all__ = ["Machine", "MachineFactory"]

_T = TypeVar("_T")
_MARK = "\n[vmbottle: truncated after 16 MiB]\n"
_MAX_COMMAND = 120 << 10
"""Bytes of a command with its environment: Linux takes 128 KiB for one string, and SSH hands over the whole command as one."""
_OWN_TIME = 600.0
_SPARE = 10.0
"""Seconds after which a guest that does not end a search itself is made to."""
_ANSWER = 5.0
"""Seconds that a guest has to tell its figures."""
_LOGIN_TIME = 60.0
_MAX_PORT = 65535
_KILL_TIME = 10.0
_NOT_FOUND = 127
_KILLED = (-9, 128 + 9)
"""How a command ends that is killed, and a shell whose last command was."""
_HELD = (
    "the command itself had ended, but something that it left in the background held its output; give that >/dev/null 2>&1, or use spawn"
)
_CD = 'cd -- "$1" && shift && exec "$@"'
_AS_USER = r"""
user=$1; shift
home=$(getent passwd "$user" | cut -d: -f6)
[ -n "$home" ] || { echo "there is no user $user in the guest" >&2; exit 125; }
set -- env HOME="$home" USER="$user" LOGNAME="$user" "$@"
command -v runuser >/dev/null && exec runuser -u "$user" -- "$@"
exec su -s /bin/sh "$user" -c 'exec "$@"' sh "$@" # as BusyBox has it
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
        self._power = Power(instance, channel, spec=spec, supply=supply)
        self.console: Console = instance.console.until(lambda: self._power.is_silent)
        self._factor = factor
        self._meter: Meter | None = None
        self._place: Place | None = None

    @property
    def instance(self) -> Instance:
        """The VM as its backend sees it, for those who extend this; another one after `start` and `restore`.

        Raises:
            MachineError: The machine is off, or belongs to the process that this one was forked from.

        Example:
            >>> vm.instance.pid == vm.pid
            True
        """
        return self._power.instance

    _instance = instance

    @property
    def _channel(self) -> Channel:
        return self._power.channel

    @property
    def _bulk(self) -> Bulk:
        return self._power.bulk

    @property
    def pid(self) -> int:
        """The hypervisor's process id on the host; another one after `start` and `restore`.

        Raises:
            MachineError: The machine is off.

        Example:
            >>> Path(f"/proc/{vm.pid}").is_dir()
            True
        """
        return self._power.pid

    @property
    def panic(self) -> str | None:
        """The line by which the guest's kernel said that it panicked, met a bug of its own (an oops), or that a task hangs.

        None if it did not since it was booted or restored last, or where the backend does not tell. Without `panic="expected"` in the mark
        every call raises `GuestPanic` then.

        Example:
            >>> vm.panic is None
            True
        """
        return self._power.panic

    def _alive(self) -> None:
        __tracebackhide__ = True
        if isinstance(self._instance, Watching):
            self._instance.alive()

    @property
    def state(self) -> State:
        """What it is doing: `"running"`, `"paused"`, `"off"`, or `"died"` if its kernel panicked or its hypervisor failed.

        Example:
            >>> vm.state
            <State.RUNNING: 'running'>
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
        stream: Callable[[str], object] | None = None,
        shell: Literal["sh", "bash"] = "sh",
    ) -> Result:
        """Runs a command in the guest and waits for its end.

        Args:
            command: A list of words runs as it is; a string is a script for `sh -eu -c`, where a pipe has its last command's status.
            check: Whether a status other than 0 raises.
            timeout: Seconds until it is killed, with everything it started.
            env: Environment variables besides the standard ones and those of the spec.
            cwd: Where to run it; `/` by default.
            user: Who runs it; the spec's user by default.
            input: What its standard input gives.
            stream: Gets what it prints while it runs, line by line with their ends, from both streams and fit to be shown: control
                characters are made visible. What it raises ends the command.
            shell: `"bash"` runs a string by `bash -euo pipefail -c`, so that a pipe fails if any of its commands does; the guest has to
                have bash.

        Raises:
            CommandFailed: The status was not 0.
            CommandTimeout: It took too long; what it had printed is in the error's `result`.
            MachineError: The guest is gone.
            ValueError: A word has a NUL byte in it or is no text, all of it is longer than Linux takes, or there is no such shell.

        Example:
            >>> vm.exec(["uname", "-s"]).stdout.strip()
            'Linux'
            >>> vm.exec("test -e /nothing", check=False).returncode
            1
            >>> vm.exec("cat /nothing | wc -l", shell="bash", check=False).returncode
            1
        """
        __tracebackhide__ = True
        argv, prepared = self._prepared(_argv(command, shell), env=env, cwd=cwd, user=user, content=input)
        result = self._run(argv, prepared, Deadline(timeout * self._factor), stream)
        return result.check() if check else result

    def spawn(  # noqa: PLR0913 - as for exec
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | PurePosixPath | GuestPath | None = None,
        user: str | None = None,
        input: str | bytes | None = None,  # noqa: A002 - subprocess.run's word
        shell: Literal["sh", "bash"] = "sh",
    ) -> Process:
        """Starts a command in the guest and returns while it runs; it ends with the machine at the latest.

        Args:
            command: As for `exec`.
            env: As for `exec`.
            cwd: As for `exec`.
            user: As for `exec`.
            input: What its standard input gives before it ends; without it, it stays open for `Process.stdin`.
            shell: As for `exec`.

        Raises:
            MachineError: The guest is gone, or the backend cannot.
            ValueError: As for `exec`.

        Example:
            >>> server = vm.spawn(["python3", "-um", "http.server"])
            >>> vm.wait_for_port(8000)
            >>> server.kill("TERM")
            >>> server.wait(timeout=30)
            -15
        """
        __tracebackhide__ = True
        argv, prepared = self._prepared(_argv(command, shell), env=env, cwd=cwd, user=user, content=input)
        process = self._spawn(argv, prepared)
        if input is not None and not prepared.input:
            process.stdin.close()
        return process

    def _spawn(self, argv: tuple[str, ...], prepared: Command) -> Process:
        self._alive()
        channel = self._power.bulk_channel(Deadline(_LOGIN_TIME * self._factor))
        return Process(channel, prepared, argv=argv, killer=self._channel, factor=self._factor)

    def _run(self, argv: tuple[str, ...], prepared: Command, deadline: Deadline, stream: Callable[[str], object] | None = None) -> Result:
        __tracebackhide__ = True
        self._alive()
        began = time.monotonic()
        finished = self._spawn(argv, prepared).relay(stream, deadline.seconds) if stream else self._channel.run(prepared, deadline=deadline)
        result = self._result(argv, finished, time.monotonic() - began)
        if finished.timed_out:
            raise CommandTimeout(result, deadline.seconds)
        return result

    def _ask(self, command: str | Sequence[str], deadline: Deadline) -> Result:
        return self._run(*self._prepared(_argv(command, "sh"), env=None, cwd=None, user=None, content=None), deadline)

    def _prepared(
        self,
        argv: tuple[str, ...],
        *,
        env: Mapping[str, str] | None,
        cwd: str | PurePosixPath | GuestPath | None,
        user: str | None,
        content: str | bytes | None,
    ) -> tuple[tuple[str, ...], Command]:
        data = content.encode() if isinstance(content, str) else content or b""
        return argv, self._command(argv, env=env or {}, cwd=None if cwd is None else str(cwd), user=user, content=data)

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

    def feed(self, text: str, *words: str, source: BinaryIO, size: int, framed: bool = False) -> Result:
        """The same with `size` bytes of a host file as its input; with `framed` the script knows itself where they end."""
        if size < BULK:
            content = source.read(size)
            return self._carry(lambda command, deadline: self._channel.run(command, deadline=deadline), text, words, content)
        return self._carry(lambda command, deadline: self._bulk.put(source, size, command, deadline=deadline, framed=framed), text, words)

    def fetch(self, text: str, *words: str, sink: BinaryIO, size: int) -> Result:
        """The same with its standard output, of about `size` bytes, going to a host file."""
        if size < BULK:
            result = self.script(text, *words)
            sink.write(result.stdout_bytes)
            return result
        return self._carry(lambda command, deadline: self._bulk.get(command, sink, size, deadline=deadline), text, words)

    def _carry(self, run: Callable[[Command, Deadline], Finished], text: str, words: tuple[str, ...], content: bytes = b"") -> Result:
        text, words = with_any_bytes(text, words)
        argv = ("/bin/sh", "-c", text, "sh", *words)
        self._alive()
        began = time.monotonic()
        finished = run(self._command(argv, env={"LC_ALL": "C"}, cwd=None, user=None, content=content), Deadline(_OWN_TIME * self._factor))
        result = self._result(argv, finished, time.monotonic() - began)
        if finished.timed_out:
            raise CommandTimeout(result, _OWN_TIME * self._factor)
        return result

    def _result(self, argv: tuple[str, ...], finished: Finished, duration: float) -> Result:
        mark = _MARK if finished.truncated else ""
        return Result(
            argv=argv,
            returncode=finished.returncode,
            stdout=finished.stdout.decode("utf-8", "surrogateescape") + mark,
            stderr=finished.stderr.decode("utf-8", "surrogateescape"),
            duration=duration,
            truncated=finished.truncated,
            note=self._note(argv[0], finished, duration),
        )

    def _note(self, program: str, finished: Finished, duration: float) -> str:
        """What else is to be said of a command's end."""
        if finished.outlived:
            return _HELD
        if finished.returncode == _NOT_FOUND and len(program.split()) > 1:
            return f"{printable(program)!r} is one word of a list, and so the name of a program; a whole command is written as a string"
        if finished.returncode not in _KILLED or finished.timed_out:
            return ""
        question = Command(argv=("/bin/sh", "-c", guestlog.KILLS), env=(("PATH", GUEST_PATH),))
        with suppress(MachineError):
            said = self._channel.run(question, deadline=Deadline(_ANSWER * self._factor)).stdout.decode(errors="replace")
            processes = ", ".join(guestlog.killed(said, duration))
            return processes and f"the guest's OOM killer ended process {processes}"
        return ""

    # -- for who keeps it ------------------------------------------------------------------------------------------------------------

    def command(self, argv: Sequence[str], *, env: Mapping[str, str], cwd: str | None, user: str | None) -> Command:
        """A command as `exec` would run it, for a channel.

        Raises:
            ValueError: It cannot be given to Linux.
        """
        return self._command(tuple(argv), env=env, cwd=cwd, user=user, content=b"")

    def kill(self, command: Command) -> None:
        """Ends a command, with all it has started."""
        self._channel.run(command.killer(), deadline=Deadline(_KILL_TIME))

    def bulk(self, deadline: Deadline) -> Channel:
        """The channel that carries the most, and commands beside each other."""
        return self._power.bulk_channel(deadline)

    # -- files -----------------------------------------------------------------------------------------------------------------------

    def path(self, path: str | PurePosixPath) -> GuestPath:
        """An absolute path in the guest.

        Example:
            >>> vm.path("/etc") / "passwd"
            GuestPath('/etc/passwd')
        """
        return GuestPath(path, shell=self)

    def write_files(
        self,
        files: Mapping[str, fileset.File] | Mapping[GuestPath, fileset.File],
        *,
        clean: bool = False,
        mode: int | None = None,
        owner: str | int | None = None,
    ) -> None:
        r"""Writes many files by one command, each as `GuestPath.write_bytes` does; the folders above them are made.

        All of them are in the guest before the first is renamed to its final name. So a full disk, a name that is a folder's, or a folder
        that may not be written leave everything as it was.

        Args:
            files: Text, bytes, or a file of the host, by absolute path in the guest. A tuple of that and permission bits gives one file
                bits of its own.
            clean: Whether to remove what is in the folders of these files beforehand: in each folder that has one of them in it directly,
                everything, and so all below it. Folders on other file systems below it are not entered. What a guest needs, such as `/`,
                `/etc`, `/var/lib` or anything in `/usr/bin`, is refused.
            mode: Permission bits of all other files; by default as with `GuestPath.write_bytes`, and executable if a file of the host is.
            owner: Whom the files, and the folders that are made, belong to.

        Raises:
            FileNotFoundError: A file of the host does not exist.
            OSError: A file could not be written: `filename` says which, `errno` why.
            LookupError: There is no such owner.
            ValueError: A path is relative or has `..` in it, two of them make no sense together, permission bits are none, or `clean` is
                refused.

        Example:
            >>> vm.write_files({"/srv/app/run.sh": ("exec true\n", 0o755), "/srv/app/conf/app.ini": b"[app]\n"}, owner="nobody")
            >>> vm.path("/srv/app/conf").owner()
            'nobody'
        """
        __tracebackhide__ = True
        placed = {self.path(str(path)): content for path, content in files.items()}
        if len(placed) < len(files):
            raise ValueError("two of the paths name the same file")
        fileset.write_files(self, placed, clean=clean, mode=mode, owner=owner)

    def cp(self, src: str | Path | GuestPath, dst: str | Path | GuestPath) -> None:
        """Copies a file or a tree, with modes, times, symbolic links and holes, to the guest or from it.

        A destination that is a folder means a place in it, as with `cp -r`. What arrives gets its final name when all of it is there. From
        1 MiB on the data goes over a disk that the machine gets for the copy. The logger `pytest_vmbottle` tells every 5 s how far a long
        copy is.

        Args:
            src: Where from.
            dst: Where to. Exactly one of the two is a `GuestPath`.

        Nothing is copied if a side is empty text: that is what a variable has that was not set.

        Raises:
            FileNotFoundError: The source, or the folder it is to go to, does not exist.
            PermissionError: Something may not be read, or written.
            TransferError: The copy broke off, or the guest sent what must not be written on the host.
            MachineError: The guest was lost, or did not answer in time.
            TypeError: Both sides are on the host, or both in a guest.

        Example:
            >>> vm.cp(vm.path("/etc/ssh"), tmp_path)
            >>> (tmp_path / "ssh" / "sshd_config").is_file()
            True
            >>> vm.cp(tmp_path / "ssh", vm.path("/root"))
        """
        __tracebackhide__ = True
        if "" in (src, dst):
            return  # as a path of this computer it would be the current folder
        if isinstance(dst, GuestPath) and not isinstance(src, GuestPath):
            transfer.copy_in(Path(src), dst)
        elif isinstance(src, GuestPath) and not isinstance(dst, GuestPath):
            transfer.copy_out(src, Path(dst))
        else:
            raise TypeError("exactly one side of a copy is in the guest: write it as vm.path('/...')")

    def search(  # noqa: PLR0913 - what grep can be told
        self,
        pattern: str,
        root: str | PurePosixPath | GuestPath,
        *,
        regex: bool = False,
        ignore_case: bool = False,
        include: str | Sequence[str] = (),
        exclude_dirs: str | Sequence[str] = (),
        max_results: int = 500,
        timeout: float = 10,
    ) -> Matches:
        """Finds the lines that have a pattern in them, in a file of the guest or in all files below a folder, with the guest's GNU grep.

        Binary files, devices, and what may not be read are left out, and symbolic links below the folder are not followed.

        Args:
            pattern: Literal text, without a newline.
            root: The file or folder.
            regex: Whether the pattern is an extended regular expression (`grep -E`) instead.
            ignore_case: Whether upper and lower case are the same.
            include: Globs: only files whose name matches one of them are read.
            exclude_dirs: Globs: folders whose name matches one of them are left out.
            max_results: How many matches to return at most; if there were more, the result's `truncated` says so.
            timeout: Seconds after which the search ends with what it has found, and the result's `timed_out` says so.

        Raises:
            FileNotFoundError, PermissionError: There is no such root, or it may not be read.
            ValueError: The pattern is no regular expression, or has a NUL byte or a newline in it.
            OSError: The guest's grep is not GNU grep.
            MachineError: The guest is gone.

        Example:
            >>> found = vm.search("root", "/etc", include="pass*d")
            >>> str(found[0].path), found[0].line
            ('/etc/passwd', 1)
        """
        __tracebackhide__ = True
        query = Query(
            pattern=pattern,
            root=root if isinstance(root, GuestPath) else self.path(root),
            regex=regex,
            ignore_case=ignore_case,
            include=include,
            exclude_dirs=exclude_dirs,
            max_results=max_results,
        )
        try:
            result = self.exec(query.argv(seconds=timeout * self._factor), check=False, timeout=timeout + _SPARE, env=query.env)
        except CommandTimeout as late:
            return query.matches(late.result, timed_out=True)
        return query.matches(result)

    def archive(self, root: str | PurePosixPath | GuestPath, dest: str | Path, format: str = "tar.gz") -> Path:  # noqa: A002 - shutil's word
        """Packs a folder of the guest into a file of the host, and returns its path.

        In the archive everything is below the folder's name, in the order of names, and belongs to root: equal folders give equal archives.
        What the guest may not send by `cp`, it may not have packed either.

        Args:
            root: The folder.
            dest: The file. It gets this name when it is complete.
            format: `"tar.gz"` or `"zip"`.

        Raises:
            FileNotFoundError, NotADirectoryError: The guest has no such folder, or the host none for the file.
            IsADirectoryError: On the host the file's name is that of a folder.
            TransferError: The copy broke off, or the guest sent what must not be packed.
            ValueError: There is no such format, or a path is empty.

        Example:
            >>> vm.archive("/etc/ssh", tmp_path / "ssh.zip", format="zip").name
            'ssh.zip'
        """
        __tracebackhide__ = True
        return transfer.pack_out(root if isinstance(root, GuestPath) else self.path(root), _host_path(dest), format)

    # -- waiting ---------------------------------------------------------------------------------------------------------------------

    def _wait(self, timeout: float) -> Wait:
        deadline = Deadline(timeout * self._factor)
        return Wait(
            machine=self.name,
            console=self.console,
            alive=self._alive,
            run=self._ask,
            deadline=deadline,
            age=lambda: host.age(self.pid),
        )

    @overload
    def wait_until(self, check: str | Sequence[str], *, timeout: float = 60, every: float = 0.25) -> Result: ...

    @overload
    def wait_until(self, check: Callable[[], _T | None], *, timeout: float = 60, every: float = 0.25) -> _T: ...

    def wait_until(self, check: str | Sequence[str] | Callable[[], _T | None], *, timeout: float = 60, every: float = 0.25) -> _T | Result:
        """Waits until a command succeeds, or until a function returns something true; returns its result.

        Args:
            check: A command as for `exec`, or a function without arguments.
            timeout: Seconds to wait at most.
            every: Seconds between two attempts, at most.

        Raises:
            MachineTimeout: It did not come true; the message has the last answer and the console's last lines.
            MachineDied: The machine is gone.

        Example:
            >>> vm.wait_until("systemctl is-system-running --quiet || test -d /run/systemd").ok
            True
        """
        __tracebackhide__ = True
        wait = self._wait(timeout)
        return wait.condition(check, every=every) if callable(check) else wait.command(check, every=every)

    def wait_for_unit(self, unit: str, *, timeout: float = 60) -> None:
        """Waits until a systemd unit is active.

        Raises:
            MachineError: It failed, does not exist, or is inactive with nothing queued to start it: at once, with its last journal lines.
            MachineTimeout: It was not active in time.

        Example:
            >>> vm.wait_for_unit("ssh.service")
        """
        __tracebackhide__ = True
        self._wait(timeout).unit(unit)

    def wait_for_port(self, port: int, *, forwarded: bool = False, timeout: float = 60) -> None:
        """Waits until something in the guest listens on a TCP port.

        Args:
            port: Its number in the guest.
            forwarded: Whether a connection from the host must reach it too, which the guest's own loopback address and its firewall do not
                let through. `forward` gives the address to connect to.
            timeout: Seconds to wait at most.

        Raises:
            MachineTimeout: Nothing did in time.

        Example:
            >>> vm.wait_for_port(22, forwarded=True)
        """
        __tracebackhide__ = True
        wait = self._wait(timeout)
        wait.forwarded_port(port, self.forward(port)) if forwarded else wait.port(port)

    def wait_for_file(self, path: str | PurePosixPath | GuestPath, *, timeout: float = 60) -> GuestPath:
        """Waits until a file or folder exists, and returns its path.

        Raises:
            MachineTimeout: It did not in time.

        Example:
            >>> vm.wait_for_file("/etc/hostname").is_file()
            True
        """
        __tracebackhide__ = True
        return self._wait(timeout).file(path if isinstance(path, GuestPath) else self.path(path))

    def wait_for_console(self, pattern: str | re.Pattern[str], *, timeout: float = 60) -> re.Match[str]:
        """Waits until the serial console says something, and returns the match.

        What it has said already counts. Each call begins where what the one before found ended, so that the same words can be awaited
        again. It is searched as it is shown by `console.text`, with control characters made visible.

        Args:
            pattern: Text, or a compiled regular expression.
            timeout: Seconds to wait at most.

        Raises:
            MachineTimeout: It did not in time.

        Example:
            >>> _ = vm.exec("echo ready at last > /dev/ttyS0")
            >>> vm.wait_for_console(re.compile("ready at ([a-z]+)"))[1]
            'last'
        """
        __tracebackhide__ = True
        return self._wait(timeout).output(pattern)

    def wait_for_shutdown(self, *, timeout: float = 60) -> None:
        """Waits until the guest has powered off.

        Raises:
            MachineTimeout: It did not in time.
            MachineDied: It ended in another way.
            MachineError: The backend does not tell.

        Example:
            >>> _ = vm.exec("systemctl poweroff --no-block")
            >>> vm.wait_for_shutdown()
        """
        __tracebackhide__ = True
        if self.state is State.OFF:
            return
        if not isinstance(self._instance, Watching):
            raise MachineError(f"the backend {self.backend} does not tell whether a guest is off", machine=self.name)
        self._wait(timeout).shutdown(self._instance)

    # -- measuring -------------------------------------------------------------------------------------------------------------------

    def metrics(self) -> Sample:
        """What the machine takes now: of the host, and, in the sample's `guest`, as its guest sees it.

        Processor time is counted from one call to the next, so the first sample has none.

        Raises:
            MachineDied: Its process has ended.
            MachineError: The machine is off.

        Example:
            >>> before = vm.metrics()
            >>> _ = vm.exec("dd if=/dev/zero of=/root/zeros bs=1M count=64 conv=fsync")
            >>> vm.metrics().guest.disk_write_bytes - before.guest.disk_write_bytes >= 64 << 20
            True
        """
        if self._meter is None or self._meter.pid != self._instance.pid:
            self._meter = self._new_meter()
        sample = self._meter.sample()
        if sample is None:
            raise MachineDied(f"process {self._meter.pid} has ended, and with it what could be measured", machine=self.name)
        return sample

    def record(self, every: float = 0.5, *, guest_every: float | None = None) -> Recording:
        """Samples the machine in the background for the length of a `with` block.

        Args:
            every: Seconds from one sample of the host's view to the next.
            guest_every: Seconds between two questions to the guest, each of which has it run `cat`. By default they become fewer the longer
                the guest takes to answer, so that its answers take 0.5 % of the time; but at least one is asked in 10 s.

        Raises:
            ValueError: A number of seconds is not above 0.
            MachineError: The machine is off.

        Example:
            >>> with vm.record(every=0.1) as recording:
            ...     _ = vm.exec("dd if=/dev/zero of=/dev/null bs=1M count=64")
            >>> recording.summary["rss_bytes"].max > 0
            True
        """
        return Recording(self._new_meter(), every=every, guest_every=guest_every)

    def _new_meter(self) -> Meter:
        return Meter(self._instance.pid, lambda question: self._channel.run(question, deadline=Deadline(_ANSWER * self._factor)).stdout)

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
            >>> boot = vm.path("/proc/sys/kernel/random/boot_id").read_text()
            >>> vm.reboot()
            >>> vm.path("/proc/sys/kernel/random/boot_id").read_text() == boot
            False
        """
        __tracebackhide__ = True
        self._power.reboot(self._deadline(timeout))
        self._settle()

    def poweroff(self, *, timeout: float = 90) -> None:
        """Shuts the guest down in order; then the machine is off, and everything but `start`, `restore` and `state` says so.

        Args:
            timeout: Seconds until the machine has to be off.

        Raises:
            MachineTimeout: It was not. It may still be shutting down; `power_cut` ends it.
            MachineError: It is off already.

        Example:
            >>> vm.poweroff()
            >>> vm.state
            <State.OFF: 'off'>
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
            >>> vm.power_cut()
            >>> vm.start()
            >>> vm.exec(["true"]).ok
            True
        """
        __tracebackhide__ = True
        self._power.start(self._deadline(timeout))
        self._settle()

    def power_cut(self) -> None:
        """Pulls the plug: the machine is off at once, and what the guest had not written out (`sync`) is lost, as on real hardware.

        Raises:
            MachineError: It is off already.

        Example:
            >>> vm.power_cut()
            >>> vm.state
            <State.OFF: 'off'>
        """
        __tracebackhide__ = True
        self._power.cut()

    def pause(self) -> None:
        """Stops the processors. Until `resume` no command can be run, and the guest's clock stands still.

        Raises:
            MachineError: It is off.

        Example:
            >>> vm.pause()
            >>> vm.state
            <State.PAUSED: 'paused'>
        """
        self._power.pause()

    def resume(self) -> None:
        """Lets the processors run on; the guest's clock is behind by the time of the pause.

        Raises:
            MachineError: It is off.

        Example:
            >>> vm.pause()
            >>> vm.resume()
            >>> vm.exec(["true"]).ok
            True
        """
        self._power.resume()

    def snapshot(self, name: str) -> Snapshot:
        """Writes the running machine down, RAM and disk, and lets it go on; it stands still for about a second.

        Args:
            name: What people call it.

        Returns:
            What `restore` takes, and `vm_factory` as a source. Its files, in `path`, are gone with the machine.

        Raises:
            CatalogError: There was no room for it. The machine goes on, and nothing is left of it.
            MachineError: The machine is off or paused, or its guest has no Python 3, which wakes it after a restore.

        Example:
            >>> before = vm.snapshot("before")
            >>> vm.path("/srv").rmtree()
            >>> vm.restore(before)
            >>> vm.path("/srv").is_dir()
            True
        """
        __tracebackhide__ = True
        if self._place is None:
            return self._power.snapshot(name)
        _ = self._channel  # where nothing answers, nothing can be unplugged either
        self._place.unplug()
        try:
            return self._power.snapshot(name)
        finally:
            self._settle()

    def restore(self, snapshot: Snapshot | None = None) -> None:
        """Takes the machine back to a snapshot, as often as one likes: its memory, its disk and what ran. Its clock is right.

        It may be off, paused or have died. What led to it from the host, such as `forward`, does so again.

        Args:
            snapshot: What `snapshot` returned; without, the machine is as fresh as it was given to the test.

        Raises:
            CatalogError: The snapshot is gone with the machine that it was made of.
            SpecError: The snapshot is of a machine with other processors or memory.
            MachineError: It could not be restored, and the machine is off.

        Example:
            >>> vm.path("/srv").rmtree()
            >>> vm.restore()
            >>> vm.path("/srv").is_dir()
            True
        """
        __tracebackhide__ = True
        self._power.restore(snapshot)
        self._settle()

    def close(self) -> None:
        """Ends it for good; who made it calls this."""
        self._power.stop()

    def _deadline(self, timeout: float | None) -> Deadline | None:
        return None if timeout is None else Deadline(timeout * self._factor)

    # -- the host's side -------------------------------------------------------------------------------------------------------------

    def forward(self, port: int) -> tuple[str, int]:
        """The host's address and port that lead to a TCP port of the guest; only this host can use them.

        The guest is not asked: where nothing listens, a connection is closed at once.

        Raises:
            ValueError: It is no port number.
            MachineError: The backend cannot, or the machine is gone.

        Example:
            >>> with socket.create_connection(vm.forward(22), timeout=60) as connection:
            ...     connection.recv(4)
            b'SSH-'
        """
        if type(port) is not int or not 0 < port <= _MAX_PORT:
            raise ValueError(f"port={port!r}: takes the number of a TCP port in the guest, from 1 to {_MAX_PORT}")
        if not isinstance(self._instance, Forwarding):
            raise self._lacking("does not forward ports")
        return self._instance.forward(port)

    def link(self, up: bool) -> None:  # noqa: FBT001 - the only thing there is to say
        """Plugs in the network cable of the machine, or pulls it; the guest sees that its card has no carrier.

        Of a machine on a private LAN it is the cable to that, and everything else goes on as before. Of any other one it is the only cable.
        Without it nothing from outside gets an answer: forwarded ports, `ssh_config`, `shell`, and large copies, which go over SSH.
        Commands still run where the guest has the QEMU guest agent, as `debian-12` does.

        Raises:
            MachineError: The backend cannot, or the machine is gone.

        Example:
            >>> vm.link(False)
            >>> vm.wait_until("! grep -qx 1 /sys/class/net/e*/carrier").ok
            True
            >>> vm.link(True)
        """
        if not isinstance(self._instance, Link):
            raise self._lacking("has no network cable to pull")
        self._instance.link(up=bool(up))

    def _lacking(self, what: str) -> MachineError:
        return MachineError(f"the backend {self.backend} {what}", machine=self.name)

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

    def _settle(self) -> None:
        """Has it on its LAN again, after a boot or as another instance."""
        if self._place is not None:
            self._place.settle()

    @property
    def address(self) -> str | None:
        """Its IPv4 address on its private LAN; None if it is on none.

        Example:
            >>> vms["one"].exec(["getent", "hosts", "two"]).stdout.split()[0] == vms["two"].address
            True
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
            >>> vms["two"].impair(delay=0.1)
            >>> vms["one"].exec(["bash", "-c", "exec 3<>/dev/tcp/two/22"]).duration > 0.2
            True
        """
        self._power.check_owner()
        if self._place is None:
            raise MachineError('it is on no private LAN: put network="lan" into its mark', machine=self.name)
        self._place.impair(delay=delay, loss=loss)

    # -- screen and keyboard ---------------------------------------------------------------------------------------------------------

    def screenshot(self, path: str | Path) -> Path:
        r"""Writes what the screen shows to a file on the host, as PNG, and returns its path.

        Raises:
            MachineError: The machine has no display (`display=True` in its mark), its QEMU writes no PNG, or it is gone.
            OSError: The file cannot be written.
            ValueError: The path is empty.

        Example:
            >>> vm.screenshot(tmp_path / "login.png").read_bytes()[:4]
            b'\x89PNG'
        """
        image, dest = self._display().screenshot(), _host_path(path)
        with atomic_file(dest, mode=0o644) as file:
            file.write(image)
        return dest

    def send_keys(self, *keys: str) -> None:
        r"""Presses keys, one argument after the other.

        An argument is the name of a key (`"ret"`, `"f2"`, `"up"`), or names joined by `-` of which the first is a modifier, held
        down together (`"ctrl-alt-f2"`). Anything else is text, typed on a US keyboard, where a newline is the return key. Names
        are QEMU's. To type a word that is a key's name, give its characters one by one: `*"home"`.

        Raises:
            ValueError: A combination has an unknown key in it, or a character is not on that keyboard; then nothing is typed.
            MachineError: The machine has no display (`display=True` in its mark), is paused, or is gone.

        Example:
            >>> vm.send_keys("ctrl-alt-f2", "root\n")
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
        r"""Writes an OpenSSH configuration in which the machine goes by its name, and returns its path.

        With it `ssh`, `scp`, `sftp`, `rsync`, Ansible and what else builds on OpenSSH log in as root, with the machine's own key and only
        if it shows its own host key. All files are private, and go with the machine. It holds for the machine's life, unless another
        program takes its port while it is off: ask again then.

        Raises:
            MachineError: The backend offers no SSH, OpenSSH cannot be given the path of the machine's folder, or the machine is gone.

        Example:
            >>> command = ["ssh", "-F", vm.ssh_config(), vm.name, "uname"]
            >>> subprocess.run(command, check=True, capture_output=True, text=True).stdout
            'Linux\n'
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
        channel = self._power.bulk_channel(deadline)
        if not isinstance(channel, Terminals):
            raise self._lacking("offers no terminals")
        return attach(channel, user=user or self.spec.user, stdin=stdin, stdout=stdout, seconds=deadline.seconds)

    @cached_property
    def host(self) -> Host:
        """The machine as a host of pytest-testinfra, which takes the extra `testinfra`; its commands run as `exec`'s do.

        Raises:
            BackendUnavailable: pytest-testinfra is not installed.

        Example:
            >>> vm.host.service("ssh").is_running
            True
        """
        try:
            from pytest_vmbottle.testinfra import connect  # noqa: PLC0415 - an extra, and it loads much
        except ImportError as error:
            reason = f"vm.host takes pytest-testinfra, which cannot be imported: {error}"
            raise BackendUnavailable(reason, "Install it: pip install 'pytest-vmbottle[testinfra]'") from error
        return connect(self)


def _environment() -> dict[str, str]:
    return {"PATH": GUEST_PATH, "HOME": "/root", "USER": "root", "LOGNAME": "root", "SHELL": "/bin/sh", "LANG": "C.UTF-8"}


_SHELLS = {"sh": ("sh", "-eu", "-c"), "bash": ("bash", "-euo", "pipefail", "-c")}


def _argv(command: str | Sequence[str], shell: str) -> tuple[str, ...]:
    if shell not in _SHELLS:
        raise ValueError(f"shell={shell!r}: takes {' or '.join(map(repr, _SHELLS))}; run another one as a list of words")
    if isinstance(command, str):
        return (*_SHELLS[shell], command)
    if shell != "sh":
        raise ValueError(
            f"shell={shell!r} is for a string, and a list of words runs as it is: leave it out, or write the command as a string"
        )
    return tuple(command)


def _host_path(path: str | Path) -> Path:
    if path == "":
        raise ValueError("an empty path names no file of this computer: write one, such as 'result.txt'")
    return Path(path)


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


class MachineFactory(Protocol):
    """The type of the fixture `vm_factory`, which starts more machines for a test."""

    def __call__(self, source: Source | MachineSpec | Snapshot, **keywords: Unpack[MachineKeywords]) -> Machine:
        """Starts a machine that ends with the test.

        Args:
            source: The name of an image, the path of a disk image, a `Layer`, a spec, or a snapshot.
            keywords: Those of the `vm` mark.

        Raises:
            SpecError: A keyword is unknown or its value makes no sense.
            MachineError: The machine could not be provided.
        """
