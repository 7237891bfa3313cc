"""Text of terminals and of screens: what the guest's answer and a picture come to, without a guest."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmbottle.errors import BackendUnavailable, MachineError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.machine.screen_text import read_picture, tty_text
from pytest_vmbottle.result import CommandFailed, Result


def answer(data: bytes, status: int = 0) -> Callable[[list[str]], Result]:
    return lambda argv: Result(argv=tuple(argv), returncode=status, stdout=data.decode(errors="surrogateescape"), stderr="no")


def shown(*lines: str, columns: int) -> bytes:
    return bytes([len(lines), columns]) + "".join(line.ljust(columns) for line in lines).encode("utf-32-le")


def test_lines_end_where_the_terminals_do_without_blanks() -> None:
    assert tty_text(1, answer(shown("login: ", "", "  Grüße", "", "", columns=8))) == "login:\n\n  Grüße"
    assert tty_text(1, answer(shown("\0" * 8, "a\0b", columns=8))) == "\na b"
    assert tty_text(1, answer(bytes([25, 80]))) == ""


def test_what_is_no_text_is_shown_as_such_and_what_is_no_answer_is_an_error() -> None:
    assert tty_text(1, answer(bytes([1, 2]) + b"\xff\xff\xff\xff" + "x".encode("utf-32-le"))) == "\N{REPLACEMENT CHARACTER}x"
    with pytest.raises(MachineError, match="no virtual terminal 9"):
        tty_text(9, answer(b"", status=3))
    with pytest.raises(CommandFailed):
        tty_text(1, answer(b"", status=1))


# Rows of five pixels; a letter's width has one more.
_FONT = {
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "P": "11110 10001 10001 11110 10000 10000 10000",
}


def picture(word: str, ink: bytes, paper: bytes, *, times: int = 4) -> bytes:
    rows = [" ".join(_FONT[letter].split()[row] for letter in word).replace(" ", "00") for row in range(7)]
    rows = ["0" * len(rows[0])] * 4 + rows + ["0" * len(rows[0])] * 4
    wide = ["0" * 20 + "".join(pixel * times for pixel in row) + "0" * 20 for row in rows for _ in range(times)]
    pixels = b"".join(ink if pixel == "1" else paper for row in wide for pixel in row)
    return b"P6\n%d %d\n255\n" % (len(wide[0]), len(wide)) + pixels


@pytest.mark.parametrize(("ink", "paper"), [(b"\xa8\xa8\xa8", b"\0\0\0"), (b"\0\0\0", b"\xff\xff\xff"), (b"\x54\xff\x54", b"\0\0\0")])
def test_a_picture_is_read_whatever_its_colours(ink: bytes, paper: bytes, tmp_path: Path) -> None:
    assert re.search("TOP", read_picture(picture("TOP", ink, paper), tmp_path, Deadline(60)).upper())
    assert not list(tmp_path.iterdir())


def test_a_computer_without_the_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendUnavailable, match="tesseract") as caught:
        read_picture(picture("TOP", b"\0\0\0", b"\xff\xff\xff"), tmp_path, Deadline(60))
    assert "tesseract-ocr" in caught.value.remedy


def test_a_reader_that_fails_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "tesseract"
    program.write_text("#!/bin/sh\necho no data for eng; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(shutil.which('sh') or '').parent}")
    with pytest.raises(MachineError, match="no data for eng"):
        read_picture(picture("TOP", b"\0\0\0", b"\xff\xff\xff"), tmp_path, Deadline(60))
    assert list(tmp_path.iterdir()) == [program]
