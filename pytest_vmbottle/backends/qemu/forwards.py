"""The host's ports that lead to those of a guest, as QEMU's user network keeps them."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable

__all__ = ["Forwards"]

_RULE = re.compile(r"\s*TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+(\d+)\s")


class Forwards:
    """What leads to one guest; the kernel chooses the numbers, so that no other process can take one first.

    Attributes:
        told: The host's ports that somebody was told of, by the guest's.
    """

    def __init__(self, monitor: Callable[[str], str]) -> None:
        """Takes what runs a line of QEMU's human monitor and returns its answer."""
        self._monitor = monitor
        self._lock = threading.Lock()
        self.told: dict[int, int] = {}

    def find(self, port: int) -> int | None:
        """The host's port that leads to one of the guest's, made if need be; None if QEMU does not."""
        with self._lock:
            found = next(iter(self._rules(port)), None)
            if found is None:
                self._monitor(f"hostfwd_add net0 tcp:127.0.0.1:0-:{port}")
                found = next(iter(self._rules(port)), None)
            if found is not None:
                self.told[port] = found
            return found

    def keep(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Makes forwards that there were before again, by the guest's port and the host's; another number where that is taken by now."""
        for port, host in wanted:
            others = [each for each in self._rules(port) if each != host]
            self._monitor(f"hostfwd_add net0 tcp:127.0.0.1:{host}-:{port}")
            for other in others if host in self._rules(port) else ():
                self._monitor(f"hostfwd_remove net0 tcp:127.0.0.1:{other}")
            self.find(port)

    def _rules(self, port: int) -> list[int]:
        matches = map(_RULE.match, self._monitor("info usernet").splitlines())
        return [int(match[1]) for match in matches if match and int(match[2]) == port]
