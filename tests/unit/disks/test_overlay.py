"""Overlays that are written in one go, read by QEMU's own tool."""

from __future__ import annotations

import json
import random
import stat
import subprocess
from pathlib import Path

import pytest

from pytest_vmbottle.disks.overlay import LARGEST, SMALLEST, write_overlay

SIZE = 4 << 20


def flattened(overlay: Path, base: Path) -> bytes:
    """Content of a disk, as QEMU reads it."""
    below = {"driver": "raw", "file": {"driver": "file", "filename": str(base)}}
    chain = {"driver": "qcow2", "file": {"driver": "file", "filename": str(overlay)}, "backing": below}
    flat = overlay.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", f"json:{json.dumps(chain)}", str(flat)], check=True)
    return flat.read_bytes()


@pytest.mark.parametrize("block", [SMALLEST, 4096, LARGEST])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 1])
def test_a_disk_has_the_blocks_that_were_given_and_what_lies_beneath_elsewhere(tmp_path: Path, block: int, share: float) -> None:
    chance = random.Random(f"{block} {share}")
    base, data, overlay = tmp_path / "base", tmp_path / "data", tmp_path / "overlay"
    base.write_bytes(chance.randbytes(SIZE))
    data.write_bytes(chance.randbytes(SIZE))
    chosen = [number for number in range(SIZE // block) if chance.random() < share]
    blocks = {number: None if chance.random() < 0.1 else chance.randrange(0, SIZE - block, 512) for number in chosen}
    with data.open("rb") as file:
        write_overlay(overlay, size=SIZE, block=block, blocks=blocks, data=file)
    expected = bytearray(base.read_bytes())
    for number, offset in blocks.items():
        content = bytes(block) if offset is None else data.read_bytes()[offset : offset + block]
        expected[number * block : (number + 1) * block] = content
    assert flattened(overlay, base) == expected
    # Leaks and wrong counts too, which a guest that goes on to write would meet.
    assert subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(overlay)], check=False).returncode == 0


def test_an_empty_overlay_is_private_and_as_large_as_its_disk_and_takes_no_room(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    write_overlay(overlay, size=20 << 30)
    told = json.loads(subprocess.run(["qemu-img", "info", "--output=json", str(overlay)], check=True, capture_output=True).stdout)
    assert (told["format"], told["virtual-size"]) == ("qcow2", 20 << 30)
    assert stat.S_IMODE(overlay.stat().st_mode) == 0o600
    assert overlay.stat().st_size < 1 << 20


def test_what_stands_there_already_is_not_written_over(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    overlay.write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        write_overlay(overlay, size=SIZE)
    assert overlay.read_bytes() == b"somebody's"
