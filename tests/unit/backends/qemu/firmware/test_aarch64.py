"""The aarch64 guests that prove an accelerator, as bytes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pytest_vmbottle.backends.qemu.firmware import AMOUNTS, aarch64, assemble, image

PROGRAMS = pytest.mark.parametrize("listing", [aarch64.WORK, aarch64.COUNT], ids=["work", "count"])


@PROGRAMS
def test_the_machine_code_of_a_listing_is_what_the_gnu_assembler_makes_of_its_instructions(listing: str, tmp_path: Path) -> None:
    instructions = [re.sub(r"^[0-9a-f]{3}  (?:[0-9a-f]{2} ){4} +", " ", line) for line in (aarch64.START + listing).splitlines()]
    (tmp_path / "source.s").write_text("\n".join(instructions) + "\n")
    subprocess.run(["aarch64-linux-gnu-as", tmp_path / "source.s", "-o", tmp_path / "object"], check=True)
    subprocess.run(["aarch64-linux-gnu-objcopy", "-O", "binary", "-j", ".text", tmp_path / "object", tmp_path / "code"], check=True)

    assert assemble(aarch64.START + listing)[0] == (tmp_path / "code").read_bytes()


@PROGRAMS
def test_an_image_is_64_kib_and_begins_with_code_that_flows_into_the_program(listing: str) -> None:
    content = aarch64.firmware(listing)
    code, labels = assemble(aarch64.START + listing)

    assert len(content) == 64 << 10
    assert content.startswith(code)
    assert labels["start"] == 0
    assert labels["program"] == len(assemble(aarch64.START)[0])


@PROGRAMS
def test_every_exception_has_its_handler_and_all_others_are_a_surprise(listing: str) -> None:
    labels = assemble(aarch64.START + listing)[1]
    content = aarch64.firmware(listing)
    handlers = {4: "on_exception", 5: "on_interrupt", 8: "on_call", 9: "on_interrupt"}

    for vector in range(16):
        place = 0x2000 + 0x80 * vector
        branch = int.from_bytes(content[place : place + 4], "little")
        assert branch >> 26 == 0b000101  # B, by a signed number of words
        words = (branch & 0x3FFFFFF) - (1 << 26 if branch & 1 << 25 else 0)
        assert place + 4 * words == labels[handlers.get(vector, "on_surprise")]


def test_the_working_guest_finds_each_amount_where_it_looks_for_it() -> None:
    offsets = {name.lower(): int(offset) for name, offset in re.findall(r"^\.equ (\w+), (\d+)$", aarch64.WORK, re.MULTILINE)}
    content = aarch64.firmware(aarch64.WORK)

    assert {name: int.from_bytes(content[0x2800 + at : 0x2804 + at], "little") for name, at in offsets.items()} == AMOUNTS


def test_parts_of_an_image_that_overlap_are_refused() -> None:
    assert image({4: b"b", 0: b"aaaa"}).startswith(b"aaaab\0")
    for parts in ({0: b"aaaaa", 4: b"b"}, {0xFFFF: b"ab"}):
        with pytest.raises(ValueError, match="overlaps"):
            image(parts)
