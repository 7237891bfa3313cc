"""One smolvm machine: made from an image or a pack, started, watched while it runs, packed, removed."""

from __future__ import annotations

import json
import logging
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from pytest_vmbottle._os import Deadline, atomic_file
from pytest_vmbottle.backend import GUEST_PATH, Channel, Command, Console, PackKind, Start, State, Unwakeable
from pytest_vmbottle.backends.smolvm.channel import SmolvmChannel
from pytest_vmbottle.backends.smolvm.engine import Creation, Engine
from pytest_vmbottle.backends.smolvm.vmm import Follower, Vmm, me
from pytest_vmbottle.console import Cursor, kernel_trouble
from pytest_vmbottle.errors import GuestPanic, MachineDied, MachineError, MachineTimeout, SmolvmError
from pytest_vmbottle.spec import MachineSpec

__all__ = ["CHECKPOINT", "PACK", "Maker", "SmolvmInstance", "packed_in"]

log = logging.getLogger(__name__)

PACK, CHECKPOINT = "machine.smolmachine", "machine.checkpoint"
"""What a saved machine is, in its folder: its disks, or these and its RAM."""

_RECORD, _CONSOLE, _AGENT_LOG = "smolvm.json", "console.log", "agent-console.log"
_FLAKE = "boot process exited (code 0) before the agent was ready"
"""What a start says that fails for no reason of the machine's, as it may where processors are emulated; the same call then works."""
_POWERED_OFF = (b"reboot: Power down", b"reboot: System halted", b"reboot: Restarting system")
_READY = Command(argv=("true",), env=(("PATH", GUEST_PATH),))
_SYNC = Command(argv=("sync",), env=(("PATH", GUEST_PATH),))
_STOP = 60.0
_ASK = 15.0


def packed_in(folder: Path) -> Path:
    """The file that a machine is made from, of a saved machine's folder."""
    checkpoint = folder / CHECKPOINT
    return checkpoint if checkpoint.exists() else folder / PACK


@attrs.frozen(kw_only=True)
class Maker:
    """What starts machines.

    Attributes:
        engine: The smolvm that does.
        kind: What kind of pack is made of a machine that is built.
        warn: Takes a sentence that somebody should read.
        source_of: The running machine that one which is restored from a folder is branched from.
    """

    engine: Engine
    kind: PackKind
    warn: Callable[[str], None]
    source_of: Callable[[Path, MachineSpec, Deadline], str]

    def start(self, spec: MachineSpec, source: Start, rundir: Path, deadline: Deadline) -> SmolvmInstance:
        """Makes a machine and starts it, or only starts one that is there."""
        record = _Record.read(rundir)
        if source.kept and record is not None:
            return self._started(spec, source, rundir, record, deadline)
        if record is not None:
            self.engine.delete(record.name, deadline=deadline)
        known = dict(source.forwards)
        record = _Record(name=machine_name(rundir), ports={port: known.get(port) or _free_port() for port in spec.ports})
        record.write(rundir)
        if self._is_branched(source) and source.saved is not None:
            warm = self.source_of(source.saved, spec, deadline)
            pid = self.engine.branch(warm, record.name, ports=record.ports, label=me(), deadline=deadline)
            return SmolvmInstance(self, spec, source, rundir=rundir, record=record, vmm=Vmm(pid))
        self.engine.create(record.name, creation(spec, source, record.ports), deadline=deadline)
        return self._started(spec, source, rundir, record, deadline)

    def _is_branched(self, source: Start) -> bool:
        restored = source.saved is not None and (source.saved / CHECKPOINT).exists()
        return self.kind is PackKind.TEMPLATE and restored and not source.building

    def _started(self, spec: MachineSpec, source: Start, rundir: Path, record: _Record, deadline: Deadline) -> SmolvmInstance:
        made_of = creation(spec, source, record.ports)
        branchable = source.building and self.kind is not PackKind.DISK
        if branchable:
            try:
                pid = self.start_twice(record.name, made_of, branchable=True, deadline=deadline)
                return SmolvmInstance(self, spec, source, rundir=rundir, record=record, vmm=Vmm(pid), branchable=True)
            except SmolvmError as error:
                self.warn(f"smolvm could not start the machine {record.name} so that its RAM can be saved: {_first_line(error)}")
                self.engine.delete(record.name, deadline=deadline)
                self.engine.create(record.name, made_of, deadline=deadline)
        pid = self.start_twice(record.name, made_of, deadline=deadline, anew=not source.kept)
        return SmolvmInstance(self, spec, source, rundir=rundir, record=record, vmm=Vmm(pid))

    def start_twice(self, name: str, made_of: Creation, *, deadline: Deadline, branchable: bool = False, anew: bool = True) -> int:
        """Starts a machine; once more, and as a new one if it may be, where that failed as it does now and then."""
        try:
            return self.engine.start(name, branchable=branchable, deadline=deadline)
        except SmolvmError as error:
            if _FLAKE not in error.stderr:
                raise
            self.warn(f"smolvm could not start the machine {name} at the first attempt and is asked once more: {_FLAKE}")
        if anew:
            self.engine.delete(name, deadline=deadline)
            self.engine.create(name, made_of, deadline=deadline)
        return self.engine.start(name, branchable=branchable, deadline=deadline)

    def discard(self, rundir: Path) -> None:
        """Removes what smolvm keeps of a folder's machine, if there is any."""
        record = _Record.read(rundir)
        if record is None:
            return
        try:
            self.engine.delete(record.name, deadline=Deadline(_STOP))
        except MachineError as error:
            self.warn(f"smolvm could not remove the machine {record.name}: {error}")


def creation(spec: MachineSpec, source: Start, ports: Mapping[int, int]) -> Creation:
    """What a machine is made of."""
    is_pack = source.image.endswith(".smolmachine")
    packed = packed_in(source.saved) if source.saved is not None else Path(source.image) if is_pack else None
    return Creation(
        image="" if packed is not None else source.image,
        packed=packed,
        cpus=spec.cpus,
        memory=spec.memory,
        network=() if isinstance(spec.network, str) else spec.network,
        ports=ports,
        label=me(),
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def machine_name(rundir: Path) -> str:
    """What smolvm calls the machine of a folder, whose name nothing else on this host has."""
    return "".join(letter if letter.isalnum() else "-" for letter in rundir.name.lower())


def _free_port() -> int:
    """A port of this host that is free now; smolvm takes it a moment later, and fails if it is not any more."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@attrs.frozen(kw_only=True)
class _Record:
    """What is known of a machine in its folder: its name, and where its ports are."""

    name: str
    ports: Mapping[int, int]

    @classmethod
    def read(cls, rundir: Path) -> _Record | None:
        try:
            facts = json.loads((rundir / _RECORD).read_bytes())
        except FileNotFoundError:
            return None
        return cls(name=facts["name"], ports={int(guest): host for guest, host in facts["ports"].items()})

    def write(self, rundir: Path) -> None:
        with atomic_file(rundir / _RECORD) as file:
            file.write(json.dumps({"name": self.name, "ports": dict(self.ports)}).encode())


class SmolvmInstance:
    """A running machine."""

    def __init__(  # noqa: PLR0913 - all that it consists of
        self, maker: Maker, spec: MachineSpec, source: Start, *, rundir: Path, record: _Record, vmm: Vmm, branchable: bool = False
    ) -> None:
        """Takes a machine that was just started."""
        self._maker, self._engine, self._spec, self._source = maker, maker.engine, spec, source
        self._rundir, self._name, self._ports, self._vmm = rundir, record.name, dict(record.ports), vmm
        self._paused = self._ended_in_order = False
        self._branchable = branchable
        self._between = False  # stopped, to be started again at once
        self._channel = SmolvmChannel(self._engine, self._name, alive=self.alive)
        self._cursor, self._said = Cursor(rundir / _CONSOLE), b""
        self._cursor.read()  # what was said when the same machine ran before
        data = self._engine.data_dir(self._name)
        self.console = Console(rundir / _CONSOLE, ended=lambda: not self._vmm.is_running)
        self._follower = Follower(data / _AGENT_LOG, rundir / _CONSOLE)

    @property
    def name(self) -> str:
        """What smolvm calls it."""
        return self._name

    @property
    def pid(self) -> int:
        """The process that runs it."""
        return self._vmm.pid

    @property
    def argv(self) -> tuple[str, ...]:
        """The command that started it."""
        return (str(self._engine.program.path), "machine", "start", "--state-dir", str(self._engine.state), "--name", self._name)

    # -- what it says ----------------------------------------------------------------------------------------------------------------

    @property
    def exitcode(self) -> int | None:
        """0 after the guest powered off or was shut down, 1 after another end; None while it runs."""
        if self._vmm.is_running or self._between:
            return None
        return 0 if self._ended_in_order or self._has_powered_off() else 1

    def _has_powered_off(self) -> bool:
        self._look()
        return any(words in self._said for words in _POWERED_OFF)

    def _look(self) -> None:
        self._follower.catch_up()
        self._said = (self._said + self._cursor.read())[-(1 << 20) :]

    @property
    def panic(self) -> str | None:
        """The line by which the guest's kernel said that it is in trouble."""
        self._look()
        return next(iter(kernel_trouble(self._said)), None)

    def alive(self) -> None:
        """Returns if the guest can still answer.

        Raises:
            GuestPanic: Its kernel said that it is in trouble, and the spec does not expect that.
            MachineDied: The process that ran it has ended.
        """
        panic = self.panic
        if panic and self._spec.panic == "fail":
            raise self._died(f"the guest's kernel is in trouble: {panic}", GuestPanic)
        if self._vmm.is_running or self._between:
            return
        how = "it was shut down" if self.exitcode == 0 else "the process that ran it is gone"
        raise self._died(f"the machine {self._spec.name} has ended: {how}")

    def _died(self, message: str, kind: type[MachineDied] = MachineDied) -> MachineDied:
        return kind(message, machine=self._spec.name, console_tail=self.console.tail(30), argv=self.argv, exitcode=self.exitcode)

    def channel(self, *, deadline: Deadline, bulk: bool = False) -> Channel:  # noqa: ARG002 - there is one way
        """The way to run commands, once it has answered (see `Instance.channel`)."""
        said = ["it did not answer"]
        if not deadline.poll(lambda: self._answers(deadline, said), every=0.5, first=0.05):
            message = f"smolvm's agent did not answer within {deadline.seconds:.0f} s; it last said: {said[-1]}"
            raise MachineTimeout(message, machine=self._spec.name, console_tail=self.console.tail(20), argv=self.argv)
        return self._channel

    def _answers(self, deadline: Deadline, said: list[str]) -> bool:
        self.alive()
        try:
            answer = self._channel.run(_READY, deadline=Deadline(max(1.0, min(_ASK, deadline.remaining))))
        except SmolvmError as error:
            said.append(str(error).splitlines()[0])
            return False
        return answer.returncode == 0

    def forward(self, port: int) -> tuple[str, int]:
        """The address on 127.0.0.1 that leads to a TCP port of the guest, which the spec has to name."""
        if port not in self._ports:
            listed = [*self._ports, port]
            raise MachineError(f"smolvm forwards what the mark names: write ports={listed} in it", machine=self._spec.name)
        return "127.0.0.1", self._ports[port]

    @property
    def forwards(self) -> Mapping[int, int]:
        """The host's ports that lead to it, by the guest's."""
        return self._ports

    # -- packs -----------------------------------------------------------------------------------------------------------------------

    def save(self, dest: Path, *, kind: PackKind, deadline: Deadline) -> None:
        """Writes the machine into a folder and ends it (see `Instance.save`)."""
        if kind is PackKind.DISK:
            self._pack(dest, deadline)
        else:
            self._save_running(dest / CHECKPOINT, deadline)
        self.stop()

    def _save_running(self, dest: Path, deadline: Deadline) -> None:
        if not self._branchable:
            raise Unwakeable("smolvm did not start it so that its RAM can be saved", machine=self._spec.name)
        self._channel.run(_SYNC, deadline=deadline)
        try:
            self._engine.checkpoint(self._name, dest, deadline=deadline)
        except SmolvmError as error:
            dest.unlink(missing_ok=True)
            raise Unwakeable(_first_line(error), machine=self._spec.name) from error

    def _pack(self, dest: Path, deadline: Deadline) -> None:
        self._halt(deadline)
        self._engine.pack(dest / PACK.removesuffix(".smolmachine"), machine=self._name, deadline=deadline)

    def _halt(self, deadline: Deadline) -> None:
        self._engine.stop(self._name, deadline=deadline)
        self._ended_in_order = True
        self._channel.close()
        self._vmm.wait(Deadline(min(_STOP, deadline.remaining)))

    def snapshot(self, dest: Path, *, deadline: Deadline) -> None:
        """Stops the machine, packs it and starts it again: its disk is kept, what ran in it is not (see `Snapshots`)."""
        self._between = True
        try:
            self._pack(dest, deadline)
        finally:
            self._boot(deadline)

    def _boot(self, deadline: Deadline) -> None:
        made_of = creation(self._spec, self._source, self._ports)
        try:
            self._vmm = Vmm(self._maker.start_twice(self._name, made_of, deadline=deadline, anew=False))
        finally:
            self._between = False
        self._look()
        self._said, self._ended_in_order, self._paused = b"", False, False
        self.channel(deadline=deadline)

    # -- power -----------------------------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stops the process that runs it."""
        self._vmm.signal(signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """Lets it run on."""
        self._vmm.signal(signal.SIGCONT)
        self._paused = False

    def state(self) -> State:
        """What the machine is doing."""
        if self._vmm.is_running:
            return State.PAUSED if self._paused else State.RUNNING
        return State.OFF if self.exitcode == 0 else State.DIED

    def shut_down(self, *, deadline: Deadline) -> bool:
        """Has it shut down in order; whether it had by the deadline."""
        self._halt(deadline)
        return not self._vmm.is_running

    def reboot(self, *, deadline: Deadline) -> bool:
        """Has it shut down, and starts it again: smolvm's machines cannot reboot by themselves."""
        self._between = True
        try:
            self._halt(deadline)
        except BaseException:
            self._between = False
            raise
        self._boot(deadline)
        return True

    def cut(self) -> None:
        """Kills the process that runs it."""
        self._vmm.kill()

    def stop(self) -> None:
        """Ends it at once and frees what it held; smolvm keeps its disk until `discard`. May be called again."""
        self.cut()
        self._channel.close()
        self._follower.close()
