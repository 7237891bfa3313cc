"""One smolvm machine: made from an image or a pack, started, watched while it runs, packed, removed."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from pytest_vmbottle.backends.kernel_watch import KernelWatch
from pytest_vmbottle.backends.port import CannotSave, Console, Instance, Start, State
from pytest_vmbottle.backends.smolvm.channel import SmolvmChannel
from pytest_vmbottle.backends.smolvm.engine import Creation, Engine
from pytest_vmbottle.backends.smolvm.vmm import Follower, Vmm, me
from pytest_vmbottle.channels.port import GUEST_PATH, Channel, Command
from pytest_vmbottle.errors import GuestPanic, MachineDied, MachineError, MachineTimeout, SmolvmError
from pytest_vmbottle.host import records
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.spec.pack_kind import PackKind

__all__ = ["CHECKPOINT", "PACK", "Maker", "SmolvmInstance", "packed_in"]

log = logging.getLogger(__name__)

PACK, CHECKPOINT = "machine.smolmachine", "machine.checkpoint"
"""Names of a saved machine's files: its disks, or its disks and RAM."""

_RECORD, _CONSOLE, _AGENT_LOG = "smolvm.json", "console.log", "agent-console.log"
_FLAKE = "boot process exited (code 0) before the agent was ready"
"""Message of a start that fails at random, as it may with emulated processors; a second call works."""
_READY = Command(argv=("true",), env=(("PATH", GUEST_PATH),))
_SYNC = Command(argv=("sync",), env=(("PATH", GUEST_PATH),))
_STOP = 60.0
_ASK = 15.0


def packed_in(folder: Path) -> Path:
    """Return the file in a saved machine's folder from which a machine is made."""
    checkpoint = folder / CHECKPOINT
    return checkpoint if checkpoint.exists() else folder / PACK


@attrs.frozen(kw_only=True)
class Maker:
    """Starter of smolvm machines.

    Attributes:
        engine: The smolvm to use.
        kind: The kind of pack to make.
        warn: Function that shows a warning to the user.
        source_of: Function that returns the running machine from which clones of a folder branch.
    """

    engine: Engine
    kind: PackKind
    warn: Callable[[str], None]
    source_of: Callable[[Path, MachineSpec, Deadline], str]

    def start(self, spec: MachineSpec, source: Start, rundir: Path, deadline: Deadline) -> SmolvmInstance:
        """Make a machine and start it, or only start an existing one."""
        record = _Record.read(rundir)
        if source.kept and record is not None:
            return self._started(spec, source, rundir, record, deadline)
        # An earlier machine of this folder, which nobody wants to keep, has the name that the new one gets.
        if record is not None:
            self.engine.delete(record.name, deadline=deadline)
        known = dict(source.forwards)
        record = _Record(name=machine_name(rundir), ports={port: known.get(port) or _free_port() for port in spec.ports})
        # Before anything is made, so that a crash in between leaves a record by which the machine is found.
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
        """Start a machine; if that fails at random, start it once more, as a new one if allowed."""
        try:
            return self.engine.start(name, branchable=branchable, deadline=deadline)
        except SmolvmError as error:
            if _FLAKE not in error.stderr:
                raise
            self.warn(f"smolvm could not start the machine {name} at the first attempt, so it is started once more: {_FLAKE}")
        if anew:
            self.engine.delete(name, deadline=deadline)
            self.engine.create(name, made_of, deadline=deadline)
        return self.engine.start(name, branchable=branchable, deadline=deadline)

    def discard(self, rundir: Path) -> None:
        """Remove smolvm's data of a folder's machine, if there is any."""
        record = _Record.read(rundir)
        if record is None:
            return
        try:
            self.engine.delete(record.name, deadline=Deadline(_STOP))
        except MachineError as error:
            self.warn(f"smolvm could not remove the machine {record.name}: {error}")


def creation(spec: MachineSpec, source: Start, ports: Mapping[int, int]) -> Creation:
    """Return the parameters of a machine."""
    is_pack = source.image.endswith(".smolmachine")
    packed = packed_in(source.saved) if source.saved is not None else Path(source.image) if is_pack else None
    return Creation(
        image="" if packed is not None else source.image,
        packed=packed,
        cpus=spec.cpus,
        memory=spec.memory,
        network=spec.networks or spec.nat,
        ports=ports,
        label=me(),
        disk=spec.disk or 0,
        nested=spec.nested,
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def machine_name(rundir: Path) -> str:
    """Return smolvm's name for a folder's machine, unique on this host."""
    return "".join(letter if letter.isalnum() else "-" for letter in rundir.name.lower())


def _free_port() -> int:
    """Return a free port of this host.

    smolvm takes it a moment later, and fails if it is in use by then.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@attrs.frozen(kw_only=True)
class _Record:
    """Record of a machine in its folder: its name and its ports."""

    name: str
    ports: Mapping[int, int]

    @classmethod
    def read(cls, rundir: Path) -> _Record | None:
        try:
            return records.read_as(
                rundir / _RECORD, lambda facts: cls(name=facts["name"], ports={int(guest): host for guest, host in facts["ports"].items()})
            )
        except FileNotFoundError:
            return None
        except records.Damaged as error:
            # The machine's name is lost with it: `vmbottle gc` finds machines by their labels.
            log.warning("the record %s cannot be read, so its machine is left alone: %s", rundir / _RECORD, error)
            return None

    def write(self, rundir: Path) -> None:
        records.write(rundir / _RECORD, {"name": self.name, "ports": dict(self.ports)})


class SmolvmInstance(Instance):
    """A running smolvm machine."""

    hypervisor = "smolvm"

    def __init__(  # noqa: PLR0913 - all that it consists of
        self, maker: Maker, spec: MachineSpec, source: Start, *, rundir: Path, record: _Record, vmm: Vmm, branchable: bool = False
    ) -> None:
        """Take a machine that was just started."""
        self._maker, self._engine, self._spec, self._source = maker, maker.engine, spec, source
        self._rundir, self._name, self._ports, self._vmm = rundir, record.name, dict(record.ports), vmm
        self._paused = self._ended_in_order = False
        self._branchable = branchable
        self._between = False  # stopped, to be started again at once
        self._channel = SmolvmChannel(self._engine, self._name, alive=self.alive)
        # Before the follower, which begins to write at once: the watch leaves out what is there when it is made.
        self._watch = KernelWatch(rundir / _CONSOLE)
        data = self._engine.data_dir(self._name)
        self.console = Console(rundir / _CONSOLE, ended=lambda: not self._vmm.is_running)
        self._follower = Follower(data / _AGENT_LOG, rundir / _CONSOLE)

    @property
    def name(self) -> str:
        """The name that smolvm has for the machine."""
        return self._name

    @property
    def pid(self) -> int:
        """ID of the process that runs the machine."""
        return self._vmm.pid

    @property
    def argv(self) -> tuple[str, ...]:
        """Command line that started the machine."""
        return (str(self._engine.program.path), "machine", "start", "--state-dir", str(self._engine.state), "--name", self._name)

    # -- what it says ----------------------------------------------------------------------------------------------------------------

    @property
    def exitcode(self) -> int | None:
        """0 after the guest powered off or was shut down, 1 after another end; None while it runs."""
        if self._vmm.is_running or self._between:
            return None
        return 0 if self._ended_in_order or self._look().powered_off else 1

    def _look(self) -> KernelWatch:
        # Now, because the follower copies only every 0.1 s: a panic must be known before the machine's end is reported.
        self._follower.catch_up()
        return self._watch.look()

    @property
    def panic(self) -> str | None:
        """The console line that reports trouble in the guest's kernel."""
        return self._look().trouble

    def alive(self) -> None:
        """Return if the guest can still answer.

        Raises:
            GuestPanic: Its kernel reported a failure that the spec does not expect.
            MachineDied: The process that ran it has ended.
        """
        # First, since a panic explains the end of the process that may follow it.
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
        """Return the channel, once it has answered (see `Instance.channel`)."""
        said = ["it did not answer"]
        if not deadline.poll(lambda: self._answers(deadline, said), every=0.5, first=0.05):
            message = f"smolvm's agent did not answer within {deadline.seconds:.0f} s; last failure: {said[-1]}"
            raise MachineTimeout(message, machine=self._spec.name, console_tail=self.console.tail(20), argv=self.argv)
        return self._channel

    def _answers(self, deadline: Deadline, said: list[str]) -> bool:
        self.alive()
        try:
            # A limit for each attempt: a smolvm that hangs must not take all the time that there is.
            answer = self._channel.run(_READY, deadline=Deadline(max(1.0, min(_ASK, deadline.remaining))))
        except SmolvmError as error:
            said.append(str(error).splitlines()[0])
            return False
        return answer.returncode == 0

    def forward(self, port: int) -> tuple[str, int]:
        """Return the address on 127.0.0.1 that leads to a TCP port of the guest; the spec has to name the port."""
        if port not in self._ports:
            listed = [*self._ports, port]
            raise MachineError(f"smolvm forwards only the ports in the mark: write ports={listed} in it", machine=self._spec.name)
        return "127.0.0.1", self._ports[port]

    @property
    def forwards(self) -> Mapping[int, int]:
        """Host ports that lead to the guest, by guest port."""
        return self._ports

    # -- packs -----------------------------------------------------------------------------------------------------------------------

    def save(self, dest: Path, *, kind: PackKind, deadline: Deadline) -> None:
        """Write the machine into a folder and end it (see `Instance.save`)."""
        if kind is PackKind.DISK:
            self._pack(dest, deadline)
        else:
            self._save_running(dest / CHECKPOINT, deadline)
        self.stop()

    def _save_running(self, dest: Path, deadline: Deadline) -> None:
        if not self._branchable:
            raise CannotSave("smolvm could not start the machine so that its RAM can be saved", machine=self._spec.name)
        self._channel.run(_SYNC, deadline=deadline)
        try:
            self._engine.checkpoint(self._name, dest, deadline=deadline)
        except SmolvmError as error:
            dest.unlink(missing_ok=True)
            raise CannotSave(_first_line(error), machine=self._spec.name) from error

    def _pack(self, dest: Path, deadline: Deadline) -> None:
        self._halt(deadline)
        self._engine.pack(dest / PACK.removesuffix(".smolmachine"), machine=self._name, deadline=deadline)

    def _halt(self, deadline: Deadline) -> None:
        # Before the end, which other threads may see at once.
        self._ended_in_order = True
        try:
            self._engine.stop(self._name, deadline=deadline)
        except BaseException:
            self._ended_in_order = False
            raise
        self._channel.close()
        self._vmm.wait(Deadline(min(_STOP, deadline.remaining)))

    def snapshot(self, dest: Path, *, whole: bool, deadline: Deadline) -> bool:  # noqa: ARG002 - it is always whole
        """Stop the machine, pack it and start it again (see `Instance.snapshot`).

        Its disk is kept, its processes are not.
        """
        self._between = True
        try:
            self._pack(dest, deadline)
        finally:
            # Whatever became of the pack: the machine was running, and is to run on.
            self._boot(deadline)
        return True

    def _boot(self, deadline: Deadline) -> None:
        made_of = creation(self._spec, self._source, self._ports)
        try:
            # Never as a new machine: its disk is what the snapshot or the reboot is to keep.
            self._vmm = Vmm(self._maker.start_twice(self._name, made_of, deadline=deadline, anew=False))
        finally:
            # After a failure too, or a machine that could not be started again would count as running.
            self._between = False
        self._follower.catch_up()
        # The messages of the shutdown are an earlier boot's.
        self._watch.forget()
        self._ended_in_order = self._paused = False
        self.channel(deadline=deadline)

    # -- power -----------------------------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop the process that runs the machine."""
        self._vmm.signal(signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """Let the process run on."""
        self._vmm.signal(signal.SIGCONT)
        self._paused = False

    def state(self) -> State:
        """Return the state of the machine."""
        if self._vmm.is_running:
            return State.PAUSED if self._paused else State.RUNNING
        return State.OFF if self.exitcode == 0 else State.DIED

    def shut_down(self, *, deadline: Deadline) -> bool:
        """Have the machine shut down in order; return whether it did by the deadline."""
        self._halt(deadline)
        return not self._vmm.is_running

    def reboot(self, *, deadline: Deadline) -> bool:
        """Shut the machine down and start it again: smolvm's machines cannot reboot by themselves."""
        self._between = True
        try:
            self._halt(deadline)
        except BaseException:
            self._between = False
            raise
        self._boot(deadline)
        return True

    def cut(self) -> None:
        """Kill the process that runs the machine."""
        self._vmm.kill()

    def stop(self) -> None:
        """End the machine at once and free its resources; may be called again.

        smolvm keeps its disk until `discard`.
        """
        self.cut()
        self._channel.close()
        self._follower.close()
