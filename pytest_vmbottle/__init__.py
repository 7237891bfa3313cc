"""Real machines for tests: booted once, bottled with their RAM, poured for every test."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pytest_vmbottle.errors import (
    BackendUnavailable,
    CatalogError,
    CommandFailed,
    CommandTimeout,
    GuestPanic,
    ImageMissing,
    LaunchError,
    MachineDied,
    MachineError,
    MachineTimeout,
    PackCorrupt,
    SmolvmError,
    SpecError,
    TransferError,
    VMBottleError,
)
from pytest_vmbottle.spec import Layer, MachineKeywords, MachineSpec, layer

if TYPE_CHECKING:
    from pytest_vmbottle.console import Console
    from pytest_vmbottle.guestpath import GuestPath
    from pytest_vmbottle.machine import Machine, MachineFactory
    from pytest_vmbottle.metrics import GuestSample, Sample
    from pytest_vmbottle.packs import Snapshot
    from pytest_vmbottle.process import Process
    from pytest_vmbottle.recording import Recording
    from pytest_vmbottle.result import Match, Matches, Result

__all__ = [
    "BackendUnavailable",
    "CatalogError",
    "CommandFailed",
    "CommandTimeout",
    "Console",
    "GuestPanic",
    "GuestPath",
    "GuestSample",
    "ImageMissing",
    "LaunchError",
    "Layer",
    "Machine",
    "MachineDied",
    "MachineError",
    "MachineFactory",
    "MachineKeywords",
    "MachineSpec",
    "MachineTimeout",
    "Match",
    "Matches",
    "PackCorrupt",
    "Process",
    "Recording",
    "Result",
    "Sample",
    "SmolvmError",
    "Snapshot",
    "SpecError",
    "TransferError",
    "VMBottleError",
    "layer",
]

# What is only needed once there is a machine: pytest loads this module in every run, with machines or without.
_LATER = {
    "Console": "console",
    "GuestPath": "guestpath",
    "GuestSample": "metrics",
    "Machine": "machine",
    "MachineFactory": "machine",
    "Match": "result",
    "Matches": "result",
    "Process": "process",
    "Recording": "recording",
    "Result": "result",
    "Sample": "metrics",
    "Snapshot": "packs",
}


if not TYPE_CHECKING:  # to a type checker it would mean that any name is there

    def __getattr__(name: str) -> object:
        """Loads what is asked for; afterwards it is there."""
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """All names, those too that are not loaded yet."""
    return sorted({*globals(), *__all__})
