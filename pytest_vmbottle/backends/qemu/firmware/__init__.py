"""Probe guests: firmware images of our own that test an accelerator, for each architecture.

The listings are sources of the GNU assembler, each line after its offset and its machine code. Python joins the bytes; no assembler is
needed to run them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

import attrs

__all__ = ["AMOUNTS", "IMAGE_BYTES", "RAM_BYTES", "RESULTS", "WORK_DONE", "Guests", "assemble", "image"]

RAM_BYTES = 16 << 20
"""Bytes of RAM of the machines for both guests."""

# QEMU's PC takes a BIOS only in whole multiples of 64 KiB (x86_bios_rom_init in hw/i386).
IMAGE_BYTES = 64 << 10

# Order and number are fixed: both listings read them from their image by offsets, as the `.equ` lines of each say.
AMOUNTS = {
    "loops": 10_000_000,
    "breakpoints": 500,
    "undefined": 20,
    "ticks": 3,
    "identifications": 20,
    "faults": 500,
    "words": 1 << 18,
    "calls": 500,
}
"""Number of times that the guest does each thing; it reads them from its image.

Things that leave the guest under KVM are few, because nested KVM makes them slow.
"""

RESULTS = struct.pack(
    "<QQ",
    pow(3, 2 * AMOUNTS["loops"], 1 << 64),
    sum(AMOUNTS.values()) - AMOUNTS["loops"] + AMOUNTS["faults"],  # a fault is counted by its handler and in the page it missed
)
"""Results of a working guest: the product of its loops, and the number of other events."""

WORK_DONE = (
    f"{2 * AMOUNTS['loops']:,} function calls in kernel and user mode, {AMOUNTS['faults']} page faults, "
    f"{AMOUNTS['breakpoints'] + AMOUNTS['undefined']} exceptions, {AMOUNTS['calls']} system calls and {AMOUNTS['ticks']} timer interrupts"
)
"""Description of a working guest's work."""


@attrs.frozen(kw_only=True)
class Guests:
    """Probe guests of one architecture, and the format of their reports.

    Attributes:
        work: The image of the guest that does a kernel's work; it reports a letter for each stage, `=` as the last, then `RESULTS`.
        count: The image of the guest that counts.
        devices: Arguments for the device that sends their reports, byte by byte, to the chardev `report`.
        stages: The work that is done when a letter is reported, in order.
        hello: The counting guest's report before it counts.
        done: QEMU's exit status after the working guest has ended itself.
    """

    work: bytes
    count: bytes
    devices: tuple[str, ...]
    stages: Mapping[str, str]
    hello: bytes
    done: int


def assemble(listing: str) -> tuple[bytes, dict[str, int]]:
    r"""Return the machine code of a listing, and the offsets of its labels.

    >>> assemble("start:\n000  90    nop\nend:\n001  eb fd    jmp start")
    (b'\x90\xeb\xfd', {'start': 0, 'end': 1})
    """
    code, labels = b"", {}
    for line in listing.strip().splitlines():
        if re.fullmatch(r"\w+:", line):
            labels[line[:-1]] = len(code)
        elif line and not line.startswith("."):
            offset, machine_code, _ = re.split(r" {2,}", line, maxsplit=2)
            # A listing that was edited by hand must not shift its jumps unnoticed.
            if int(offset, 16) != len(code):
                raise ValueError(f"the listing goes on at {len(code):#x}, not as it says: {line}")
            code += bytes.fromhex(machine_code)
    return code, labels


def image(parts: Mapping[int, bytes]) -> bytes:
    """Return an image of 64 KiB with these parts at their offsets, and zeros in between.

    Raises:
        ValueError: A part overlaps another one, or the end.
    """
    whole = bytearray(IMAGE_BYTES)
    end = 0
    for offset, content in sorted(parts.items()):
        if not end <= offset <= IMAGE_BYTES - len(content):
            raise ValueError(f"the part at {offset:#x} overlaps")
        end = offset + len(content)
        whole[offset:end] = content
    return bytes(whole)
