"""Launching of machines.

Each has a folder of its own and a record for the supervisor, and is awaited until it is ready.
"""

from __future__ import annotations

import secrets
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pytest_vmbottle.backends.console import Console, Cursor
from pytest_vmbottle.channels.guest_agent import AgentEnded
from pytest_vmbottle.channels.port import GUEST_PATH, Command
from pytest_vmbottle.errors import MachineTimeout
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.host.generations import Holds
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.images import check_again
from pytest_vmbottle.machine.disks import await_disks
from pytest_vmbottle.machine.lifecycle import CAPTURE, CAPTURES, Relauncher
from pytest_vmbottle.machine.machine import Machine
from pytest_vmbottle.machine.sampler import Sampler
from pytest_vmbottle.provision.context import Remains
from pytest_vmbottle.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_vmbottle.backends.port import Instance, Start
    from pytest_vmbottle.channels.port import Channel
    from pytest_vmbottle.provision.context import Context
    from pytest_vmbottle.provision.origins import Origin
    from pytest_vmbottle.spec import MachineSpec

    _AwaitBoot = Callable[[Instance, Channel, Deadline], None]

__all__ = ["Launcher"]

_EMULATED_FACTOR = 4.0
_FOREIGN_FACTOR = 2.0
"""Factor of time-outs for foreign images: they have a boot loader, a big initial RAM disk and much to start."""
# By its name in all backends: a machine that never started has no instance that knows its console.
_CONSOLE = "console.log"
_BOOTED = read_script(__package__, "is_booted.sh")


class Launcher:
    """Launcher of machines, which gives each the means to be started again."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sampler = Sampler()

    @contextmanager
    def machine(self, name: str, spec: MachineSpec, start: Start, origin: Origin) -> Iterator[Machine]:
        """Start a machine for a block, under a name with a random suffix.

        The record by which a supervisor ends it is written before the start. Files that the backend keeps elsewhere are removed with it.
        """
        backend = self._context.backend
        # Random, because several machines of one test may have the same name, and folders must not.
        # The holds end before the folder goes: a machine that went back to a snapshot of its own holds a part of that very folder.
        folder = self._context.catalog.rundir(f"{name}-{secrets.token_hex(4)}", ending=backend.ending)
        with folder as rundir, Holds() as holds, self._leaving(rundir, spec, start, origin) as remains:
            machine = self._furnish(spec, start, origin, remains, holds)
            try:
                with self._sampler.following(machine):
                    yield machine
            finally:
                with remains.timeline.span("power", verb="stop", args=[]):
                    machine.lifecycle.stop()

    @contextmanager
    def _leaving(self, rundir: Path, spec: MachineSpec, start: Start, origin: Origin) -> Iterator[Remains]:
        """Hand over what a machine leaves at the end of a block, and discard what its backend keeps elsewhere."""
        context = self._context
        remains = Remains(
            id=rundir.name,
            spec=spec,
            source=start,
            backend=context.name,
            made_by=context.label(spec),
            image=origin.sha256,
            folder=rundir,
            console=Console(rundir / _CONSOLE),
            timeline=Timeline(private_dir(rundir / "timeline"), machine=spec.name),
        )
        # From the first instant, so that a boot that fails has its lines in the timeline.
        remains.timeline.watch(Cursor(remains.console.path).read)
        try:
            yield remains
        # Ctrl-C too: what was interrupted is explained by the same evidence.
        except BaseException:
            remains.failed = True
            raise
        finally:
            try:
                context.settings.ended(remains)
            finally:
                remains.timeline.close()
                # Also after a failed start, which may have left files outside of the folder.
                context.backend.discard(rundir)

    def patience(self, spec: MachineSpec, origin: Origin) -> float:
        """Return the seconds that a machine may take to start here."""
        emulated = spec.arch != host_arch() or spec.cpu_clock == "instructions" or self._context.capabilities.emulated
        factor = (_EMULATED_FACTOR if emulated else 1.0) * (1.0 if origin.prepared else _FOREIGN_FACTOR)
        return spec.timeout * self._context.settings.timeout_factor * factor

    def _furnish(self, spec: MachineSpec, start: Start, origin: Origin, remains: Remains, holds: Holds) -> Machine:
        """Start a machine in its folder, with the means to start it again."""
        context, patience = self._context, self.patience(spec, origin)

        def await_boot(instance: Instance, channel: Channel, deadline: Deadline) -> None:
            if origin.awaits_boot:
                _await_system(instance, channel, spec, deadline)
            context.tally.booted += 1

        def launch(source: Start, deadline: Deadline) -> tuple[Instance, Channel]:
            # Held before the start: a pack that is pruned between the two would leave a machine without its disk.
            self._hold(source, holds)
            return self._launch(spec, source, remains, deadline, await_boot)

        timeline = remains.timeline
        with timeline.span("power", verb="launch", args=[] if start.saved is None else [f"from the pack {start.saved.name[:12]}"]):
            instance, channel = launch(start, Deadline(patience))
        relauncher = Relauncher(
            start=start,
            folder=remains.folder,
            patience=patience,
            launch=launch,
            await_boot=await_boot,
            image=origin.sha256,
            backend=remains.made_by,
        )
        factor = context.settings.timeout_factor
        return Machine(
            instance,
            spec,
            id=remains.id,
            backend=context.name,
            channel=channel,
            factor=factor,
            relauncher=relauncher,
            timeline=timeline,
        )

    def _hold(self, start: Start, holds: Holds) -> None:
        """Hold the images, packs and snapshots that a machine starts from.

        Files in users' own folders are not held.
        """
        folders = [disk.path.parent for disk in start.images] + [folder for folder in (start.saved, start.ram) if folder]
        with self._context.explained():
            holds.take(*(folder for folder in folders if self._context.catalog.root in folder.parents))

    def _launch(
        self, spec: MachineSpec, start: Start, remains: Remains, deadline: Deadline, await_boot: _AwaitBoot
    ) -> tuple[Instance, Channel]:
        context, rundir = self._context, remains.folder
        for disk in start.images:
            # Nobody keeps others from writing to a disk in its own place, nor a guest of another run: its header is read each time.
            if context.catalog.root not in disk.path.parents:
                check_again(disk.path, disk.format)
        with context.explained():
            instance = context.backend.launch(spec, source=start, rundir=rundir, deadline=deadline)
        context.catalog.ledger.machines += 1
        remains.argv = getattr(instance, "argv", ())
        try:
            # As soon as the process is known, so that a crash from here on leaves it named in the record.
            context.catalog.note_process(rundir, instance.pid)
            if spec.capture:
                instance.capture(_new_capture(private_dir(rundir / CAPTURES)))
            channel = instance.channel(deadline=deadline)
            if start.saved is None:
                await_boot(instance, channel, deadline)
            elif not start.building:
                context.tally.restored += 1
            # Those that a saved state has were there before.
            await_disks(channel, [disk.name for disk in start.data if not (start.saved and disk.saved)], deadline)
        # Ctrl-C too: nobody else knows of this instance yet.
        except BaseException:
            instance.stop()
            raise
        return instance, channel


def _new_capture(folder: Path) -> Path:
    """Return the path for the traffic of one more instance of a machine: each start and restore has a file of its own."""
    number = len(list(folder.glob(f"{CAPTURE}*.pcap"))) + 1
    return folder / (f"{CAPTURE}.pcap" if number == 1 else f"{CAPTURE}-{number}.pcap")


def _await_system(instance: Instance, channel: Channel, spec: MachineSpec, deadline: Deadline) -> None:
    question = Command(argv=("/bin/sh", "-c", _BOOTED), env=(("PATH", GUEST_PATH),))

    def booted() -> bool:
        # It has better things to do than to answer, or its own user data has it reboot once more.
        with suppress(MachineTimeout, AgentEnded):
            return channel.run(question, deadline=Deadline(30)).returncode == 0
        return False

    # Each question is work for a guest that is busy booting.
    if not deadline.poll(booted, every=0.75, first=0.5):
        raise MachineTimeout(
            f"timed out after {deadline.seconds:.0f} s waiting for the guest to start: cloud-init or some services had not finished",
            machine=spec.name,
            console_tail=instance.console.tail(30),
            argv=getattr(instance, "argv", ()),
        )
