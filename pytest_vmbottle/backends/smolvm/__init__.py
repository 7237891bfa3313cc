"""Machines by smolvm, a runner of microVMs with libkrun."""

from __future__ import annotations

from pytest_vmbottle.backends.smolvm.backend import SmolvmBackend
from pytest_vmbottle.backends.smolvm.engine import Engine
from pytest_vmbottle.backends.smolvm.program import Program, find_program

__all__ = ["Engine", "Program", "SmolvmBackend", "find_program"]
