"""Slow tests of the service: its document tried out, its pages in a browser, crowds. They run only where `-m service` asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import leave_out
from tests.service.running import Service, serving

if TYPE_CHECKING:
    from pytest_vmbottle.catalog.catalog import Catalog


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave these files alone where nobody asks for them: they import what only their own group installs."""
    return None if "service" in config.getoption("markexpr") else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items, Path(__file__).parent, "service")


@pytest.fixture(scope="session")
def service(vm_catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service on the catalog of all tests."""
    with serving(vm_catalog.root, tmp_path_factory.mktemp("service")) as running:
        yield running
