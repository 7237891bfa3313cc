"""The three kinds of packs: each can be forced, each gives the same machines, and each gives way to the next one."""

from __future__ import annotations

import os

import pytest

from pytest_vmbottle import MachineSpec, packs
from pytest_vmbottle.backend import PackKind
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog import Catalog
from pytest_vmbottle.provision import Provisioner, Settings

SCRIPT = "echo lasting > /root/which; echo kept > /dev/shm/which"
TESTS = f"""
import time
import pytest

pytestmark = pytest.mark.vm("debian-12", run=[{SCRIPT!r}])

def test_the_disk_is_as_it_was_prepared_and_ram_too_if_it_is_bottled(vm, pytestconfig):
    assert vm.path("/root/which").read_text() == "lasting\\n"
    assert vm.path("/dev/shm/which").exists() == (pytestconfig.getoption("--vm-pack") != "disk")
    vm.path("/root/which").write_text("changed")
    vm.path("/dev/shm/mine").write_text("changed")
    vm.exec("sync")

def test_no_other_test_has_changed_it_and_it_is_awake(vm):
    assert vm.path("/root/which").read_text() == "lasting\\n"
    assert not vm.path("/dev/shm/mine").exists()
    assert abs(float(vm.exec(["date", "+%s"]).stdout) - time.time()) < 5
    assert vm.exec(["cat"], input="in and out").stdout == "in and out"
"""


def provisioner(catalog: Catalog, kind: PackKind, warned: list[str] | None = None) -> Provisioner:
    said: list[str] = [] if warned is None else warned
    return Provisioner(catalog, QemuBackend(proofs=catalog.proofs, pack_kind=kind), name="qemu", settings=Settings(warn=said.append))


@pytest.mark.parametrize("kind", list(PackKind))
def test_each_kind_can_be_forced_and_gives_the_same_machines(
    kind: PackKind, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, vm_catalog: Catalog
) -> None:
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(vm_catalog.root))
    pytester.makepyfile(TESTS)

    result = pytester.runpytest_subprocess(f"--vm-pack={kind}", "-p", "no:cacheprovider")

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines([f"*, {kind} packs, *"])
    poured = 0 if kind is PackKind.DISK else 2
    result.stdout.fnmatch_lines([f"*vmbottle: {poured} machine* poured, *"])


@pytest.mark.parametrize("kind", [PackKind.TEMPLATE, PackKind.STREAM])
def test_a_pack_that_cannot_be_restored_gives_way_to_one_of_the_next_kind(kind: PackKind, vm_catalog: Catalog) -> None:
    first = provisioner(vm_catalog, kind)
    spec = MachineSpec.resolve("debian-12", {"run": [SCRIPT, f"echo {kind}"]})
    pack = first.pack(spec)
    # A pack whose hashes are right and whose state makes no sense, as after a mistake of QEMU's own.
    (pack.path / "pack.json").unlink()
    (pack.path / "state.bin").unlink()
    (pack.path / "state.bin").write_bytes(b"no state at all")
    packs.seal(pack.path, pack.manifest)
    first.close()
    warned: list[str] = []
    second = provisioner(vm_catalog, kind, warned)

    with second.machine(spec) as machine:
        assert machine.path("/root/which").read_text() == "lasting\n"
        assert machine.path("/dev/shm/which").exists() == (kind.next is not PackKind.DISK)

    assert f"was put aside; {kind.next} packs are used from now on" in warned[0]
    assert not pack.path.exists()
    second.close()
