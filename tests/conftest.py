"""What tests of every kind ask of the host."""

from __future__ import annotations

import psutil

__all__ = ["is_gone"]


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that only waits for its parent to take note of its end has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
