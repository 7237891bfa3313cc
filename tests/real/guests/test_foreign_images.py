"""Images that were not made for us: a partition table, a boot loader, a cloud-init that ends badly, no agent, no Python."""

from __future__ import annotations

import hashlib
import os
import secrets
import shlex
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock

from pytest_vmbottle import Machine, MachineFactory, MachineSpec, layer
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.channels.fallback import AgentOrSsh
from pytest_vmbottle.channels.ssh import SshChannel
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.digests import digest
from pytest_vmbottle.images import ImageStore
from pytest_vmbottle.images.apt import apt_sources
from pytest_vmbottle.images.builder import _Workshop, _write_tar
from pytest_vmbottle.provision import Provisioner, Settings

PACKAGES = """
    linux-image-cloud-amd64 grub-pc-bin grub-common init systemd systemd-sysv udev dbus libpam-systemd e2fsprogs fdisk cloud-guest-utils
    cloud-init netplan.io openssh-server sudo python3 iproute2 procps ca-certificates
"""
ROOT = "5f0c2c7e-6d0b-4f43-9c1c-6f3a3b2d9a10"
FILES = {
    "etc/fstab": f"UUID={ROOT} / ext4 rw,discard,errors=remount-ro 0 1\n",
    "etc/hostname": "localhost\n",
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/machine-id": "",
    "etc/resolv.conf": "",
    "boot/grub/grubenv": "",
    # What makes `cloud-init status` say "error", and `systemctl is-system-running` say "degraded".
    "etc/cloud/cloud.cfg.d/99_broken.cfg": "runcmd: ['false']\n",
    "etc/systemd/system/broken.service": "[Service]\nExecStart=/bin/false\n[Install]\nWantedBy=multi-user.target\n",
}
GRUB = """\
set timeout=1
menuentry Debian {{
  search --no-floppy --fs-uuid --set=root {root}
  linux /boot/{kernel} root=UUID={root} ro console=tty0 console=ttyS0,115200
  initrd /boot/{initrd}
}}
"""
SECTOR, MIB = 512, 1 << 20
LOADER, SYSTEM, SIZE = 1 * MIB, 4 * MIB, 2048 * MIB
"""Starts of the boot loader's partition and of the root partition, and the end of the disk."""


def make_official(folder: Path) -> None:
    """Makes a disk.qcow2 as distributions publish them, and a folder of the packages that a guest agent takes."""
    with _Workshop.opened(print) as shop:
        root, raw = shop.folder / "root", shop.folder / "disk.raw"
        install(shop, root)
        shop.run_as_root("mv", root / "agent", shop.folder)
        raw.touch()
        os.truncate(raw, SIZE)
        table = f"label: gpt\n14: start={LOADER // SECTOR}, size={(SYSTEM - LOADER) // SECTOR}, type=21686148-6449-6E6F-744E-656564454649\n"
        table += f"1: start={SYSTEM // SECTOR}, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4\n"
        (shop.folder / "table").write_text(table)
        shop.run("sh", "-c", "sfdisk -q disk.raw < table")
        raw.chmod(0o666)
        where = f"offset={SYSTEM}"
        shop.run_as_root("mke2fs", "-q", "-t", "ext4", "-U", ROOT, "-E", where, "-d", root, raw, f"{(SIZE - SYSTEM - MIB) >> 10}k")
        load_grub(raw, root / "usr/lib/grub/i386-pc/boot.img", root / "boot/grub/core.img")
        shop.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, folder / "disk.qcow2")
        shutil.copytree(shop.folder / "agent", folder / "agent", ignore=shutil.ignore_patterns("partial", "lock"))


def install(shop: _Workshop, root: Path) -> None:
    for name, text in apt_sources("bookworm").items():
        (shop.folder / name).write_text(text)
    files = shop.folder / "files.tar"
    _write_tar(files, FILES, {})
    fetch = "install -qq -y --no-install-recommends --download-only -o Dir::Cache::archives=$1/agent qemu-guest-agent"
    modules = "biosdisk part_gpt ext2 normal linux search search_fs_uuid"
    shop.bootstrap(
        "--variant=apt",
        "--format=directory",
        f"--include={','.join(PACKAGES.split())}",
        f"--customize-hook=tar-in {shlex.quote(str(files))} /",
        f'--customize-hook=mkdir -p "$1/agent/partial" && APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get {fetch}',
        '--customize-hook=chroot "$1" systemctl enable broken.service && rm "$1"/etc/ssh/ssh_host_*',
        f"--customize-hook=chroot \"$1\" grub-mkimage -O i386-pc -p '(hd0,gpt1)/boot/grub' -o /boot/grub/core.img {modules}",
        "bookworm",
        root,
        *(shop.folder / name for name in apt_sources("bookworm")),
    )
    kernel, initrd = (next(root.glob(f"boot/{name}-*")).name for name in ("vmlinuz", "initrd.img"))
    (shop.folder / "grub.cfg").write_text(GRUB.format(root=ROOT, kernel=kernel, initrd=initrd))
    shop.run_as_root("cp", shop.folder / "grub.cfg", root / "boot/grub/grub.cfg")


def load_grub(raw: Path, boot: Path, core: Path) -> None:
    """Puts GRUB in front of the system: its first sector says where the second is, and that one where the rest is."""
    first, rest = bytearray(boot.read_bytes()), bytearray(core.read_bytes())
    struct.pack_into("<Q", first, 0x5C, LOADER // SECTOR)
    struct.pack_into("<Q", rest, SECTOR - 12, LOADER // SECTOR + 1)
    with raw.open("r+b") as disk:
        disk.write(first[:440])  # behind it is the partition table's
        disk.seek(LOADER)
        disk.write(rest)


@pytest.fixture(scope="module")
def official(vm_catalog: Catalog) -> Path:
    """A folder with the disk, made once for all workers and runs that share a catalog."""
    folder = vm_catalog.root / f"official-{digest(PACKAGES, FILES, GRUB)[:12]}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_suffix(".new")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make_official(unfinished)
            unfinished.rename(folder)
    return folder


def test_an_official_image_boots_by_firmware_and_is_poured_over_ssh(official: Path, vm_factory: MachineFactory, tmp_path: Path) -> None:
    vm = vm_factory(official / "disk.qcow2", disk="3G")

    assert type(vm.lifecycle.channel) is SshChannel
    assert vm.exec("command -v qemu-ga", check=False).returncode != 0
    assert vm.path("/proc/cmdline").read_text().startswith("BOOT_IMAGE=/boot/vmlinuz-"), "the boot loader wrote this"
    assert vm.exec(["cloud-init", "status"], check=False).stdout == "status: error\n"
    assert vm.exec(["systemctl", "is-system-running"], check=False).stdout == "degraded\n"
    assert int(vm.exec("df --output=size -B1 / | tail -1").stdout) > 2.8 * 2**30
    assert abs(float(vm.exec(["date", "+%s"]).stdout) - time.time()) < 5
    (tmp_path / "f").write_text("there and back")
    vm.cp(tmp_path / "f", vm.path("/root/f"))
    assert vm.path("/root/f").read_text() == "there and back"
    assert not vm_factory(official / "disk.qcow2", disk="3G").path("/root/f").exists()


def test_an_official_image_that_was_added_has_the_packs_of_the_one_in_place(official: Path, vm_catalog: Catalog) -> None:
    ImageStore(vm_catalog.images).add(official / "disk.qcow2", name=official.name)
    provisioner = Provisioner(vm_catalog, QemuBackend(proofs=vm_catalog.proofs), name="qemu", settings=Settings())
    named, in_place = (provisioner.pack(MachineSpec.resolve(source, {"disk": "3G"})) for source in (official.name, official / "disk.qcow2"))
    provisioner.close()
    assert named.key == in_place.key


def test_where_sshd_refuses_root_that_is_what_is_told(official: Path, vm_factory: MachineFactory) -> None:
    vm = vm_factory(official / "disk.qcow2", disk="3G")
    vm.path("/etc/ssh/sshd_config.d/hardened.conf").write_text("PermitRootLogin no\n")
    vm.exec(["systemctl", "restart", "ssh"])
    said: list[str] = []
    keys = vm.lifecycle.instance._source.keys  # type: ignore[attr-defined]

    def refused() -> bool:
        assert SshChannel.attempt(vm.forward(22), keys, deadline=Deadline(30), alive=lambda: None, reasons=said) is None
        return "PermitRootLogin" in said[-1]

    vm.wait_until(refused)
    assert "PermitRootLogin no" in said[-1]


@pytest.fixture
def repository(official: Path, tmp_path: Path) -> Iterator[int]:
    """A repository with what the agent takes, on a port of this host's loopback."""
    index = []
    for package in sorted(official.glob("agent/*.deb")):
        about = subprocess.run(["dpkg-deb", "-f", package], check=True, capture_output=True, text=True).stdout
        name, size = package.name.replace("%", "_"), package.stat().st_size
        shutil.copy(package, tmp_path / name)
        index.append(f"{about}Filename: ./{name}\nSize: {size}\nSHA256: {hashlib.sha256(package.read_bytes()).hexdigest()}\n")
    (tmp_path / "Packages").write_text("\n".join(index))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_where_a_guest_reaches_its_packages_the_agent_is_installed_in_the_pack(
    official: Path, repository: int, vm_factory: MachineFactory
) -> None:
    source = f"deb [trusted=yes] http://10.0.2.2:{repository} ./"
    first = f"rm -f /etc/apt/sources.list.d/*; echo '{source}' > /etc/apt/sources.list"
    vm = vm_factory(official / "disk.qcow2", disk="3G", network=True, user_data={"bootcmd": [first]})

    assert type(vm.lifecycle.channel) is AgentOrSsh
    assert vm.exec(["systemctl", "is-active", "qemu-guest-agent"]).stdout == "active\n"


def test_a_guest_without_python_gets_a_disk_pack_and_that_is_told(vm_catalog: Catalog) -> None:
    @layer("debian-12", version=secrets.token_hex(4))
    def without_python(vm: Machine) -> None:
        vm.exec("echo kept > /root/kept; rm /usr/bin/python3*")

    said: list[str] = []
    provisioner = Provisioner(vm_catalog, QemuBackend(proofs=vm_catalog.proofs), name="qemu", settings=Settings(warn=said.append))
    with provisioner.machine(MachineSpec.resolve(without_python, {})) as vm:
        assert vm.path("/root/kept").read_text() == "kept\n"
    assert provisioner.tally.restored == 0
    assert [sentence.startswith("without_python cannot be saved with its RAM") for sentence in said] == [True]
