"""The machine of a test: commands, files, waits, power and devices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO, TypeVar, Unpack, overload

from pytest_vmbottle.backends.port import Console, Instance, State
from pytest_vmbottle.channels.port import Channel, Command
from pytest_vmbottle.errors import BackendUnavailable, MachineDied, MachineError, SpecError
from pytest_vmbottle.guest import copy as transfer
from pytest_vmbottle.guest import write_files as fileset
from pytest_vmbottle.guest.exclusion import Exclusion
from pytest_vmbottle.guest.path import GuestPath
from pytest_vmbottle.guest.search import Query
from pytest_vmbottle.host import resources as host
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import atomic_file
from pytest_vmbottle.machine import keyboard, openssh
from pytest_vmbottle.machine.clock import Clock
from pytest_vmbottle.machine.disks import new_disk
from pytest_vmbottle.machine.faults import Faults
from pytest_vmbottle.machine.guest_shell import CommandKeywords, GuestShell, words_of
from pytest_vmbottle.machine.instructions import Instructions, count_instructions
from pytest_vmbottle.machine.lan import impairment_of
from pytest_vmbottle.machine.lifecycle import Lifecycle, Relauncher
from pytest_vmbottle.machine.metrics import Meter, Sample
from pytest_vmbottle.machine.process import Process
from pytest_vmbottle.machine.recording import Recording
from pytest_vmbottle.machine.screen_text import read_picture, tty_text
from pytest_vmbottle.machine.terminal import attach
from pytest_vmbottle.machine.units import GuestUnit
from pytest_vmbottle.machine.waits import Wait
from pytest_vmbottle.result import CommandSucceeded, CommandTimeout, Matches, Result
from pytest_vmbottle.shown import redact
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.timeline import Timeline, recorded

if TYPE_CHECKING:
    from testinfra.host import Host

    from pytest_vmbottle.backends.port import Start
    from pytest_vmbottle.machine.snapshot import HasSnapshot, Snapshot
    from pytest_vmbottle.spec import MachineKeywords, Source

__all__ = ["Machine", "MachineFactory"]

_T = TypeVar("_T")
_SPARE = 10.0
"""Extra seconds after which a search is killed if the guest has not ended it."""
_ANSWER = 5.0
"""Seconds for the guest to answer a question about itself."""
_DATE = ("date", "+%s.%N")
_LOGIN_TIME = 60.0
_QMP_TIME = 60.0
_READING = 60.0
_PLUG_TIME = 30.0
"""Seconds for a guest to take or to release a disk; an emulated one takes 0.2 s."""
_MAX_PORT = 65535
_WORD, _WORDS = 4 << 10, 64
"""Characters of a word, and words of a command, that the timeline has."""
_ANSWER_TEXT, _NOTE = 2 << 10, 16 << 10


class Machine:
    """A running machine, with everything a test does to it. It is made by the fixtures and by `vm_factory`, which also end it.

    Attributes:
        name: The test's name for it.
        id: A name that is unique on this host.
        spec: Its `MachineSpec`.
        backend: The name of the backend that runs it.
        console: Its serial console.
        lifecycle: Its current instance and power, for extensions of this package.
        guest: Runner of commands in its guest, for extensions of this package.
        launch_fork: Function that starts another machine from a boot source, and calls a function when that has ended, before this one
            does; None if it was made without.
        end: Function that ends it before the machine that it was forked from; None if it is no fork.
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
        relauncher: Relauncher | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        """Take a running instance whose channel has answered.

        Args:
            instance: The VM as its backend sees it.
            spec: The machine's spec.
            id: A name that is unique on this host.
            backend: The backend's name.
            channel: The channel for commands.
            factor: Factor of all time-outs.
            relauncher: The means to start it again; without it, that is impossible.
            timeline: The record of what happens to it; without it, nothing is recorded.
        """
        self.name = spec.name
        self.id = id
        self.spec = spec
        self.backend = backend
        self.lifecycle = Lifecycle(instance, channel, spec=spec, factor=factor, relauncher=relauncher, timeline=timeline)
        self.guest = GuestShell(self.lifecycle, spec, factor=factor)
        # Not the instance's own console: a start or a restore replaces the instance, but the recording goes on in the same file, and
        # somebody who follows it must not be told of an end in between.
        self.console: Console = instance.console.until(lambda: self.lifecycle.is_silent)
        self._factor = factor
        self.launch_fork: Callable[[MachineSpec, Start, Callable[[], object]], Machine] | None = None
        self.end: Callable[[], None] | None = None
        self._forks = 0
        # Made on first use: most tests measure nothing.
        self._meter: Meter | None = None

    @property
    def _timeline(self) -> Timeline:
        return self.lifecycle.timeline

    @property
    def pid(self) -> int:
        """The hypervisor's process id on the host.

        `start` and `restore` change it.

        Raises:
            MachineError: The machine is off.

        Example:
            >>> Path(f"/proc/{vm.pid}").is_dir()
            True
        """
        return self.lifecycle.pid

    @property
    def panic(self) -> str | None:
        """The last panic message of the guest's kernel, if any.

        It is the line that reports a panic, a bug of the kernel (an oops), or a hung task.

        None if there was no such line since the last boot or restore, or if the backend does not report panics. After a panic every call
        raises `GuestPanic`, unless the mark says `panic="expected"`.

        Example:
            >>> vm.panic is None
            True
        """
        return self.lifecycle.panic

    @property
    def state(self) -> State:
        """The machine's state: `"running"`, `"paused"`, `"off"` or `"died"`.

        It has died if its kernel panicked or its hypervisor failed.

        Example:
            >>> vm.state
            <State.RUNNING: 'running'>
        """
        return self.lifecycle.state

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
        tty: bool = False,
    ) -> Result:
        """Run a command in the guest and wait for its end.

        Args:
            command: A list of words runs as it is; a string is a script for `sh -eu -c`, where a pipe has its last command's status.
            check: Whether to raise `CommandFailed` for a status other than 0.
            timeout: Seconds after which the command and everything it started is killed.
            env: Environment variables besides the standard ones and those of the spec.
            cwd: The working directory; `/` by default.
            user: The user who runs it; the spec's user by default.
            input: The content of its standard input.
            stream: Function that is called with each line of both streams as it comes, with its end and with control characters made
                visible. An exception from it ends the command.
            shell: `"bash"` runs a string by `bash -euo pipefail -c`, so that a pipe fails if any of its commands fails; the guest must have
                bash.
            tty: Whether it runs on a terminal of its own, of 80 columns: for programs that behave otherwise there. Both streams are in
                `stdout` then, with the terminal's line ends and the echo of `input`, which is typed and not ended. It goes over SSH.

        Raises:
            CommandFailed: The status was not 0.
            CommandTimeout: The command took too long; the error's `result` has its output so far.
            MachineError: The guest is gone.
            ValueError: A word has a NUL byte in it or is not text, the command is longer than Linux accepts, there is no such shell, or
                `stream` is given together with `tty`.

        Example:
            >>> vm.exec(["uname", "-s"]).stdout.strip()
            'Linux'
            >>> vm.exec("test -e /nothing", check=False).returncode
            1
            >>> vm.exec("cat /nothing | wc -l", shell="bash", check=False).returncode
            1
        """
        if tty and stream is not None:
            raise ValueError("tty=True has no streams of lines: leave out stream=")
        # Before the span: a command that cannot be given to Linux is the caller's mistake, and no event of the machine.
        argv = words_of(command, shell)
        prepared = self.guest.command(argv, env=env, cwd=cwd, user=user, content=input)
        with self._timeline.span("command", **_told(argv, env, cwd, user or self.spec.user)) as event:
            deadline = Deadline(timeout * self._factor)
            result = self.guest.run_on_terminal(argv, prepared, deadline) if tty else self.guest.run(argv, prepared, deadline, stream)
            event.finish(result)
        # After the span, whose event has the status already: whether that is an error is up to the caller.
        return result.check() if check else result

    def fail(self, command: str | Sequence[str], **keywords: Unpack[CommandKeywords]) -> Result:
        r"""Run a command in the guest that has to fail, and return its result.

        Any status other than 0 counts, also that of a program that does not exist (127).

        Args:
            command: As for `exec`.
            keywords: `timeout`, `env`, `cwd`, `user`, `input`, `stream`, `shell` and `tty`, as for `exec`.

        Raises:
            CommandSucceeded: The status was 0.
            CommandTimeout: As for `exec`.
            MachineError: The guest is gone.
            ValueError: As for `exec`.

        Example:
            >>> vm.fail(["cat", "/nothing"]).stderr
            'cat: /nothing: No such file or directory\n'
        """
        result = self.exec(command, check=False, **keywords)
        if result.ok:
            raise CommandSucceeded(result)
        return result

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
        """Start a command in the guest and return while it runs.

        It ends with the machine at the latest.

        Args:
            command: As for `exec`.
            env: As for `exec`.
            cwd: As for `exec`.
            user: As for `exec`.
            input: The whole content of its standard input; without it, the input stays open for `Process.stdin`.
            shell: As for `exec`.

        Raises:
            MachineError: The guest is gone, or the backend runs no commands in the background.
            ValueError: As for `exec`.

        Example:
            >>> server = vm.spawn(["python3", "-um", "http.server"])
            >>> vm.wait_for_port(8000)
            >>> server.kill("TERM")
            >>> server.wait(timeout=30)
            -15
        """
        argv = words_of(command, shell)
        prepared = self.guest.command(argv, env=env, cwd=cwd, user=user, content=input)
        # The event covers the start only. The end of the command is an event of its own kind (`exit`).
        with self._timeline.span("spawn", **_told(argv, env, cwd, user or self.spec.user)):
            process = self.guest.spawn(argv, prepared)
        # Without data the channel leaves the input open for `Process.stdin`, but an empty input was asked for.
        if input is not None and not prepared.input:
            process.stdin.close()
        return process

    def count_instructions(self) -> AbstractContextManager[Instructions]:
        """Count the instructions that the commands of a `with` block take in the guest, with all that they start.

        The machine needs `cpu_clock="instructions"` in its mark. The count hardly depends on the host, its load, or what else the guest
        does, so that a small difference is one of the software; see docs/instructions.md.

        Returns:
            A context manager that gives an `Instructions`, whose `total` is known at the end of the block.

        Raises:
            MachineError: The machine's clocks follow those of the host, or its guest has no control groups of version 2.

        Example:
            >>> with vm.count_instructions() as count:
            ...     _ = vm.exec(["sort", "/etc/passwd"])
            >>> count.total > 100_000
            True
        """
        if self.spec.cpu_clock != "instructions":
            raise MachineError('its instructions are not counted: write cpu_clock="instructions" in the mark', machine=self.name)
        return count_instructions(self.guest)

    # -- files -----------------------------------------------------------------------------------------------------------------------

    def path(self, path: str | PurePosixPath) -> GuestPath:
        """Return an absolute path in the guest.

        Example:
            >>> vm.path("/etc") / "passwd"
            GuestPath('/etc/passwd')
        """
        return GuestPath(path, shell=self.guest)

    @recorded("copy")
    def write_files(
        self,
        files: Mapping[str, fileset.File] | Mapping[GuestPath, fileset.File],
        *,
        clean: bool = False,
        mode: int | None = None,
        owner: str | int | None = None,
    ) -> None:
        r"""Write many files by one command, each as `GuestPath.write_bytes` does.

        The folders above them are created.

        All files are in the guest before the first gets its final name. So a full disk, a folder of the same name, or a folder that may not
        be written leaves everything as it was.

        Args:
            files: Text, bytes, or a file of the host, by absolute path in the guest. A tuple of content and permission bits sets the mode
                of one file.
            clean: Whether to empty the folders of these files beforehand: each folder that directly contains one of them, with everything
                below it except other file systems. Folders that a guest needs, such as `/`, `/etc`, `/var/lib` or anything in `/usr/bin`,
                are refused.
            mode: Permission bits of all other files; by default those of `GuestPath.write_bytes`, and executable if the file of the host
                is.
            owner: Owner of the files and of the folders that are created.

        Raises:
            FileNotFoundError: A file of the host does not exist.
            OSError: A file could not be written: `filename` says which, `errno` why.
            LookupError: There is no such owner.
            ValueError: A path is relative or has `..` in it, two paths contradict each other, permission bits are invalid, or `clean` is
                refused.

        Example:
            >>> vm.write_files({"/srv/app/run.sh": ("exec true\n", 0o755), "/srv/app/conf/app.ini": b"[app]\n"}, owner="nobody")
            >>> vm.path("/srv/app/conf").owner()
            'nobody'
        """
        placed = {self.path(str(path)): content for path, content in files.items()}
        # `/srv/a` and `/srv//a` are two keys, but one file.
        if len(placed) < len(files):
            raise ValueError("two of the paths name the same file")
        fileset.write_files(self.guest, placed, clean=clean, mode=mode, owner=owner)

    @recorded("copy")
    def cp(self, src: str | Path | GuestPath, dst: str | Path | GuestPath, *, exclude: str | Iterable[str] = ()) -> None:
        """Copy a file or a tree to the guest or from it.

        Modes, times, symbolic links and holes are kept. Sockets and FIFOs in a tree are left out, and the logger `pytest_vmbottle` warns of
        that.

        If the destination is a folder, the copy goes into it, as with `cp -r`. A slash at the end of the source means the contents of the
        folder, as with rsync: they go into the destination, which is made if need be. The copy gets its final name when it is complete.
        From 1 MiB on the data goes over a disk that is plugged in for the copy. The logger `pytest_vmbottle` reports the progress of a long
        copy every 5 s.

        Args:
            src: The source. Only a string, here or in `path`, can have a slash at its end.
            dst: The destination. Exactly one of the two is a `GuestPath`.
            exclude: Patterns of what is left out of a tree: names at any depth, such as `"*.pyc"`, and paths below the source, such as
                `"build/*.o"`. A folder is left out with all that is in it.

        Nothing is copied if a side is an empty string, which is the value of a variable that was not set.

        Raises:
            FileNotFoundError: The source, or the destination's folder, does not exist.
            NotADirectoryError: The source has a slash at its end and is no folder.
            PermissionError: A file may not be read or written.
            TransferError: The copy broke off, or the guest sent content that must not be written on the host.
            MachineError: The guest was lost, or did not answer in time.
            TypeError: Both sides are on the host, or both in a guest.
            ValueError: A pattern is empty or absolute, or has `..` in it.

        Example:
            >>> vm.cp(vm.path("/etc/ssh"), tmp_path)
            >>> (tmp_path / "ssh" / "sshd_config").is_file()
            True
            >>> vm.cp(tmp_path / "ssh", vm.path("/root"), exclude=["*_key", "*.pub"])
            >>> vm.cp(f"{tmp_path}/ssh/", vm.path("/root/config"))
            >>> vm.path("/root/config/sshd_config").is_file()
            True
        """
        excluded = Exclusion.of(exclude)
        if "" in (src, dst):
            return  # as a path of this computer it would be the current folder
        if isinstance(dst, GuestPath) and not isinstance(src, GuestPath):
            transfer.copy_in(Path(src), dst, excluded, contents=str(src).endswith("/") and bool(Path(src).name))
        elif isinstance(src, GuestPath) and not isinstance(dst, GuestPath):
            transfer.copy_out(src, Path(dst), excluded)
        else:
            raise TypeError("exactly one side of a copy is in the guest: write it as vm.path('/...')")

    @recorded("search")
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
        """Search the guest's files for a pattern, with GNU grep.

        It searches one file, or all files below a folder, and returns the lines that match.

        Binary files, devices and unreadable files are left out, and symbolic links below the folder are not followed.

        Args:
            pattern: Literal text, without a newline.
            root: The file or folder.
            regex: Whether the pattern is an extended regular expression (`grep -E`) instead of literal text.
            ignore_case: Whether to ignore the case of letters.
            include: Globs: only files whose name matches one of them are read.
            exclude_dirs: Globs: folders whose name matches one of them are left out.
            max_results: Maximum number of matches to return; if there were more, the result's `truncated` is true.
            timeout: Seconds after which the search ends with the matches so far, and the result's `timed_out` is true.

        Raises:
            FileNotFoundError, PermissionError: There is no such root, or it may not be read.
            ValueError: The pattern is not a regular expression, or has a NUL byte or a newline in it.
            OSError: The guest's grep is not GNU grep.
            MachineError: The guest is gone.

        Example:
            >>> found = vm.search("root", "/etc", include="pass*d")
            >>> str(found[0].path), found[0].line
            ('/etc/passwd', 1)
        """
        # It refuses a pattern with a newline before anything is sent: grep would take that for two patterns.
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
            # The guest ends the search itself and returns its matches so far; the kill is for a guest that does not.
            result = self.exec(query.argv(seconds=timeout * self._factor), check=False, timeout=timeout + _SPARE, env=query.env)
        except CommandTimeout as late:
            return query.matches(late.result, timed_out=True)
        return query.matches(result)

    @recorded("copy")
    def archive(
        self,
        root: str | PurePosixPath | GuestPath,
        dest: str | Path,
        format: str = "tar.gz",  # noqa: A002 - shutil's word
        *,
        exclude: str | Iterable[str] = (),
    ) -> Path:
        """Pack a folder of the guest into a file of the host, and return its path.

        In the archive everything is below the folder's name, sorted by name, and belongs to root: equal folders give equal archives.
        Content that `cp` refuses from a guest is refused here too.

        Args:
            root: The folder.
            dest: The file, which appears when it is complete.
            format: `"tar.gz"` or `"zip"`.
            exclude: Patterns of what is left out, as for `cp`.

        Raises:
            FileNotFoundError, NotADirectoryError: The folder does not exist in the guest, or the file's folder does not exist on the host.
            IsADirectoryError: The file on the host is a folder.
            TransferError: The copy broke off, or the guest sent content that must not be packed.
            ValueError: There is no such format, a pattern is invalid, or a path is empty.

        Example:
            >>> vm.archive("/etc/ssh", tmp_path / "ssh.zip", format="zip").name
            'ssh.zip'
        """
        source = root if isinstance(root, GuestPath) else self.path(root)
        return transfer.pack_out(source, _host_path(dest), format, Exclusion.of(exclude))

    # -- units and waiting -----------------------------------------------------------------------------------------------------------

    def _wait(self, timeout: float, user: str | None = None) -> Wait:
        deadline = Deadline(timeout * self._factor)
        # The deadline begins here, once for the whole wait: a slow answer of the guest costs time of it too.
        return Wait(
            machine=self.name,
            console=self.console,
            alive=self.lifecycle.alive,
            run=partial(self.guest.ask, user=user),
            deadline=deadline,
            # Asked only by a wait that failed. What a unit did before the machine was cloned explains nothing.
            age=lambda: host.age(self.pid),
            record=lambda seen: self._timeline.note("answer", text=seen[:_ANSWER_TEXT]) if seen else None,
        )

    def unit(self, name: str, *, user: str | None = None) -> GuestUnit:
        """Return a systemd unit of the guest, with its state and properties; it can be started and stopped.

        Args:
            name: Its name.
            user: The user whose unit it is; by default it is one of the system.

        Example:
            >>> vm.unit("ssh").state
            'active'
            >>> vm.unit("ssh").property("Restart")
            'on-failure'
        """
        return GuestUnit(name, self.exec, user=user)

    @overload
    def wait_until(self, check: str | Sequence[str], *, timeout: float = 60, every: float = 0.25) -> Result: ...

    @overload
    def wait_until(self, check: Callable[[], _T | None], *, timeout: float = 60, every: float = 0.25) -> _T: ...

    @recorded("wait")
    def wait_until(self, check: str | Sequence[str] | Callable[[], _T | None], *, timeout: float = 60, every: float = 0.25) -> _T | Result:
        """Wait until a command succeeds or a function returns something true, and return its result.

        Args:
            check: A command as for `exec`, or a function without arguments.
            timeout: Seconds to wait at most.
            every: Seconds between two attempts, at most.

        Raises:
            MachineTimeout: The condition did not come true; the message has the last answer and the console's last lines.
            MachineDied: The machine is gone.

        Example:
            >>> vm.wait_until("systemctl is-system-running --quiet || test -d /run/systemd").ok
            True
        """
        wait = self._wait(timeout)
        return wait.condition(check, every=every) if callable(check) else wait.command(check, every=every)

    @recorded("wait")
    def wait_for_unit(self, unit: str, *, user: str | None = None, finished: bool = False, timeout: float = 60) -> None:
        """Wait until a systemd unit is active.

        Args:
            unit: Its name.
            user: The user whose unit it is; by default it is one of the system.
            finished: Whether it has to have run and to be over, without a failure, in place of being active: for a unit that runs once,
                such as a service with `Type=oneshot`.
            timeout: Seconds to wait at most.

        Raises:
            MachineError: The unit failed, does not exist, or is inactive with no job queued to start it. Raised at once, with its last
                journal lines.
            MachineTimeout: The unit was not active, or not over, in time.

        Example:
            >>> vm.wait_for_unit("ssh.service")
            >>> vm.wait_for_unit("systemd-tmpfiles-setup.service", finished=True)
        """
        self._wait(timeout, user).unit(unit, of_user=user is not None, finished=finished)

    @recorded("wait")
    def wait_for_port(
        self, port: int, *, address: str | None = None, closed: bool = False, forwarded: bool = False, timeout: float = 60
    ) -> None:
        """Wait until something in the guest listens on a TCP port.

        Args:
            port: The port's number.
            address: A name or an address that the guest has to reach the port at: one of its own, or another machine's. By default the
                port is the guest's, at any address.
            closed: Whether to wait for the opposite: until nothing listens there, or it is reached no more.
            forwarded: Whether a connection from the host must reach it too, which the guest's own loopback address and its firewall do not
                let through. `forward` gives the address to connect to.
            timeout: Seconds to wait at most.

        Raises:
            MachineTimeout: Nothing listened in time, or something still did.
            MachineError: The guest has no program to connect with; only with `address`.
            ValueError: `forwarded` is given together with `address` or `closed`.

        Example:
            >>> vm.wait_for_port(22, forwarded=True)
            >>> vm.wait_for_port(22, address="localhost")
            >>> vm.wait_for_port(23, closed=True)
        """
        if forwarded and (closed or address is not None):
            raise ValueError("forwarded=True waits for a connection from the host: give it without address= and closed=")
        wait = self._wait(timeout)
        if forwarded:
            wait.forwarded_port(port, self.forward(port))
        elif address is not None:
            wait.port_of(address, port, closed=closed)
        else:
            wait.port(port, closed=closed)

    @recorded("wait")
    def wait_for_socket(self, path: str | PurePosixPath | GuestPath, *, timeout: float = 60) -> None:
        """Wait until something in the guest listens on a unix socket.

        A socket for datagrams needs to be there only. The file of a socket alone does not count: it may be one that a program has left.

        Args:
            path: Its path, or `@` and the name of an abstract one.
            timeout: Seconds to wait at most.

        Raises:
            MachineTimeout: Nothing listened in time.

        Example:
            >>> vm.wait_for_socket("/run/systemd/private")
        """
        self._wait(timeout).socket(str(path))

    @recorded("wait")
    def wait_for_file(self, path: str | PurePosixPath | GuestPath, *, timeout: float = 60) -> GuestPath:
        """Wait until a file or folder exists in the guest, and return its path.

        Raises:
            MachineTimeout: The path did not exist in time.

        Example:
            >>> vm.wait_for_file("/etc/hostname").is_file()
            True
        """
        return self._wait(timeout).file(path if isinstance(path, GuestPath) else self.path(path))

    @recorded("wait")
    def wait_for_console(self, pattern: str | re.Pattern[str], *, timeout: float = 60) -> re.Match[str]:
        """Wait until the serial console's output matches a pattern, and return the match.

        Earlier output counts too. Each call searches from the end of the match before it, so that the same words can be awaited again. The
        pattern is matched against `console.text`, in which control characters are made visible.

        Args:
            pattern: Text, or a compiled regular expression.
            timeout: Seconds to wait at most.

        Raises:
            MachineTimeout: There was no match in time.

        Example:
            >>> _ = vm.exec("echo ready at last > /dev/ttyS0")
            >>> vm.wait_for_console(re.compile("ready at ([a-z]+)"))[1]
            'last'
        """
        return self._wait(timeout).output(pattern)

    @recorded("wait")
    def wait_for_tty_text(self, pattern: str | re.Pattern[str], *, number: int = 1, timeout: float = 60) -> re.Match[str]:
        """Wait until what a virtual terminal shows matches a pattern, and return the match (see `tty_text`).

        Args:
            pattern: Text, or a compiled regular expression.
            number: The number of the terminal.
            timeout: Seconds to wait at most.

        Raises:
            MachineTimeout: There was no match in time.
            MachineError: The guest has no such terminal.

        Example:
            >>> _ = vm.exec("echo ready at last > /dev/tty1")
            >>> vm.wait_for_tty_text("ready at last")[0]
            'ready at last'
        """
        return self._wait(timeout, "root").tty(number, pattern)

    @recorded("wait")
    def wait_for_screen_text(self, pattern: str | re.Pattern[str], *, timeout: float = 60) -> re.Match[str]:
        """Wait until the text on the machine's screen matches a pattern, and return the match (see `screen_text`).

        Args:
            pattern: Text, or a compiled regular expression.
            timeout: Seconds to wait at most.

        Raises:
            MachineTimeout: There was no match in time.
            MachineError: As for `screen_text`.
            BackendUnavailable: As for `screen_text`.

        Example:
            >>> _ = vm.exec("echo everything is ready > /dev/tty1")
            >>> vm.wait_for_screen_text("everything is ready")[0]
            'everything is ready'
        """
        return self._wait(timeout).screen(self._read_screen, pattern)

    @recorded("wait")
    def wait_for_shutdown(self, *, timeout: float = 60) -> None:
        """Wait until the guest has powered off.

        Raises:
            MachineTimeout: It did not in time.
            MachineDied: It ended in another way.

        Example:
            >>> _ = vm.exec("systemctl poweroff --no-block")
            >>> vm.wait_for_shutdown()
        """
        # A machine that was retired has no instance left to be waited for, which would be an error.
        if self.state is State.OFF:
            return
        self._wait(timeout).shutdown(self.lifecycle.instance)

    # -- measuring -------------------------------------------------------------------------------------------------------------------

    def metrics(self) -> Sample:
        """Measure the machine now.

        The sample has the host's figures and, in `guest`, the guest's.

        Processor time is measured between two calls, so the first sample has none.

        Raises:
            MachineDied: The machine's process has ended.
            MachineError: The machine is off.

        Example:
            >>> before = vm.metrics()
            >>> _ = vm.exec("dd if=/dev/zero of=/root/zeros bs=1M count=64 conv=fsync")
            >>> vm.metrics().guest.disk_write_bytes - before.guest.disk_write_bytes >= 64 << 20
            True
        """
        # Kept between calls, because processor time is measured from one to the next; another process starts from zero.
        if self._meter is None or self._meter.pid != self.lifecycle.instance.pid:
            self._meter = self._new_meter()
        sample = self._meter.sample()
        if sample is None:
            raise MachineDied(f"process {self._meter.pid} has ended and cannot be measured any more", machine=self.name)
        return sample

    def record(self, every: float = 0.5, *, guest_every: float | None = None) -> Recording:
        """Sample the machine in the background for a `with` block.

        Args:
            every: Seconds between two samples of the host's figures.
            guest_every: Seconds between two questions to the guest, each of which has it run `cat`. By default the interval grows with the
                time that the guest takes to answer, so that answering takes 0.5 % of its time, but it is at most 10 s.

        Raises:
            ValueError: A number of seconds is not above 0.
            MachineError: The machine is off.

        Example:
            >>> with vm.record(every=0.1) as recording:
            ...     _ = vm.exec("dd if=/dev/zero of=/dev/null bs=1M count=64")
            >>> recording.summary["rss_bytes"].max > 0
            True
        """
        # A meter of its own: samples in between would otherwise shorten the intervals of `metrics`.
        return Recording(self._new_meter(), every=every, guest_every=guest_every)

    def _new_meter(self) -> Meter:
        # The channel is looked up for each question: a reboot replaces it, while the process stays the same.
        def ask(question: Command) -> bytes:
            return self.lifecycle.channel.run(question, deadline=Deadline(_ANSWER * self._factor)).stdout

        return Meter(self.lifecycle.instance.pid, ask)

    # -- evidence --------------------------------------------------------------------------------------------------------------------

    def journal(self, unit: str | None = None, *, since: str | float | None = None, lines: int | None = None) -> str:
        """Return the guest's journal of this boot, with a time and a name in each line.

        Args:
            unit: The unit whose messages are wanted; by default all.
            since: Only later messages: seconds since 1970, or a time as `journalctl --since` takes it, such as `"-5min"`.
            lines: Only the last lines, so many.

        Raises:
            CommandFailed: The guest has no journal, or `since` is not a time.
            MachineError: The guest is gone.

        Example:
            >>> "systemd" in vm.journal("ssh.service", lines=5)
            True
        """
        # `--boot`, because the journal of an image or a pack has the boots before it, too. As root, because others see only their own
        # messages. journalctl takes `@` for seconds since 1970 (systemd.time(7)).
        argv = ["journalctl", "--no-pager", "--quiet", "--boot", "--output=short-iso"]
        argv += [] if unit is None else [f"--unit={unit}"]
        argv += [] if since is None else [f"--since={since if isinstance(since, str) else f'@{since:.0f}'}"]
        argv += [] if lines is None else [f"--lines={lines:d}"]
        return self.exec(argv, user="root").stdout

    def note(self, text: str) -> None:
        """Add a remark to the machine's timeline, which the report of a failed test shows.

        Example:
            >>> vm.note("upgraded")
        """
        self._timeline.note("note", text=text[:_NOTE])

    def redact(self, value: str) -> None:
        """Hide a value, such as a password, in everything that this process shows or records from now on.

        It is replaced by `[redacted]` in timelines, artifacts, errors and reports; the test itself still gets it. Of a value of several
        lines each line is hidden too.

        Raises:
            ValueError: The value has fewer than four characters.

        Example:
            >>> vm.redact("correct horse")
            >>> "horse" in repr(vm.exec(["echo", "correct horse"]))
            False
        """
        redact(value)

    # -- power and time --------------------------------------------------------------------------------------------------------------

    @recorded("power")
    def reboot(self, *, timeout: float | None = None) -> None:
        """Reboot the guest in order, and return when it is ready again.

        Its boot id proves that it is another boot.

        Args:
            timeout: Seconds for the whole reboot; by default the spec's time for a boot.

        Raises:
            MachineTimeout: The guest was not ready in time.
            MachineDied: The guest panicked, or powered off instead.
            MachineError: The machine is off.

        Example:
            >>> boot = vm.path("/proc/sys/kernel/random/boot_id").read_text()
            >>> vm.reboot()
            >>> vm.path("/proc/sys/kernel/random/boot_id").read_text() == boot
            False
        """
        self.lifecycle.reboot(self._deadline(timeout))

    @recorded("power")
    def poweroff(self, *, timeout: float = 90) -> None:
        """Shut the guest down in order, and return when the machine is off.

        Afterwards everything but `start`, `restore` and `state` raises an error that says so.

        Args:
            timeout: Seconds until the machine has to be off.

        Raises:
            MachineTimeout: The machine was not off in time. It may still be shutting down; `power_cut` ends it.
            MachineError: The machine is off already.

        Example:
            >>> vm.poweroff()
            >>> vm.state
            <State.OFF: 'off'>
        """
        self.lifecycle.off(Deadline(timeout * self._factor))

    @recorded("power")
    def start(self, *, timeout: float | None = None) -> None:
        """Boot a machine that is off or died, from its own disk as it was left.

        Returns when the guest is ready.

        Args:
            timeout: Seconds for the boot; by default the spec's.

        Raises:
            MachineTimeout: The guest was not ready in time, and the machine is off again.
            MachineError: The machine is on.

        Example:
            >>> vm.power_cut()
            >>> vm.start()
            >>> vm.exec(["true"]).ok
            True
        """
        self.lifecycle.start(self._deadline(timeout))

    @recorded("power")
    def power_cut(self, lose: Literal["unflushed", "torn"] | None = None) -> None:
        """Cut the power: the machine is off at once.

        What the guest still had in its own memory is lost (`sync` writes it out). What it had given to its disks stays, unless `lose` says
        otherwise.

        Args:
            lose: `"unflushed"` takes from the tracked disks all that they had not been told to flush, as real disks lose what is in their
                caches; `"torn"` leaves of that the first half of the first write. Tracked are the disks of `disks=`, and the root disk with
                `track_writes=True` in the mark.

        Raises:
            MachineError: The machine is off already, or no disk is tracked.

        Example:
            >>> vm.power_cut()
            >>> vm.state
            <State.OFF: 'off'>
        """
        self.lifecycle.cut(lose)

    @recorded("power")
    def pause(self) -> None:
        """Pause the processors.

        Until `resume` no command can be run, and the guest's clock stands still.

        Raises:
            MachineError: The machine is off.

        Example:
            >>> vm.pause()
            >>> vm.state
            <State.PAUSED: 'paused'>
        """
        self.lifecycle.pause()

    @recorded("power")
    def resume(self) -> None:
        """Resume the processors.

        The guest's clock is behind by the length of the pause.

        Raises:
            MachineError: The machine is off.

        Example:
            >>> vm.pause()
            >>> vm.resume()
            >>> vm.exec(["true"]).ok
            True
        """
        self.lifecycle.resume()

    @recorded("snapshot")
    def snapshot(self, name: str) -> Snapshot:
        """Save a snapshot of the running machine, RAM and disk.

        The machine is paused for about a second.

        Args:
            name: The snapshot's name, for people.

        Returns:
            The snapshot, for `restore`, or for `vm_factory` as a source. Its files, in `path`, are deleted with the machine.

        Raises:
            CatalogError: There was not enough space on the disk. The machine goes on, and nothing is left of the snapshot.
            MachineError: The machine is off or paused, or its guest has no Python 3, which sets clock and entropy right after a restore.

        Example:
            >>> before = vm.snapshot("before")
            >>> vm.path("/srv").rmtree()
            >>> vm.restore(before)
            >>> vm.path("/srv").is_dir()
            True
        """
        return self.lifecycle.snapshot(name)

    @overload
    def fork(self, name: str | None = None) -> Machine: ...

    @overload
    def fork(self, name: int) -> tuple[Machine, ...]: ...

    @recorded("snapshot")
    def fork(self, name: str | int | None = None) -> Machine | tuple[Machine, ...]:
        """Start a second machine that is as this one is now, RAM, disks and processes; both go on from here.

        A fork costs this machine a pause of some hundredths of a second. It has the memory of the pack in common with it, and ends when
        this machine does, at the latest. It has other ports on the host. A fork of a machine on private LANs is not on them: `join_lan`
        connects it, under a name and an address of its own.

        Args:
            name: The fork's name; by default this machine's, with a number. Or how many forks are wanted: all of them begin at the same
                moment.

        Returns:
            The fork; or as many as were asked for.

        Raises:
            SpecError: It is not a name, or no number from 1 on.
            MachineError: The machine is off or paused, or its guest has no Python 3, which sets clock and entropy right in the fork.

        Example:
            >>> vm.path("/tmp/step").write_text("1")
            1
            >>> other = vm.fork()
            >>> other.path("/tmp/step").write_text("2")
            1
            >>> vm.path("/tmp/step").read_text(), other.path("/tmp/step").read_text()
            ('1', '2')
        """
        if not isinstance(name, int):
            return self._forked(name)[0]
        if isinstance(name, bool) or name < 1:
            raise SpecError(f"fork({name!r}): takes a name, or how many forks are wanted")
        return self._forked(*[None] * name)

    def _forked(self, *names: str | None) -> tuple[Machine, ...]:
        if self.launch_fork is None:
            raise MachineError(f"the machine {self.name} cannot be forked: it was made without a way to do that", machine=self.name)
        # Before anything is written: a wrong name costs no time.
        specs = [self.spec.but(name=name or f"{self.name}-{number}") for number, name in enumerate(names, self._forks + 1)]
        self._forks += len(specs)
        with self.lifecycle.written("fork") as start:
            ended = Lifecycle.last_of(len(specs), start)
            return tuple(self.launch_fork(spec, start, ended) for spec in specs)

    def discard(self) -> None:
        """End a fork, with what was forked from it, before the machine that it was forked from; its memory and its disk are free then.

        Raises:
            MachineError: It is no fork.

        Example:
            >>> other = vm.fork()
            >>> other.discard()
        """
        if self.end is None:
            raise MachineError(f"the machine {self.name} is no fork: it ends with its test", machine=self.name)
        self.end()

    @recorded("network")
    def join_lan(self) -> str:
        """Connect a fork to the private LANs of the machine that it was forked from; return its address on the first of them.

        Raises:
            MachineError: It is connected, or has no LAN.
        """
        if self.lifecycle.join is None:
            has = "is on its private LAN" if self.lifecycle.places else 'has no private LAN: write network="lan" in its mark'
            raise MachineError(f"the machine {self.name} {has}", machine=self.name)
        self.lifecycle.join()
        return str(self.address)

    @recorded("snapshot")
    def restore(self, snapshot: Snapshot | None = None) -> None:
        """Restore the machine to a snapshot: memory, disk and processes.

        It can be restored any number of times. The guest's clock is set right.

        The machine may be off, paused or have died. Forwarded ports stay the same.

        Args:
            snapshot: The value that `snapshot` returned; by default, the state in which the test got the machine.

        Raises:
            CatalogError: The snapshot was deleted with the machine that it was made of.
            SpecError: The snapshot is of a machine with other processors or memory.
            MachineError: The restore failed, and the machine is off.

        Example:
            >>> vm.path("/srv").rmtree()
            >>> vm.restore()
            >>> vm.path("/srv").is_dir()
            True
        """
        self.lifecycle.restore(snapshot)

    def _deadline(self, timeout: float | None) -> Deadline | None:
        return None if timeout is None else Deadline(timeout * self._factor)

    # -- the host's side -------------------------------------------------------------------------------------------------------------

    @recorded("network")
    def forward(self, port: int) -> tuple[str, int]:
        """Forward a TCP port of the guest, and return the host's address and port for it.

        Only this host can connect to it.

        The guest is not asked: if nothing listens there, a connection is closed at once.

        Raises:
            ValueError: It is not a port number.
            MachineError: The backend does not forward ports, or the machine is gone.

        Example:
            >>> with socket.create_connection(vm.forward(22), timeout=60) as connection:
            ...     connection.recv(4)
            b'SSH-'
        """
        # `bool` is a subclass of `int`, so `isinstance` would let True pass for port 1.
        if type(port) is not int or not 0 < port <= _MAX_PORT:
            raise ValueError(f"port={port!r}: takes the number of a TCP port in the guest, from 1 to {_MAX_PORT}")
        return self.lifecycle.instance.forward(port)

    @recorded("network")
    def link(self, up: bool, *, lan: str | None = None) -> None:  # noqa: FBT001 - the only thing there is to say
        """Plug the machine's network cable in, or pull it out.

        The guest sees that its card has no carrier.

        If the machine is on a private LAN, it is the cable to that LAN, and everything else goes on as before. Otherwise it is its only
        cable.
        Without that nothing from outside gets an answer: forwarded ports, `ssh_config`, and what goes over SSH. Commands and shells do not
        where the guest has Python and the QEMU guest agent, as `debian-12` does.

        Args:
            up: Whether it is plugged in.
            lan: The LAN, if the machine is on several.

        Raises:
            MachineError: The backend has no cable to pull, or the machine is gone.
            ValueError: The machine is on several LANs and it is not said which, or it is on others.

        Example:
            >>> vm.link(False)
            >>> vm.wait_until("! grep -qx 1 /sys/class/net/e*/carrier").ok
            True
            >>> vm.link(True)
        """
        mac = self.lifecycle.place(lan).mac if lan is not None or self.lifecycle.places else None
        self.lifecycle.instance.link(up=bool(up), mac=mac)

    # -- private LANs ----------------------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str | None:
        """The machine's IPv4 address on its private LAN, or on the first of several; None if it is on none.

        Example:
            >>> vms["one"].exec(["getent", "hosts", "two"]).stdout.split()[0] == vms["two"].address
            True
        """
        return next(iter(self.addresses.values()), None)

    @property
    def addresses(self) -> Mapping[str, str]:
        """The machine's IPv4 addresses on its private LANs, by the names of these.

        Example:
            >>> vms["one"].addresses
            {'lan': '10.77.0.1'}
        """
        return {place.lan: place.address for place in self.lifecycle.places}

    @recorded("network")
    def impair(self, *, delay: float = 0.0, loss: float = 0.0, lan: str | None = None) -> None:
        """Set delay and loss of the machine's cable to its private LAN.

        They hold from now on, in both directions; `impair()` removes them. `faults.network` has more of the kind.

        Args:
            delay: Seconds by which each frame is delayed, up to 60; a round trip takes twice that longer.
            loss: Probability that a frame is lost, from 0 to 1.
            lan: The LAN, if the machine is on several.

        Raises:
            MachineError: The machine is on no LAN.
            ValueError: The delay or the loss is out of range, or the LAN is not said or another one.

        Example:
            >>> vms["two"].impair(delay=0.1)
            >>> vms["one"].exec(["bash", "-c", "exec 3<>/dev/tcp/two/22"]).duration > 0.2
            True
        """
        self.lifecycle.place(lan).impair(impairment_of(delay=delay, loss=loss))

    # -- disks -----------------------------------------------------------------------------------------------------------------------

    @recorded("power")
    def plug_disk(self, name: str, source: int | str | Path) -> None:
        """Plug in one more disk, and return when the guest has it: `/dev/disk/by-id/virtio-NAME`.

        It stays when the machine is rebooted or off, and is in its snapshots.

        Args:
            name: Its serial number: a letter, then at most 19 letters, digits, `-` or `_`.
            source: As for `disks` in the mark: the size of an empty disk, or the path of a disk image, which is not written to.

        Raises:
            SpecError: The name or the size is invalid, or the path leads to no disk image.
            MachineError: The machine has a disk of this name, no port for another one, or is off or paused.

        Example:
            >>> vm.plug_disk("spare", "64M")
            >>> vm.exec("blockdev --getsize64 /dev/disk/by-id/virtio-spare").stdout.strip()
            '67108864'
        """
        self.lifecycle.plug_disk(new_disk(name, source), Deadline(_PLUG_TIME * self._factor))

    @recorded("power")
    def unplug_disk(self, name: str) -> None:
        """Pull out a disk, with everything on it, as if by its cable.

        A guest that still uses it gets errors: unmount it first.

        Raises:
            MachineError: There is no such disk, the guest does not release it, or the machine is off.

        Example:
            >>> vm.plug_disk("spare", "64M")
            >>> vm.unplug_disk("spare")
            >>> vm.path("/dev/disk/by-id/virtio-spare").exists()
            False
        """
        self.lifecycle.unplug_disk(name, Deadline(_PLUG_TIME * self._factor))

    @cached_property
    def faults(self) -> Faults:
        """Faults that begin and end while the machine runs, each for the length of a `with` block; several at once, if need be.

        Example:
            >>> with vm.faults.disk_full("/srv", leave="1M"), vm.faults.slow_disk("root", iops=100):
            ...     vm.exec("head -c 8M /dev/zero > /srv/file", check=False).ok
            False
        """
        return Faults(self.lifecycle)

    @cached_property
    def clock(self) -> Clock:
        """The guest's wall clock, which can be set.

        Example:
            >>> with vm.clock.advance(days=1):
            ...     vm.exec("date +%s").stdout > str(time.time() + 86000)
            True
        """
        return Clock(self.lifecycle, lambda: float(self.guest.run(_DATE, self.guest.command(_DATE), Deadline(_ANSWER)).stdout))

    # -- screen and keyboard ---------------------------------------------------------------------------------------------------------

    @recorded("screen")
    def screenshot(self, path: str | Path) -> Path:
        r"""Save a screenshot to a file on the host, as PNG, and return its path.

        Raises:
            MachineError: The machine has no display (`display=True` in its mark), its QEMU writes no PNG, or the machine is gone.
            OSError: The file cannot be written.
            ValueError: The path is empty.

        Example:
            >>> vm.screenshot(tmp_path / "login.png").read_bytes()[:4]
            b'\x89PNG'
        """
        image, dest = self._display().screenshot(), _host_path(path)
        # Readable by all, unlike the machine's own files: it is the user's, and often a CI job's artifact.
        with atomic_file(dest, mode=0o644) as file:
            file.write(image)
        return dest

    def tty_text(self, number: int = 1) -> str:
        r"""Return what a virtual terminal of the guest shows, as its kernel knows it; no screen is needed.

        Lines end where the terminal's do, without the blanks at their ends.

        Args:
            number: The number of the terminal: 1 is the first one.

        Raises:
            MachineError: The guest has no such terminal, or is gone.

        Example:
            >>> _ = vm.exec(r"printf '\033c2 + 2\n    = 4' > /dev/tty1")
            >>> vm.tty_text()
            '2 + 2\n    = 4'
        """
        return tty_text(number, lambda argv: self.exec(argv, check=False, user="root"))

    def screen_text(self) -> str:
        r"""Read the text on the machine's screen, whatever shows it: firmware, boot loader, kernel or a desktop.

        It is read by the program tesseract (package `tesseract-ocr`), which takes a second or two, and may take one character for another
        that looks like it, such as `l` for `1`. Where a virtual terminal has the text, `tty_text` is exact.

        Raises:
            MachineError: The machine has no display (`display=True` in its mark), or is gone.
            BackendUnavailable: There is no tesseract here.

        Example:
            >>> _ = vm.exec(r"printf '\033cnothing to see here' > /dev/tty1")
            >>> "nothing to see" in vm.screen_text()
            True
        """
        return self._read_screen(Deadline(_READING * self._factor))

    def _read_screen(self, deadline: Deadline) -> str:
        return read_picture(self._display().screenshot("ppm"), self.lifecycle.folder, deadline)

    @recorded("screen")
    def send_keys(self, *keys: str) -> None:
        r"""Press keys, one argument after the other.

        An argument is the name of a key (`"ret"`, `"f2"`, `"up"`), or names joined by `-` of which the first is a modifier, held
        down together (`"ctrl-alt-f2"`). Anything else is text, typed on a US keyboard, where a newline is the return key. Names
        are QEMU's. To type a word that is a key's name, give its characters one by one: `*"home"`.

        Raises:
            ValueError: A combination has an unknown key in it, or a character is not on a US keyboard; then nothing is typed.
            MachineError: The machine has no display (`display=True` in its mark), is paused, or is gone.

        Example:
            >>> vm.send_keys("ctrl-alt-f2", "root\n")
        """
        # All keys are checked before the first is pressed.
        pressed = keyboard.chords(keys)
        self._display().press(pressed)

    @recorded("screen")
    def send_console(self, text: str) -> None:
        r"""Type text on the serial console, as somebody at its other end would.

        From then on `wait_for_console` finds only what the console says afterwards, which begins with the echo of the text unless the guest
        has turned that off. A newline is the return key, which sends a carriage return. Other control characters are sent as they are:
        `"\x03"` is Ctrl-C.

        Raises:
            MachineError: The guest reads nothing from its serial port, the backend has no input for it, or the machine is gone.
            ValueError: The text cannot be encoded as UTF-8.

        Example:
            >>> asks = vm.spawn("exec </dev/ttyS0 >/dev/ttyS0; printf 'Passphrase: '; read word; echo it was $word")
            >>> _ = vm.wait_for_console("Passphrase: ")
            >>> vm.send_console("sesame\n")
            >>> vm.wait_for_console("it was sesame")[0]
            'it was sesame'
        """
        self.console.skip()
        self.lifecycle.instance.write_console(text.replace("\n", "\r").encode(), deadline=Deadline(_ANSWER * self._factor))

    def _display(self) -> Instance:
        if not self.spec.display:
            raise MachineError(f"the machine {self.name!r} has no display: write display=True in its mark", machine=self.name)
        return self.lifecycle.instance

    # -- the hypervisor itself -------------------------------------------------------------------------------------------------------

    @recorded("power")
    def qmp(self, command: str, arguments: Mapping[str, object] | None = None, /, **keywords: object) -> Any:
        """Run a command of QEMU's monitor protocol (QMP), and return its answer: for what no other member does.

        The machine does not notice what it changes. Processors that are stopped by `stop` count as running, and a machine with devices that
        were added or removed can be neither saved nor restored. Commands and answers differ from one version of QEMU to another.

        Args:
            command: Its name in QEMU's QMP reference.
            arguments: Its arguments by name.
            keywords: The same; an underscore in a name stands for a dash.

        Raises:
            Unsupported: The backend is not QEMU.
            MachineError: QEMU refused the command or did not answer within a minute, or the machine is off.

        Example:
            >>> vm.qmp("query-status")["running"]
            True
            >>> vm.qmp("human-monitor-command", command_line="info name").strip() == vm.id
            True
        """
        named = {**(arguments or {}), **{name.replace("_", "-"): value for name, value in keywords.items()}}
        return self.lifecycle.instance.qmp(command, named, deadline=Deadline(_QMP_TIME * self._factor))

    def gdb(self) -> Path:
        """Have QEMU listen for a debugger of the guest's kernel, and return the path of the unix socket for it.

        `gdb vmlinux -ex "target remote PATH"` connects. The guest stands still while the debugger has it, and goes on when that continues
        or leaves; its clocks are behind then. Only this user can connect, as long as the machine is on: after `start` or `restore`, ask
        again.

        Raises:
            MachineError: The path of the machine's folder is too long for a socket, the backend has no such thing, or the machine is off.

        Example:
            >>> vm.gdb().is_socket()
            True
        """
        return self.lifecycle.instance.debug_stub()

    # -- other clients ---------------------------------------------------------------------------------------------------------------

    def ssh_config(self) -> Path:
        r"""Write an OpenSSH configuration for the machine, and return its path.

        The machine's name is its host name there.

        With it `ssh`, `scp`, `sftp`, `rsync`, Ansible and everything else that builds on OpenSSH log in as root, with the machine's own key
        and only if it shows its own host key. All files are private, and deleted with the machine. The configuration is valid as long as
        the machine lives, unless another program takes its port while it is off: then call this again.

        Raises:
            MachineError: The backend offers no SSH, OpenSSH cannot be given the path of the machine's folder, or the machine is gone.

        Example:
            >>> command = ["ssh", "-F", vm.ssh_config(), vm.name, "uname"]
            >>> subprocess.run(command, check=True, capture_output=True, text=True).stdout
            'Linux\n'
        """
        return openssh.write_config(self.lifecycle.instance.ssh_access(), self.name)

    def shell(self, *, user: str | None = None, stdin: TextIO | None = None, stdout: TextIO | None = None) -> int | None:
        """Open an interactive shell of the guest on the terminal.

        In a test it needs `pytest -s`.

        Every key goes to the guest, Ctrl-C and Ctrl-D too, and so does the size of the window; Ctrl-] leaves. Afterwards the terminal is as
        it was. There is no time-out.

        Args:
            user: The user whose login shell is started; the spec's user by default.
            stdin: The terminal to read from; `sys.stdin` by default.
            stdout: The terminal to write to; `sys.stdout` by default.

        Returns:
            The status of the shell, -N for signal N; None if the user left it.

        Raises:
            MachineError: There is no terminal here, the backend offers none, or the guest cannot be reached.
        """
        deadline = Deadline(_LOGIN_TIME * self._factor)
        # The QEMU guest agent has no terminals.
        channel = self.lifecycle.stream_channel(deadline, terminals=True)
        return attach(channel, user=user or self.spec.user, stdin=stdin, stdout=stdout, seconds=deadline.seconds)

    @cached_property
    def host(self) -> Host:
        """The machine as a host of pytest-testinfra, which needs the extra `testinfra`.

        Its commands run as those of `exec` do.

        Raises:
            BackendUnavailable: pytest-testinfra is not installed.

        Example:
            >>> vm.host.service("ssh").is_running
            True
        """
        try:
            from pytest_vmbottle.machine.testinfra import connect  # noqa: PLC0415 - an extra, and it loads much
        except ImportError as error:
            reason = f"vm.host needs pytest-testinfra, and importing it failed: {error}"
            raise BackendUnavailable(reason, "Install it: pip install 'pytest-vmbottle[testinfra]'") from error
        return connect(self.name, self.exec)


def _told(argv: Sequence[str], env: Mapping[str, str] | None, cwd: object, user: str) -> dict[str, object]:
    """Return the fields of a command's event, without the values of its environment, which may be secret."""
    return {"argv": [word[:_WORD] for word in argv[:_WORDS]], "env": list(env or ()), "cwd": "" if cwd is None else str(cwd), "user": user}


def _host_path(path: str | Path) -> Path:
    # `Path("")` would be the current folder, and the value of a variable that was not set is no reason to write there.
    if path == "":
        raise ValueError("the path on this computer is empty: write one, such as 'result.txt'")
    return Path(path)


class MachineFactory(Protocol):
    """The type of `vm_factory` and the other factories, fixtures which start more machines for tests."""

    def __call__(self, source: Source | MachineSpec | Snapshot | HasSnapshot, **keywords: Unpack[MachineKeywords]) -> Machine:
        """Start a machine that ends with the test, or with the class, module or run of the factory.

        Args:
            source: The name of an image, the path of a disk image, a `Layer`, a spec, a snapshot, or a capsule.
            keywords: Those of the `vm` mark.

        Raises:
            SpecError: A keyword is unknown or its value is invalid.
            MachineError: The machine could not be started.
        """
