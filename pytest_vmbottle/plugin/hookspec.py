"""Hooks of this plugin, for a conftest or another plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vmbottle.backends.port import Backend
    from pytest_vmbottle.machine.machine import Machine


@pytest.hookspec(firstresult=True)
def pytest_vmbottle_make_backend(config: pytest.Config, name: str) -> Backend | None:
    """Return the backend of this name, or None if it is not yours. `"auto"` is never asked for."""


@pytest.hookspec(firstresult=True)
# First result: two hooks that both change the keywords would not know of each other.
def pytest_vmbottle_spec(item: pytest.Item | None, keywords: dict[str, Any]) -> dict[str, Any] | None:
    """Return other spec keywords (with `source`) for a machine of a test, or None to leave them; `item` is None for shared machines."""


@pytest.hookspec
def pytest_vmbottle_machine_ready(machine: Machine) -> None:
    """Use a machine that is ready, before the test gets it."""


@pytest.hookspec
def pytest_vmbottle_machine_stopping(machine: Machine, failed: bool) -> None:  # noqa: FBT001 - hooks have their arguments by name
    """Use a machine that is about to be stopped, and still runs. An exception here becomes a warning.

    Args:
        machine: The machine.
        failed: Whether a test that had it failed.
    """


@pytest.hookspec
def pytest_vmbottle_artifacts(machine: Machine, folder: Path, report: pytest.TestReport) -> None:
    """Add files of your own to the artifacts of a machine, in its folder. The machine may be off. An exception here becomes a warning."""
