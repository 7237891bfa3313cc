"""The commands for capsules; `replay` is tried with real machines."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from pytest_vmbottle import MachineSpec
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.cli import main
from pytest_vmbottle.images import ImageStore, Traits
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.standalone.capsules import Capsule
from pytest_vmbottle.standalone.stored import Stored
from pytest_vmbottle.testing import FakeBackend

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "disk.raw").write_bytes(bytes(510) + b"\x55\xaa" + bytes((1 << 20) - 512))
    spec = MachineSpec(source="debian-12", name="web")
    with closing(Catalog(tmp_path / "catalog")) as catalog:
        ImageStore(catalog.images).add(tmp_path / "disk.raw", name="debian-12", traits=Traits(prepared=True))
        with closing(Provisioner(catalog, FakeBackend(), name="fake", settings=Settings())) as provisioner, provisioner.machine(spec) as vm:
            stored = Stored.of(vm.snapshot("failed"), provisioner.origin(spec), "failed")
            for test in ("test_a.py::test_it", "test_b.py::test_it"):
                Capsule.save(catalog.root, {"web": (stored, "elsewhere")}, test=test, error="no")
    return tmp_path / "catalog"


def _run(root: Path, *words: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["--catalog", str(root), *words])
    assert result.exit_code == status, result.output
    return result


def test_capsules_are_listed_shown_removed_and_pruned(root: Path) -> None:
    assert "test_a-py-test_it" in _run(root, "capsule", "ls").stdout
    found = json.loads(_run(root, "capsule", "list", "--json").stdout)
    assert [each["test"] for each in found] == ["test_a.py::test_it", "test_b.py::test_it"]
    assert json.loads(_run(root, "capsule", "show", "test_a-py-test_it", "--json").stdout)["machines"] == ["web"]
    shown = _run(root, "capsule", "show", "test_a-py-test_it")
    assert "secret" in shown.stderr
    _run(root, "capsule", "rm", "test_a-py-test_it")
    assert not _run(root, "capsule", "prune", "--older-than", "1d").stdout
    assert _run(root, "capsule", "prune").stdout == "test_b-py-test_it\n"
    assert json.loads(_run(root, "capsule", "ls", "--json").stdout) == []


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (("capsule", "show", "none"), 1, "there is no capsule"),
        (("replay", "none", "--exec", "true"), 1, "there is no capsule"),
        (("replay", "test_a-py-test_it"), 2, "is no terminal"),
        (("replay", "test_a-py-test_it", "--exec", "true", "--shell"), 2, "choose one"),
        (("replay", "test_a-py-test_it", "--machine", "db", "--exec", "true"), 1, "no machine 'db'"),
        (("replay", "test_a-py-test_it", "--exec", "true"), 1, "cannot be restored here"),
    ],
)
def test_what_cannot_be_done_says_why(root: Path, words: tuple[str, ...], status: int, reason: str) -> None:
    assert reason in _run(root, *words, status=status).stderr
