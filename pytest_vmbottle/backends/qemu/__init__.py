"""Machines by QEMU."""

from __future__ import annotations

from pytest_vmbottle.backends.qemu.backend import QemuBackend, find_program

__all__ = ["QemuBackend", "find_program"]
