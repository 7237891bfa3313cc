"""What is kept of a command's output."""

from __future__ import annotations

import pytest

from pytest_vmbottle.channels import outputs
from pytest_vmbottle.channels.outputs import Outputs
from pytest_vmbottle.channels.port import Command


@pytest.mark.parametrize(("pieces", "kept"), [((), b""), ((b"ab", b"cd"), b"abcd"), ((b"abc", b"de"), b"abcd")])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_each_stream_is_kept_up_to_the_limit_and_what_is_over_is_told(
    stream: str, pieces: tuple[bytes, ...], kept: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "MAX_OUTPUT", 4)
    both = Outputs()
    for piece in pieces:
        assert getattr(both, stream).write(piece) == len(piece), "no writer is told to try again with what was dropped"
    finished = both.finished(Command(argv=("program",)), status=3, timed_out=False)

    other = "stderr" if stream == "stdout" else "stdout"
    assert (getattr(finished, stream), getattr(finished, other)) == (kept, b"")
    assert (finished.returncode, finished.timed_out) == (3, False)
    assert finished.truncated is (sum(map(len, pieces)) > 4)


def test_a_command_without_a_status_was_killed() -> None:
    finished = Outputs().finished(Command(argv=("program",)), status=None, timed_out=True)
    assert (finished.returncode, finished.timed_out) == (-9, True)
