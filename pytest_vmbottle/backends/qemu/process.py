"""A QEMU process: started so that it cannot outlive us, watched, and ended for certain."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pytest_vmbottle import supervisor
from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backends.qemu.account import Account
from pytest_vmbottle.backends.qemu.qmp import in_background
from pytest_vmbottle.ownership import Owner
from pytest_vmbottle.supervisor import Identity

__all__ = ["QemuProcess"]


def _leash() -> tuple[str, ...]:
    """A prefix that has the kernel kill the process when the thread that started it ends; it survives the exec that follows.

    It is looked for each time: a search path may lack it only for now.
    """
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()


class QemuProcess:
    """A running QEMU; what it prints goes to a file, never into a pipe that could fill up."""

    def __init__(
        self, argv: Sequence[str], *, log: Path, fds: Sequence[int] = (), leash: bool = True, account: Account | None = None
    ) -> None:
        """Starts it.

        Args:
            argv: Its command line.
            log: The file for what it prints, in the folder of its machine.
            fds: The descriptors that the command line refers to.
            leash: Whether the kernel is to end it with us; not where it sees to that itself.
            account: Who it runs as, if not as us.
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
                    start_new_session=True,
                    cwd="/",
                    # Before the leash is put on: a change of user takes it off.
                    user=account.uid if account else None,
                    group=account.gid if account else None,
                    extra_groups=account.groups if account else None,
                )

        self._popen = in_background(spawn)
        self._owner = Owner()
        self._identity = Identity.of(self._popen.pid)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def exitcode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs. A forked child, which cannot know it, is told 0."""
        if not self.is_ours:
            return None if self._identity is not None and self._identity.is_running else 0
        return self._popen.poll()

    @property
    def is_ours(self) -> bool:
        """Whether it is a child of this process: not in a forked child."""
        return self._owner.is_us

    @property
    def output(self) -> str:
        """What it has printed."""
        try:
            return self._log.read_text(errors="replace")[-4000:]
        except FileNotFoundError:
            return ""

    def wait(self, deadline: Deadline) -> int | None:
        """Its exit status, or None if it has not ended by the deadline."""
        if not self.is_ours:
            deadline.poll(lambda: self.exitcode is not None, every=0.05)
            return self.exitcode
        try:
            return self._popen.wait(deadline.remaining)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Ends it at once; may be called again. A forked child, whose it is not, leaves it alone."""
        if self.is_ours:
            self._popen.kill()
            self._popen.wait()
