"""Real machines for tests: booted once, bottled with their RAM, poured for every test."""

from __future__ import annotations

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
from pytest_vmbottle.guestpath import GuestPath
from pytest_vmbottle.machine import Machine
from pytest_vmbottle.metrics import GuestSample, Sample
from pytest_vmbottle.process import Process
from pytest_vmbottle.recording import Recording
from pytest_vmbottle.result import Match, Matches, Result
from pytest_vmbottle.spec import Layer, MachineSpec, layer

__all__ = [
    "BackendUnavailable",
    "CatalogError",
    "CommandFailed",
    "CommandTimeout",
    "GuestPanic",
    "GuestPath",
    "GuestSample",
    "ImageMissing",
    "LaunchError",
    "Layer",
    "Machine",
    "MachineDied",
    "MachineError",
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
    "SpecError",
    "TransferError",
    "VMBottleError",
    "layer",
]
