"""A worker on another host, and what it sends to its controller beside its reports."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pytest_vmbottle.hosts.remote import HOST

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["FILE", "FLAG", "SAY", "Hosted"]

FILE, FLAG, SAY = "file", "flag", "say"
"""Kinds of messages: a part of a file of the artifacts, that there are tests with machines, a line for the terminal."""
_PART = 1 << 20
"""Bytes of a file in one message: reports are sent between them."""


class Hosted:
    """Connection of a worker to a controller on another host."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        """Take what the controller has given to this worker: facts of the host, and a channel."""
        self.facts, self._channel = inputs[HOST], inputs["vmbottle_channel"]
        self._sent: dict[Path, tuple[int, int]] = {}

    def __str__(self) -> str:
        """Return the host's address, for messages."""
        return str(self.facts["address"])

    def say(self, line: str) -> None:
        """Have a line written to the controller's terminal."""
        self._send(SAY, line)

    def flag(self) -> None:
        """Tell that there are tests with machines."""
        self._send(FLAG)

    def send_files(self, folder: Path) -> None:
        """Send the files of a test's artifacts that are new or changed.

        Raises:
            OSError: A file cannot be read.
        """
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
            with path.open("rb") as file:
                state = os.fstat(file.fileno())
                if self._sent.get(path) == (state.st_mtime_ns, state.st_size):
                    continue
                name = str(path.relative_to(folder.parent))
                at, part = 0, file.read(_PART)
                # An empty file has a part as well.
                while part or not at:
                    self._send(FILE, name, at, part)
                    at, part = at + max(1, len(part)), file.read(_PART)
                self._sent[path] = (state.st_mtime_ns, state.st_size)

    def by_hand(self, command: str) -> str:
        """Return a `vmbottle` command of this host as a person runs it where the controller is."""
        program = shlex.join([self.facts["python"], "-m", "pytest_vmbottle"])
        # A person's ssh asks what it has to, and passes a terminal on.
        return shlex.join([*self.facts["ssh"], f"{program} {command.removeprefix('vmbottle ')}"])

    def _send(self, kind: str, *values: object) -> None:
        # The controller may have gone.
        with suppress(OSError):
            self._channel.send((kind, *values))
