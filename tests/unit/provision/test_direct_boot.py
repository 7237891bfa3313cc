"""What a machine boots directly: the image's kernel, or that of a mark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from pytest_vmbottle import MachineSpec, SpecError
from pytest_vmbottle.images import Image
from pytest_vmbottle.provision.direct_boot import boot_files, copy_boot_files

FOLDER = Path("/the/machines/folder")
DIRECT = Image(
    name="direct",
    sha256="0",
    key="0",
    disk=Path("/disk"),
    format="raw",
    virtual_size=1,
    arch="x86_64",
    kernel=Path("/vmlinuz"),
    initrd=Path("/initrd.img"),
    cmdline="root=/dev/vda",
)
BY_FIRMWARE = attrs.evolve(DIRECT, name="loads", kernel=None, initrd=None, cmdline="")


@pytest.mark.parametrize(
    ("image", "given", "booted"),
    [
        (DIRECT, {}, (Path("/vmlinuz"), Path("/initrd.img"), "root=/dev/vda")),
        (DIRECT, {"append": "foo"}, (Path("/vmlinuz"), Path("/initrd.img"), "root=/dev/vda foo")),
        (DIRECT, {"cmdline": "bar", "append": "foo"}, (Path("/vmlinuz"), Path("/initrd.img"), "bar foo")),
        (DIRECT, {"initrd": "x"}, (Path("/vmlinuz"), FOLDER / "initrd", "root=/dev/vda")),
        (DIRECT, {"kernel": "x"}, (FOLDER / "kernel", None, "root=/dev/vda")),
        (DIRECT, {"kernel": "x", "initrd": "x"}, (FOLDER / "kernel", FOLDER / "initrd", "root=/dev/vda")),
        (BY_FIRMWARE, {}, (None, None, "")),
        (BY_FIRMWARE, {"kernel": "x", "cmdline": "bar"}, (FOLDER / "kernel", None, "bar")),
    ],
)
def test_a_mark_replaces_what_it_names_and_the_images_initial_ram_disk_is_for_its_kernel_alone(
    image: Image, given: dict[str, Any], booted: tuple[object, ...]
) -> None:
    found = boot_files(image, MachineSpec(source="any", **given), FOLDER)
    assert (found.kernel, found.initrd, found.cmdline) == booted


@pytest.mark.parametrize(
    ("given", "lack"),
    [
        ({"append": "foo"}, "append=: the image loads is booted by its firmware"),
        ({"initrd": "x"}, "initrd=: .*give kernel= and cmdline= too"),
        ({"kernel": "x"}, "kernel=: .*give cmdline= too"),
    ],
)
def test_an_image_that_its_firmware_boots_needs_a_kernel_and_a_command_line(given: dict[str, Any], lack: str) -> None:
    with pytest.raises(SpecError, match=lack):
        boot_files(BY_FIRMWARE, MachineSpec(source="any", **given), FOLDER)


def test_files_are_copied_and_a_missing_one_is_named(tmp_path: Path) -> None:
    kernel, folder = tmp_path / "bzImage", tmp_path / "folder"
    kernel.write_bytes(b"kernel")
    folder.mkdir()
    copy_boot_files(MachineSpec(source="any", kernel=kernel), folder)
    kernel.write_bytes(b"another")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"kernel": b"kernel"}
    with pytest.raises(SpecError, match="initrd='/none': cannot be copied: No such file"):
        copy_boot_files(MachineSpec(source="any", initrd="/none"), folder)
