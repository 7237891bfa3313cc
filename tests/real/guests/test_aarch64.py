"""Guests of another architecture: a real aarch64 system under the plugin, emulated on whatever this host is."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from pytest_vmbottle import MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.images import Image, ImageStore
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.spec.pack_kind import PackKind

TESTS = """
import time
import pytest
from pytest_vmbottle import layer

@layer("arm", arch="aarch64", memory="256M")
def prepared(vm):
    vm.path("/root/lasting").write_text("lasting")
    vm.path("/run/in-memory").write_text("kept")

pytestmark = pytest.mark.vm(prepared)

def test_its_processor_is_an_arm_and_it_is_as_the_layer_left_it(vm, pytestconfig):
    assert vm.exec(["uname", "-m"]).stdout == "aarch64\\n"
    assert vm.path("/root/lasting").read_text() == "lasting"
    assert vm.path("/run/in-memory").exists() == (pytestconfig.getoption("--vm-pack") != "disk")
    vm.path("/root/mine").write_text("changed")
    vm.path("/run/mine").write_text("changed")
    vm.exec("sync")

def test_a_fresh_clone_has_nothing_of_another_ones_and_is_awake(vm):
    assert not vm.path("/root/mine").exists()
    assert not vm.path("/run/mine").exists()
    assert vm.exec(["cat"], input="in and out").stdout == "in and out"
    assert abs(float(vm.exec(["date", "+%s"]).stdout) - time.time()) < 5
"""


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """A catalog with the image "arm"."""
    parts = tmp_path_factory.mktemp("arm64")
    subprocess.run([sys.executable, Path(__file__).parents[2] / "small_image.py", "arm64", parts], check=True)
    catalog = Catalog(tmp_path_factory.mktemp("catalog"))
    _add(catalog, parts)
    return catalog


def _add(catalog: Catalog, parts: Path) -> Image:
    kernel, initrd = parts / "vmlinuz", parts / "initrd"
    cmdline = "console=ttyAMA0 quiet"
    return ImageStore(catalog.images).add(parts / "disk.raw", name="arm", kernel=kernel, initrd=initrd, cmdline=cmdline, arch="aarch64")


@pytest.mark.parametrize("kind", list(PackKind))
def test_tests_get_aarch64_machines_from_packs_of_each_kind(kind: PackKind, arm: Catalog, inner: pytest.Pytester) -> None:
    inner.makepyfile(TESTS)

    result = inner.runpytest_subprocess("--vm-catalog", str(arm.root), f"--vm-pack={kind}", "-p", "no:cacheprovider")

    result.assert_outcomes(passed=2)
    # A machine that could change its pack would have it made again, by another boot.
    machines = "0 machines restored, *" if kind is PackKind.DISK else "2 machines restored, 1 booted; 2 packs built, *"
    result.stdout.fnmatch_lines([f"*vmbottle: {machines}"])


def test_its_disks_and_its_clock_have_faults(arm: Catalog) -> None:
    spec = MachineSpec.resolve("arm", {"arch": "aarch64", "memory": "256M", "disks": {"data": "8M"}})
    with closing(_provisioner(arm, PackKind.TEMPLATE, [])) as provisioner, provisioner.machine(spec) as vm:
        # It has no udev, which gives disks their names.
        where = "disk=/dev/$(basename $(dirname $(grep -lx data /sys/block/*/serial))); "
        write = where + "printf %s | dd of=$disk conv=fsync"
        with vm.faults.disk_errors("data", on="write"):
            assert "Input/output error" in vm.exec(write % "text", check=False).stderr
        with vm.faults.slow_disk("data", latency=0.5):
            assert vm.exec(f"{write % 'text'}; {write % 'text'}").duration > 1
        for jump in (86400, -86400):
            with vm.faults.clock(jump=jump):
                assert abs(float(vm.exec(["date", "+%s"]).stdout) - time.time() - jump) < 10
            assert abs(float(vm.exec(["date", "+%s"]).stdout) - time.time()) < 10
        vm.exec(write % "flushed")
        vm.exec(where + "dd if=/dev/zero of=$disk bs=4k count=1 oflag=direct")
        vm.power_cut(lose="unflushed")
        vm.start()
        assert vm.exec(where + "head -c 7 $disk").stdout == "flushed"


def test_a_machine_by_hand_is_of_the_architecture_that_was_asked_for(arm: Catalog) -> None:
    def vmbottle(*words: str) -> str:
        argv = [sys.executable, "-m", "pytest_vmbottle", "--catalog", str(arm.root), "machine", *words]
        return subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, timeout=300).stdout

    vmbottle("start", "arm", "--arch", "aarch64", "--memory", "256M", "--name", "by-hand")
    try:
        assert vmbottle("exec", "by-hand", "uname", "-m") == "aarch64\n"
        assert vmbottle("exec", "by-hand", "ls", "/sys/firmware/devicetree/base/compatible") != ""
    finally:
        vmbottle("rm", "--force", "by-hand")


def _provisioner(catalog: Catalog, kind: PackKind, warned: list[str]) -> Provisioner:
    return Provisioner(catalog, QemuBackend(proofs=catalog.proofs, pack_kind=kind), name="qemu", settings=Settings(warn=warned.append))


@pytest.mark.parametrize("kind", [PackKind.TEMPLATE, PackKind.STREAM])
def test_a_pack_that_cannot_be_restored_gives_way_to_one_of_the_next_kind(kind: PackKind, arm: Catalog) -> None:
    """With a guest that boots in seconds; nothing of it is about the architecture."""
    warned: list[str] = []
    first = _provisioner(arm, kind, warned)
    spec = MachineSpec.resolve("arm", {"arch": "aarch64", "memory": "256M", "run": [f"echo {kind} > /root/lasting; touch /run/in-memory"]})
    pack = first.pack(spec)
    # A pack whose hashes are right and whose state makes no sense, as after a mistake of QEMU's own.
    (pack.path / "pack.json").unlink()
    (pack.path / "state.bin").unlink()
    (pack.path / "state.bin").write_bytes(b"no state at all")
    packs.seal(pack.path, pack.manifest)
    first.close()
    second = _provisioner(arm, kind, warned)

    with second.machine(spec) as machine:
        assert machine.path("/root/lasting").read_text() == f"{kind}\n"
        assert machine.path("/run/in-memory").exists() == (kind.next is not PackKind.DISK)

    (warning,) = warned
    assert f"was quarantined; {kind.next} packs are used from now on" in warning
    assert not pack.path.exists()
    second.close()
