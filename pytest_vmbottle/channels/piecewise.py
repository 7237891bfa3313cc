"""Commands whose output comes piece by piece, over a channel that has no streams.

The guest agent returns the output of a command at its end. Here the command writes into FIFOs of the guest, and short commands fetch what
is in them. So nothing is lost, however much it is: a command that writes faster than it is fetched waits, as with a pipe.
"""

from __future__ import annotations

import secrets
import signal
import threading
from collections.abc import Callable

from pytest_vmbottle.channels.port import GUEST_PATH, Channel, Command, Finished, Running, not_run
from pytest_vmbottle.errors import MachineDied, MachineError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script

__all__ = ["PiecewiseProcess"]

_SCRIPT = read_script(__package__, "piecewise.sh")
_FOLDER = "/run/vmbottle-exec-"
_AT_ONCE = "0.5"
"""Seconds that the first call waits for the end of a short command, of which it brings the whole output."""
_PAUSES = 0.02, 0.5
"""Seconds between two fetches: after one with output, and at most."""
_BY_SIGNAL = 128
_FETCH = 60.0
"""Seconds for one of these calls."""


class PiecewiseProcess(Running):
    """A command without input whose output is fetched piece by piece (see `Running`)."""

    def __init__(
        self,
        channel: Channel,
        command: Command,
        *,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
    ) -> None:
        """Start the command; its output goes to the two functions in another thread."""
        self._channel, self._command = channel, command
        self._stdout, self._stderr = stdout, stderr
        self._files, self._mark = f"{_FOLDER}{secrets.token_hex(8)}", f"\x1e{secrets.token_hex(8)}"
        self._status: int | None = None
        self._error: MachineError | None = None
        self._given_up = threading.Event()
        self._over = threading.Event()
        threading.Thread(target=self._follow, daemon=True, name="piecewise").start()

    def _follow(self) -> None:
        try:
            status = self._passed_on(self._call(_AT_ONCE, *self._command.argv))
            pause = _PAUSES[0]
            while status is None and not self._given_up.wait(pause):
                found = self._call()
                status = self._passed_on(found)
                # A command that says nothing is asked more and more seldom: each question costs the guest time.
                pause = _PAUSES[0] if found.stdout or len(found.stderr) > len(self._mark) + 3 else min(2 * pause, _PAUSES[1])
            self._status = status
        except MachineError as error:
            self._error = error
        finally:
            self._over.set()
            self._stdout(b"")
            self._stderr(b"")

    def _call(self, *words: str) -> Finished:
        argv = ("/bin/sh", "-c", _SCRIPT, "sh", self._files, self._mark, *words)
        # The first call has the command's own tag and environment, and the others a tag of theirs: what ends the command spares them.
        own = {"env": self._command.env, "tag": self._command.tag} if words else {"env": (("PATH", GUEST_PATH),)}
        return self._channel.run(Command(argv=argv, **own), deadline=Deadline(_FETCH))

    def _passed_on(self, found: Finished) -> int | None:
        """Pass on a piece of output; return the status if it was the last one."""
        text, mark, state = found.stderr.rpartition(self._mark.encode())
        if not mark:
            if self._given_up.is_set():
                return None
            raise MachineDied(f"the output of {self._command.argv[0]!r} was lost: {found.stderr.decode(errors='replace').strip()}")
        word = state.strip().decode(errors="replace")
        status = _status(word) if word.isdigit() else None
        if status is not None:
            text = not_run(Finished(returncode=status, stderr=text), self._command).stderr
        if found.stdout:
            self._stdout(found.stdout)
        if text:
            self._stderr(text)
        return status

    @property
    def returncode(self) -> int | None:
        """The status, or -N for signal N; None while the command runs."""
        if self._error is not None:
            raise self._error
        return self._status

    def wait(self, *, deadline: Deadline) -> int | None:
        """Wait for the status; return None if there is none by the deadline."""
        self._over.wait(deadline.remaining)
        return self.returncode

    def write(self, data: bytes, *, deadline: Deadline) -> None:  # noqa: ARG002
        """Raise `BrokenPipeError`: the command has an empty input."""
        raise BrokenPipeError

    def close_input(self) -> None:
        """Return at once: the input has ended from the beginning."""
        return

    def close(self) -> None:
        """Fetch nothing more; the command is left to whoever kills it."""
        self._given_up.set()


def _status(word: str) -> int:
    number = int(word)
    # As a shell tells it: 128 + N for a command that signal N ended.
    return _BY_SIGNAL - number if number - _BY_SIGNAL in set(signal.Signals) else number
