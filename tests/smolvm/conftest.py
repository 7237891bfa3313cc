"""The real smolvm: these tests need a KVM that runs guests. `pytest -m smolvm tests/smolvm` runs them; no other run does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.backends.smolvm import Engine, SmolvmBackend
from pytest_vmbottle.backends.smolvm.engine import LABEL
from pytest_vmbottle.backends.smolvm.vmm import me
from tests.conftest import leave_out

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_vmbottle import Machine
    from pytest_vmbottle.catalog.catalog import Catalog

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items, HERE, "smolvm")


@pytest.fixture(scope="session")
def engine(vm_catalog: Catalog) -> Engine:
    """The smolvm of this host, with the machines of this run."""
    return SmolvmBackend(state=vm_catalog.root / "smolvm", proofs=vm_catalog.root / "proofs").engine


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    engine = request.getfixturevalue("engine") if "engine" in request.fixturenames else None

    def ours() -> set[str]:
        return {each.name for each in engine.machines() if each.labels.get(LABEL) == me()} if engine else set()

    before = ours()
    yield
    left = {name for name in ours() - before if not name.startswith(("vm-", "warm-"))}
    assert not left, "a machine that nobody uses was left behind"


@pytest.fixture
def either(session_vm: Machine) -> Machine:
    """The session's machine: for the tests that all channels pass."""
    return session_vm


@pytest.fixture(scope="session")
def environment(vm_catalog: Catalog) -> dict[str, str]:
    """Environment for another pytest or `vmbottle` that uses the same smolvm and catalog."""
    return {**os.environ, "VMBOTTLE_CATALOG": str(vm_catalog.root), "VMBOTTLE_MISSING": "fail", "VMBOTTLE_TIMEOUT_FACTOR": "3"}
