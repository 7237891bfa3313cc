"""Guests that take long: other systems, another architecture, second boots. `-m guests` asks for them, as `.ci/full guests` does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import leave_out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items, Path(__file__).parent, "guests")
