"""A QEMU process, which is watched and cannot outlive its owner."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pytest_vmbottle.backends.qemu.qmp import in_background
from pytest_vmbottle.host import supervisor
from pytest_vmbottle.host.account import Account
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.ownership import Owner
from pytest_vmbottle.host.supervisor import Identity

__all__ = ["QemuProcess"]


def _leash() -> tuple[str, ...]:
    """Return a command prefix that has the kernel kill the process when the thread that started it ends.

    The setting survives the exec that follows.

    The program is searched each time, because a search path may lack it only for a while.
    """
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()


class QemuProcess:
    """A running QEMU.

    Its output goes to a file, never into a pipe, which could fill up.
    """

    def __init__(
        self, argv: Sequence[str], *, log: Path, fds: Sequence[int] = (), leash: bool = True, account: Account | None = None
    ) -> None:
        """Start QEMU.

        Args:
            argv: The command line.
            log: The file for its output, in its machine's folder.
            fds: The descriptors that the command line refers to.
            leash: Whether the kernel kills it when we end; not needed if this QEMU exits with its parent.
            account: The account that it runs as; by default our own.
        """
        self.argv = tuple(argv)
        self._log = log

        def spawn() -> subprocess.Popen[bytes]:
            with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as output:
                return subprocess.Popen(  # noqa: S603 - argv list, no shell
                    [*(_leash() if leash else ()), *argv],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=fds,
                    env=(supervisor.bare_environment if account else supervisor.environment)(log.parent),
                    # Ctrl-C on the terminal is for the test run, not for QEMU.
                    start_new_session=True,
                    cwd="/",
                    # Before the leash is put on: a change of user takes it off.
                    user=account.uid if account else None,
                    group=account.gid if account else None,
                    extra_groups=account.groups if account else None,
                )

        # The parent-death signal comes when the thread that started QEMU ends, so a thread starts it that lives as long as this process.
        self._popen = in_background(spawn)
        self._owner = Owner()
        self._identity = Identity.of(self._popen.pid)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    @property
    def exitcode(self) -> int | None:
        """The exit status, negative for a signal, or None while it runs.

        A forked child cannot know it and gets 0.
        """
        if not self.is_ours:
            return None if self._identity is not None and self._identity.is_running else 0
        return self._popen.poll()

    @property
    def is_ours(self) -> bool:
        """Tell whether it is a child of this process; not so in a forked child."""
        return self._owner.is_us

    @property
    def output(self) -> str:
        """The output so far."""
        try:
            # Its end, where the reason is: a QEMU that warns again and again would fill an error message.
            return self._log.read_text(errors="replace")[-4000:]
        except FileNotFoundError:
            return ""

    def wait(self, deadline: Deadline) -> int | None:
        """Wait for the exit status; return None if the process has not ended by the deadline."""
        # Only a parent can wait for a process, so a forked child looks at /proc.
        if not self.is_ours:
            deadline.poll(lambda: self.exitcode is not None, every=0.05)
            return self.exitcode
        try:
            return self._popen.wait(deadline.remaining)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Kill the process; may be called again.

        A forked child, which does not own it, leaves it alone.
        """
        if self.is_ours:
            self._popen.kill()
            self._popen.wait()
