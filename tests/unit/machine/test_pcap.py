"""Recorded frames, read as any program reads pcap."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.machine import pcap
from pytest_vmbottle.machine.pcap import PcapFile
from pytest_vmbottle.machine.switch import Switch


def frames(path: Path) -> list[tuple[float, bytes]]:
    data = path.read_bytes()
    magic, major, minor, _, _, _, link = struct.unpack("=IHHiIII", data[:24])
    assert (magic, major, minor, link) == (0xA1B2C3D4, 2, 4, 1)
    found, at = [], 24
    while at < len(data):
        seconds, micros, kept, length = struct.unpack("=IIII", data[at : at + 16])
        assert kept <= length
        found.append((seconds + micros / 1e6, data[at + 16 : at + 16 + kept]))
        at += 16 + kept
    return found


def test_frames_are_written_with_their_times(tmp_path: Path) -> None:
    file, before = PcapFile(tmp_path / "x.pcap"), time.time()
    file.write(b"a" * 60)
    file.write(b"b" * 100_000)
    file.close()

    (first, one), (second, two) = frames(tmp_path / "x.pcap")
    assert (one, two) == (b"a" * 60, b"b" * 65536)
    assert before - 0.001 <= first <= second <= time.time()


def test_a_recording_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pcap, "LIMIT", 10_000)
    file = PcapFile(tmp_path / "x.pcap")
    for _ in range(100):
        file.write(b"x" * 1000)
    file.close()

    assert 8_000 <= (tmp_path / "x.pcap").stat().st_size <= 10_000
    assert {len(frame) for _, frame in frames(tmp_path / "x.pcap")} == {1000}


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "x.pcap").write_text("mine")
    with pytest.raises(FileExistsError):
        PcapFile(tmp_path / "x.pcap")


def test_a_switch_records_each_frame_once_however_many_get_it(tmp_path: Path) -> None:
    switch = Switch("lan")
    try:
        wires = [switch.connect("vm")[1] for _ in range(3)]
        switch.capture(tmp_path / "lan.pcap")
        frame = b"\xff" * 6 + b"\x52" * 6 + b"hello to everybody"
        wires[0].send(frame)
        for wire in wires[1:]:
            wire.settimeout(5)
            assert wire.recv(2000) == frame
        assert Deadline(5).poll(lambda: [each for _, each in frames(tmp_path / "lan.pcap")] == [frame], every=0.01)
    finally:
        switch.close()
        for wire in wires:
            wire.close()
