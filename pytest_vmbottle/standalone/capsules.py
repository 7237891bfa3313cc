"""Capsules: the machines of a test as they were when it failed, to be started again from there.

::

    capsules/NAME/                the name is made of the test's
      capsule.json                the test, the time, and its machines; written last
      MACHINE/                    a machine (`Stored`): links to its pack, and what it had of its own

A capsule has links to the files of the packs that its machines stand on, so it stays whole when those are removed.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs
import cattrs

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.errors import CatalogError, SpecError
from pytest_vmbottle.host import generations, records
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.standalone.stored import Stored

if TYPE_CHECKING:
    from pytest_vmbottle.machine.snapshot import Snapshot

__all__ = ["CAPSULES", "Capsule", "all_in"]

CAPSULES = "capsules"
"""Name of the folder of all capsules, in the catalog."""
_FACTS = "capsule.json"
_NAME = 60
"""Characters of a capsule's name, before what makes it unique."""


@attrs.frozen(kw_only=True)
class _Facts:
    """Content of `capsule.json`.

    Attributes:
        test: The id of the test.
        error: The first line of its error.
        created: The time of the failure, in seconds since 1970.
        machines: What each machine depends on, by its name (see `Backend.fingerprint`); the test's own machine first.
        addresses: The address of each that was on a private LAN, or the addresses of one on several, divided by blanks.
    """

    test: str
    error: str
    created: float
    machines: Mapping[str, str]
    addresses: Mapping[str, str] = attrs.field(factory=dict)


class Capsule:
    """The machines of a test at its failure.

    In a test, `vm_factory(Capsule(path))` starts the first of them.
    """

    def __init__(self, path: str | Path) -> None:
        """Read what is in a capsule.

        Args:
            path: Its folder, which `vmbottle capsule show` tells.

        Raises:
            CatalogError: There is none, or it is damaged.
        """
        self.path = Path(path)
        try:
            self._facts = records.read_as(self.path / _FACTS, lambda facts: cattrs.structure(facts, _Facts))
        except FileNotFoundError:
            raise CatalogError(f"there is no capsule {self.path}") from None
        except (records.Damaged, OSError) as error:
            raise CatalogError(f"the capsule {self.path.name} is damaged: {error}") from error

    @property
    def name(self) -> str:
        """Its name."""
        return self.path.name

    @property
    def test(self) -> str:
        """The id of the test that failed."""
        return self._facts.test

    @property
    def error(self) -> str:
        """The first line of the test's error."""
        return self._facts.error

    @property
    def created(self) -> float:
        """The time of the failure, in seconds since 1970."""
        return self._facts.created

    @property
    def machines(self) -> tuple[str, ...]:
        """The names of its machines, the test's own first."""
        return tuple(self._facts.machines)

    @property
    def addresses(self) -> Mapping[str, str]:
        """The address of each machine that was on a private LAN, by name; of one on several all, in their order, divided by blanks."""
        return self._facts.addresses

    @property
    def size(self) -> int:
        """Bytes that are in no pack; links to the files of packs take no room."""
        return sum(packs.read(folder).size for folder in self._saved())

    def stored(self, machine: str | None = None) -> Stored:
        """Return the boot source of a machine, by default the first; its files are compared with their digests.

        Raises:
            SpecError: It has no such machine.
            CatalogError: A file is damaged or missing.
        """
        wanted = self.machines[0] if machine is None else machine
        if wanted not in self.machines:
            raise SpecError(f"the capsule {self.name} has no machine {wanted!r} (there: {', '.join(self.machines)})")
        try:
            stored = Stored.read(self.path / wanted)
            for folder in (stored.start.saved, stored.start.ram):
                if folder is not None:
                    packs.read(folder).verify()
        except (records.Damaged, OSError, CatalogError, ValueError) as error:
            raise CatalogError(f"the machine {wanted!r} of the capsule {self.name} is damaged: {error}") from error
        return stored

    def snapshot(self, machine: str | None = None) -> Snapshot:
        """Return a machine as a snapshot (see `stored`)."""
        return self.stored(machine).snapshot()

    def depends(self, machine: str) -> str:
        """Return what one of its machines depends on (see `Backend.fingerprint`)."""
        return self._facts.machines[machine]

    def check_fits(self, fingerprint: str, machine: str | None = None) -> None:
        """Check that a machine can be restored by what is here.

        Args:
            fingerprint: What packs for such machines depend on here (see `Backend.fingerprint`).
            machine: The machine; by default the first.

        Raises:
            CatalogError: Another QEMU, accelerator or processor made it.
        """
        wanted = self.machines[0] if machine is None else machine
        if self.depends(wanted) != fingerprint:
            raise CatalogError(
                f"the capsule {self.name} was made by another QEMU or accelerator, or with KVM on another processor or kernel of the host, "
                "and cannot be restored here; `vmbottle doctor` tells those of this computer"
            )

    def _saved(self) -> list[Path]:
        stored = (Stored.read(self.path / machine) for machine in self.machines)
        return [each.start.saved for each in stored if each.start.saved is not None]

    def remove(self) -> None:
        """Remove it.

        Raises:
            CatalogError: A machine runs from it.
        """
        # The saved folders are what machines hold. A damaged capsule has none that could be held.
        saved = [path.parent for path in self.path.glob("*/*/pack.json")]
        if not all(generations.remove(folder) for folder in saved):
            raise CatalogError(f"a machine runs from the capsule {self.name}: stop it first (vmbottle machine ls)")
        shutil.rmtree(self.path)

    @classmethod
    def save(  # noqa: PLR0913 - all that a capsule has
        cls,
        root: Path,
        machines: Mapping[str, tuple[Stored, str]],
        *,
        test: str,
        error: str,
        created: float | None = None,
        addresses: Mapping[str, str] = MappingProxyType({}),
    ) -> Capsule:
        """Write a capsule, whole or not at all.

        Args:
            root: The catalog's folder.
            machines: The boot source of each machine and what it depends on, by the machine's name.
            test: The id of the test.
            error: The first line of its error.
            created: The time of the failure, in seconds since 1970; by default now.
            addresses: The addresses of those that are on private LANs, by name (see `addresses`).

        Raises:
            OSError: There is no room.
        """
        folder = _claimed(private_dir(root / CAPSULES), test)
        try:
            for name, (stored, _) in machines.items():
                stored.write(folder / name)
            depends = {name: needs for name, (_, needs) in machines.items()}
            created = time.time() if created is None else created
            facts = _Facts(test=test, error=error, created=created, machines=depends, addresses=dict(addresses))
            records.write(folder / _FACTS, attrs.asdict(facts))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(folder)


def _claimed(parent: Path, test: str) -> Path:
    """Make the folder of the first name that no capsule has."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", test.rpartition("/")[2]).strip("-")[-_NAME:].strip("-") or "test"
    for name in (plain if number == 1 else f"{plain}-{number}" for number in count(1)):
        try:
            (parent / name).mkdir(mode=0o700)
        except FileExistsError:
            continue
        return parent / name
    raise AssertionError


def all_in(root: Path) -> Iterator[Capsule]:
    """Yield the capsules of a catalog, the oldest first; damaged ones are left out."""
    found = []
    for path in (root / CAPSULES).glob(f"*/{_FACTS}"):
        try:
            found.append(Capsule(path.parent))
        except CatalogError:
            continue
    yield from sorted(found, key=lambda capsule: (capsule.created, capsule.name))
