"""Real machines. Every test that ends its machines itself is followed by a look for what it left behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from pytest_vmbottle import Machine
from pytest_vmbottle._os import Deadline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_vmbottle.catalog import Catalog


def qemus(folder: Path) -> list[int]:
    """The QEMU processes of this user whose command line names a folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        words = process.info["cmdline"] or []
        if words and "qemu-system" in words[0] and str(folder) in " ".join(words):
            found.append(process.info["pid"])
    return found


@pytest.fixture
def machines_of() -> object:
    """A function that finds the QEMU processes that use a folder."""
    return qemus


@pytest.fixture(autouse=True)
def _nothing_is_left(vm_catalog: Catalog) -> Iterator[None]:
    run = vm_catalog.root / "run"
    before = {path.name for path in run.glob(f"{os.getpid()}-*/*")}
    yield
    shared = {path.name for path in run.glob(f"{os.getpid()}-*/*")} - before
    assert not {name for name in shared if not name.startswith("vm-")}, "a folder of a build or of a named machine was left behind"


@pytest.fixture
def inner(pytester: pytest.Pytester, vm_catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Pytest runs inside the test, which know nothing of this one but its catalog."""
    for name in [name for name in os.environ if name.startswith(("PYTEST_XDIST", "PYTEST_ADDOPTS"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(vm_catalog.root))
    return pytester


@pytest.fixture(params=["agent", "ssh"])
def either(request: pytest.FixtureRequest, session_vm: Machine) -> Machine:
    """The session's machine, spoken to over one channel and then over the other."""
    instance = session_vm._instance
    channel = instance.channel(deadline=Deadline(120), bulk=request.param == "ssh")
    return Machine(instance, session_vm.spec, id=session_vm.id, backend="qemu", channel=channel)
