"""Origins: the image at the bottom of a machine, and how machines start from it or from a pack that stands on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Self

import attrs

from pytest_vmbottle.backends.port import DataDisk, Disk, Start
from pytest_vmbottle.channels.port import Keys
from pytest_vmbottle.channels.ssh import new_keys
from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.host import records
from pytest_vmbottle.host.files import copy_sparse
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.images.disk_format import check_again, opened
from pytest_vmbottle.machine.disks import new_disk
from pytest_vmbottle.provision.direct_boot import boot_files, copy_boot_files
from pytest_vmbottle.provision.seed import write_seed
from pytest_vmbottle.spec.pack_kind import PackKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pytest_vmbottle.backends.port import Backend, OwnImage
    from pytest_vmbottle.catalog.packs import Pack
    from pytest_vmbottle.host.deadline import Deadline
    from pytest_vmbottle.images import Image
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["BackendOrigin", "DiskOrigin", "KeptOrigin", "Origin", "with_own_images"]


@attrs.frozen(kw_only=True)
class Origin(ABC):
    """Image that a machine is finally made from, looked up once.

    Attributes:
        name: Its name for people.
        sha256: Digest of its content, to compare packs with.
        key: Digest of everything that a guest boots from.
        prepared: Whether its guests have the agent and Python, so that nothing is installed in them.
        awaits_boot: Whether a booted guest is ready only when its system has started everything.
        is_quick: Whether machines start from it as quickly as from a pack of it, so that none is made.
    """

    name: str
    sha256: str
    key: str
    prepared: bool
    awaits_boot: bool
    is_quick: bool

    @abstractmethod
    def cold(self, spec: MachineSpec, folder: Path, *, building: bool = False) -> Start:
        """Return the boot source for a cold boot, with its files made in a folder.

        Raises:
            SpecError: Its disk is to be smaller than the image, or its kernel cannot be booted.
        """

    @abstractmethod
    def from_pack(self, spec: MachineSpec, pack: Pack, beneath: Callable[[str], Pack], *, building: bool = False) -> Start:
        """Return the boot source for a pack; `beneath` gives the packs below it."""

    @abstractmethod
    def pack_without_machine(self, dest: Path, *, deadline: Deadline) -> bool:
        """Write the image as a pack into a folder; return false if that takes a machine."""


@attrs.frozen(kw_only=True)
class DiskOrigin(Origin):
    """A disk image, in the catalog or in its own place.

    Attributes:
        image: Its record.
    """

    image: Image

    @classmethod
    def of(cls, image: Image) -> Self:
        """Make an origin from an image's record."""
        return cls(
            name=image.name,
            sha256=image.sha256,
            key=image.key,
            prepared=image.prepared,
            awaits_boot=image.readiness == "cloud-init",
            is_quick=False,
            image=image,
        )

    def cold(self, spec: MachineSpec, folder: Path, *, building: bool = False) -> Start:
        """Return the boot source for the disk, with a new seed and new keys."""
        size, keys = self._disk_size(spec), new_keys()
        write_seed(folder / "seed.iso", hostname=spec.name, keys=keys, user_data=spec.user_data)
        records.write(folder / "keys.json", attrs.asdict(keys), version=0)
        copy_boot_files(spec, folder)
        start = self._start(spec, folder, size=size, building=building)
        return attrs.evolve(start, data=tuple(new_disk(name, source) for name, source in spec.disks))

    def from_pack(self, spec: MachineSpec, pack: Pack, beneath: Callable[[str], Pack], *, building: bool = False) -> Start:
        """Return the boot source for the chain of disks down to the image, with the seed and keys of the first boot."""
        chain = [pack]
        while chain[-1].manifest.parent is not None:
            chain.append(beneath(chain[-1].manifest.parent))
        # Found from the top down, but `Start` has the lowest first.
        chain.reverse()
        saved = None if pack.manifest.kind == PackKind.DISK else pack.path
        # The seed and the keys are those of the first boot, deep in the chain: a later seed would be another instance to cloud-init.
        first = self._start(spec, chain[0].path, size=pack.manifest.disk_size, building=building)
        disks = (Disk(path=each.path / "disk.qcow2") for each in chain)
        return attrs.evolve(first, disks=(*first.disks, *disks), saved=saved, data=_data_disks(spec, chain))

    def _start(self, spec: MachineSpec, folder: Path, *, size: int, building: bool) -> Start:
        # Beside the seed of the first boot, as that is: all clones of a pack reboot with the same kernel.
        booted = boot_files(self.image, spec, folder)
        return Start(
            disks=(Disk(path=self.image.disk, format=self.image.format),),
            disk_size=size,
            kernel=booted.kernel,
            initrd=booted.initrd,
            # Our images disable cloud-init for a faster boot, and only cloud-init reads user-data.
            cmdline=booted.boot_words(cloud_init=spec.user_data is not None),
            firmware=self.image.firmware,
            seed=folder / "seed.iso",
            keys=records.read_as(folder / "keys.json", lambda facts: Keys(**facts)),
            building=building,
        )

    def _disk_size(self, spec: MachineSpec) -> int:
        least = self.image.virtual_size
        if spec.disk is not None and spec.disk < least:
            raise SpecError(f"disk={format_size(spec.disk)} is less than the image {self.name} needs: {format_size(least)}")
        return spec.disk or least

    def pack_without_machine(self, dest: Path, *, deadline: Deadline) -> bool:  # noqa: ARG002
        """Return false: a pack of a disk needs a first boot."""
        return False


@attrs.frozen(kw_only=True)
class BackendOrigin(Origin):
    """Image in a backend's own store, of which the catalog has no disk.

    Attributes:
        backend: The backend.
        reference: The backend's reference to the image.
    """

    backend: Backend
    reference: str

    @classmethod
    def of(cls, image: OwnImage, backend: Backend) -> Self:
        """Make an origin from a backend's description of its image."""
        return cls(
            name=image.name,
            sha256=image.digest,
            key=image.digest,
            prepared=True,
            awaits_boot=False,
            is_quick=image.quick,
            backend=backend,
            reference=image.reference,
        )

    def cold(self, spec: MachineSpec, folder: Path, *, building: bool = False) -> Start:  # noqa: ARG002
        """Return the boot source for the image; a machine to be packed is started so that it can be."""
        return Start.own(image=self.reference, building=building)

    def from_pack(
        self,
        spec: MachineSpec,  # noqa: ARG002
        pack: Pack,
        beneath: Callable[[str], Pack],  # noqa: ARG002
        *,
        building: bool = False,
    ) -> Start:
        """Return the boot source for a pack, which has everything in it."""
        return Start.own(saved=pack.path, building=building)

    def pack_without_machine(self, dest: Path, *, deadline: Deadline) -> bool:
        """Have the backend pack its image."""
        self.backend.pack_image(self.reference, dest, deadline=deadline)
        return True


@attrs.frozen(kw_only=True)
class KeptOrigin(Origin):
    """Image of a machine that starts from its own files, so that the image need not be there any more."""

    @classmethod
    def of(cls, origin: Origin) -> Self:
        """Keep the facts of an image."""
        return cls(**{field.name: getattr(origin, field.name) for field in attrs.fields(Origin)})

    def cold(self, spec: MachineSpec, folder: Path, *, building: bool = False) -> Start:  # noqa: ARG002
        """Raise `SpecError`: the machine has a disk of its own."""
        raise self._refusal(spec)

    def from_pack(
        self,
        spec: MachineSpec,
        pack: Pack,  # noqa: ARG002
        beneath: Callable[[str], Pack],  # noqa: ARG002
        *,
        building: bool = False,  # noqa: ARG002
    ) -> Start:
        """Raise `SpecError`: the machine has a disk of its own."""
        raise self._refusal(spec)

    def pack_without_machine(self, dest: Path, *, deadline: Deadline) -> bool:  # noqa: ARG002
        """Return false: nothing is packed for it."""
        return False

    def _refusal(self, spec: MachineSpec) -> SpecError:
        return SpecError(f"the machine {spec.name!r} starts from its own disk, and not from the image {self.name}")


def with_own_images(start: Start, folder: Path) -> Start:
    """Return the boot source of a pack that is built, with copies of the images that its new disks are made from, in the pack's folder.

    A pack has all that its clones need: others may change or remove the images, which lie in their own places.

    Raises:
        CatalogError: An image is not safe any more.
        OSError: It cannot be copied.
    """
    return attrs.evolve(start, data=tuple(disk if disk.saved else _with_own_image(disk, folder) for disk in start.data))


def _with_own_image(disk: DataDisk, folder: Path) -> DataDisk:
    copies = []
    for image in disk.disks:
        copy = folder / _image_file(disk.name, image.format)
        with opened(image.path) as source, copy.open("xb") as target:
            copy_sparse(source.fileno(), target.fileno())
        # The copy and not the image, which may have changed in between.
        check_again(copy, image.format)
        copies.append(Disk(path=copy, format=image.format))
    return attrs.evolve(disk, disks=tuple(copies))


def _image_file(name: str, kind: str) -> str:
    return f"image-{name}.{kind}"


def _data_disks(spec: MachineSpec, chain: Iterable[Pack]) -> tuple[DataDisk, ...]:
    """Return the disks beside the root disk: those that the highest pack has first, then those that are new."""
    found: dict[str, DataDisk] = {}
    for pack in chain:
        for name, size in pack.manifest.disks.items():
            disk = found.get(name) or DataDisk(name=name, size=size, disks=_own_image(pack, name), saved=True)
            found[name] = attrs.evolve(disk, disks=(*disk.disks, Disk(path=pack.path / disk.file)))
    return (*found.values(), *(new_disk(name, source) for name, source in spec.disks if name not in found))


def _own_image(pack: Pack, name: str) -> tuple[Disk, ...]:
    files = ((kind, _image_file(name, kind)) for kind in ("qcow2", "raw"))
    return tuple(Disk(path=pack.path / file, format=kind) for kind, file in files if file in pack.manifest.files)
