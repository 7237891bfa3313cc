"""One QEMU machine: started cold or from a saved state, watched while it runs, saved, ended."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Literal

import attrs

from pytest_vmbottle import host
from pytest_vmbottle._os import Deadline, atomic_file, copy_sparse, format_size, run_tool
from pytest_vmbottle.backend import GUEST_PATH, Channel, Chord, Command, NotPlugged, PackKind, SshAccess, Start, State, Unwakeable
from pytest_vmbottle.backends.qemu import controls
from pytest_vmbottle.backends.qemu.account import Account, Loans
from pytest_vmbottle.backends.qemu.command_line import NIC, Emulator, Wiring, command_line
from pytest_vmbottle.backends.qemu.forwards import Forwards
from pytest_vmbottle.backends.qemu.hotplug import DiskPort
from pytest_vmbottle.backends.qemu.lan_card import LAN_CARD, plug_card, unplugged
from pytest_vmbottle.backends.qemu.process import QemuProcess
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed, QmpLost
from pytest_vmbottle.backends.qemu.uefi import find_uefi
from pytest_vmbottle.backends.qemu.waker import Waker
from pytest_vmbottle.channels.fallback import AgentOrSsh
from pytest_vmbottle.channels.guest_agent import GuestAgent
from pytest_vmbottle.channels.ssh import HostKeyMismatch, SshChannel
from pytest_vmbottle.console import Console, Cursor, Recorder, kernel_trouble
from pytest_vmbottle.errors import GuestPanic, LaunchError, MachineDied, MachineError, MachineTimeout, SpecError
from pytest_vmbottle.shown import printable
from pytest_vmbottle.spec import MachineSpec

__all__ = ["Programs", "QemuInstance", "start"]

# Each takes the rest of its line, so that one which begins like this again and again is read once.
_FATAL = re.compile(rb"You are in emergency mode[^\r\n]*|ALERT![^\r\n]*|^\(initramfs\)", re.MULTILINE)
_ALERT, _GIVES_UP = b"ALERT!", b"Dropping to a shell!"
_GRACE = 10.0
_MOMENT = 2.0
"""Seconds in which a QEMU whose monitor is closed has ended."""
_LATE = 60.0
"""Seconds that an agent which is installed may start later than the guest lets us in by SSH; else it is not going to be started."""
_SAVED, _STATE, _RAM = "saved.json", "state.bin", "ram.img"
_CONSOLE = "console.log"
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL
_FULL = 1 << 20
"""Bytes that a disk which has no room for a state may still have free."""
_LAST_WORDS = 300
"""Characters of what QEMU printed last, or a guest, that the first sentence of an error has."""
_UNKNOWN_PROCESSOR = re.compile(r"unable to find CPU model|-cpu\.\S+' not found")
"""What QEMU, from 7.2 to 10.0 at least, says to a model and to a feature that it does not know."""


@attrs.frozen(kw_only=True)
class Programs:
    """What makes machines and their disks."""

    emulator: Emulator
    img: Path


@attrs.frozen(kw_only=True)
class _Saved:
    """What is known of a saved machine besides its state, as its folder says.

    Attributes:
        kind: What it was saved as.
        nonce: What it is known by.
        agent: Whether it has a guest agent.
        login: See `GuestAgent.login`.
    """

    kind: PackKind
    nonce: str
    agent: bool
    login: int | None

    @classmethod
    def read(cls, folder: Path) -> _Saved:
        facts = json.loads((folder / _SAVED).read_bytes())
        return cls(kind=PackKind(facts["kind"]), nonce=facts["nonce"], agent=facts["agent"], login=facts.get("login"))

    def write(self, folder: Path) -> None:
        with atomic_file(folder / _SAVED) as record:
            record.write(json.dumps(attrs.asdict(self)).encode())


@attrs.frozen(kw_only=True)
class Parts:
    """What a started QEMU consists of on the host."""

    process: QemuProcess
    qmp: Qmp
    lines: Lines
    recorder: Recorder
    watch: _Watch
    ram: Ram
    rundir: Path


class QemuInstance:
    """A running machine."""

    def __init__(self, spec: MachineSpec, source: Start, *, programs: Programs, parts: Parts) -> None:
        """Takes over what `start` has made."""
        self._spec, self._source, self._programs = spec, source, programs
        self._process, self._qmp, self._ram, self._rundir = parts.process, parts.qmp, parts.ram, parts.rundir
        self.console = Console(parts.rundir / _CONSOLE, ended=lambda: self._process.exitcode is not None)
        self._recorder = parts.recorder
        self._watch = parts.watch
        self._agent = GuestAgent(parts.lines.agent, alive=self.alive, changes=lambda: self._qmp.agent_changes)
        self._agent_or_ssh = AgentOrSsh(
            agent=self._agent, present=self._agent_is_there, logged_in=self._logged_in, log_in=lambda deadline: self._log_in(deadline, [""])
        )
        self._waker = Waker(parts.lines.waker)
        self._disk_port = DiskPort(parts.qmp, alive=self.alive)
        self._cable = NIC
        self._has_agent: bool | None = None
        self._agent_due: Deadline | None = None
        self._ssh: SshChannel | None = None
        self._lock = threading.RLock()
        self._forwards = Forwards(self._monitor)

    @property
    def pid(self) -> int:
        """The process id of QEMU."""
        return self._process.pid

    @property
    def argv(self) -> tuple[str, ...]:
        """The command line it was started with."""
        return self._process.argv

    @property
    def exitcode(self) -> int | None:
        """The exit status of QEMU: 0 after the guest powered off; None while it runs."""
        return self._process.exitcode

    @property
    def panic(self) -> str | None:
        """The line by which the guest's kernel said that it panicked, met a bug of its own, or that a task hangs."""
        return self._watch.look().trouble or ("the guest's kernel panicked" if self._qmp.seen("GUEST_PANICKED") else None)

    def alive(self) -> None:
        """Returns if the guest can still answer.

        Raises:
            GuestPanic: Its kernel said that it is in trouble, and the spec does not expect that or it is its end.
            MachineDied: It gave up booting, or QEMU ended: with the cause and the console's last lines.
        """
        panic = self.panic
        if panic and (self._watch.is_over or self._qmp.seen("GUEST_PANICKED")):
            raise self._died(f"the guest is lost: {panic}", GuestPanic)
        if panic and self._spec.panic == "fail":
            raise self._died(f"the guest's kernel is in trouble: {panic}", GuestPanic)
        status = self._process.exitcode
        if status is not None:
            raise self._died(f"QEMU ended with status {status}{_signal_hint(status)}")
        if self._watch.stuck:
            raise self._died(f"the guest is lost: {self._watch.stuck}")
        if self._qmp.seen("BLOCK_IO_ERROR", action="stop"):
            raise self._died("the guest was stopped because its disk could not be written: is the catalog's file system full?")

    def _died(self, message: str, kind: type[MachineDied] = MachineDied) -> MachineDied:
        if self._process.exitcode is not None:
            self._recorder.finish()
        output = self._process.output.strip()
        detail = f"\nQEMU printed: {output}" if output else ""
        tail = self.console.tail(80 if kind is GuestPanic else 30)  # a panic has some 50 lines
        return kind(message + detail, machine=self._spec.name, console_tail=tail, argv=self.argv, exitcode=self._process.exitcode)

    def channel(self, *, deadline: Deadline, bulk: bool = False) -> Channel:
        """The guest agent for short commands, SSH for much data or where there is no agent (see `Instance.channel`)."""
        with self._lock:
            if self._has_agent is None:
                self._has_agent = self._find_agent(deadline)
            return self._ssh_channel(deadline) if bulk or not self._has_agent else self._agent_or_ssh

    def _agent_is_there(self) -> bool:
        with self._asked("whether there is a guest agent"):
            return self._qmp.agent_is_there(deadline=Deadline(_GRACE))

    def _find_agent(self, deadline: Deadline) -> bool:
        """Waits for whichever channel the guest offers; true if that is the agent."""
        said = ["it did not answer"]
        found = deadline.poll(lambda: self._look_for_channel(deadline, said), every=0.2)
        if found is None:
            raise MachineTimeout(
                f"neither the guest agent nor SSH answered within {deadline.seconds:.0f} s; SSH last: {said[-1]}",
                machine=self._spec.name,
                console_tail=self.console.tail(30),
                argv=self.argv,
            )
        return found is self._agent

    def _look_for_channel(self, deadline: Deadline, said: list[str]) -> Channel | None:
        able = None
        with suppress(MachineTimeout):
            able = self._agent.runs_commands(deadline=Deadline(min(2.0, deadline.remaining)))
        if able:
            self._log_out()
            return self._agent
        ssh = self._log_in(deadline, said)
        if ssh is None:
            said[-1] += " (and the agent may not run commands)" if able is False else ""
            return None
        self._agent_due = self._agent_due or Deadline(_LATE)
        if able is None and not self._agent_due.expired and _has_agent_installed(ssh):
            return None  # it has not been started yet
        return ssh

    def _logged_in(self) -> SshChannel | None:
        with self._lock:
            if self._ssh is not None and self._ssh.lost:
                self._log_out()
            return self._ssh

    def _log_in(self, deadline: Deadline, said: list[str]) -> SshChannel | None:
        """The connection by SSH, or why there is none yet."""
        with self._lock:
            try:
                self._ssh = self._logged_in() or SshChannel.attempt(
                    self.forward(22), self._source.keys, deadline=deadline, alive=self.alive, reasons=said
                )
            except HostKeyMismatch as error:  # the image's own key, until cloud-init has put the machine's in its place
                said[:] = [str(error)]
            return self._ssh

    def _log_out(self) -> None:
        if self._ssh is not None:
            self._ssh.close()
            self._ssh = None

    def _ssh_channel(self, deadline: Deadline) -> SshChannel:
        with self._lock:
            if self._logged_in() is None:
                self._ssh = SshChannel.connect(self.forward(22), self._source.keys, deadline=deadline, alive=self.alive)
            return self._ssh  # type: ignore[return-value]

    def forward(self, port: int) -> tuple[str, int]:
        """The address on 127.0.0.1 that leads to a TCP port of the guest; the kernel chooses its number."""
        found = self._forwards.find(port)
        if found is None:
            raise MachineError(f"QEMU did not forward the guest's port {port}", machine=self._spec.name)
        return "127.0.0.1", found

    @property
    def forwards(self) -> Mapping[int, int]:
        """The host's ports that somebody was told of, by the guest's."""
        return dict(self._forwards.told)

    def keep_forwards(self) -> None:
        """Has the same ports of the host lead to the guest as when the machine ran before."""
        self._forwards.keep(self._source.forwards)

    def _monitor(self, line: str) -> str:
        with self._asked(f"to {line}"):
            return str(self._qmp.execute("human-monitor-command", command_line=line, deadline=Deadline(_GRACE)))

    def ssh_access(self) -> SshAccess:
        """How any SSH client logs in."""
        return SshAccess(address=self.forward(22), user="root", keys=self._source.keys, folder=self._rundir)

    def screenshot(self) -> bytes:
        """What the screen shows, as PNG."""
        with self._asked("for a screenshot"):
            return controls.screenshot(self._qmp, self._rundir)

    def press(self, chords: Iterable[Chord]) -> None:
        """Presses keys (see `Display.press`)."""
        with self._asked("to press keys"):
            controls.press(self._qmp, chords)

    def link(self, *, up: bool) -> None:
        """Plugs in a cable or pulls it: that to the private LAN if there is one, else that of the card that the host reaches it by."""
        with self._asked("to plug or pull the network cable"):
            controls.set_link(self._qmp, self._cable, up=up)

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """Says what it means that QEMU did not do something: that the machine is gone, or that it cannot."""
        try:
            yield
        except QmpFailed as error:
            if isinstance(error, QmpLost):
                self._process.wait(Deadline(_MOMENT))
            self.alive()
            raise MachineError(f"QEMU was asked {what}: {error}", machine=self._spec.name) from error

    def disk(self, file: int, *, serial: str, writable: bool, deadline: Deadline) -> AbstractContextManager[Callable[[], int]]:
        """A disk that the guest has for a while (see `Hotplug.disk`)."""
        if not self._programs.emulator.board.quick_hotplug:
            raise NotPlugged(f"guests for {self._spec.arch} take too long to let go of a disk")
        return self._disk_port.disk(file, serial=serial, writable=writable, deadline=deadline)

    def plug_card(self, wire: socket.socket, *, mac: str) -> None:
        """Plugs a card for a private LAN into the port that is free for it (see `Cabling.plug_card`)."""
        with self._asked("to plug in a network card"):
            plug_card(self._qmp, wire, mac=mac)
        self._cable = LAN_CARD

    def unplug_card(self, *, deadline: Deadline) -> None:
        """Takes it out again (see `Cabling.unplug_card`)."""
        with self._asked("to take a network card out"):
            if not deadline.poll(lambda: unplugged(self._qmp), every=0.2, first=0.05):
                raise MachineError("the guest does not let go of its second network card", machine=self._spec.name)
        self._cable = NIC

    def restore(self, folder: Path, *, deadline: Deadline) -> None:
        """Loads what `save` wrote, lets it run, and wakes the guest."""
        saved = _Saved.read(folder)
        self._migrate("migrate-incoming", folder / _STATE, saved.kind, deadline)
        self._qmp.execute("cont", deadline=deadline)
        self._waker.wake(saved.nonce, deadline=Deadline(min(deadline.remaining, 20.0)))
        self._has_agent = saved.agent
        if self._has_agent and self._agent_is_there():
            self._agent.sync(deadline=deadline)
            if saved.login is not None:
                self._agent.adopt(saved.login)

    def _migrate(self, verb: Literal["migrate", "migrate-incoming"], file: Path, kind: PackKind, deadline: Deadline) -> None:
        dialect = self._programs.emulator.dialect
        self._qmp.migrate(verb, file, capabilities=dialect.capabilities(kind), by_name=dialect.state_files, deadline=deadline)

    def save(self, dest: Path, *, kind: PackKind, deadline: Deadline) -> None:
        """Stops the machine for good and writes it into a folder (see `Instance.save`)."""
        if self._ram.private:
            raise MachineError("this machine shares its pack's RAM and cannot be saved; start it for building", machine=self._spec.name)
        if kind is PackKind.DISK:
            self._shut_down(deadline)
        else:
            self._save_running(dest, kind, deadline)
        shutil.move(self._rundir / "disk.qcow2", dest / "disk.qcow2")
        _make_overlay(dest / "empty.qcow2", self._source.disk_size, self._programs.img)

    def _save_running(self, dest: Path, kind: PackKind, deadline: Deadline) -> None:
        self._has_agent = None  # whoever built on this machine may have installed it, or taken it away
        channel = self.channel(deadline=deadline)
        channel.run(Command(argv=("sync",), env=(("PATH", GUEST_PATH),)), deadline=deadline)
        with self._nothing_plugged(deadline):
            nonce = self._waker.freeze(channel, deadline=deadline)
            self.pause()
            with _open(dest / _STATE, _NEW):
                self._migrate("migrate", dest / _STATE, kind, deadline)
            self._end()
        if kind is PackKind.TEMPLATE:
            with _open(dest / _RAM, _NEW) as file:
                copy_sparse(self._ram.fd, file)
        _Saved(kind=kind, nonce=nonce, agent=bool(self._has_agent), login=self._agent.login).write(dest)

    def snapshot(self, dest: Path, *, deadline: Deadline) -> None:
        """Writes the machine into a folder, all of its RAM in its state; it goes on (see `Snapshots`)."""
        with self._nothing_plugged(deadline):
            nonce = self._waker.freeze(self.channel(deadline=deadline), deadline=deadline)
            try:
                self._write_down_paused(dest, deadline)
            except QmpFailed as error:
                self._process.wait(Deadline(0.5))
                self.alive()
                raise OSError(errno.ENOSPC if _is_full(dest) else errno.EIO, str(error)) from error
            self._waker.wake(nonce, deadline=deadline)
        _make_overlay(dest / "empty.qcow2", self._source.disk_size, self._programs.img)
        _Saved(kind=PackKind.STREAM, nonce=nonce, agent=bool(self._has_agent), login=self._agent.login).write(dest)

    @contextmanager
    def _nothing_plugged(self, deadline: Deadline) -> Iterator[None]:
        """No disk is plugged in for a copy meanwhile."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._disk_port.reserved(deadline))
            except NotPlugged as error:
                raise Unwakeable(f"{error}, which no restored machine has", machine=self._spec.name) from error
            yield

    def _write_down_paused(self, dest: Path, deadline: Deadline) -> None:
        self.pause()
        try:
            self._write_down(dest, deadline)
        finally:
            self.resume()  # after a migration, this also gives QEMU its disks back

    def _write_down(self, dest: Path, deadline: Deadline) -> None:
        with _open(dest / _STATE, _NEW):
            self._migrate("migrate", dest / _STATE, PackKind.STREAM, deadline)
        with _open(self._rundir / "disk.qcow2", os.O_RDONLY) as disk, _open(dest / "disk.qcow2", _NEW) as copy:
            copy_sparse(disk, copy)

    def state(self) -> State:
        """What the machine is doing: off if QEMU ended by itself without complaint."""
        try:
            self.alive()
            paused = self._qmp.execute("query-status", deadline=Deadline(_GRACE))["status"] == "paused"
        except MachineDied:
            return State.OFF if self._process.exitcode == 0 else State.DIED
        except QmpFailed:  # it is just ending
            return State.OFF if self._process.wait(Deadline(_GRACE)) == 0 else State.DIED
        return State.PAUSED if paused else State.RUNNING

    def shut_down(self, *, deadline: Deadline) -> bool:
        """Has the guest power itself off in order; whether it had by the deadline."""
        self._ask_to("poweroff", deadline)
        while self._process.wait(Deadline(min(0.5, deadline.remaining))) is None and not deadline.expired:
            self._check_lost()
        return self._process.exitcode is not None

    def reboot(self, *, deadline: Deadline) -> bool:
        """Has the guest reboot in order, and forgets the channels; whether it had begun anew by the deadline."""
        before = self._qmp.resets
        self._ask_to("reboot", deadline)
        while self._qmp.resets == before:
            if self._process.wait(Deadline(min(0.1, deadline.remaining))) is not None or deadline.expired:
                return False
            self._check_lost()
        with self._lock:
            self._has_agent = self._agent_due = None
            self._log_out()
        self._forget_trouble()
        return True

    def _ask_to(self, program: str, deadline: Deadline) -> None:
        channel = self.channel(deadline=deadline)
        script = f"sync; (sleep 0.5; {program}) >/dev/null 2>&1 </dev/null &"
        with suppress(MachineError):  # the channel may be cut before it has answered
            channel.run(Command(argv=("/bin/sh", "-c", script), env=(("PATH", GUEST_PATH),)), deadline=deadline)

    def _check_lost(self) -> None:
        if self.state() is State.DIED:
            self.alive()

    def cut(self) -> None:
        """Kills QEMU, which loses what it had not handed to the host's kernel yet, as a disk loses its cache."""
        self._process.kill()

    def _shut_down(self, deadline: Deadline) -> None:
        ended = self.shut_down(deadline=deadline)
        self._end()
        if not ended:
            raise MachineTimeout("the guest did not shut down, so its disk cannot be packed", machine=self._spec.name)

    def pause(self) -> None:
        """Stops its processors."""
        self._qmp.execute("stop", deadline=Deadline(_GRACE))

    def resume(self) -> None:
        """Lets them run on."""
        self._qmp.execute("cont", deadline=Deadline(_GRACE))

    def _forget_trouble(self) -> None:
        self._watch.forget()
        self._qmp.forget("GUEST_PANICKED")

    def stop(self) -> None:
        """Ends it at once, since nobody needs its disk any more, and frees what it held; may be called again.

        A forked child, whose it is not, leaves it alone.
        """
        if not self._process.is_ours:
            return
        self._process.kill()
        self._qmp.close()
        for held in (self._agent, self._waker, self._ram, self._ssh, self._recorder):
            if held is not None:
                held.close()

    def _end(self) -> None:
        if self._process.exitcode is None:
            with suppress(QmpFailed):
                self._qmp.execute("quit", deadline=Deadline(1))
            if self._process.wait(Deadline(1)) is None:
                self._process.kill()
        self._qmp.close()


@attrs.frozen
class Lines:
    """Our ends of the sockets of a machine."""

    qmp: socket.socket
    agent: socket.socket
    waker: socket.socket
    console: socket.socket

    def close(self) -> None:
        for line in (self.qmp, self.agent, self.waker, self.console):
            line.close()


class Ram:
    """The file that is a guest's memory: the pack's own, written by nobody, or one for this machine alone.

    A machine's own RAM is memory of the kernel's without a name (memfd), so that it is gone with its last user whatever happens. Where
    the host has not enough of it, it is a file in the machine's folder. QEMU opens it by name, so one that runs as somebody else gets
    no part of the pack, but a copy.
    """

    def __init__(self, spec: MachineSpec, source: Start, rundir: Path, account: Account | None) -> None:
        """Opens it, and copies into it what it is to begin with."""
        bottled = source.saved / _RAM if source.saved is not None and (source.saved / _RAM).exists() else None
        self.private = bottled is not None and not source.building and account is None
        self.fd = -1
        if bottled is not None and self.private:
            self.path = bottled
            return
        self.fd = _anonymous(rundir) if spec.memory < host.available_memory() else _file(rundir / _RAM, spec)
        self.path = Path(f"/proc/self/fd/{self.fd}")
        os.ftruncate(self.fd, spec.memory)
        if account is not None:
            os.fchown(self.fd, account.uid, account.gid)
        if bottled is not None:
            with _open(bottled, os.O_RDONLY) as saved:
                copy_sparse(saved, self.fd)

    def close(self) -> None:
        """Lets go of it; may be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _anonymous(rundir: Path) -> int:
    return os.memfd_create(f"vmbottle-{rundir.name}", os.MFD_CLOEXEC)


def _file(path: Path, spec: MachineSpec) -> int:
    """A file that has all of its blocks: where a disk has no room for a page that is touched, QEMU would be killed (SIGBUS)."""
    size, free = format_size(spec.memory), shutil.disk_usage(path.parent).free
    hint = "ask for less with memory=, make room (vmbottle pack prune), or choose another folder with --vm-catalog"
    if free < spec.memory:
        reason = f"memory has no room for {size} of RAM now, and {path.parent} has only {format_size(free)} for a file"
        raise MachineError(f"{reason}: {hint}", machine=spec.name)
    path.unlink(missing_ok=True)  # from when the same machine ran before
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, spec.memory)
    except OSError as error:
        os.close(fd)
        raise MachineError(f"{size} of RAM cannot be had in {path.parent}: {error.strerror}; {hint}", machine=spec.name) from error
    return fd


class _Watch:
    """Looks for the lines on a console by which a guest tells that it is in trouble; safe to use from several threads.

    Attributes:
        trouble: What its kernel said of itself.
        is_over: Whether that was the kernel's end.
        stuck: Why it cannot come up any more.
    """

    def __init__(self, path: Path) -> None:
        self._cursor = Cursor(path)
        self._cursor.read()  # what is there already was said by an earlier instance of the same machine
        self._rest = b""
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self.trouble: str | None = None
        self.is_over = False
        self.stuck: str | None = None

    def look(self) -> _Watch:
        """Reads on."""
        with self._lock:
            new = self._cursor.read()
            if new:
                text = self._rest + new
                self._judge(text)
                # The last line may not be complete: it is looked at again.
                self._rest = text[text.rfind(b"\n") + 1 :][-4096:]
        return self

    def _judge(self, text: bytes) -> None:
        for line in kernel_trouble(text):
            if self.trouble is None or line.startswith(self.trouble):  # the rest of the line may have come only now
                self.trouble = line
            self.is_over = self.is_over or line.startswith("Kernel panic")
        for stuck in _FATAL.finditer(text):
            said, gives_up, _ = stuck[0].partition(_GIVES_UP)
            if gives_up or not said.startswith(_ALERT):
                why = printable((said[:_LAST_WORDS] + gives_up).decode("ascii", "replace")).strip()
                self.stuck = "its initial RAM disk gave up and waits at a prompt" if why == "(initramfs)" else why
                return

    def forget(self) -> None:
        """What was said so far does not count any more."""
        self.look()
        with self._lock:
            self._rest = b""
            self._clear()


def start(programs: Programs, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> QemuInstance:
    """Starts a machine, restored and awake or just booting.

    Raises:
        SpecError: QEMU does not know the processor.
        LaunchError: QEMU did not start.
        MachineError: The saved state could not be restored, or the guest did not wake up.
    """
    _lay_disk(source, rundir, programs.img)
    watch = _Watch(rundir / _CONSOLE)
    with ExitStack() as undo:
        ram = Ram(spec, source, rundir, programs.emulator.account)
        undo.callback(ram.close)
        process, lines = _spawn(programs.emulator, spec, source, ram, rundir)
        undo.callback(lines.close)
        undo.callback(process.kill)
        recorder = Recorder(lines.console, rundir / _CONSOLE)
        undo.callback(recorder.close)
        try:
            qmp = Qmp(lines.qmp, deadline=Deadline(min(_GRACE, deadline.remaining)))
        except QmpFailed as error:
            raise _not_launched(process, spec) from error
        parts = Parts(process=process, qmp=qmp, lines=lines, recorder=recorder, watch=watch, ram=ram, rundir=rundir)
        instance = QemuInstance(spec, source, programs=programs, parts=parts)
        undo.callback(instance.stop)
        instance.keep_forwards()
        if source.saved is not None:
            try:
                instance.restore(source.saved, deadline=deadline)
            except QmpFailed as error:
                instance.alive()
                raise MachineError(f"the saved state cannot be restored: {error}\n{process.output}", machine=spec.name) from error
        undo.pop_all()
    return instance


def _lay_disk(source: Start, rundir: Path, img: Path) -> None:
    if source.kept:
        return
    if source.saved is None or source.building:
        _make_overlay(rundir / "disk.qcow2", source.disk_size, img)
    else:
        shutil.copyfile(source.saved / "empty.qcow2", rundir / "disk.qcow2")
    (rundir / "disk.qcow2").chmod(0o600)


def _spawn(emulator: Emulator, spec: MachineSpec, source: Start, ram: Ram, rundir: Path) -> tuple[QemuProcess, Lines]:
    with ExitStack() as theirs, ExitStack() as ours:
        # Connected before QEMU starts: nothing is polled for, and the greeting is there as soon as QEMU is.
        pairs = [socket.socketpair() for _ in range(4)]
        lines = Lines(*(ours.enter_context(mine) for mine, _ in pairs))
        qmp, agent, waker, console = (theirs.enter_context(its).fileno() for _, its in pairs)
        wiring = Wiring(
            name=rundir.name,
            ram=ram.path,
            share=not ram.private,
            overlay=rundir / "disk.qcow2",
            disks=source.disks,
            seed=source.seed,
            kernel=source.kernel,
            initrd=source.initrd,
            cmdline=source.cmdline,
            firmware=_firmware(emulator, spec, source),
            qmp=qmp,
            agent=agent,
            waker=waker,
            console=console,
            incoming=source.saved is not None,
        )
        inherited = [qmp, agent, waker, console, *([ram.fd] if ram.fd >= 0 else [])]
        if emulator.account is not None:
            loans = theirs.enter_context(closing(Loans()))
            wiring = _lend(loans, wiring)
            inherited += loans.fds
        argv, log = command_line(emulator, spec, wiring), rundir / "qemu.log"
        process = QemuProcess(argv, log=log, fds=inherited, leash=not emulator.dialect.exit_with_parent, account=emulator.account)
        ours.pop_all()
        return process, lines


def _lend(loans: Loans, wiring: Wiring) -> Wiring:
    """The same for a QEMU that may open none of these files by itself."""
    return attrs.evolve(
        wiring,
        overlay=loans.disk(wiring.overlay, writable=True),
        disks=tuple(attrs.evolve(disk, path=loans.disk(disk.path)) for disk in wiring.disks),
        seed=loans.disk(wiring.seed),
        kernel=loans.file(wiring.kernel) if wiring.kernel is not None else None,
        initrd=loans.file(wiring.initrd) if wiring.initrd is not None else None,
        lent=loans.argv,
    )


def _firmware(emulator: Emulator, spec: MachineSpec, source: Start) -> Path | None:
    needed = source.kernel is None and source.firmware == "uefi"  # what else is needed comes with QEMU
    return find_uefi(spec.arch, emulator.binary) if needed else None


def _not_launched(process: QemuProcess, spec: MachineSpec) -> LaunchError | SpecError:
    status = process.wait(Deadline(1))
    ending = "does not answer" if status is None else f"ended with status {status}{_signal_hint(status)}"
    output = process.output
    program = Path(process.argv[0]).name
    last = output.strip().rpartition("\n")[2].rpartition(f"{program}: ")[2][:_LAST_WORDS]
    if spec.cpu and _UNKNOWN_PROCESSOR.search(last):
        return SpecError(f"cpu={spec.cpu!r}: {last}; `{program} -cpu help` lists what there is")
    return LaunchError(
        f"QEMU {ending} before the machine {spec.name!r} could run{last and f': {last}'}",
        argv=process.argv,
        exitcode=status,
        output=output,
        machine=spec.name,
    )


def _signal_hint(status: int) -> str:
    if status == -signal.SIGSYS:
        return " (a system call that its sandbox forbids)"
    if status == -signal.SIGKILL:
        return " (killed by SIGKILL, as the kernel does where memory runs out)"
    return f" (killed by {signal.Signals(-status).name})" if status < 0 else ""


def _has_agent_installed(ssh: Channel) -> bool:
    script = "command -v qemu-ga >/dev/null"
    return ssh.run(Command(argv=("sh", "-c", script), env=(("PATH", GUEST_PATH),)), deadline=Deadline(_GRACE)).returncode == 0


def _is_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < _FULL


def _make_overlay(path: Path, size: int, img: Path) -> None:
    made = run_tool([img, "create", "-q", "-f", "qcow2", path, str(size)], timeout=30)
    if not made.ok:
        raise MachineError(f"{img} could not make a disk at {path}: {made.output.strip() or 'it took longer than 30 s'}")


@contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
