"""The commands for capsules; `replay` is tried with real machines."""

from __future__ import annotations

import json
import subprocess
from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
from click.testing import CliRunner, Result

from pytest_vmbottle import MachineError, MachineSpec
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.cli import main
from pytest_vmbottle.cli.capsules import _start
from pytest_vmbottle.images import ImageStore, Traits
from pytest_vmbottle.machine.shared_lan import Seat
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.standalone.capsules import Capsule
from pytest_vmbottle.standalone.stored import Stored
from pytest_vmbottle.testing import FakeBackend

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vmbottle.standalone.client import Kept


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
    assert "machines.web.image: debian-12\nmachines.web.memory: 1.0 GiB\n" in shown.stdout
    # No QEMU made it.
    assert "machines.web.obstacle: the capsule test_a-py-test_it was made by another QEMU" in shown.stdout
    _run(root, "capsule", "rm", "test_a-py-test_it")
    assert not _run(root, "capsule", "prune", "--older-than", "1d").stdout
    assert _run(root, "capsule", "prune").stdout == "test_b-py-test_it\n"
    assert json.loads(_run(root, "capsule", "ls", "--json").stdout) == []


def test_a_file_of_a_capsule_is_its_owners_alone_and_says_that_it_has_secrets(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "failed"
    result = _run(root, "capsule", "export", "test_a-py-test_it", "-o", str(file))
    assert result.stdout == f"{file}\n"
    assert "secret" in result.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    # No QEMU made it. It is told before anything is made of it.
    assert "cannot be restored here" in _run(root, "capsule", "import", str(file), status=1).stderr
    assert len(json.loads(_run(root, "capsule", "ls", "--json").stdout)) == 2
    assert "secret" in _run(root, "capsule", "export", "--help").stdout


def test_a_signed_file_is_read_only_if_its_owner_signed_it(root: Path, tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        words = ["minisign", "-G", "-W", "-p", str(tmp_path / f"{name}.pub"), "-s", str(tmp_path / name)]
        subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    file = str(tmp_path / "failed")
    _run(root, "capsule", "export", "test_a-py-test_it", "-o", file)
    assert "is not signed" in _run(root, "capsule", "import", file, "--public-key", str(tmp_path / "ours.pub"), status=1).stderr
    _run(root, "capsule", "export", "test_a-py-test_it", "-o", file, "--sign", str(tmp_path / "ours"))
    assert "and not with" in _run(root, "capsule", "import", file, "--public-key", str(tmp_path / "theirs.pub"), status=1).stderr
    told = _run(root, "capsule", "import", file, "--public-key", str(tmp_path / "ours.pub"), status=1).stderr
    assert "signed with the key" in told
    assert "cannot be restored here" in told


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (("capsule", "show", "none"), 1, "there is no capsule"),
        (("replay", "none", "--exec", "true"), 1, "there is no capsule"),
        (("replay", "test_a-py-test_it"), 2, "is no terminal"),
        (("replay", "test_a-py-test_it", "--exec", "true", "--shell"), 2, "choose one"),
        (("replay", "test_a-py-test_it", "--machine", "db", "--exec", "true"), 1, "no machine 'db'"),
        (("replay", "test_a-py-test_it", "--exec", "true"), 1, "cannot be restored here"),
        (("capsule", "export", "test_a-py-test_it", "-o", "/none/file"), 1, "there is no folder /none"),
        (("capsule", "export", "none", "-o", "/tmp/none"), 1, "there is no capsule"),
        (("capsule", "import", __file__), 1, "is no archive of packs, or is damaged"),
    ],
)
def test_what_cannot_be_done_says_why(root: Path, words: tuple[str, ...], status: int, reason: str) -> None:
    assert reason in _run(root, *words, status=status).stderr


def test_a_machine_that_cannot_be_on_its_lan_comes_back_without_it_and_says_why(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tried = []

    class Place:
        name = "replay-web"

        def start(self, order: dict[str, Any], _: object, **__: object) -> None:
            tried.append((order["keywords"]["network"], order.get("seats")))
            if "seats" in order:
                raise MachineError("the machine 'web' cannot be on the LAN 'lan': its guest has no program `ip`")

    stored = Stored.read(root / "capsules" / "test_a-py-test_it" / "web")
    stored = attrs.evolve(stored, keywords={**stored.keywords, "network": "lan"})
    with closing(Catalog(root)) as catalog:
        _start(cast("Kept", Place()), stored, catalog, {"replay-web-lan": Seat(name="web", members={"web": "10.77.0.1"})})
    assert tried == [(["replay-web-lan"], {"replay-web-lan": {"name": "web", "members": {"web": "10.77.0.1"}}}), (False, None)]
    assert "web comes back without its private LAN lan: the machine 'web' cannot be" in capsys.readouterr().err
