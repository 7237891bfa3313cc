"""Pytest runs inside these tests see nothing of the run that they are part of, and have machines that run nothing."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Protocol

import pytest

import pytest_vmbottle.provision
import pytest_vmbottle.testing  # noqa: F401 - a run in this process forgets what it imports, and what is compiled cannot be imported twice
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.images import ImageStore

if TYPE_CHECKING:
    from pathlib import Path

CONFTEST = """
import pytest
from pytest_vmbottle import layer
from pytest_vmbottle.testing import FakeBackend

def pytest_vmbottle_make_backend(config, name):
    return FakeBackend() if name in ("fake", "other") else None
"""


class Run(Protocol):
    """Runs pytest on a test file."""

    def __call__(
        self, text: str, *args: str, conftest: str = "", status: int = 0, process: bool = False, **outcomes: int
    ) -> pytest.RunResult:
        """Returns the run, which must have ended with this status and, if any are given, these outcomes.

        It is within this process, which takes a tenth of the time, unless it has workers, or the process is what the test is about.
        """


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name == "CI" or name.startswith(("VMBOTTLE_", "PYTEST_XDIST_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(tmp_path / "catalog"))


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    """The catalog of the inner runs, with the image "debian-12": the smallest file that passes for a disk."""
    content = bytearray(1 << 20)
    content[510:512] = b"\x55\xaa"
    (tmp_path / "disk.raw").write_bytes(content)
    ImageStore(Catalog(tmp_path / "catalog").images).add(tmp_path / "disk.raw", name="debian-12")
    return tmp_path / "catalog"


@pytest.fixture
def run(pytester: pytest.Pytester, catalog: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs pytest strictly, with the backend "fake"."""
    assert catalog.is_dir()
    monkeypatch.setenv("VMBOTTLE_BACKEND", "fake")

    def run(text: str, *args: str, conftest: str = "", status: int = 0, process: bool = False, **outcomes: int) -> pytest.RunResult:
        pytester.makeconftest(CONFTEST + conftest)
        pytester.makepyfile(test_it=f"import pytest\nfrom pytest_vmbottle import layer, MachineSpec\n{text}")
        workers = ("-p", "xdist") if "-n2" in args else ()
        start = pytester.runpytest_subprocess if process or "-n2" in args else pytester.runpytest_inprocess
        result = start("-W", "error", "--strict-markers", *workers, *args)
        assert result.ret == status, said(result)
        assert "INTERNALERROR" not in said(result)
        if outcomes:
            result.assert_outcomes(**outcomes)
        return result

    return run


def said(result: pytest.RunResult) -> str:
    """Return the whole output of a run."""
    return re.sub(r"\x1b\[[0-9;]*m", "", result.stdout.str() + "\n" + result.stderr.str())
