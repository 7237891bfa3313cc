"""One QEMU machine: started cold or from a saved state, watched while it runs, saved, ended."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import attrs

from pytest_vmbottle.backends.console import Console, ConsoleInput, Recorder
from pytest_vmbottle.backends.kernel_watch import KernelWatch
from pytest_vmbottle.backends.port import CannotSave, Chord, DataDisk, DiskErrors, Instance, Loss, NotPlugged, SshAccess, Start, State
from pytest_vmbottle.backends.qemu import capture, display
from pytest_vmbottle.backends.qemu.after_restore import AfterRestore
from pytest_vmbottle.backends.qemu.command_line import NIC, DiskSlot, Emulator
from pytest_vmbottle.backends.qemu.disks import OVERLAY, Disks
from pytest_vmbottle.backends.qemu.forwards import Forwards
from pytest_vmbottle.backends.qemu.guest_channels import GuestChannels, Host
from pytest_vmbottle.backends.qemu.hot_ports import HotPorts
from pytest_vmbottle.backends.qemu.hotplug import DiskPort
from pytest_vmbottle.backends.qemu.lan_cards import LanCards
from pytest_vmbottle.backends.qemu.own_memory import OWN_MEMORY, Memory, OwnMemory, copier
from pytest_vmbottle.backends.qemu.process import QemuProcess
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed, QmpLost
from pytest_vmbottle.backends.qemu.ram import RAM_FILE, Ram
from pytest_vmbottle.backends.qemu.shares import Shares
from pytest_vmbottle.channels.port import GUEST_PATH, Channel, Command
from pytest_vmbottle.errors import GuestPanic, MachineDied, MachineError, MachineTimeout
from pytest_vmbottle.host import records
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import copy_sparse, descriptor
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.shown import printable
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.spec.pack_kind import PackKind

__all__ = ["CONSOLE", "Parts", "QemuInstance", "Saved", "Sockets", "signal_hint"]

_GRACE = 10.0
_MOMENT = 2.0
"""Seconds within which a QEMU whose monitor has closed ends."""
_SAVED, _STATE = "saved.json", "state.bin"
_DISK_CHANGE = read_script(__package__, "disk_change.py")
_WAY_OUT = read_script(__package__, "way_out.py")
CONSOLE = "console.log"
# Exclusive, so that nothing that stands there is written over, or through as a link.
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL
_FULL = 1 << 20
"""Most free bytes of a file system that counts as full."""
_DEBUG = "gdb"
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+@-]{1,107}")
"""Paths that a socket can have, and that mean nothing else to QEMU's monitor."""


@attrs.frozen
class Sockets:
    """Our ends of a machine's sockets."""

    qmp: socket.socket
    agent: socket.socket
    waker: socket.socket
    runner: socket.socket
    console: socket.socket

    def close(self) -> None:
        """Close the sockets."""
        for line in (self.qmp, self.agent, self.waker, self.runner, self.console):
            line.close()


@attrs.frozen(kw_only=True)
class Saved:
    """Facts about a saved machine besides its state, in its folder.

    Attributes:
        kind: The kind of pack.
        nonce: The secret that identifies it after a restore.
        agent: Whether it has a guest agent.
        login: See `GuestAgent.login`.
        ports: The port of each disk beside the root disk, by the disk's name.
        runner: Whether it has a runner.
        nameless: Whether its state does not begin with the name of the machine (`Qmp.save_devices`).
        differs: Whether its RAM is that of a pack with the pages of `OWN_MEMORY`.
        cards: The port of each network card on a private LAN, by the card's MAC address.
    """

    kind: PackKind
    nonce: str
    agent: bool
    login: int | None
    ports: Mapping[str, str] = attrs.field(factory=dict)
    runner: bool = False
    nameless: bool = False
    differs: bool = False
    cards: Mapping[str, str] = attrs.field(factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Saved:
        """Read the facts in a folder."""
        return records.read_as(folder / _SAVED, lambda facts: cls(**{**facts, "kind": PackKind(facts["kind"])}))

    def write(self, folder: Path) -> None:
        """Write the facts into a folder."""
        # Without a checksum of its own, because the pack's manifest has one of each file.
        records.write(folder / _SAVED, attrs.asdict(self), version=0)


@attrs.frozen(kw_only=True)
class Parts:
    """Host resources of a started QEMU."""

    process: QemuProcess
    qmp: Qmp
    lines: Sockets
    recorder: Recorder
    watch: KernelWatch
    ram: Ram
    rundir: Path
    disks: tuple[DiskSlot, ...]


class QemuInstance(Instance):
    """A running QEMU machine."""

    hypervisor = "QEMU"

    def __init__(self, spec: MachineSpec, source: Start, *, emulator: Emulator, parts: Parts) -> None:
        """Take over the resources that `start` has made."""
        self._spec, self._source, self._emulator = spec, source, emulator
        self._process, self._qmp, self._ram, self._rundir = parts.process, parts.qmp, parts.ram, parts.rundir
        self.console = Console(parts.rundir / CONSOLE, ended=lambda: self._process.exitcode is not None)
        self._recorder = parts.recorder
        self._console_input = ConsoleInput(parts.lines.console)
        self._watch = parts.watch
        self._channels = GuestChannels(
            parts.lines.agent,
            parts.lines.runner,
            Host(
                alive=self.alive,
                agent_is_there=lambda: self._is_open("agent"),
                runner_is_there=lambda: self._is_open("runner"),
                agent_changes=lambda: self._qmp.changes("agentport"),
                runner_changes=lambda: self._qmp.changes("runnerport"),
                ssh_address=lambda: self.forward(22),
                keys=source.keys,
                emulated=emulator.accelerator.name == "tcg",
            ),
        )
        self._waker = AfterRestore(parts.lines.waker, lambda: self._is_open("waker"))
        self._disk_port = DiskPort(parts.qmp, alive=self.alive)
        self._disks = Disks(parts.qmp, parts.disks, account=emulator.account, alive=self.alive)
        ports = HotPorts()
        self._cards, self._shares = LanCards(parts.qmp, ports), Shares(parts.qmp, ports, parts.rundir)
        self._nameless, self._nonce = False, ""
        self._forwards = Forwards(self._monitor)

    @property
    def pid(self) -> int:
        """Process ID of QEMU."""
        return self._process.pid

    @property
    def argv(self) -> tuple[str, ...]:
        """Command line of QEMU."""
        return self._process.argv

    @property
    def overlay(self) -> Path:
        """File of the machine's own disk (see `Instance.overlay`)."""
        return self._rundir / OVERLAY

    @property
    def exitcode(self) -> int | None:
        """Exit status of QEMU: 0 after the guest powered off; None while it runs."""
        return self._process.exitcode

    @property
    def panic(self) -> str | None:
        """The console line that reports a kernel panic, a kernel bug or a hung task."""
        return self._watch.look().trouble or ("the guest's kernel panicked" if self._qmp.seen("GUEST_PANICKED") else None)

    def alive(self) -> None:
        """Return if the guest can still answer.

        Raises:
            GuestPanic: Its kernel reported a failure that the spec does not expect, or that ended it.
            MachineDied: It gave up booting, or QEMU ended: with the cause and the console's last lines.
        """
        # In order of certainty: a panic explains the end that follows it, and the exit status would hide it.
        panic = self.panic
        # Whatever the spec expects: after a panic nothing answers any more, while a guest may survive an oops or a hung task.
        if panic and (self._watch.is_over or self._qmp.seen("GUEST_PANICKED")):
            raise self._died(f"the guest is lost: {panic}", GuestPanic)
        if panic and self._spec.panic == "fail":
            raise self._died(f"the guest's kernel is in trouble: {panic}", GuestPanic)
        status = self._process.exitcode
        if status is not None:
            raise self._died(f"QEMU ended with status {status}{signal_hint(status)}")
        # A test that expects trouble may go on from such a prompt, by the console.
        if self._watch.stuck and self._spec.panic == "fail":
            raise self._died(f"the guest is lost: {self._watch.stuck}")
        # By default QEMU pauses a guest whose disk is full. It would wait for ever, so it counts as lost.
        if self._qmp.seen("BLOCK_IO_ERROR", action="stop"):
            raise self._died("the guest was stopped because its disk could not be written: is the catalog's file system full?")

    def _died(self, message: str, kind: type[MachineDied] = MachineDied) -> MachineDied:
        # The recorder reads in another thread, so the last lines may not be in the file yet.
        if self._process.exitcode is not None:
            self._recorder.finish()
        output = self._process.output.strip()
        detail = f"\nQEMU printed: {output}" if output else ""
        tail = self.console.tail(80 if kind is GuestPanic else 30)  # a panic has some 50 lines
        return kind(message + detail, machine=self._spec.name, console_tail=tail, argv=self.argv, exitcode=self._process.exitcode)

    def channel(self, *, deadline: Deadline, bulk: bool = False) -> Channel:
        """Return the guest agent, or SSH for much data or without an agent (see `Instance.channel`)."""
        try:
            return self._channels.get(deadline, bulk=bulk)
        except MachineTimeout as error:
            raise MachineTimeout(str(error), machine=self._spec.name, console_tail=self.console.tail(30), argv=self.argv) from error

    def _is_open(self, port: str) -> bool:
        with self._asked(f"tell whether the guest has its {port} port open"):
            return self._qmp.is_open(port, deadline=Deadline(_GRACE))

    def forward(self, port: int) -> tuple[str, int]:
        """Return the address on 127.0.0.1 that leads to a TCP port of the guest; the kernel chooses its number."""
        found = self._forwards.find(port)
        if found is None:
            raise MachineError(f"QEMU did not forward the guest's port {port}", machine=self._spec.name)
        return "127.0.0.1", found

    def forward_from(self, here: int, port: int) -> None:
        """Forward a chosen port (see `Instance.forward_from`)."""
        self._forwards.keep([(port, here)])
        if self.forward(port)[1] != here:
            raise MachineError(f"the port {here} of this computer is in use, or may not be listened on", machine=self._spec.name)

    @property
    def forwards(self) -> Mapping[int, int]:
        """Host ports that were given out, by guest port."""
        return dict(self._forwards.told)

    def keep_forwards(self) -> None:
        """Forward the host ports of the machine's previous run again."""
        self._forwards.keep(self._source.forwards)

    def _monitor(self, line: str) -> str:
        with self._asked(f"run {line}"):
            return str(self._qmp.execute("human-monitor-command", command_line=line, deadline=Deadline(_GRACE)))

    def ssh_access(self) -> SshAccess:
        """Return the address and keys for any SSH client."""
        return SshAccess(address=self.forward(22), user="root", keys=self._source.keys, folder=self._rundir)

    def screenshot(self, kind: Literal["png", "ppm"] = "png") -> bytes:
        """Return a screenshot."""
        with self._asked("take a screenshot"):
            return display.screenshot(self._qmp, self._rundir, kind)

    def press(self, chords: Iterable[Chord]) -> None:
        """Press keys (see `Instance.press`)."""
        with self._asked("press keys"):
            display.press(self._qmp, chords)

    def write_console(self, data: bytes, *, deadline: Deadline) -> None:
        """Send data to the guest's serial port (see `Instance.write_console`)."""
        try:
            self._console_input.write(data, deadline)
        except OSError as error:
            self._process.wait(Deadline(_MOMENT)) if not isinstance(error, TimeoutError) else None
            self.alive()
            raise MachineError(f"cannot type on the serial console: {error}", machine=self._spec.name) from error

    def qmp(self, command: str, arguments: Mapping[str, object], *, deadline: Deadline) -> object:
        """Run a command of the monitor (see `Instance.qmp`)."""
        with self._asked(f"run {command}"):
            answer: object = self._qmp.call(command, arguments, deadline=deadline)
            return answer

    def link(self, *, up: bool, mac: str | None = None) -> None:
        """Plug in a cable or pull it (see `Instance.link`)."""
        with self._asked("plug or unplug the network cable"):
            display.set_link(self._qmp, NIC if mac is None else self._cards.card(mac), up=up)

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """Translate a failed QMP command: the machine is gone, or it cannot do this."""
        try:
            yield
        except QmpFailed as error:
            # The monitor closes before the process ends. Its exit status, and so the reason, is known a moment later.
            if isinstance(error, QmpLost):
                self._process.wait(Deadline(_MOMENT))
            self.alive()
            raise MachineError(f"QEMU could not {what}: {error}", machine=self._spec.name) from error

    def disk(self, file: int, *, serial: str, writable: bool, deadline: Deadline) -> AbstractContextManager[Callable[[], int]]:
        """Plug in a disk for the length of a block (see `Instance.disk`)."""
        # Without ACPI hot-plug a guest waits 5 s before it releases a device.
        if not self._emulator.board.quick_hotplug:
            raise NotPlugged(f"guests for {self._spec.arch} take too long to release a disk")
        return self._disk_port.disk(file, serial=serial, writable=writable, deadline=deadline)

    @property
    def data(self) -> tuple[DataDisk, ...]:
        """The disks beside the root disk."""
        return self._disks.data

    def plug_disk(self, disk: DataDisk) -> None:
        """Plug in one more disk (see `Instance.plug_disk`)."""
        self._disks.plug(disk)

    def unplug_disk(self, name: str, *, deadline: Deadline) -> None:
        """Remove a disk (see `Instance.unplug_disk`)."""
        self._disks.unplug(name, deadline)

    def release_disk(self, name: str, *, deadline: Deadline) -> bool:
        """Have the guest unmount a disk (see `Instance.release_disk`)."""
        return self._told_of_disk(f"release({name!r})", ("free", "used"), deadline) == "free"

    def change_disk(self, disk: DataDisk, *, deadline: Deadline) -> None:
        """Put a disk in the place of another one (see `Instance.change_disk`)."""
        with self._asked("change a disk"):
            self._disks.change(disk)
        self._told_of_disk(f"changed({disk.name!r}, {str(uuid.uuid4())!r})", ("seen",), deadline)

    def _told_of_disk(self, call: str, answers: Sequence[str], deadline: Deadline) -> str:
        answer = self._waker.do(f"{_DISK_CHANGE}\nanswer = {call}\n", deadline=deadline)
        if answer not in answers:
            self.alive()
            raise MachineError(f"the guest could not do {call}: {printable(answer)}", machine=self._spec.name)
        return answer

    def record_writes(self, name: str, folder: Path) -> AbstractContextManager[Path]:
        """Record what the guest writes to a disk (see `Instance.record_writes`)."""
        return self._disks.recorded(name, folder)

    def bound_logs(self) -> Sequence[str]:
        """End logs of writes that have become too long (see `Instance.bound_logs`)."""
        with self._asked("end the log of a disk"):
            return self._disks.bound_logs()

    @contextmanager
    def disk_errors(self, name: str, errors: DiskErrors) -> Iterator[None]:
        """Have requests to a disk fail (see `Instance.disk_errors`)."""
        with self._asked("put a fault on a disk"), self._disks.errors(name, errors):
            yield

    @contextmanager
    def slow_disk(self, name: str, *, iops: float, bytes_per_second: float) -> Iterator[None]:
        """Limit what a disk takes in a second (see `Instance.slow_disk`)."""
        with self._asked("put a fault on a disk"), self._disks.slow(name, iops=iops, bytes_per_second=bytes_per_second):
            yield

    def lying_disk(self, name: str) -> AbstractContextManager[None]:
        """Count no flush of a disk as one (see `Instance.lying_disk`)."""
        return self._disks.lying(name)

    def capture(self, file: Path) -> None:
        """Record the traffic of the card (see `Instance.capture`)."""
        with self._asked("record network traffic"):
            capture.begin(self._qmp, file, self._emulator.account)

    def end_capture(self) -> None:
        """Stop recording (see `Instance.end_capture`)."""
        with self._asked("stop recording network traffic"):
            capture.end(self._qmp)

    def plug_card(self, wire: socket.socket, *, mac: str) -> None:
        """Plug a card for a private LAN into a free port (see `Instance.plug_card`)."""
        with self._asked("plug in a network card"):
            self._cards.plug(wire, mac=mac)

    def _unplug_card(self, mac: str, deadline: Deadline) -> None:
        with self._asked("remove a network card"):
            # Removal needs the guest, and one that is booting may ignore a request: it is asked again.
            if not deadline.poll(lambda: self._cards.unplugged(mac), every=0.2, first=0.05):
                raise MachineError(f"the guest did not release its network card {mac}", machine=self._spec.name)

    def debug_stub(self) -> Path:
        """Have QEMU's gdb stub listen (see `Instance.debug_stub`)."""
        path = self._rundir / _DEBUG
        if not _PLAIN_PATH.fullmatch(str(path)):
            message = f"a debugger cannot connect to {path}: a socket needs a short and plain path: choose another --vm-catalog"
            raise MachineError(message, machine=self._spec.name)
        if not path.exists():
            said = self._monitor(f"gdbserver unix:{path},server=on,wait=off").strip()
            if not path.exists():
                raise MachineError(f"QEMU does not listen for a debugger: {printable(said)}", machine=self._spec.name)
            path.chmod(0o600)
        return path

    def plug_share(self, folder: Path, *, tag: str) -> None:
        """Plug in a folder of the host (see `Instance.plug_share`)."""
        with self._asked("share a folder"):
            self._shares.plug(folder, tag=tag)

    def unplug_share(self, tag: str, *, deadline: Deadline) -> None:
        """Remove a folder (see `Instance.unplug_share`)."""
        with self._asked("take a shared folder away"):
            if not deadline.poll(lambda: self._shares.unplugged(tag), every=0.2, first=0.05):
                raise MachineError(f"the guest did not release its shared folder {tag}", machine=self._spec.name)

    def restore(self, folder: Path, saved: Saved, *, deadline: Deadline) -> None:
        """Load a saved state, let it run, and set the guest's clock; it is on no private LAN."""
        self._nameless, self._nonce = saved.nameless, saved.nonce
        for mac, port in saved.cards.items():
            self._cards.expect(mac, port)
        if saved.differs:
            self._load_differing(folder, deadline)
        else:
            self._migrate("migrate-incoming", folder / _STATE, saved.kind, deadline)
        self._qmp.execute("cont", deadline=deadline)
        # Before any channel is used: no command may see the old clock, or draw the random numbers that other clones draw.
        self._waker.wake(saved.nonce, deadline=Deadline(min(deadline.remaining, 20.0)))
        if self._spec.nat:
            # DHCP names no gateway to a machine without a network, as which the guest may have been saved, nor does the guest ask again.
            self._waker.do(f"{_WAY_OUT}\nanswer = lead_out()\n", deadline=deadline)
        self._channels.adopt(has_agent=saved.agent, login=saved.login, has_runner=saved.runner, deadline=deadline)
        # With their addresses, which are those of the machine that was saved.
        for mac in saved.cards:
            self._unplug_card(mac, deadline)

    def _load_differing(self, folder: Path, deadline: Deadline) -> None:
        memory = Memory(self.pid, self._ram.path, self._monitor)
        with OwnMemory.opened(folder / OWN_MEMORY) as own:
            # Before the devices, which read their queues from the RAM.
            own.into_ram(memory)
            self._migrate("migrate-incoming", folder / _STATE, PackKind.STREAM, deadline)
            own.into_others(memory)

    def attach(self, slots: Iterable[DiskSlot]) -> None:
        """Plug in disks whose overlays are in the machine's folder, since its saved state does not have them."""
        for slot in slots:
            self._disks.attach(slot)

    def _migrate(self, verb: Literal["migrate", "migrate-incoming"], file: Path, kind: PackKind, deadline: Deadline) -> None:
        dialect = self._emulator.dialect
        self._qmp.migrate(verb, file, capabilities=dialect.capabilities(kind), by_name=dialect.state_files, deadline=deadline)

    def save(self, dest: Path, *, kind: PackKind, deadline: Deadline) -> None:
        """Stop the machine for good and write it into a folder (see `Instance.save`)."""
        # Its writes to RAM are private to the process, and in no file that could be copied.
        if self._ram.private:
            raise MachineError("this machine shares its pack's RAM and cannot be saved; start it for building", machine=self._spec.name)
        if kind is PackKind.DISK:
            self._shut_down(deadline)
        else:
            self._save_running(dest, kind, deadline)
        # After QEMU's end, which has flushed it. Moved, because the machine is over and a disk may be large.
        for slot in self._disks.slots:
            shutil.move(slot.file, dest / slot.file.name)

    def _save_running(self, dest: Path, kind: PackKind, deadline: Deadline) -> None:
        self._channels.has_agent = None  # whoever built on this machine may have installed it, or taken it away
        channel = self.channel(deadline=deadline)
        channel.run(Command(argv=("sync",), env=(("PATH", GUEST_PATH),)), deadline=deadline)
        with self._nothing_plugged(deadline):
            nonce = self._waker.freeze(channel, deadline=deadline)
            self._channels.start_runner(deadline)
            with self._channels.runner.quiet(deadline):
                saved = self._saved(kind, nonce)
                self.pause()
                with descriptor(dest / _STATE, _NEW):
                    self._migrate("migrate", dest / _STATE, kind, deadline)
                self._end()
        if kind is PackKind.TEMPLATE:
            with descriptor(dest / RAM_FILE, _NEW) as file:
                # Through the descriptor: the RAM may be a memfd, which has no name that could be moved.
                copy_sparse(self._ram.fd, file)
        saved.write(dest)

    def snapshot(self, dest: Path, *, whole: bool, deadline: Deadline) -> bool:
        """Write the machine into a folder; it continues (see `Instance.snapshot`)."""
        with self._nothing_plugged(deadline):
            # Before the pause: the guest has to run to start the process that will set its clock.
            nonce = self._nonce = self._waker.freeze(self.channel(deadline=deadline), deadline=deadline)
            # Without a mapping of its own, its pages would be those of others too.
            whole = whole or not self._ram.private
            try:
                with self._channels.runner.quiet(deadline):
                    (self._write_whole if whole else self._write_differing)(dest, deadline)
            except QmpFailed as error:
                # The failed migration may be QEMU's end, whose reason `alive` reports; it is seen in the process a moment later.
                self._process.wait(Deadline(0.5))
                self.alive()
                raise OSError(errno.ENOSPC if _is_full(dest) else errno.EIO, str(error)) from error
            # The guest's clock stood still while the machine was written.
            self._waker.wake(nonce, deadline=deadline)
        self._saved(PackKind.STREAM, nonce, differs=not whole).write(dest)
        return whole

    def _saved(self, kind: PackKind, nonce: str, *, differs: bool = False) -> Saved:
        agent = self._channels.agent
        return Saved(
            kind=kind,
            nonce=nonce,
            agent=bool(self._channels.has_agent),
            login=agent.login,
            runner=self._channels.runner.is_ready,
            ports=self._disks.ports,
            # A QEMU that was started to load such a state writes others in the same way.
            nameless=differs or self._nameless,
            differs=differs,
            cards=self._cards.plugged,
        )

    @contextmanager
    def _nothing_plugged(self, deadline: Deadline) -> Iterator[None]:
        """Keep the disk port empty for the length of a block."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._disk_port.reserved(deadline))
            except NotPlugged as error:
                raise CannotSave(f"{error}; a machine cannot be saved with a disk plugged in", machine=self._spec.name) from error
            yield

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            self.resume()  # after a migration, this also gives QEMU its disks back

    def _write_whole(self, dest: Path, deadline: Deadline) -> None:
        with descriptor(dest / _STATE, _NEW), self._standing_still():
            self._migrate("migrate", dest / _STATE, PackKind.STREAM, deadline)
            # Only now: with the end of the migration QEMU has written its disks out, and does not touch them before it gets them back.
            self._copy_disks(dest)

    def _write_differing(self, dest: Path, deadline: Deadline) -> None:
        """Write what the pack has not: while it stands still nothing is done that takes long."""
        memory = Memory(self.pid, self._ram.path, self._monitor)
        with descriptor(dest / _STATE, _NEW) as state, descriptor(dest / OWN_MEMORY, _NEW) as file, copier(memory) as copy:
            with self._standing_still():
                self._qmp.save_devices(state, deadline=deadline)
                own = copy()
                # QEMU has written its disks out when it stopped.
                self._copy_disks(dest)
            own.save(file)

    def _copy_disks(self, dest: Path) -> None:
        for slot in self._disks.slots:
            with descriptor(slot.file, os.O_RDONLY) as disk, descriptor(dest / slot.file.name, _NEW) as copy:
                copy_sparse(disk, copy)

    def state(self) -> State:
        """Return the state: off if QEMU ended by itself without complaint."""
        try:
            self.alive()
            paused = self._qmp.execute("query-status", deadline=Deadline(_GRACE))["status"] == "paused"
        except MachineDied:
            return State.OFF if self._process.exitcode == 0 else State.DIED
        except QmpFailed:  # it is just ending
            return State.OFF if self._process.wait(Deadline(_GRACE)) == 0 else State.DIED
        return State.PAUSED if paused else State.RUNNING

    def shut_down(self, *, deadline: Deadline) -> bool:
        """Have the guest power off in order; return whether it did by the deadline."""
        self._ask_to("poweroff", deadline)
        while self._process.wait(Deadline(min(0.5, deadline.remaining))) is None and not deadline.expired:
            self._check_lost()
        return self._process.exitcode is not None

    def reboot(self, *, deadline: Deadline) -> bool:
        """Have the guest reboot in order, and forget the channels; return whether it had restarted by the deadline."""
        # The event, not a channel that answers, proves the reset: the old system answers until its last moment.
        before = self._qmp.resets
        self._ask_to("reboot", deadline)
        while self._qmp.resets == before:
            if self._process.wait(Deadline(min(0.1, deadline.remaining))) is not None or deadline.expired:
                return False
            self._check_lost()
        self._channels.forget()
        self._forget_trouble()
        self._nonce = ""
        return True

    def _ask_to(self, program: str, deadline: Deadline) -> None:
        channel = self.channel(deadline=deadline)
        # Sleep half a second, so that the channel can answer before it is cut. Streams are closed, or the agent would wait for their end.
        script = f"sync; (sleep 0.5; {program}) >/dev/null 2>&1 </dev/null &"
        with suppress(MachineError):  # the channel may be cut before it has answered
            channel.run(Command(argv=("/bin/sh", "-c", script), env=(("PATH", GUEST_PATH),)), deadline=deadline)

    def _check_lost(self) -> None:
        if self.state() is State.DIED:
            self.alive()

    def cut(self) -> None:
        """Kill QEMU; what it had passed to the host's kernel stays, also what the guest had not flushed."""
        self._process.kill()

    def cut_losing(self, loss: Loss) -> None:
        """Kill QEMU, and take from the tracked disks what they had not flushed (see `Instance.cut_losing`)."""
        with self._disks.lock:
            self._disks.check_tracked()
            self.cut()
            self._disks.lose(loss)

    def _shut_down(self, deadline: Deadline) -> None:
        ended = self.shut_down(deadline=deadline)
        self._end()
        if not ended:
            raise MachineTimeout("the guest did not shut down, so its disk cannot be packed", machine=self._spec.name)

    def pause(self) -> None:
        """Stop the processors."""
        # With the lock, so that they do not run on when a change of a disk is done.
        with self._disks.lock:
            self._qmp.execute("stop", deadline=Deadline(_GRACE))

    def resume(self) -> None:
        """Let the processors run on."""
        self._qmp.execute("cont", deadline=Deadline(_GRACE))

    def refresh(self, *, deadline: Deadline) -> None:
        """Set the guest's clock and randomness (see `Instance.refresh`)."""
        if self._nonce:
            self._waker.wake(self._nonce, deadline=deadline)

    def _forget_trouble(self) -> None:
        self._watch.forget()
        self._qmp.forget("GUEST_PANICKED")

    def stop(self) -> None:
        """End the machine at once and free its resources; may be called again.

        Nobody needs its disk any more.

        A forked child, which does not own it, leaves it alone.
        """
        if not self._process.is_ours:
            return
        self._process.kill()
        self._qmp.close()
        # After QEMU has ended: the recorder's thread then finds the console's end behind its last output.
        for held in (self._channels, self._waker, self._ram, self._recorder, self._shares):
            held.close()

    def _end(self) -> None:
        # Quit lets QEMU flush its disk, which becomes part of a pack; a kill could lose writes that it has not passed on.
        if self._process.exitcode is None:
            with suppress(QmpFailed):
                self._qmp.execute("quit", deadline=Deadline(1))
            if self._process.wait(Deadline(1)) is None:
                self._process.kill()
        self._qmp.close()


def signal_hint(status: int) -> str:
    """Return the name of the signal behind an exit status, in brackets; nothing for other statuses."""
    if status == -signal.SIGSYS:
        return " (a system call that its sandbox forbids)"
    if status == -signal.SIGKILL:
        return " (killed by SIGKILL: did the host run out of memory?)"
    return f" (killed by {signal.Signals(-status).name})" if status < 0 else ""


def _is_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < _FULL
