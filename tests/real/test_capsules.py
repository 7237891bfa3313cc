"""A failed test's machine, saved at the failure and started again as it was."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from pytest_vmbottle.standalone.capsules import all_in

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from pytest_vmbottle.catalog.catalog import Catalog

_TEST = """
import pytest

@pytest.mark.vm("debian-12")
def test_it(vm):
    vm.exec("echo disk > /root/state; echo ram > /dev/shm/state; sleep 1000 >/dev/null 2>&1 & echo $! > /dev/shm/pid")
    assert not vm.path("/root/state").exists()
"""
_SEEN = "cat /root/state /dev/shm/state; kill -0 $(cat /dev/shm/pid) && echo runs; touch /root/replayed"


def test_a_failed_tests_machine_is_replayed_with_its_memory_its_disk_and_its_processes(
    inner: pytest.Pytester, vm_catalog: Catalog, tmp_path: Path
) -> None:
    before = {capsule.name for capsule in all_in(vm_catalog.root)}
    inner.makepyfile(test_capsule=_TEST)
    result = inner.runpytest_subprocess("-p", "no:cacheprovider", "--vm-missing=fail", "--vm-capsule=failed")
    assert result.ret == 1
    (capsule,) = [each for each in all_in(vm_catalog.root) if each.name not in before]
    file = tmp_path / "file"
    try:
        # What the packs have takes no room.
        assert capsule.size < 40 << 20
        for _ in range(2):  # it is not changed by what is done in it
            done = _run(vm_catalog, "replay", capsule.name, "--exec", _SEEN)
            assert (done.returncode, done.stdout) == (0, "disk\nram\nruns\n"), done.stderr
        _run(vm_catalog, "capsule", "export", capsule.name, "-o", str(file))
    finally:
        capsule.remove()
    # As from another computer that has the pack.
    came = _run(vm_catalog, "capsule", "import", str(file)).stdout.strip()
    try:
        assert file.stat().st_size < 20 << 20
        done = _run(vm_catalog, "replay", came, "--exec", _SEEN)
        assert (done.returncode, done.stdout) == (0, "disk\nram\nruns\n"), done.stderr
    finally:
        _run(vm_catalog, "capsule", "rm", came)


def _run(catalog: Catalog, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pytest_vmbottle", "--catalog", str(catalog.root), *words]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
