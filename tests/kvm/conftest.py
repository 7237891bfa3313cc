"""A guest with a KVM that runs guests. What it gets was laid out by `.ci/nested`; what is here runs only where `-m kvm` asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from pytest_vmbottle import Machine, layer
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.images import ImageStore, build
from tests.conftest import leave_out

HERE = Path(__file__).parent
ENGINE = Path(os.environ.get("ENGINE", HERE.parents[1] / ".engine"))
SMALL = HERE.parent / "small_image.py"
IMAGE = "kvm-host"

collect_ignore = ["inside"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items, HERE, "kvm")


@pytest.fixture(autouse=True, scope="module")
def _image(vm_catalog: Catalog) -> None:
    store = ImageStore(vm_catalog.images)
    if IMAGE not in {image.name for image in store.list()}:
        build(store, "debian-12", name=IMAGE, include=["qemu-system-x86", "qemu-utils"])


@layer(
    IMAGE,
    nested=True,
    cpus=3,
    memory="4G",
    env={"PYTHONPATH": "/opt/libraries:/opt/project"},
    depends=[ENGINE / "libraries.txt", ENGINE / "project.txt", SMALL, HERE / "inside"],
)
def kvm_host(vm: Machine) -> None:
    """QEMU, pytest, this project, and the image "small"; nothing of them comes over a network."""
    vm.cp(ENGINE / "libraries", vm.path("/opt/libraries"))
    vm.cp(ENGINE / "project", vm.path("/opt/project"))
    vm.cp(HERE / "inside", vm.path("/srv/inside"))
    vm.exec("modprobe kvm_amd || modprobe kvm_intel")  # for the pack to have it
    with TemporaryDirectory() as folder:
        subprocess.run([sys.executable, SMALL, "amd64", folder], check=True)
        for part in ("disk.raw", "vmlinuz", "initrd"):
            vm.cp(Path(folder) / part, vm.path(f"/root/{part}"))
    add = "python3 -m pytest_vmbottle image add disk.raw --name small --kernel vmlinuz --initrd initrd --cmdline 'console=ttyS0 quiet'"
    vm.exec(f"{add} && rm disk.raw", cwd="/root", timeout=300)
