"""Start of a QEMU machine: lay out disk and memory, start the process, restore a saved state."""

from __future__ import annotations

import re
import socket
from contextlib import ExitStack, closing
from pathlib import Path

import attrs

from pytest_vmbottle.backends.console import Recorder
from pytest_vmbottle.backends.kernel_watch import KernelWatch
from pytest_vmbottle.backends.port import Start
from pytest_vmbottle.backends.qemu.command_line import DiskSlot, Emulator, LaunchResources, command_line
from pytest_vmbottle.backends.qemu.disks import lay_disks, slots
from pytest_vmbottle.backends.qemu.instance import CONSOLE, Parts, QemuInstance, Saved, Sockets, signal_hint
from pytest_vmbottle.backends.qemu.process import QemuProcess
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.backends.qemu.ram import Ram
from pytest_vmbottle.backends.qemu.run_as import PassedFds
from pytest_vmbottle.backends.qemu.uefi import find_uefi
from pytest_vmbottle.errors import BackendUnavailable, LaunchError, MachineError, SpecError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.spec import MachineSpec

__all__ = ["start"]

_GREETING = 10.0
"""Seconds for QEMU until its monitor speaks."""
_LAST_WORDS = 300
"""Most characters of QEMU's last line that the first sentence of an error has."""
_UNKNOWN_PROCESSOR = re.compile(r"unable to find CPU model|-cpu\.\S+' not found")
"""Message of QEMU, from 7.2 to 10.0 at least, for an unknown model or feature."""
_LACKED = re.compile(r"support requested feature: .*(?:E[A-D]X|\))\.(\S+) \[bit")
"""Message of those QEMUs for each feature that an accelerator lacks, here or everywhere."""


def start(emulator: Emulator, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> QemuInstance:
    """Start a machine, restored and awake or just booting.

    Raises:
        SpecError: QEMU does not know the processor.
        BackendUnavailable: This host lacks something that the processor is to have.
        LaunchError: QEMU did not start.
        MachineError: The saved state could not be restored, or the guest did not answer.
    """
    saved = Saved.read(source.saved) if source.saved is not None else None
    disks = slots(source, saved.ports if saved is not None else {}, rundir, track_root=spec.track_writes)
    lay_disks(disks, kept=source.kept)
    # A saved state has its own disks, and no others: those that are new come in when it runs.
    first = disks if saved is None else tuple(slot for slot in disks if slot.disk.saved)
    # Made before QEMU starts, so that its cursor begins at the end of an earlier run's console.
    watch = KernelWatch(rundir / CONSOLE, hung_tasks=spec.cpu_clock == "host")
    with ExitStack() as undo:
        ram = Ram(spec, source, rundir, emulator.account)
        # Callbacks run in reverse, so QEMU is killed before its RAM is closed.
        undo.callback(ram.close)
        process, lines = _spawn(emulator, spec, source, ram, rundir, first, nameless=saved is not None and saved.nameless)
        undo.callback(lines.close)
        undo.callback(process.kill)
        recorder = Recorder(lines.console, rundir / CONSOLE)
        undo.callback(recorder.close)
        try:
            qmp = Qmp(lines.qmp, deadline=Deadline(min(_GREETING, deadline.remaining)))
        except QmpFailed as error:
            raise _not_launched(process, spec) from error
        parts = Parts(process=process, qmp=qmp, lines=lines, recorder=recorder, watch=watch, ram=ram, rundir=rundir, disks=first)
        instance = QemuInstance(spec, source, emulator=emulator, parts=parts)
        undo.callback(instance.stop)
        # Before anybody has the instance, and could be told another number.
        instance.keep_forwards()
        if source.saved is not None and saved is not None:
            try:
                instance.restore(source.saved, saved, deadline=deadline)
            except QmpFailed as error:
                # A machine that died while loading explains more than the monitor's error does.
                instance.alive()
                raise MachineError(f"the saved state cannot be restored: {error}\n{process.output}", machine=spec.name) from error
            instance.attach(slot for slot in disks if not slot.disk.saved)
        # All went well: the instance owns everything now, and nothing is undone.
        undo.pop_all()
    return instance


def _spawn(  # noqa: PLR0913, PLR0917 - all that a QEMU is started with
    emulator: Emulator, spec: MachineSpec, source: Start, ram: Ram, rundir: Path, disks: tuple[DiskSlot, ...], *, nameless: bool
) -> tuple[QemuProcess, Sockets]:
    with ExitStack() as theirs, ExitStack() as ours:
        # Connected before QEMU starts: nothing is polled for, and the greeting is there as soon as QEMU is.
        pairs = [socket.socketpair() for _ in attrs.fields(Sockets)]
        lines = Sockets(*(ours.enter_context(mine) for mine, _ in pairs))
        qmp, agent, waker, runner, console = (theirs.enter_context(its).fileno() for _, its in pairs)
        wiring = LaunchResources(
            name=rundir.name,
            ram=ram.path,
            share=not ram.private,
            disks=disks,
            seed=source.seed,
            kernel=source.kernel,
            initrd=source.initrd,
            cmdline=source.cmdline,
            firmware=_firmware(emulator, spec, source),
            qmp=qmp,
            agent=agent,
            waker=waker,
            runner=runner,
            console=console,
            incoming=source.saved is not None,
            nameless=nameless,
        )
        # These are asked for by descriptor alone, so QEMU inherits no other open file of this process.
        inherited = [qmp, agent, waker, runner, console, *([ram.fd] if ram.fd >= 0 else [])]
        if emulator.account is not None:
            loans = theirs.enter_context(closing(PassedFds()))
            wiring = _lend(loans, wiring)
            inherited += loans.fds
        argv, log = command_line(emulator, spec, wiring), rundir / "qemu.log"
        process = QemuProcess(argv, log=log, fds=inherited, leash=not emulator.dialect.exit_with_parent, account=emulator.account)
        ours.pop_all()
        return process, lines


def _lend(loans: PassedFds, wiring: LaunchResources) -> LaunchResources:
    """Return the resources as a QEMU gets them that may open none of the files by itself."""

    def lent(slot: DiskSlot) -> DiskSlot:
        below = tuple(attrs.evolve(disk, path=loans.disk(disk.path)) for disk in slot.disk.disks)
        return attrs.evolve(
            slot,
            disk=attrs.evolve(slot.disk, disks=below),
            file=loans.disk(slot.file, writable=True),
            log=loans.disk(slot.log, writable=True) if slot.log is not None else None,
        )

    return attrs.evolve(
        wiring,
        disks=tuple(map(lent, wiring.disks)),
        seed=loans.disk(wiring.seed),
        kernel=loans.file(wiring.kernel) if wiring.kernel is not None else None,
        initrd=loans.file(wiring.initrd) if wiring.initrd is not None else None,
        lent=loans.argv,
    )


def _firmware(emulator: Emulator, spec: MachineSpec, source: Start) -> Path | None:
    needed = source.kernel is None and source.firmware == "uefi"  # what else is needed comes with QEMU
    return find_uefi(spec.arch, emulator.binary) if needed else None


def _not_launched(process: QemuProcess, spec: MachineSpec) -> BackendUnavailable | LaunchError | SpecError:
    status = process.wait(Deadline(1))
    ending = "did not answer" if status is None else f"ended with status {status}{signal_hint(status)}"
    output = process.output
    program = Path(process.argv[0]).name
    last = output.strip().rpartition("\n")[2].rpartition(f"{program}: ")[2][:_LAST_WORDS]
    # Told apart from a broken QEMU: the mark is wrong, and no retry would help.
    if spec.cpu and _UNKNOWN_PROCESSOR.search(last):
        return SpecError(f"cpu={spec.cpu!r}: {last}; `{program} -cpu help` lists the models")
    if spec.cpu and last.endswith("support requested features"):
        lacked = ", ".join(dict.fromkeys(_LACKED.findall(output)))
        return BackendUnavailable(f"cpu={spec.cpu!r}: {last}: {lacked}", "Ask for a lower level, such as cpu='x86-64-v2'")
    return LaunchError(
        f"QEMU {ending} before the machine {spec.name!r} could run{last and f': {last}'}",
        argv=process.argv,
        exitcode=status,
        output=output,
        machine=spec.name,
    )
