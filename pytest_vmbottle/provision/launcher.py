"""Starts machines: each in a folder of its own, known to who ends it, and waited for until it can be used."""

from __future__ import annotations

import secrets
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backend import GUEST_PATH, Command, Detached, Keeping
from pytest_vmbottle.errors import MachineTimeout
from pytest_vmbottle.generations import Holds
from pytest_vmbottle.images import check_again
from pytest_vmbottle.machine import Machine
from pytest_vmbottle.power import Supply
from pytest_vmbottle.spec import host_arch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_vmbottle.backend import Channel, Instance, Start
    from pytest_vmbottle.provision.context import Context
    from pytest_vmbottle.provision.sources import Sources
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["Launcher"]

_EMULATED_FACTOR = 4.0
_FOREIGN_FACTOR = 2.0
"""Images that were not made for us have a boot loader, a big initial RAM disk and much to start."""
# cloud-init has ended, well or badly, when it has written its result: it is the last to do so. Where it is not there, or disabled, systemd
# says when it has started all there is. A guest that is otherwise in a sorry state is still the one that was asked for.
_BOOTED = r"""
if command -v cloud-init && ! [ -e /run/cloud-init/disabled ] && ! [ -e /etc/cloud/cloud-init.disabled ]; then
    [ -e /run/cloud-init/result.json ] || systemctl is-failed cloud-final.service
elif [ -d /run/systemd/system ]; then
    case $(systemctl is-system-running) in initializing | starting) false ;; esac
fi >/dev/null
"""


class Launcher:
    """Starts machines, with all they can be started again with."""

    def __init__(self, context: Context, sources: Sources) -> None:
        self._context, self._sources = context, sources

    @contextmanager
    def machine(self, name: str, spec: MachineSpec, start: Start) -> Iterator[Machine]:
        """A running machine for the length of a block, under a name that gets a random end.

        What ends it if we do not is written down before it is started; what the backend keeps elsewhere goes with it.
        """
        backend = self._context.backend
        ending = {"ending": backend.ending} if isinstance(backend, Detached) else {}
        with self._context.catalog.rundir(f"{name}-{secrets.token_hex(4)}", **ending) as rundir, Holds() as holds:
            try:
                machine = self._furnish(spec, start, rundir, holds, Deadline(self.patience(spec)))
                try:
                    yield machine
                finally:
                    machine.close()
            finally:
                if isinstance(backend, Keeping):
                    backend.discard(rundir)

    def patience(self, spec: MachineSpec) -> float:
        """Seconds that a machine may take to come up here."""
        emulated = spec.arch != host_arch() or self._context.capabilities.emulated
        factor = (_EMULATED_FACTOR if emulated else 1.0) * (1.0 if self._sources.image(spec).prepared else _FOREIGN_FACTOR)
        return spec.timeout * self._context.settings.timeout_factor * factor

    def _furnish(self, spec: MachineSpec, start: Start, rundir: Path, holds: Holds, deadline: Deadline) -> Machine:
        """Starts a machine in a folder and gives it what it can be started again with."""
        context = self._context

        def launch(source: Start, deadline: Deadline) -> tuple[Instance, Channel]:
            self._hold(source, holds)
            return self._launch(spec, source, rundir, deadline)

        instance, channel = launch(start, deadline)
        supply = Supply(
            start=start,
            folder=rundir,
            patience=self.patience(spec),
            launch=launch,
            await_boot=lambda instance, channel, deadline: self._await_boot(instance, channel, spec, deadline),
            image=self._sources.image(spec).sha256,
            backend=context.label(spec),
        )
        factor = context.settings.timeout_factor
        return Machine(instance, spec, id=rundir.name, backend=context.name, channel=channel, factor=factor, supply=supply)

    def _hold(self, start: Start, holds: Holds) -> None:
        """Holds what a machine starts from: images, packs and snapshots; not what lies in somebody's own folders."""
        folders = [disk.path.parent for disk in start.disks] + ([start.saved] if start.saved else [])
        with self._context.explained():
            holds.take(*(folder for folder in folders if self._context.catalog.root in folder.parents))

    def _launch(self, spec: MachineSpec, start: Start, rundir: Path, deadline: Deadline) -> tuple[Instance, Channel]:
        context = self._context
        for disk in start.disks:
            # Nobody keeps others from writing to a disk in its own place, nor a guest of another run: its header is read each time.
            if context.catalog.root not in disk.path.parents:
                check_again(disk.path, disk.format)
        with context.explained():
            instance = context.backend.launch(spec, source=start, rundir=rundir, deadline=deadline)
        context.catalog.ledger.machines += 1
        try:
            context.catalog.note_process(rundir, instance.pid)
            channel = instance.channel(deadline=deadline)
            if start.saved is None:
                self._await_boot(instance, channel, spec, deadline)
            elif not start.building:
                context.tally.poured += 1
        except BaseException:
            instance.stop()
            raise
        return instance, channel

    def _await_boot(self, instance: Instance, channel: Channel, spec: MachineSpec, deadline: Deadline) -> None:
        if self._sources.image(spec).readiness == "cloud-init":
            _await_system(instance, channel, spec, deadline)
        self._context.tally.booted += 1


def _await_system(instance: Instance, channel: Channel, spec: MachineSpec, deadline: Deadline) -> None:
    question = Command(argv=("/bin/sh", "-c", _BOOTED), env=(("PATH", GUEST_PATH),))

    def booted() -> bool:
        with suppress(MachineTimeout):  # it has better things to do than to answer
            return channel.run(question, deadline=Deadline(30)).returncode == 0
        return False

    # Each question is work for a guest that is busy booting.
    if not deadline.poll(booted, every=0.75, first=0.5):
        raise MachineTimeout(
            f"after {deadline.seconds:.0f} s the guest was still starting: cloud-init had not ended, or not all services had been started",
            machine=spec.name,
            console_tail=instance.console.tail(30),
            argv=getattr(instance, "argv", ()),
        )
