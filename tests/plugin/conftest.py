"""Pytest runs inside these tests see nothing of the run that they are part of."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name == "CI" or name.startswith(("VMBOTTLE_", "PYTEST_XDIST_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(tmp_path / "catalog"))
