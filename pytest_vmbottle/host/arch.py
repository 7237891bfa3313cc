"""The architecture of this host."""

from __future__ import annotations

import platform

__all__ = ["ARCHITECTURES", "host_arch"]

# Linux names both as on the right. Debian and container registries name them as on the left, and so does macOS (arm64).
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


def host_arch() -> str:
    """Return the architecture of this host, as `uname -m` names it on Linux."""
    machine = platform.machine().lower()
    return ARCHITECTURES.get(machine, machine)
