"""Real machines for tests: booted once, saved with their RAM, cloned for every test."""

from __future__ import annotations

TYPE_CHECKING = False  # without `typing`, which takes longer to load than all of this
if TYPE_CHECKING:
    from pytest_vmbottle.backends.console import Console
    from pytest_vmbottle.errors import (
        BackendUnavailable,
        CatalogError,
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
        Unsupported,
        VMBottleError,
    )
    from pytest_vmbottle.guest.path import GuestPath
    from pytest_vmbottle.machine.machine import Machine, MachineFactory
    from pytest_vmbottle.machine.metrics import GuestSample, Sample
    from pytest_vmbottle.machine.process import Process
    from pytest_vmbottle.machine.recording import Recording
    from pytest_vmbottle.machine.snapshot import Snapshot
    from pytest_vmbottle.result import CommandFailed, CommandSucceeded, CommandTimeout, Match, Matches, Result
    from pytest_vmbottle.spec import Layer, MachineKeywords, MachineSpec, layer
    from pytest_vmbottle.standalone.capsules import Capsule

__all__ = [
    "BackendUnavailable",
    "Capsule",
    "CatalogError",
    "CommandFailed",
    "CommandSucceeded",
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
    "Unsupported",
    "VMBottleError",
    "layer",
]

# Loaded when it is asked for: pytest loads this module in every run, and `vmbottle --help` needs nothing of it.
_LATER = {
    "BackendUnavailable": "errors",
    "Capsule": "standalone.capsules",
    "CatalogError": "errors",
    "CommandFailed": "result",
    "CommandSucceeded": "result",
    "CommandTimeout": "result",
    "Console": "backends.console",
    "GuestPanic": "errors",
    "GuestPath": "guest.path",
    "GuestSample": "machine.metrics",
    "ImageMissing": "errors",
    "LaunchError": "errors",
    "Layer": "spec.spec",
    "Machine": "machine.machine",
    "MachineDied": "errors",
    "MachineError": "errors",
    "MachineFactory": "machine.machine",
    "MachineKeywords": "spec.spec",
    "MachineSpec": "spec.spec",
    "MachineTimeout": "errors",
    "Match": "result",
    "Matches": "result",
    "PackCorrupt": "errors",
    "Process": "machine.process",
    "Recording": "machine.recording",
    "Result": "result",
    "Sample": "machine.metrics",
    "SmolvmError": "errors",
    "Snapshot": "machine.snapshot",
    "SpecError": "errors",
    "TransferError": "errors",
    "Unsupported": "errors",
    "VMBottleError": "errors",
    "layer": "spec.spec",
}


if not TYPE_CHECKING:  # to a type checker it would mean that any name is there

    def __getattr__(name: str) -> object:
        """Import a public name on first use."""
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module  # noqa: PLC0415 - as the rest, only if it is needed

        value: object = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
        # Python asks `__getattr__` only for names that are not there (PEP 562), so this is once for each.
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Return all names, including those not imported yet."""
    # For completion in a shell, which reads `dir`.
    return sorted({*globals(), *__all__})
