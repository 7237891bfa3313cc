"""A failed test's machine, saved at the failure and started again as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.standalone.capsules import all_in

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vmbottle.catalog.catalog import Catalog

_TEST = """
import pytest

@pytest.mark.vm("debian-12")
def test_it(vm):
    vm.exec("echo disk > /root/state; echo ram > /dev/shm/state; sleep 1000 >/dev/null 2>&1 & echo $! > /dev/shm/pid")
    assert not vm.path("/root/state").exists()
"""
_LAN = """
import pytest

@pytest.mark.vm("debian-12", name="web", network="lan")
@pytest.mark.vm("debian-12", name="db", network="lan")
def test_it(vms):
    # At its own address there, which so has to be there again.
    address = vms["db"].exec("ip -4 -o addr show dev eth1 | grep -o '10[0-9.]*/' | tr -d /").stdout.strip()
    vms["db"].exec(f"python3 -m http.server --bind {address} 8000 >/dev/null 2>&1 </dev/null &")
    vms["db"].wait_for_port(8000)
    assert not vms["web"].exec("timeout 20 bash -c ': < /dev/tcp/db/8000'")
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
        (details,) = json.loads(_run(vm_catalog, "capsule", "show", "--json", capsule.name).stdout)["details"].values()
        assert (details["image"], details["obstacle"], details["lan"]) == ("debian-12", "", None)
        assert details["pack"].startswith("debian-12 (")
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


@pytest.mark.guests
def test_the_machines_of_a_private_lan_find_each_other_again_by_name_and_address(inner: pytest.Pytester, vm_catalog: Catalog) -> None:
    before = {capsule.name for capsule in all_in(vm_catalog.root)}
    inner.makepyfile(test_capsule=_LAN)
    result = inner.runpytest_subprocess("-p", "no:cacheprovider", "--vm-missing=fail", "--vm-capsule=failed")
    assert result.ret == 1
    (capsule,) = [each for each in all_in(vm_catalog.root) if each.name not in before]
    try:
        # Of the server that the test started, once by the name, once from the other side.
        done = _run(vm_catalog, "replay", capsule.name, "--exec", "hostname; timeout 20 bash -c ': < /dev/tcp/db/8000' && echo found")
        assert (done.returncode, done.stdout) == (0, "web\nfound\n"), done.stderr
        assert "on a private LAN of its own" in done.stderr
        done = _run(vm_catalog, "replay", capsule.name, "--machine", "db", "--exec", "hostname; timeout 20 bash -c ': < /dev/tcp/web/22'")
        assert (done.returncode, done.stdout) == (0, "db\n"), done.stderr
        assert not list((vm_catalog.root / "lans").glob("replay-*"))
    finally:
        capsule.remove()


def _run(catalog: Catalog, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pytest_vmbottle", "--catalog", str(catalog.root), *words]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
