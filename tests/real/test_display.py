"""A machine with a screen and a keyboard."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import pytest

from pytest_vmbottle import Machine, MachineDied, MachineError, MachineTimeout, layer
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.machine.keyboard import _KEYS


@layer("debian-12", display=True)
def tty(vm: Machine) -> None:
    """Something that reads from the keyboard and shows it: a program on the first virtual terminal."""
    words = ["-p", "StandardInput=tty", "-p", "StandardOutput=tty", "-p", "TTYPath=/dev/tty1", "-p", "TTYReset=yes"]
    vm.exec(["systemd-run", "--unit=reader", *words, "sh", "-c", "printf 'what now? '; exec cat > /run/typed"])
    vm.wait_for_file("/run/typed")


pytestmark = [pytest.mark.vm(tty), pytest.mark.guests]

# None of the words is a key's name; each character of a US keyboard is once in it.
TEXT = "The quick brown fox jumps over the lazy dog: `~!@#$%^&*()_+-={}[]|\\;'<>?,./ 0123456789 ABC"


def pixels(png: bytes) -> tuple[int, int, set[bytes]]:
    """Width, height and the colours of an image, of 8-bit RGB as QEMU writes it."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    place, header, data = 8, b"", b""
    while place < len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        chunk = png[place + 8 : place + 8 + length]
        assert struct.unpack(">I", png[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + chunk)
        header = chunk if kind == b"IHDR" else header
        data += chunk if kind == b"IDAT" else b""
        place += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", header[:10])
    assert (depth, colour) == (8, 2)
    return width, height, _colours(zlib.decompress(data), width, height)


def _colours(raw: bytes, width: int, height: int) -> set[bytes]:
    stride, above, colours = width * 3, bytearray(width * 3), set()
    for line in range(height):
        kind, row = raw[line * (stride + 1)], bytearray(raw[line * (stride + 1) + 1 : (line + 1) * (stride + 1)])
        for at in range(stride):
            left, up, corner = (row[at - 3] if at > 2 else 0), above[at], (above[at - 3] if at > 2 else 0)
            row[at] = (row[at] + _predicted(kind, left, up, corner)) & 255
        colours |= {bytes(row[at : at + 3]) for at in range(0, stride, 3)}
        above = row
    return colours


def _predicted(kind: int, left: int, up: int, corner: int) -> int:
    """Return the prediction of a filter, by the PNG specification, section 9.2."""
    if kind == 4:
        guess = left + up - corner
        return min((left, up, corner), key=lambda each: abs(guess - each))
    return (0, left, up, (left + up) // 2)[kind]


def test_text_and_keys_arrive_at_the_first_virtual_terminal(vm: Machine) -> None:
    vm.send_keys(TEXT, "ret", "wrong", "backspace", *["backspace"] * 4, *"home", "\n", "ctrl-d")
    vm.wait_until("! systemctl is-active --quiet reader", timeout=120)

    assert vm.path("/run/typed").read_text() == f"{TEXT}\nhome\n"


def test_a_screenshot_is_a_png_of_what_the_screen_shows(vm: Machine, tmp_path: Path) -> None:
    before, after = tmp_path / "a.png", tmp_path / "b.png"

    assert vm.screenshot(before) == before
    width, height, colours = pixels(before.read_bytes())
    assert (width, height) == (720, 400)
    assert 2 <= len(colours) < 20
    vm.exec(r"printf '\033[41m\033[2J' > /dev/tty1")
    vm.wait_until(lambda: pixels(vm.screenshot(after).read_bytes())[2] != colours)
    # The card's colours have six bits, and QEMU may fill up the other two.
    assert any(colour[0] & 0xFC == 0xA8 and colour[1:] == b"\0\0" for colour in pixels(after.read_bytes())[2])


def test_a_paused_machine_shows_its_screen_and_takes_no_keys(vm: Machine, tmp_path: Path) -> None:
    first = vm.screenshot(tmp_path / "first.png").read_bytes()
    vm.lifecycle.instance.pause()

    assert vm.screenshot(tmp_path / "paused.png").read_bytes()[:8] == first[:8]
    with pytest.raises(MachineError, match="paused"):
        vm.send_keys("ret")


def test_every_key_has_a_name_that_qemu_knows(vm: Machine) -> None:
    schema = vm.lifecycle.instance._qmp.execute("query-qmp-schema", deadline=Deadline(30))  # type: ignore[attr-defined]
    known = next(set(each["values"]) for each in schema if each["meta-type"] == "enum" and "kp_enter" in each["values"])

    assert known >= _KEYS


def test_a_screenshot_that_cannot_be_written_leaves_nothing(vm: Machine, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        vm.screenshot(tmp_path / "none" / "a.png")
    vm.lifecycle.instance.stop()
    with pytest.raises(MachineDied):
        vm.screenshot(tmp_path / "a.png")
    with pytest.raises(MachineDied):
        vm.send_keys("ret")
    assert list(tmp_path.iterdir()) == []


def test_the_text_on_a_terminal_and_on_the_screen_is_read(vm: Machine) -> None:
    vm.wait_for_tty_text("what now?")
    vm.exec(r"printf '\033c\033[1;33mPress a key to continue\033[0m\n\n  \303\234ber alles 42' > /dev/tty1")
    assert vm.tty_text() == "Press a key to continue\n\n  Über alles 42"
    assert vm.wait_for_screen_text(re.compile("a key to (con[a-z]+)"))[1] == "continue"
    with pytest.raises(MachineTimeout, match=r"(?s)'no such thing' on the screen.*Press a key"):
        vm.wait_for_screen_text("no such thing", timeout=1)
    with pytest.raises(MachineTimeout, match=r"(?s)'no such thing' on the virtual terminal 1.*Press a key"):
        vm.wait_for_tty_text("no such thing", timeout=1)
    with pytest.raises(MachineError, match="no virtual terminal 99"):
        vm.tty_text(99)


@pytest.mark.vm("debian-12", display=False)
def test_a_machine_without_a_display_says_how_to_have_one(session_vm: Machine, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="display=True"):
        session_vm.screenshot(tmp_path / "a.png")
    with pytest.raises(MachineError, match="display=True"):
        session_vm.send_keys("ret")
    with pytest.raises(MachineError, match="display=True"):
        session_vm.screen_text()
    assert isinstance(session_vm.tty_text(), str)
    assert list(tmp_path.iterdir()) == []
