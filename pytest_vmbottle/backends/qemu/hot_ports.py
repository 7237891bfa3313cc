"""Ports of a machine for what is plugged in while it runs."""

from __future__ import annotations

from pytest_vmbottle.backends.qemu.command_line import HOT_PORTS
from pytest_vmbottle.backends.qemu.qmp import QmpFailed

__all__ = ["HotPorts"]


class HotPorts:
    """The ports in use, by the names of what is in them."""

    def __init__(self) -> None:
        """Begin with free ports."""
        self._used: dict[str, str] = {}

    def take(self, name: str) -> str:
        """Return a free port for something.

        Raises:
            QmpFailed: None is free.
        """
        free = [port for port in HOT_PORTS if port not in self._used.values()]
        if not free:
            raise QmpFailed(f"all of its {len(HOT_PORTS)} ports for that are in use")
        self._used[name] = free[0]
        return free[0]

    def hold(self, name: str, port: str) -> None:
        """Note that something is in a certain port.

        Raises:
            QmpFailed: There is no such port, or something else is in it.
        """
        if port not in HOT_PORTS or port in self._used.values():
            raise QmpFailed(f"there is no free port {port!r}")
        self._used[name] = port

    def of(self, name: str) -> str:
        """Return the port of something."""
        return self._used[name]

    def free(self, name: str) -> None:
        """Have a port free again."""
        del self._used[name]
