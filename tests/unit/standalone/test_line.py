"""Lines between processes: messages, descriptors, and what is refused."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from pytest_vmbottle.standalone.client import Kept
from pytest_vmbottle.standalone.line import Line, connect, listen, peer_is_us


def test_a_socket_is_reached_however_deep_its_folder_lies(tmp_path: Path) -> None:
    place = Kept(tmp_path / ("long" * 40) / "web")
    with place.claimed(again=False) as hold, listen(hold) as server:
        line = connect(place.folder)
        accepted, _ = server.accept()
        assert peer_is_us(accepted)
        line.close()
        accepted.close()


def test_a_line_carries_messages_of_any_size_and_descriptors(tmp_path: Path) -> None:
    ours, theirs = map(Line, socket.socketpair())
    (tmp_path / "file").write_text("content")
    with (tmp_path / "file").open() as file:
        ours.send({"verb": "exec", "argv": ["x" * 50_000]}, (file.fileno(),))
        ours.send({"next": 1})
    message = theirs.receive()

    assert message is not None
    assert len(message["argv"][0]) == 50_000
    assert os.read(theirs.descriptors[0], 100) == b"content"
    assert theirs.receive() == {"next": 1}
    assert not theirs.is_cut
    ours.close()
    assert theirs.is_cut
    assert theirs.receive() is None
    theirs.close()
    assert theirs.descriptors == []


def test_an_answer_arrives_however_soon_its_sender_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = map(Line, socket.socketpair())
    send = socket.send_fds

    def answered(*words: Any) -> int:
        sent = send(*words)
        theirs.receive()
        theirs.send({"answer": 1})
        theirs.close()
        return sent

    monkeypatch.setattr(socket, "send_fds", answered)
    ours.send({"verb": "exec"}, (0,))
    assert ours.receive() == {"answer": 1}
    ours.close()


@pytest.mark.parametrize("data", [b"[]\n", b"nonsense\n", b"\xff\n"])
def test_a_message_that_makes_no_sense_is_refused(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(data)
    line = Line(theirs)
    with pytest.raises(ValueError, match=r"object|Expecting|decode"):
        line.receive()
    line.close()
    ours.close()
