"""Host ports that lead to guest ports, in QEMU's user network."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable

from pytest_vmbottle.backends.qemu.command_line import NETDEV

__all__ = ["Forwards"]

_RULE = re.compile(r"\s*TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+(\d+)\s")


class Forwards:
    """Port forwards of one guest; the kernel chooses the numbers, so that no other process can take one first.

    Attributes:
        told: Host ports that were given out, by guest port.
    """

    def __init__(self, monitor: Callable[[str], str]) -> None:
        """Take a function that runs a line of QEMU's human monitor and returns its answer."""
        self._monitor = monitor
        self._lock = threading.Lock()
        self.told: dict[int, int] = {}

    def find(self, port: int) -> int | None:
        """Return the host port that leads to a guest port, made if need be; None if QEMU makes none."""
        # Two threads could make two rules for the same port.
        with self._lock:
            found = next(iter(self._rules(port)), None)
            if found is None:
                # By the human monitor, because QMP has no such command. It reports a failure only as text, so the list is looked at again.
                self._monitor(f"hostfwd_add {NETDEV} tcp:127.0.0.1:0-:{port}")
                found = next(iter(self._rules(port)), None)
            if found is not None:
                self.told[port] = found
            return found

    def keep(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Make earlier forwards again, by guest port and host port; take another number if that one is in use."""
        for port, host in wanted:
            others = [each for each in self._rules(port) if each != host]
            # The new rule is made before the old one goes, so that the port is always forwarded by some number.
            self._monitor(f"hostfwd_add {NETDEV} tcp:127.0.0.1:{host}-:{port}")
            for other in others if host in self._rules(port) else ():
                self._monitor(f"hostfwd_remove {NETDEV} tcp:127.0.0.1:{other}")
            self.find(port)

    def _rules(self, port: int) -> list[int]:
        matches = map(_RULE.match, self._monitor("info usernet").splitlines())
        return [int(match[1]) for match in matches if match and int(match[2]) == port]
