"""Recipes of the base images that can be built."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle.host.package_data import read_script

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["RECIPES", "TAKES_SEED", "Recipe"]

TAKES_SEED = "vmbottle-seed.service"
"""Unit of our images that configures a machine from its seed in place of cloud-init."""


@attrs.frozen(kw_only=True)
class Recipe:
    """Recipe of a base image for mmdebstrap.

    Attributes:
        description: The result, in a few words.
        suite: The release's name in its archive.
        keyring: The keys of its archive, and the package that has them.
        packages: Its packages besides the essential ones; `{arch}` stands for the architecture's Debian name.
        arches: By `uname -m`, the architecture's Debian name and its serial console.
        early: Files to put in place before the kernel is configured.
        files: Files to put over the result.
        links: Symbolic links to put over it.
        disk_size: Bytes of the file system; unused blocks take no space.
    """

    description: str
    suite: str
    keyring: tuple[Path, str]
    packages: tuple[str, ...]
    arches: Mapping[str, tuple[str, str]]
    early: Mapping[str, str]
    files: Mapping[str, str]
    links: Mapping[str, str]
    disk_size: int


# What a machine that lives for seconds, on a clock and a disk of its own, never needs.
# The clock of a restored clone jumps forward, and each calendar timer that came due meanwhile would start in all clones at once.
_MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "cloud-init-hotplugd.socket",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "logrotate.timer",
    "man-db.timer",
    "motd-news.timer",
    "serial-getty@ttyS0.service",
    "serial-getty@ttyAMA0.service",
    "systemd-binfmt.service",
    "systemd-journal-flush.service",
    "systemd-networkd-wait-online.service",
    "systemd-timesyncd.service",
)

_DEBIAN_PACKAGES = (
    "linux-image-cloud-{arch}",
    "ca-certificates",
    "cloud-init",
    "dbus",
    "e2fsprogs",
    "init",
    "iproute2",
    "libnss-myhostname",  # a guest without a name server still knows its own name
    "libpam-systemd",
    "lz4",  # for COMPRESS below
    "netplan.io-",  # the minus keeps it out, see apt-get(8): the network is configured below
    "openssh-server",
    "procps",
    "python3",  # runs our script after a restore
    "qemu-guest-agent",
    "sudo",
    "systemd",
    "systemd-sysv",
    "udev",
)

# An initramfs with just what finds the root: a fifth of the size, and seconds less where there is no KVM.
_DEBIAN_EARLY = {
    "etc/initramfs-tools/conf.d/vmbottle": "MODULES=list\nCOMPRESS=lz4\n",
    "usr/share/initramfs-tools/modules.d/vmbottle": "virtio_pci\nvirtio_blk\next4\nvirtio_net\nvirtio_console\n",
}
_DEBIAN_FILES = {
    "etc/cloud/cloud.cfg.d/90-vmbottle.cfg": read_script(__package__, "cloud.cfg"),
    "etc/default/locale": "LANG=C.UTF-8\n",
    "etc/hostname": "debian\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
    "etc/machine-id": "",  # empty, so that systemd makes one at the first boot: see machine-id(5)
    "etc/resolv.conf": "nameserver 10.0.2.3\n",  # the name server of QEMU's user network
    "etc/ssh/sshd_config.d/vmbottle.conf": read_script(__package__, "sshd.conf"),
    "etc/systemd/network/80-dhcp.network": "[Match]\nName=e*\n\n[Network]\nDHCP=ipv4\n",
    f"etc/systemd/system/{TAKES_SEED}": read_script(__package__, "vmbottle-seed.service"),
    "usr/lib/vmbottle/take-seed": read_script(__package__, "take_seed.sh"),
}


# systemd 256 and newer look for a vsock to serve SSH on, which our machines do not have, and complain at each boot.
_NO_VSOCK = {"etc/systemd/system-generators/systemd-ssh-generator": "/dev/null"}


def _debian(release: int, suite: str, *, links: Mapping[str, str] = MappingProxyType({})) -> Recipe:
    """Return the recipe of a Debian release; releases differ in little."""
    return Recipe(
        description=f"Debian {release} ({suite})",
        suite=suite,
        keyring=(Path("/usr/share/keyrings/debian-archive-keyring.gpg"), "debian-archive-keyring"),
        packages=_DEBIAN_PACKAGES,
        arches={"x86_64": ("amd64", "ttyS0"), "aarch64": ("arm64", "ttyAMA0")},
        early=_DEBIAN_EARLY,
        files=_DEBIAN_FILES,
        links={
            **{f"etc/systemd/system/{unit}": "/dev/null" for unit in _MASKED},
            **links,
            # Debian does not enable it by itself.
            "etc/systemd/system/multi-user.target.wants/systemd-networkd.service": "/lib/systemd/system/systemd-networkd.service",
        },
        disk_size=8 << 30,
    )


RECIPES: Mapping[str, Recipe] = {"debian-12": _debian(12, "bookworm"), "debian-13": _debian(13, "trixie", links=_NO_VSOCK)}
