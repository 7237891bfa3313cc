"""Text that a machine shows: on its virtual terminals, as the guest's kernel knows it, and on its screen, as it can be read there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pytest_vmbottle.errors import BackendUnavailable, MachineError
from pytest_vmbottle.host.commands import run_tool
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.result import Result
from pytest_vmbottle.shown import printable

__all__ = ["read_picture", "tty_text"]

_TTY = read_script(__package__, "tty.sh")
_NO_TTY = 3
# The font of a text mode is too small for tesseract, which also sees columns where there are none unless it is told so (--psm 6). The
# resolution is about that of an enlarged screen; without it tesseract guesses, and says so on stderr.
_TIMES = 2
_READER = ("--psm", "6", "--dpi", "150", "quiet")
_DARK = 128
_INVERTED = bytes(255 - value for value in range(256))
_INSTALL = "Install it: apt-get install tesseract-ocr"


def tty_text(number: int, run: Callable[[list[str]], Result]) -> str:
    """Return what a virtual terminal shows, without the blanks at the ends of its lines.

    Args:
        number: The number of the terminal.
        run: Function that runs a command in the guest as root.

    Raises:
        MachineError: The guest has no such terminal.
    """
    answer = run(["sh", "-c", _TTY, "sh", str(number)])
    if answer.returncode == _NO_TTY:
        raise MachineError(f"the guest has no virtual terminal {number}: its kernel has none, or it is in no use yet")
    data = answer.check().stdout_bytes
    columns = data[1] if len(data) > 1 else 0
    text = data[2:].decode("utf-32-le", errors="replace").replace("\0", " ")
    lines = [text[at : at + columns].rstrip() for at in range(0, len(text), columns or 1)]
    return "\n".join(lines).rstrip("\n")


def read_picture(picture: bytes, folder: Path, deadline: Deadline) -> str:
    """Return the text in a picture, read by tesseract.

    That is a program, and no library in this process: a picture is what a guest wants us to read.

    Args:
        picture: The picture, as PPM.
        folder: A folder for a file.
        deadline: When it has to be read.

    Raises:
        BackendUnavailable: There is no tesseract here.
        MachineError: It failed.
    """
    program = shutil.which("tesseract")
    if program is None:
        raise BackendUnavailable("text on a screen is read by tesseract, and that is not in the search path", _INSTALL)
    file = folder / "screen-text.pgm"
    file.write_bytes(_readable(picture))
    try:
        # One thread: others may be at work here, and a screen is small.
        ended = run_tool([program, file, "-", *_READER], timeout=deadline.remaining, env={**os.environ, "OMP_THREAD_LIMIT": "1"})
    finally:
        file.unlink(missing_ok=True)
    if not ended.ok:
        raise MachineError(f"tesseract could not read the screen: {printable(ended.output.strip()) or f'status {ended.returncode}'}")
    return ended.output.replace("\f", "").rstrip()


def _readable(picture: bytes) -> bytes:
    """Return a picture as PGM, dark on light and enlarged."""
    _, width, height, _, _ = picture.split(maxsplit=4)
    columns, rows = int(width), int(height)
    pixels = picture[-3 * columns * rows :]
    # The brightest part of each pixel, so that text of any colour stands out from black.
    grey = bytes(map(max, pixels[0::3], pixels[1::3], pixels[2::3]))
    grey = grey.translate(_INVERTED) if sum(grey) < _DARK * len(grey) else grey
    large = bytearray()
    for row in range(rows):
        line = bytearray(columns * _TIMES)
        for offset in range(_TIMES):
            line[offset::_TIMES] = grey[row * columns : (row + 1) * columns]
        large += line * _TIMES
    return b"P5 %d %d 255\n%b" % (columns * _TIMES, rows * _TIMES, bytes(large))
