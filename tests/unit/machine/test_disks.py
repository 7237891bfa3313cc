"""Disks that are made from images: which ones may be used, and how."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmbottle.backends.port import Disk
from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.machine.disks import new_disk

MIB = 1 << 20


def qcow2(path: Path, *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, "8M"], check=True)
    return path


def raw(path: Path) -> Path:
    path.write_bytes(bytes(510) + b"\x55\xaa" + bytes(MIB - 512))
    return path


def truncated(folder: Path) -> Path:
    whole = qcow2(folder / "truncated")
    subprocess.run(["qemu-io", "-c", "write -P 1 0 4M", whole], check=True, stdout=subprocess.DEVNULL)
    os.truncate(whole, whole.stat().st_size - MIB)
    return whole


def link(folder: Path, target: Path) -> Path:
    (folder / "link").symlink_to(target)
    return folder / "link"


def written(folder: Path, content: bytes) -> Path:
    (folder / "file").write_bytes(content)
    return folder / "file"


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: qcow2(folder / "top", "-b", str(raw(folder / "secret")), "-F", "raw"), "backing file"),
        (lambda folder: qcow2(folder / "top", "-o", f"data_file={folder / 'other'}"), "data in another file"),
        (
            lambda folder: qcow2(folder / "top", "-u", "-b", "json:{}", "-F", "raw"),
            "backing file",
        ),
        (truncated, "not a whole disk image"),
        (lambda folder: written(folder, b"text"), "not a disk image"),
        (lambda folder: written(folder, b"\x1f\x8b" + bytes(MIB)), "gzip"),
        (lambda folder: written(folder, b"KDMV" + bytes(MIB)), "VMDK"),
        (lambda folder: written(folder, raw(folder / "raw").read_bytes() + b"more"), "multiple of 512"),
        (lambda folder: written(folder, raw(folder / "raw").read_bytes() + b"conectix".ljust(512, b"\0")), "VHD"),
        (lambda folder: folder, "regular file"),
        (fifo, "regular file"),
        (lambda folder: folder / "none", "No such file"),
        (lambda folder: link(folder, folder / "none"), "No such file"),
        (lambda folder: link(folder, Path("/dev/zero")), "regular file"),
        (lambda folder: link(folder, folder / "link"), "symbolic links"),
        (lambda folder: link(folder, qcow2(folder / "top", "-b", str(raw(folder / "secret")), "-F", "raw")), "backing file"),
    ],
)
def test_an_image_that_is_none_or_that_names_others_is_refused(tmp_path: Path, make: Callable[[Path], Path], reason: str) -> None:
    with pytest.raises(SpecError, match=reason) as refused:
        new_disk("data", make(tmp_path))
    assert "disks={'data'" in str(refused.value)


def test_an_image_is_used_where_it_is_by_its_format_and_a_link_is_followed_once(tmp_path: Path) -> None:
    for image, kind, size in ((raw(tmp_path / "raw"), "raw", MIB), (qcow2(tmp_path / "qcow2"), "qcow2", 8 * MIB)):
        for path in (image, str(image), link(tmp_path, image)):
            disk = new_disk("data", path)
            assert (disk.size, disk.disks, disk.saved, disk.overlay) == (size, (Disk(path=image, format=kind),), False, None)
        (tmp_path / "link").unlink()
