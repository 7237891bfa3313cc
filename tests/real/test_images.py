"""Images in real machines: one that a project declares, built and booted; and disks that were made to do harm."""

from __future__ import annotations

import base64
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_vmbottle import Machine, MachineSpec, layer
from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backend import Disk, PackKind, Start
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.backends.qemu.instance import QemuInstance
from pytest_vmbottle.catalog import Catalog
from pytest_vmbottle.channels.ssh import SshChannel, new_keys
from pytest_vmbottle.images import declared_images
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.seed import write_seed

MIB = 1 << 20
DECLARED = """
[tool.vmbottle.images.small]
build = "debian-13"
packages = ["tree"]
script = "setup.sh"
"""
SCRIPT = """\
#!/bin/bash -eu
[[ $(id -u) == 0 && $PWD == / ]]
useradd --create-home web
echo "It's $(getent passwd web | cut -d: -f6)" > /etc/made-by-script
"""


def test_a_declared_image_of_debian_13_is_built_booted_packed_and_poured(vm_catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(DECLARED)
    (tmp_path / "setup.sh").write_text(SCRIPT)
    settings = Settings(declared=declared_images(tmp_path), timeout_factor=2)
    provisioner = Provisioner(Catalog(tmp_path / "catalog"), QemuBackend(proofs=vm_catalog.proofs), name="qemu", settings=settings)
    spec = MachineSpec.resolve("small", {})
    try:
        random = {_looked_over(provisioner, spec) for _ in range(2)}
        kind = provisioner.pack(spec).manifest.kind
    finally:
        provisioner.close()
    assert len(random) == 2
    assert kind == provisioner.capabilities.pack_kind
    expected = (1, 2) if kind == PackKind.TEMPLATE else (3, 0)
    assert (provisioner.tally.booted, provisioner.tally.poured) == expected


def _looked_over(provisioner: Provisioner, spec: MachineSpec) -> str:
    """Looks at a machine from all sides; some of its random bytes."""
    began = time.time()
    with provisioner.machine(spec) as vm:
        assert 'VERSION_ID="13"' in vm.path("/etc/os-release").read_text().splitlines()
        assert vm.exec(["systemctl", "is-system-running"], check=False).stdout == "running\n"
        assert vm.exec(["cloud-init", "status"]).stdout == "status: disabled\n"
        assert vm.exec(["hostname"]).stdout == "vm\n"
        assert vm.path("/etc/made-by-script").read_text() == "It's /home/web\n"
        assert vm.exec(["tree", "--noreport", "-i", "/home"]).stdout.splitlines()[-1].endswith("web")
        assert vm.path("/etc/resolv.conf").read_text() == "nameserver 10.0.2.3\n"
        assert not [path for path in vm.path("/").iterdir() if path.name.startswith("vmbottle")]
        assert float(vm.exec("date +%s.%N").stdout) >= began
        assert isinstance(vm._instance.channel(deadline=Deadline(120), bulk=True), SshChannel)
        return vm.exec("head -c 16 /dev/urandom | od -An -tx1").stdout


def evil(backing: Path | str) -> bytes:
    """The first sector of a qcow2 that names a backing file, as a guest can write it to its own disk."""
    name = str(backing).encode()
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQIIQ", b"QFI\xfb", 3, 120, len(name), 16, MIB, 0, 1, 3 << 16, 1 << 16, 1, 0, 0, 0, 0, 0, 4, 112, 0
    )
    return (header + bytes(8) + name).ljust(512, b"\0")


@layer("debian-12")
def planted(vm: Machine) -> None:
    vm.exec(["dd", "of=/dev/vda", "bs=512", "count=1", "conv=notrunc", "oflag=direct", "status=none"], input=evil("/etc/passwd"))


@pytest.mark.vm(planted)
def test_a_qcow2_header_that_a_guest_wrote_to_its_disk_is_data_the_next_time(vm: Machine, vm_factory: Callable[..., Machine]) -> None:
    other = vm_factory("debian-12")
    first, size = "dd if=/dev/vda bs=512 count=1 iflag=direct status=none | base64 -w 0", ["blockdev", "--getsize64", "/dev/vda"]
    assert base64.b64decode(vm.exec(first).stdout) == evil("/etc/passwd")
    assert base64.b64decode(other.exec(first).stdout) != evil("/etc/passwd")
    assert vm.exec(size).stdout == other.exec(size).stdout


@pytest.fixture
def qemu_img_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The command lines of qemu-img from now on, as a program of its name in the search path writes them down."""
    log, real = tmp_path / "runs", shutil.which("qemu-img")
    assert real is not None
    wrapper = tmp_path / "bin" / "qemu-img"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {log}\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    return lambda: log.read_text().splitlines() if log.exists() else []


@contextmanager
def launched(catalog: Catalog, disk: Disk, folder: Path) -> Iterator[tuple[QemuInstance, Path]]:
    """A machine that has just been started from a disk, and the folder it runs in."""
    spec, keys = MachineSpec.resolve("debian-12", {"memory": "128M"}), new_keys()
    write_seed(folder / "seed.iso", hostname="vm", keys=keys)
    start = Start(disks=(disk,), disk_size=2 * MIB, kernel=None, initrd=None, cmdline="", seed=folder / "seed.iso", keys=keys)
    with catalog.rundir("hostile-disk") as rundir:
        instance = QemuBackend(proofs=catalog.proofs).launch(spec, source=start, rundir=rundir, deadline=Deadline(120))
        assert isinstance(instance, QemuInstance)
        try:
            yield instance, rundir
        finally:
            instance.stop()


def test_a_raw_disk_that_begins_like_a_qcow2_is_raw_to_qemu_and_what_it_names_stays_closed(
    vm_catalog: Catalog, tmp_path: Path, qemu_img_runs: Callable[[], list[str]]
) -> None:
    """QEMU is told the format of every disk in the chain; qemu-img never gets to see one that is not our own."""
    secret, disk = tmp_path / "secret", tmp_path / "disk.raw"
    secret.write_bytes(bytes(MIB))
    disk.write_bytes(evil(secret).ljust(2 * MIB, b"\0"))
    with launched(vm_catalog, Disk(path=disk, format="raw"), tmp_path) as (instance, rundir):
        nodes = instance._qmp.execute("query-named-block-nodes", flat=True, deadline=Deadline(30))
        opened = {os.readlink(fd) for fd in Path(f"/proc/{instance.pid}/fd").iterdir()}  # noqa: PTH115
    assert sorted(node["drv"] for node in nodes) == ["file", "file", "file", "qcow2", "raw", "raw"]
    files = {node["file"] for node in nodes if node["drv"] == "file"}
    assert files == {str(rundir / "disk.qcow2"), str(disk), str(tmp_path / "seed.iso")}
    assert str(disk) in opened
    assert str(secret) not in opened
    assert qemu_img_runs() == [f"create -q -f qcow2 {rundir / 'disk.qcow2'} {2 * MIB}"]
