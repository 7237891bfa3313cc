"""Recording of Ethernet frames in the format of pcap, which tshark and Wireshark read.

The format: https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-04.html
"""

from __future__ import annotations

import struct
import time
from pathlib import Path

__all__ = ["LIMIT", "PcapFile"]

LIMIT = 64 << 20
"""Bytes of a recording at most: a guest must not fill the disk with its traffic."""
# The magic number is written in this computer's byte order, by which readers know that of all numbers.
_MAGIC, _VERSION, _FRAME, _ETHERNET = 0xA1B2C3D4, (2, 4), 1 << 16, 1


class PcapFile:
    """File of frames; what would make it longer than `LIMIT` is left out."""

    def __init__(self, path: Path) -> None:
        """Create the file.

        Raises:
            OSError: It cannot be created, or is there already.
        """
        # Without a buffer: the artifacts of a failed test copy the file while the LAN goes on.
        self._file = path.open("xb", buffering=0)
        self._file.write(struct.pack("=IHHiIII", _MAGIC, *_VERSION, 0, 0, _FRAME, _ETHERNET))

    def write(self, frame: bytes) -> None:
        """Append a frame.

        Raises:
            OSError: It cannot be written.
        """
        # Left out and no error: later frames may be shorter, but a recording must never stop a LAN.
        if self._file.tell() + len(frame) > LIMIT:
            return
        kept, now = frame[:_FRAME], time.time()
        header = struct.pack("=IIII", int(now), int(now % 1 * 1_000_000), len(kept), len(frame))
        self._file.write(header + kept)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
