"""A backend without a hypervisor, for testing what is built around machines: plugins, conftests, and this package's own wiring.

It runs nothing. A test about a guest needs a real machine.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backend import Capabilities, Channel, Command, Console, Finished, Instance, PackKind, Start, State
from pytest_vmbottle.console import Cursor, kernel_trouble
from pytest_vmbottle.errors import GuestPanic, LaunchError
from pytest_vmbottle.spec import MachineSpec, digest

__all__ = ["FakeBackend", "FakeChannel", "FakeInstance", "FakeRunning"]

Handler = Callable[[Command], Finished]


def _succeed(command: Command) -> Finished:
    return Finished(returncode=0, stdout=" ".join(command.argv).encode())


class FakeRunning:
    """A command that has ended already."""

    def __init__(self, returncode: int) -> None:
        """Takes its status."""
        self.returncode: int | None = returncode
        self.written = b""
        self.closed = self.input_closed = False

    def wait(self, *, deadline: Deadline) -> int | None:  # noqa: ARG002
        """Returns its status."""
        return self.returncode

    def write(self, data: bytes, *, deadline: Deadline) -> None:  # noqa: ARG002
        """Keeps it."""
        self.written += data

    def close_input(self) -> None:
        """Notes it."""
        self.input_closed = True

    def close(self) -> None:
        """Notes it."""
        self.closed = True


class FakeChannel:
    """A channel that answers by calling a function of yours."""

    def __init__(self, handler: Handler) -> None:
        """Takes what turns a command into its end."""
        self._handler = handler
        self.closed = False

    def run(self, command: Command, *, deadline: Deadline) -> Finished:  # noqa: ARG002
        """Calls the function."""
        return self._handler(command)

    def put(self, source: BinaryIO, command: Command, *, deadline: Deadline) -> Finished:  # noqa: ARG002
        """Reads the input to its end and calls the function."""
        source.read()
        return self._handler(command)

    def get(self, command: Command, sink: BinaryIO, *, deadline: Deadline) -> Finished:  # noqa: ARG002
        """Calls the function and writes the output it made up."""
        finished = self._handler(command)
        sink.write(finished.stdout)
        return finished

    def start(
        self,
        command: Command,
        *,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        deadline: Deadline,  # noqa: ARG002
    ) -> FakeRunning:
        """Calls the function and gives the output it made up, all at once."""
        finished = self._handler(command)
        for sink, data in ((stdout, finished.stdout), (stderr, finished.stderr)):
            for chunk in (data, b"") if data else (b"",):
                sink(chunk)
        return FakeRunning(finished.returncode)

    def close(self) -> None:
        """Notes it."""
        self.closed = True


class FakeInstance:
    """A machine that is only on paper; `log` in its folder's console records what is done to it."""

    def __init__(self, backend: FakeBackend, rundir: Path, *, spec: MachineSpec | None = None) -> None:
        """Takes the backend that made it, its folder, and what it is to be."""
        self._backend = backend
        self._strict = spec is None or spec.panic == "fail"
        self._log = rundir / "console.log"
        self._cursor = Cursor(self._log)
        self._cursor.read()  # what an earlier instance of the same machine has said
        self._said = b""
        self.console = Console(self._log, ended=lambda: not self.running)
        self.pid = os.getpid()
        self.running = True
        self._paused = False
        self.forwards: dict[int, int] = {}

    @property
    def exitcode(self) -> int | None:
        """0 once it was ended."""
        return None if self.running else 0

    @property
    def panic(self) -> str | None:
        """The first line of its console that a kernel in trouble would write."""
        self._said = (self._said + self._cursor.read())[-(1 << 20) :]
        return next(iter(kernel_trouble(self._said)), None)

    def alive(self) -> None:
        """Raises `GuestPanic` for such a line, unless the spec expects one."""
        if self.panic and self._strict:
            raise GuestPanic(f"the guest's kernel is in trouble: {self.panic}")

    def _note(self, line: str) -> None:
        with self._log.open("a") as log:
            log.write(line + "\n")

    def channel(self, *, deadline: Deadline, bulk: bool = False) -> Channel:  # noqa: ARG002
        """A `FakeChannel`."""
        return FakeChannel(self._backend.handler)

    def save(self, dest: Path, *, kind: PackKind, deadline: Deadline) -> None:  # noqa: ARG002
        """Writes files that have the right names and no meaning."""
        running = {PackKind.TEMPLATE: ("ram.img", "state.bin"), PackKind.STREAM: ("state.bin",), PackKind.DISK: ()}
        for name in ("disk.qcow2", "empty.qcow2", *running[kind]):
            (dest / name).write_text(secrets.token_hex(16))
        self.stop()

    def pause(self) -> None:
        """Notes it."""
        self._paused = True
        self._note("paused")

    def resume(self) -> None:
        """Notes it."""
        self._paused = False
        self._note("resumed")

    def state(self) -> State:
        """What was done to it last."""
        return State.OFF if not self.running else State.PAUSED if self._paused else State.RUNNING

    def shut_down(self, *, deadline: Deadline) -> bool:  # noqa: ARG002
        """Ends it."""
        self._note("shut down")
        self.stop()
        return True

    def reboot(self, *, deadline: Deadline) -> bool:  # noqa: ARG002
        """Notes it; what the handler says to `cat /proc/sys/kernel/random/boot_id` has to change meanwhile."""
        self._note("rebooted")
        return True

    def cut(self) -> None:
        """Ends it."""
        self._note("cut")
        self.stop()

    def snapshot(self, dest: Path, *, deadline: Deadline) -> None:  # noqa: ARG002
        """Writes files that have the right names and no meaning."""
        for name in ("disk.qcow2", "empty.qcow2", "state.bin"):
            (dest / name).write_text(secrets.token_hex(16))

    def stop(self) -> None:
        """Ends it; may be called again."""
        if self.running:
            self.running = False
            self._backend.stopped += 1


class FakeBackend:
    """Makes machines that run nothing.

    Attributes:
        handler: Turns every command into its end; by default it succeeds and prints its own words.
        broken: Where it says something, every launch fails with it.
        launched: Where each machine that was started started from.
        stopped: How many were ended.
    """

    def __init__(self, handler: Handler = _succeed, *, broken: str = "", pack_kind: PackKind = PackKind.TEMPLATE) -> None:
        """Starts nothing."""
        self.handler = handler
        self.broken = broken
        self.launched: list[Start] = []
        self.stopped = 0
        self._pack_kind = pack_kind

    def probe(self) -> Capabilities:
        """Says that it can do everything, because it does nothing."""
        return Capabilities(
            backend="fake",
            version="1",
            accelerator="none",
            reason="nothing is run",
            pack_kind=self._pack_kind,
            pack_reason="nothing is restored",
            emulated=False,
        )

    def fingerprint(self, spec: MachineSpec) -> str:
        """The same for all specs of one architecture."""
        return digest("fake", spec.arch)

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:  # noqa: ARG002
        """Makes a `FakeInstance`, or fails if it is broken."""
        if self.broken:
            raise LaunchError(self.broken, machine=spec.name)
        self.launched.append(source)
        with (rundir / "console.log").open("a") as console:
            console.write(f"{spec.name} started\n")
        return FakeInstance(self, rundir, spec=spec)
