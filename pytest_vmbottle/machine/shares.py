"""Folders of the host that a guest has, too.

No saved state has them: they are plugged in and mounted when a machine is there, and taken away while it is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs

from pytest_vmbottle.backends.port import Instance
from pytest_vmbottle.channels.port import GUEST_PATH, Channel, Command
from pytest_vmbottle.errors import MachineError, SpecError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.shown import printable

__all__ = ["Share"]

_SECONDS = 30.0
"""Seconds for a guest to take or to release a folder; an emulated one takes 0.3 s."""
_NO_VIRTIOFS = 3
_MOUNT, _UNMOUNT = read_script(__package__, "share_mount.sh"), read_script(__package__, "share_unmount.sh")


@attrs.define(kw_only=True)
class Share:
    """A folder of the host at a path of a guest.

    Attributes:
        machine: The machine's name.
        path: The path.
        folder: The folder.
        tag: The name by which the guest mounts it.
        instance: Function that returns the machine's present instance.
        channel: Function that returns its present channel.
        factor: The factor of all time-outs.
    """

    machine: str
    path: str
    folder: Path
    tag: str
    instance: Callable[[], Instance]
    channel: Callable[[], Channel]
    factor: float
    _plugged: Instance | None = attrs.field(default=None, init=False)

    def settle(self) -> None:
        """Plug it in, if need be, and mount it: the guest has booted, or is another instance.

        Raises:
            SpecError: There is no such folder.
            BackendUnavailable: A program that shares it is missing here.
            MachineError: The backend shares no folders, or the guest cannot mount it.
        """
        instance = self.instance()
        if instance is not self._plugged:
            if not self.folder.is_dir():
                raise SpecError(f"shares={{{self.path!r}: ...}}: there is no folder {self.folder}")
            instance.plug_share(self.folder, tag=self.tag)
            self._plugged = instance
        self._script(_MOUNT, self.tag, self.path)

    def unplug(self) -> None:
        """Unmount it and take it away, until `settle` is called.

        Raises:
            MachineError: Something in the guest uses it.
        """
        instance = self.instance()
        if instance is self._plugged:
            self._script(_UNMOUNT, self.path)
            instance.unplug_share(self.tag, deadline=Deadline(_SECONDS * self.factor))
        self._plugged = None

    def _script(self, text: str, *words: str) -> None:
        command = Command(argv=("/bin/sh", "-c", text, "sh", *words), env=(("PATH", GUEST_PATH),))
        finished = self.channel().run(command, deadline=Deadline(_SECONDS * self.factor))
        if finished.timed_out:
            reason = "the guest did not find its device in time"
        elif finished.returncode == _NO_VIRTIOFS:
            reason = "the guest's kernel has no virtiofs (CONFIG_VIRTIO_FS)"
        elif finished.returncode:
            reason = printable(finished.stderr.decode(errors="replace").strip())
        else:
            return
        raise MachineError(f"the folder {self.folder} cannot be shared as {self.path}, or taken away: {reason}", machine=self.machine)
