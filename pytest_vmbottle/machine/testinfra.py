"""The machine as a host of pytest-testinfra, which needs the extra `testinfra`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from testinfra.backend.base import BaseBackend, CommandResult
from testinfra.host import Host

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vmbottle.result import Result

__all__ = ["connect"]

# testinfra has no time-outs of its own.
_SECONDS = 600.0


class _Backend(BaseBackend):  # type: ignore[misc]  # it comes without types
    NAME = "vmbottle"

    def __init__(self, name: str, execute: Callable[..., Result]) -> None:
        super().__init__(name)
        self._execute = execute

    def run(self, command: str, *args: str, **_: Any) -> CommandResult:
        # testinfra writes its commands for a POSIX shell, with each argument quoted.
        text = self.get_command(command, *args)
        result = self._execute(["/bin/sh", "-c", text], check=False, timeout=_SECONDS)
        return self.result(result.returncode, text.encode(), result.stdout_bytes, result.stderr_bytes)

    def get_encoding(self) -> str:
        return "utf-8"  # as the environment of our commands says


def connect(name: str, execute: Callable[..., Result]) -> Host:
    """Return the testinfra host of a machine, given its name and its `exec`."""
    backend = _Backend(name, execute)
    host = Host(backend)
    backend.set_host(host)
    return host
