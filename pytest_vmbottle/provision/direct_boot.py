"""Kernels that a mark gives to a machine, in place of those of its image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.host.files import copy_sparse

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vmbottle.images import Image
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["boot_files", "copy_boot_files"]


def copy_boot_files(spec: MachineSpec, folder: Path) -> None:
    """Copy the kernel and the initial RAM disk of a spec into a folder: a developer builds them again in their place.

    Raises:
        SpecError: One of them cannot be read.
    """
    for keyword, path in (("kernel", spec.kernel), ("initrd", spec.initrd)):
        if path is not None:
            # A FIFO would be waited for.
            if path.exists() and not path.is_file():
                raise SpecError(f"{keyword}={str(path)!r}: is not a regular file")
            try:
                with path.open("rb") as source, (folder / keyword).open("xb") as target:
                    copy_sparse(source.fileno(), target.fileno())
            except OSError as error:
                raise SpecError(f"{keyword}={str(path)!r}: cannot be copied: {error.strerror}") from error


def boot_files(image: Image, spec: MachineSpec, folder: Path) -> Image:
    """Return an image with the kernel, the initial RAM disk and the command line of a spec, as copied into a folder.

    Raises:
        SpecError: The image is booted by its firmware, so that more than one of them is needed.
    """
    given = [keyword for keyword in ("append", "cmdline", "initrd") if getattr(spec, keyword)]
    if spec.kernel is None and image.kernel is None and given:
        raise SpecError(
            f"{given[0]}=: the image {image.name} is booted by its firmware, with a kernel of its own: give kernel= and cmdline= too"
        )
    if spec.kernel is not None and not (spec.cmdline or image.cmdline):
        raise SpecError(
            f"kernel=: the image {image.name} has no command line for it: give cmdline= too, such as 'root=/dev/vda1 rw console=ttyS0'"
        )
    # The image's own modules fit its own kernel alone.
    initrd = folder / "initrd" if spec.initrd is not None else image.initrd if spec.kernel is None else None
    return attrs.evolve(
        image,
        kernel=folder / "kernel" if spec.kernel is not None else image.kernel,
        initrd=initrd,
        cmdline=" ".join(filter(None, (spec.cmdline or image.cmdline, spec.append))),
    )
