"""A machine as a host of pytest-testinfra, which asks it by our own commands; needs the extra `testinfra`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from testinfra.backend.base import BaseBackend, CommandResult
from testinfra.host import Host

if TYPE_CHECKING:
    from pytest_vmbottle.machine import Machine

__all__ = ["connect"]

_SECONDS = 600.0


class _Backend(BaseBackend):  # type: ignore[misc]  # it comes without types
    NAME = "vmbottle"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.name)
        self._machine = machine

    def run(self, command: str, *args: str, **_: Any) -> CommandResult:
        text = self.get_command(command, *args)
        result = self._machine.exec(["/bin/sh", "-c", text], check=False, timeout=_SECONDS)
        return self.result(result.returncode, text.encode(), result.stdout_bytes, result.stderr_bytes)

    def get_encoding(self) -> str:
        return "utf-8"  # as the environment of our commands says


def connect(machine: Machine) -> Host:
    """The host that a machine is."""
    backend = _Backend(machine)
    host = Host(backend)
    backend.set_host(host)
    return host
