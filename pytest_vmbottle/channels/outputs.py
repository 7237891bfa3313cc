"""What is kept of the output of a command whose streams are read as they come, and the outcome that it makes."""

from __future__ import annotations

from pytest_vmbottle.backend import MAX_OUTPUT, Command, Finished, not_run

__all__ = ["Outputs"]


class _Head:
    """Keeps the first `MAX_OUTPUT` bytes of what it is given, and knows whether there was more."""

    def __init__(self) -> None:
        self.kept = bytearray()
        self.truncated = False

    def write(self, data: bytes) -> int:
        room = MAX_OUTPUT - len(self.kept)
        self.kept += data[:room]
        self.truncated = self.truncated or len(data) > room
        return len(data)


class Outputs:
    """The beginnings of both streams of a command."""

    def __init__(self) -> None:
        self.stdout, self.stderr = _Head(), _Head()

    def finished(self, command: Command, *, status: int | None, timed_out: bool) -> Finished:
        """The outcome, with the status -9 if there is none: then it was killed."""
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
