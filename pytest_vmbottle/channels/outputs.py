"""Bounded output of a command whose streams are read as they come."""

from __future__ import annotations

from pytest_vmbottle.channels.port import MAX_OUTPUT, Command, Finished, not_run

__all__ = ["Outputs"]


class _Head:
    """Buffer for the first `MAX_OUTPUT` bytes of a stream, which notes whether there was more."""

    def __init__(self) -> None:
        self.kept = bytearray()
        self.truncated = False

    def write(self, data: bytes) -> int:
        room = MAX_OUTPUT - len(self.kept)
        self.kept += data[:room]
        self.truncated = self.truncated or len(data) > room
        return len(data)


class Outputs:
    """The first bytes of both streams of a command."""

    def __init__(self) -> None:
        self.stdout, self.stderr = _Head(), _Head()

    def finished(self, command: Command, *, status: int | None, timed_out: bool) -> Finished:
        """Return the outcome; without a status the command was killed, and it is -9."""
        return not_run(
            Finished(
                returncode=-9 if status is None else status,
                stdout=bytes(self.stdout.kept),
                stderr=bytes(self.stderr.kept),
                truncated=self.stdout.truncated or self.stderr.truncated,
                timed_out=timed_out,
            ),
            command,
        )
