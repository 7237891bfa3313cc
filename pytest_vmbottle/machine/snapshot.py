"""Snapshots of running machines."""

from __future__ import annotations

from typing import Any, Protocol

import attrs

from pytest_vmbottle.backends.port import Start
from pytest_vmbottle.catalog.packs import Pack
from pytest_vmbottle.errors import CatalogError, SpecError
from pytest_vmbottle.spec import BOOT, MachineSpec

__all__ = ["HasSnapshot", "Snapshot"]


@attrs.frozen(kw_only=True)
class Snapshot(Pack):
    """A pack made of a machine in the middle of a test.

    It lives in that machine's folder, and is deleted with the machine and with all that run from it.

    Attributes:
        spec: The spec of the machine.
        start: The boot source for machines that start from this.
    """

    spec: MachineSpec = attrs.field(repr=False)
    start: Start = attrs.field(repr=False)

    def of(self, **keywords: Any) -> MachineSpec:
        """Return the spec of a machine that starts from this snapshot.

        It is the original's, with other values for keywords that do not concern a booted guest.

        Raises:
            CatalogError: The snapshot is gone.
            SpecError: A value is invalid, or the keyword is fixed at the boot.
        """
        self.check()
        spec = self.spec.but(**keywords)
        # Checked here too, so that the error names the call and not the start of the machine.
        self.check_fits(spec)
        return spec

    def check_fits(self, spec: MachineSpec) -> None:
        """Check that a machine can be restored from this snapshot.

        Raises:
            SpecError: The machine differs in what is fixed at the boot.
        """
        # Not by digests: the files of a kernel may be others by now, or gone, and the snapshot has its own.
        differs = ", ".join(sorted(key for key in BOOT if getattr(spec, key) != getattr(self.spec, key)))
        if differs:
            raise SpecError(f"the snapshot {self.manifest.name!r} was made of a machine with another {differs} than {spec.name}")

    def check(self) -> None:
        """Check that the snapshot and everything below it still exist.

        Raises:
            CatalogError: A file is gone.
        """
        ram = [self.start.ram] if self.start.ram is not None else []
        if not all(path.exists() for path in (self.path, self.start.seed, *ram, *(disk.path for disk in self.start.images))):
            raise CatalogError(f"the snapshot {self.manifest.name!r} is gone: it is removed with the machine that it was made of")


class HasSnapshot(Protocol):
    """The type of a capsule for `vm_factory`."""

    def snapshot(self, machine: str | None = None) -> Snapshot:
        """Return one of its machines."""
