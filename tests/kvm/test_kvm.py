"""Machines under a real KVM, in a guest whose processor has virtualisation by emulation."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import closing
from pathlib import Path

import pytest

from pytest_vmbottle import Machine, MachineFactory, MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.images import ImageStore
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.result import Result
from tests.kvm.conftest import SMALL, kvm_host

pytestmark = pytest.mark.vm(kvm_host)

PROCESSORS = "1,2"
"""Those that run machines: see tests/nested."""
ONE = "clone_goes_on"


def vmbottle(vm: Machine, *words: str, accel: str = "kvm", catalog: str = "", check: bool = True, **environment: str) -> Result:
    argv = ["taskset", "-c", PROCESSORS, "python3", "-m", "pytest_vmbottle", *words]
    env = {"VMBOTTLE_ACCEL": accel, **({"VMBOTTLE_CATALOG": catalog} if catalog else {}), **environment}
    return vm.exec(argv, env=env, check=check, timeout=600)


def outcomes(vm: Machine, *options: str) -> dict[str, str]:
    """Runs the tests inside, and returns how each ended: an empty text, or what went wrong."""
    report = "/root/report.xml"
    argv = [
        "taskset",
        "-c",
        PROCESSORS,
        "python3",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junit-xml={report}",
        "--vm-missing=fail",
    ]
    ran = vm.exec([*argv, *options], cwd="/srv/inside", check=False, timeout=1500)
    cases = ET.fromstring(vm.path(report).read_text()).iter("testcase")
    found = {str(case.get("name")): "".join(f"{part.get('message')} {part.text}" for part in case) for case in cases}
    assert found, ran.stdout
    return found


@pytest.fixture
def host(module_vm: Machine) -> Machine:
    return module_vm


def test_kvm_is_proved_by_a_guest_that_runs_under_it(host: Machine) -> None:
    findings = {each["topic"]: each for each in json.loads(vmbottle(host, "doctor", "--json").stdout)}
    assert findings["accelerator"]["state"] == "ok"
    assert "KVM" in findings["accelerator"]["text"]
    assert "template" in findings["packs"]["text"]


def test_machines_are_cloned_changed_restored_and_shared_under_kvm(host: Machine) -> None:
    found = outcomes(host, "--vm-accel=kvm", "--vm-pack=template")
    assert {name: words for name, words in found.items() if words} == {}
    assert len(found) == 9


@pytest.mark.parametrize("kind", ["stream", "disk"])
def test_packs_of_other_kinds_are_saved_and_restored_under_kvm(host: Machine, kind: str) -> None:
    assert [*outcomes(host, "--vm-accel=kvm", f"--vm-pack={kind}", "-k", ONE).values()] == [""]


SLOW = """#!/bin/sh
case "$*" in *"-accel kvm"*) echo $$ > /sys/fs/cgroup/slow/cgroup.procs;; esac
exec /usr/bin/qemu-system-x86_64 "$@"
"""
"""A QEMU that has a twentieth of a processor for what it runs under KVM."""


def test_kvm_that_is_slower_than_emulation_is_not_used(host: Machine) -> None:
    host.exec("cd /sys/fs/cgroup; echo +cpu > cgroup.subtree_control; mkdir slow; echo '5000 100000' > slow/cpu.max")
    host.path("/root/slow").mkdir()
    host.path("/root/slow/qemu-system-x86_64").write_text(SLOW, mode=0o755)
    found = vmbottle(host, "doctor", "--json", accel="auto", PATH="/root/slow:/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin")
    findings = {each["topic"]: each for each in json.loads(found.stdout)}
    assert findings["accelerator"]["state"] == "degraded"
    assert "using TCG" in findings["accelerator"]["text"]


RUN = ("machine", "run", "--memory", "256M")


def exported(vm: Machine, name: str, *, made: tuple[str, ...] = (), written: tuple[str, ...] = ()) -> str:
    """Makes a pack in a catalog of its own, and returns the file that it was written into."""
    catalog, file = with_images(vm, f"/root/{name}"), f"/root/{name}.vmpack"
    vmbottle(vm, *RUN, *made, "small", "true", catalog=catalog)
    (pack,) = json.loads(vmbottle(vm, "pack", "ls", "--json", catalog=catalog).stdout)
    vmbottle(vm, "pack", "export", pack["key"], "-o", file, *written, catalog=catalog)
    return file


@pytest.fixture(scope="module")
def of_kvm(module_vm: Machine) -> str:
    """A pack for the host's own processor. Its image is left out: to compress it takes minutes in there."""
    return exported(module_vm, "of-kvm", written=("--without-parents",))


def with_images(vm: Machine, catalog: str) -> str:
    vm.exec(["mkdir", "-m", "700", catalog])
    vm.exec(["ln", "-s", "/root/.cache/pytest-vmbottle/images", f"{catalog}/images"])
    return catalog


def refusal(vm: Machine, file: str, accel: str) -> str:
    """Tries to import a pack, and returns what is said; it must not be there after that."""
    catalog = with_images(vm, f"/root/for-{accel}")
    said = vmbottle(vm, "pack", "import", file, accel=accel, catalog=catalog, check=False)
    assert said.returncode == 1
    assert json.loads(vmbottle(vm, "pack", "ls", "--json", accel=accel, catalog=catalog).stdout) == []
    return said.stderr


UNFIT = "cannot be restored here: it needs the same QEMU and accelerator"


def test_a_pack_of_kvm_is_refused_under_emulation(host: Machine, of_kvm: str) -> None:
    assert UNFIT in refusal(host, of_kvm, "tcg")


def test_a_pack_of_emulation_is_refused_under_kvm(host: Machine, vm_catalog: Catalog, tmp_path: Path) -> None:
    # Made out here: a pack with the very same QEMU, and an emulation in an emulation takes ten times as long.
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run([sys.executable, SMALL, "amd64", small], check=True)
    catalog = Catalog(tmp_path / "catalog")
    kernel, initrd = small / "vmlinuz", small / "initrd"
    ImageStore(catalog.images).add(small / "disk.raw", name="outside", kernel=kernel, initrd=initrd, cmdline="console=ttyS0 quiet")
    backend = QemuBackend(accelerator="tcg", proofs=vm_catalog.proofs)
    with closing(Provisioner(catalog, backend, name="qemu", settings=Settings())) as provisioner:
        pack = provisioner.pack(MachineSpec.resolve("outside", {"memory": "256M"}))
        argv = [
            sys.executable,
            "-m",
            "pytest_vmbottle",
            "--catalog",
            str(catalog.root),
            "pack",
            "export",
            pack.key,
            "-o",
            str(tmp_path / "pack"),
        ]
        subprocess.run(argv, check=True)
    host.cp(tmp_path / "pack", host.path("/root/of-tcg.vmpack"))
    assert UNFIT in refusal(host, "/root/of-tcg.vmpack", "kvm")


def test_a_pack_of_a_level_fits_another_processor_and_any_other_pack_does_not(
    host: Machine, of_kvm: str, vm_factory: MachineFactory, tmp_path: Path
) -> None:
    level = exported(host, "level", made=("--cpu", "x86-64-v2"))
    other = vm_factory(kvm_host, cpu="Opteron_G5")
    models = [vm.exec("grep -m1 'model name' /proc/cpuinfo").stdout for vm in (host, other)]
    assert models[0] != models[1]
    for file in (level, of_kvm):
        host.cp(host.path(file), tmp_path / "pack")
        other.cp(tmp_path / "pack", other.path(file))
    catalog = "/root/there"
    vmbottle(other, "pack", "import", level, catalog=catalog)
    assert UNFIT in vmbottle(other, "pack", "import", of_kvm, catalog=catalog, check=False).stderr
    flags = vmbottle(other, *RUN, "--cpu", "x86-64-v2", "small", "grep", "-m1", "flags", "/proc/cpuinfo", catalog=catalog).stdout.split()
    assert ("ssse3" in flags, "avx" in flags) == (True, False)
    assert len(json.loads(vmbottle(other, "pack", "ls", "--json", catalog=catalog).stdout)) == 1, "the pack that came was taken"
    refused = vmbottle(other, *RUN, "--cpu", "x86-64-v3", "small", "true", catalog=catalog, check=False)
    assert refused.returncode == 3
    assert "avx2" in refused.stderr
