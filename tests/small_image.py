"""A small system that boots in seconds, put together from Debian's packages on a host of any architecture: none of them is run here.

The packages are only unpacked, and a few of their files go on a disk and into an initial RAM disk. What starts them is busybox.

Usage: small_image.py amd64|arm64 FOLDER
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

from pytest_vmbottle.images import RECIPES
from pytest_vmbottle.images.apt import apt_sources

_RECIPE = RECIPES["debian-12"]
_PACKAGES = "linux-image-cloud-{arch},busybox-static,qemu-guest-agent,python3-minimal"
_TRIPLES = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}
# In the order in which they need each other.
_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio-rng",
    "failover",
    "net_failover",
    "virtio_net",
)
_PROGRAMS = (
    "./bin/busybox",
    "./lib*/ld-linux-*.so.*",
    "./lib/{triple}/*.so*",
    "./usr/lib/{triple}/*.so*",
    "./usr/sbin/qemu-ga",
    "./usr/bin/python3*",
    "./usr/lib/python3*",
)
_KERNEL = ("./boot/vmlinuz-*", "./lib/modules/*/kernel/drivers", "./lib/modules/*/kernel/net")
_MOUNT_ROOT = """\
#!/bin/busybox sh
busybox mount -t devtmpfs dev /dev
for module in MODULES; do busybox insmod "/$module.ko"; done
busybox mount -t ext4 /dev/vda /root
busybox mount -o move /dev /root/dev
exec busybox switch_root /root /sbin/init
"""
_START = """\
#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
[ -e /bin/ls ] || /bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=755 run /run
mkdir /dev/pts /dev/virtio-ports
mount -t devpts pts /dev/pts
until ls /sys/class/virtio-ports/*/name; do sleep 0.05; done >/dev/null 2>&1 # the host tells them some time later, all the ports first
for port in /sys/class/virtio-ports/*; do
  until [ -e "$port/name" ]; do sleep 0.05; done
  ln -s "../${port##*/}" "/dev/virtio-ports/$(cat "$port/name")"
done
hostname small
ifconfig lo 127.0.0.1
ifconfig eth0 10.0.2.15
"""
_FILES = {
    "etc/inittab": """\
::sysinit:/etc/start
::respawn:/usr/sbin/qemu-ga -p /dev/virtio-ports/org.qemu.guest_agent.0
::shutdown:/bin/umount -r /
""",
    "etc/start": _START,
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/hosts": "127.0.0.1 localhost\n",
}
_LINKS = {"sbin/init": "/bin/busybox", "bin/sh": "busybox", "var/run": "/run"}
_FOLDERS = ("dev", "proc", "sys", "run", "tmp", "root", "var/tmp", "var/lib", "bin", "sbin")


def build(folder: Path, arch: str) -> None:
    """Makes `disk.raw`, `vmlinuz` and `initrd` in an empty folder; takes some ten seconds."""
    root, boot, packages = folder / "root", folder / "boot", folder / "packages.tar"
    _unpack(packages, folder, arch)
    _extract(packages, root, tuple(pattern.format(triple=_TRIPLES[arch]) for pattern in _PROGRAMS))
    _extract(packages, boot, _KERNEL)
    packages.unlink()
    next(boot.glob("boot/vmlinuz-*")).rename(folder / "vmlinuz")
    _write_initrd(folder / "initrd", root / "bin/busybox", {path.stem: path for path in boot.rglob("*.ko")})
    _write_disk(folder / "disk.raw", root)


def _run(*argv: str | Path) -> None:
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where mke2fs is, also for ordinary users
    done = subprocess.run([*argv], env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{argv[0]} failed: {done.stderr[-2000:]}")


def _unpack(packages: Path, folder: Path, arch: str) -> None:
    """Downloads the packages and what they depend on, and unpacks them into an archive; nothing is configured."""
    sources = apt_sources(_RECIPE.suite)
    for name, text in sources.items():
        (folder / name).write_text(text)
    keyring = [] if sources else [f"--keyring={_RECIPE.keyring[0]}"]
    variant = ("--mode=chrootless", "--variant=extract", f"--architectures={arch}", f"--include={_PACKAGES.format(arch=arch)}", *keyring)
    _run("mmdebstrap", *variant, _RECIPE.suite, packages, *(folder / name for name in sources))


def _extract(packages: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    folder.mkdir()
    _run("tar", "-xf", packages, "-C", folder, "--wildcards", "--no-wildcards-match-slash", *patterns)


def _write_initrd(path: Path, busybox: Path, modules: dict[str, Path]) -> None:
    # In the kernel's "newc" format: https://docs.kernel.org/driver-api/early-userspace/buffer-format.html
    mount = _MOUNT_ROOT.replace("MODULES", " ".join(_MODULES)).encode()
    members = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "root")]
    members += [("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()), ("init", stat.S_IFREG | 0o755, mount)]
    members += [(f"{name}.ko", stat.S_IFREG | 0o644, modules[name].read_bytes()) for name in _MODULES]
    with path.open("wb") as file:
        for number, (name, mode, content) in enumerate([*members, ("TRAILER!!!", 0, b"")], 1):
            fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
            header = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
            file.write(header.ljust(-(-len(header) // 4) * 4, b"\0") + content.ljust(-(-len(content) // 4) * 4, b"\0"))


def _write_disk(disk: Path, root: Path) -> None:
    for name in _FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, text in _FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    (root / "etc/start").chmod(0o755)
    for name, target in _LINKS.items():
        (root / name).symlink_to(target)
    _run("mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", root, disk, "256M")


if __name__ == "__main__":
    build(Path(sys.argv[2]), sys.argv[1])
