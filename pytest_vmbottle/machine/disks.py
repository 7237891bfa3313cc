"""Disks of a machine beside its root disk: what they are made from, and how its guest sees them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vmbottle.backends.port import DataDisk, Disk
from pytest_vmbottle.channels.port import GUEST_PATH, Command
from pytest_vmbottle.errors import CatalogError, MachineTimeout, SpecError
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.spec import disk_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vmbottle.channels.port import Channel
    from pytest_vmbottle.host.deadline import Deadline

__all__ = ["await_disks", "new_disk"]

_THERE = read_script(__package__, "disks_are_there.sh")


def new_disk(name: str, source: int | str | Path) -> DataDisk:
    """Return a disk that nothing was written to, made from a size or a disk image.

    Raises:
        SpecError: The name or the source is invalid.
    """
    # Imported here and not above: whoever only names `Machine` pays nothing for what images need.
    from pytest_vmbottle.images.disk_format import check_whole, inspect, opened  # noqa: PLC0415

    checked = disk_source(name, source)
    if isinstance(checked, int):
        return DataDisk(name=name, size=checked)
    try:
        with opened(checked) as file:
            kind, size = inspect(file, checked)
            check_whole(file, checked)
    except (OSError, CatalogError) as error:
        raise SpecError(f"disks={{{name!r}: {str(checked)!r}}}: {error}") from error
    # Resolved, because a symbolic link may soon lead elsewhere.
    return DataDisk(name=name, size=size, disks=(Disk(path=checked.resolve(), format=kind),))


def await_disks(channel: Channel, names: Sequence[str], deadline: Deadline) -> None:
    """Wait until the guest has disks, under their names in `/dev/disk/by-id` where it gives such names.

    Raises:
        MachineTimeout: It does not have all of them by the deadline.
        MachineDied: The guest is gone.
    """
    if not names:
        return
    command = Command(argv=("/bin/sh", "-c", _THERE, "sh", *names), env=(("PATH", GUEST_PATH),))
    if channel.run(command, deadline=deadline).returncode != 0:
        raise MachineTimeout(f"the guest does not have the disks {', '.join(names)} after {deadline.seconds:.0f} s; has it virtio-blk?")
