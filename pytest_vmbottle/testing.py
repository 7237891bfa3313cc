"""Backend without a hypervisor, for tests of plugins, conftests and this package.

It runs nothing. A test about a guest needs a real machine.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pytest_vmbottle.backends.kernel_watch import KernelWatch
from pytest_vmbottle.backends.port import Backend, Capabilities, Console, Instance, Start, State
from pytest_vmbottle.channels.port import Channel, Command, Finished, Running
from pytest_vmbottle.errors import GuestPanic, LaunchError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.digests import digest
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.spec.pack_kind import PackKind

__all__ = ["FakeBackend", "FakeChannel", "FakeInstance", "FakeRunning"]

Handler = Callable[[Command], Finished]


def _succeed(command: Command) -> Finished:
    return Finished(returncode=0, stdout=" ".join(command.argv).encode())


class FakeRunning(Running):
    """A command that has ended already."""

    returncode: int | None = None

    def __init__(self, returncode: int) -> None:
        """Take the status."""
        self.returncode = returncode
        self.written = b""
        self.closed = self.input_closed = False

    def wait(self, *, deadline: Deadline) -> int | None:  # noqa: ARG002
        """Return the status."""
        return self.returncode

    def write(self, data: bytes, *, deadline: Deadline) -> None:  # noqa: ARG002
        """Keep the input."""
        self.written += data

    def close_input(self) -> None:
        """Note the call."""
        self.input_closed = True

    def close(self) -> None:
        """Note the call."""
        self.closed = True


class FakeChannel(Channel):
    """Channel that answers by calling your function."""

    def __init__(self, handler: Handler) -> None:
        """Take a function that returns the result of a command."""
        self._handler = handler
        self.closed = False

    def run(self, command: Command, *, deadline: Deadline) -> Finished:  # noqa: ARG002
        """Call the function."""
        return self._handler(command)

    def put(self, source: BinaryIO, command: Command, *, deadline: Deadline) -> Finished:  # noqa: ARG002
        """Read the input to its end and call the function."""
        source.read()
        return self._handler(command)

    def get(self, command: Command, sink: BinaryIO, *, deadline: Deadline) -> Finished:  # noqa: ARG002
        """Call the function and write its output."""
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
        """Call the function and deliver its output at once."""
        finished = self._handler(command)
        for sink, data in ((stdout, finished.stdout), (stderr, finished.stderr)):
            # `b""` is the end of a stream, and must come once.
            for chunk in (data, b"") if data else (b"",):
                sink(chunk)
        return FakeRunning(finished.returncode)

    def close(self) -> None:
        """Note the call."""
        self.closed = True


class FakeInstance(Instance):
    """Fake machine; the console in its folder records the calls."""

    hypervisor = "the backend fake"
    pid = 0

    def __init__(self, backend: FakeBackend, rundir: Path, *, spec: MachineSpec | None = None) -> None:
        """Take the backend, the folder and the spec."""
        self._backend = backend
        self._strict = spec is None or spec.panic == "fail"
        self._log = rundir / "console.log"
        # The real one: a test writes lines into the console to play a kernel in trouble.
        self._watch = KernelWatch(self._log)
        self.console = Console(self._log, ended=lambda: not self.running)
        # A process that is there, so that figures and ages of it can be read.
        self.pid = os.getpid()
        self.running = True
        self._paused = False

    @property
    def exitcode(self) -> int | None:
        """0 once the machine was ended."""
        return None if self.running else 0

    @property
    def panic(self) -> str | None:
        """The first console line that reports a kernel in trouble."""
        return self._watch.look().trouble

    def alive(self) -> None:
        """Raise `GuestPanic` for such a line, unless the spec expects one."""
        if self.panic and self._strict:
            raise GuestPanic(f"the guest's kernel is in trouble: {self.panic}")

    def _note(self, line: str) -> None:
        with self._log.open("a") as log:
            log.write(line + "\n")

    def channel(self, *, deadline: Deadline, bulk: bool = False) -> Channel:  # noqa: ARG002
        """Return a `FakeChannel`."""
        return FakeChannel(self._backend.handler)

    def save(self, dest: Path, *, kind: PackKind, deadline: Deadline) -> None:  # noqa: ARG002
        """Write files that have the right names and no meaning."""
        # Names that `catalog.packs` and restores look for.
        running = {PackKind.TEMPLATE: ("ram.img", "state.bin"), PackKind.STREAM: ("state.bin",), PackKind.DISK: ()}
        for name in ("disk.qcow2", *running[kind]):
            # Random, so that two packs differ as those of real machines do.
            (dest / name).write_text(secrets.token_hex(16))
        self.stop()

    def pause(self) -> None:
        """Note the call."""
        self._paused = True
        self._note("paused")

    def resume(self) -> None:
        """Note the call."""
        self._paused = False
        self._note("resumed")

    def state(self) -> State:
        """Return the state after the last call."""
        return State.OFF if not self.running else State.PAUSED if self._paused else State.RUNNING

    def shut_down(self, *, deadline: Deadline) -> bool:  # noqa: ARG002
        """End the machine."""
        self._note("shut down")
        self.stop()
        return True

    def reboot(self, *, deadline: Deadline) -> bool:  # noqa: ARG002
        """Note the call; the handler's answer to `cat /proc/sys/kernel/random/boot_id` has to change meanwhile."""
        self._note("rebooted")
        return True

    def cut(self) -> None:
        """End the machine."""
        self._note("cut")
        self.stop()

    def snapshot(self, dest: Path, *, whole: bool, deadline: Deadline) -> bool:  # noqa: ARG002
        """Write files that have the right names and no meaning."""
        for name in ("disk.qcow2", "state.bin"):
            (dest / name).write_text(secrets.token_hex(16))
        return True

    def stop(self) -> None:
        """End the machine; may be called again."""
        # Counted once, however often it is called.
        if self.running:
            self.running = False
            self._backend.stopped += 1


class FakeBackend(Backend):
    """Backend whose machines run nothing.

    Attributes:
        handler: Function that returns the result of a command; by default the command succeeds and prints its own words.
        broken: Message with which every launch fails; empty for none.
        launched: Boot source of each machine that was started.
        stopped: Number of machines that were ended.
    """

    def __init__(self, handler: Handler = _succeed, *, broken: str = "", pack_kind: PackKind = PackKind.TEMPLATE) -> None:
        """Take the handler; nothing is started."""
        self.handler = handler
        self.broken = broken
        self.launched: list[Start] = []
        self.stopped = 0
        self._pack_kind = pack_kind

    def probe(self) -> Capabilities:
        """Return capabilities for everything, since nothing is run."""
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
        """Return the same digest for all specs of one architecture."""
        return digest("fake", spec.arch)

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:  # noqa: ARG002
        """Make a `FakeInstance`, or fail if it is broken."""
        if self.broken:
            raise LaunchError(self.broken, machine=spec.name)
        self.launched.append(source)
        # Appended: a machine that starts again continues its console, as with QEMU.
        with (rundir / "console.log").open("a") as console:
            console.write(f"{spec.name} started\n")
        return FakeInstance(self, rundir, spec=spec)
