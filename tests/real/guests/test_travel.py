"""A pack leaves one catalog in a file, and machines are cloned from it in another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.registries import docker_registry

if TYPE_CHECKING:
    import pytest

    from pytest_vmbottle.catalog.catalog import Catalog

CONFTEST = """
from pytest_vmbottle import layer


@layer("debian-12")
def travelled(vm):
    vm.exec("echo in RAM > /dev/shm/state; echo on disk > /srv/state")
    vm.exec("systemd-run --unit=counter sh -c 'while sleep 0.2; do date >> /dev/shm/ticks; done'")
"""
TEST = """
import pytest
from conftest import travelled


@pytest.mark.vm(travelled)
def test_it(vm):
    assert vm.exec("cat /dev/shm/state /srv/state").stdout == "in RAM\\non disk\\n"
    assert vm.exec("systemctl is-active counter").stdout == "active\\n"
"""


def vmbottle(folder: Path, root: Path, *words: str | Path) -> str:
    argv = [sys.executable, "-m", "pytest_vmbottle", "--catalog", str(root), *map(str, words)]
    ended = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_layers_pack_is_exported_imported_and_cloned_without_being_built_again(
    tmp_path: Path, vm_catalog: Catalog, inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner.makeconftest(CONFTEST)
    inner.makepyfile(test_it=TEST)
    vmbottle(inner.path, vm_catalog.root, "pack", "export", "conftest.py::travelled", "-o", tmp_path / "whole.vmpack")
    vmbottle(inner.path, vm_catalog.root, "pack", "export", "conftest.py::travelled", "-o", tmp_path / "layer.vmpack", "--without-parents")
    assert (tmp_path / "layer.vmpack").stat().st_size < 15 << 20
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    keys = vmbottle(tmp_path, other, "pack", "import", tmp_path / "whole.vmpack").split()
    assert len(keys) == 2
    assert "debian-12" in vmbottle(tmp_path, other, "image", "ls")
    vmbottle(tmp_path, other, "pack", "rm", keys[1])
    assert vmbottle(tmp_path, other, "pack", "import", tmp_path / "layer.vmpack").split() == keys[1:]
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(other))
    ran = inner.runpytest_subprocess("-p", "no:cacheprovider", "--vm-missing=fail")
    ran.assert_outcomes(passed=1)
    ran.stdout.fnmatch_lines(["*0 packs built*"])


def test_a_run_pulls_what_another_run_has_pushed_and_builds_nothing(
    tmp_path: Path, inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner.makeconftest(CONFTEST.replace("in RAM >", "in RAM > /dev/null; echo in RAM >"))  # no other run has built this layer
    inner.makepyfile(test_it=TEST)
    other, folder = tmp_path / "other", tmp_path / "registry"
    other.mkdir(mode=0o700)
    folder.mkdir()
    with docker_registry(folder) as registry:
        options = ("-p", "no:cacheprovider", "--vm-missing=fail", f"--vm-registry={registry.host}/team/packs")
        first = inner.runpytest_subprocess(*options, "--vm-registry-push")
        first.assert_outcomes(passed=1)
        first.stdout.fnmatch_lines(["vmbottle: 1 machine restored*1 pack built*1 pushed*"])
        monkeypatch.setenv("VMBOTTLE_CATALOG", str(other))
        second = inner.runpytest_subprocess(*options)
        second.assert_outcomes(passed=1)
        second.stdout.fnmatch_lines(["vmbottle: 1 machine restored, 0 booted; 0 packs built*2 pulled*"])
    assert {path.name for path in (other / "images" / "names").iterdir()} == {"debian-12.json"}
