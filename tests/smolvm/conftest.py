"""The real smolvm: these tests need a KVM that runs guests, and run nothing where `-m smolvm` did not ask for them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.backends.smolvm import Engine, find_program
from pytest_vmbottle.backends.smolvm.engine import LABEL
from pytest_vmbottle.backends.smolvm.vmm import me

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_vmbottle.catalog import Catalog


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what is in this folder, and leaves it out of runs that did not ask for it."""
    here = os.path.dirname(__file__)
    ours = [item for item in items if str(item.path).startswith(here)]
    for item in ours:
        item.add_marker(pytest.mark.smolvm)
    if "smolvm" not in config.getoption("markexpr"):
        config.hook.pytest_deselected(items=ours)
        items[:] = [item for item in items if item not in ours]


@pytest.fixture(scope="session")
def engine(vm_catalog: Catalog) -> Engine:
    """The smolvm of this host, with the machines of this run's catalog."""
    return Engine(find_program(), vm_catalog.root / "smolvm")


@pytest.fixture(autouse=True)
def _nothing_is_left(engine: Engine) -> Iterator[None]:
    def ours() -> set[str]:
        return {each.name for each in engine.machines() if each.labels.get(LABEL) == me()}

    before = ours()
    yield
    left = ours() - before
    shared = {name for name in left if name.startswith(("vm-", "warm-"))}
    assert not left - shared, "a machine that nobody uses was left behind"
