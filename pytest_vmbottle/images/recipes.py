"""What the base images that can be built are made of."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["RECIPES", "TAKES_SEED", "Recipe"]

TAKES_SEED = "vmbottle-seed.service"
"""The unit of our images that gives a machine what every one needs of cloud-init."""


@attrs.frozen(kw_only=True)
class Recipe:
    """How a base image is made with mmdebstrap.

    Attributes:
        description: What comes out.
        suite: The release's name in its archive.
        keyring: The keys of its archive, and the package that has them.
        packages: What it has besides the essential packages; `{arch}` stands for the architecture's Debian name.
        arches: By `uname -m`, the architecture's Debian name and its serial console.
        early: Files that are there before the kernel is configured.
        files: Files that are laid over the result.
        links: Symbolic links that are laid over it.
        disk_size: Of the file system, in bytes; what is not used takes no space.
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

_CLOUD_CONFIG = """\
datasource_list: [NoCloud, None]
network: {config: disabled}
locale: C.UTF-8
cloud_init_modules: [bootcmd, write_files, resizefs, set_hostname, update_hostname, update_etc_hosts, ca_certs, users_groups, ssh]
cloud_config_modules: [set_passwords, ntp, timezone, apt_configure, runcmd]
cloud_final_modules:
  [package_update_upgrade_install, write_files_deferred, scripts_per_boot, scripts_per_instance, scripts_user, final_message]
"""

# cloud-init takes most of a boot: four programs, each of which imports a great deal. What every machine needs of it, its name and its keys,
# is taken from the same seed by this, before the network is up, and once, as cloud-init does. No image has a host key. The kernel's command
# line wants this unit and disables cloud-init: whoever boots the image in another way gets Debian's usual behaviour.
_TAKE_SEED_UNIT = """\
[Unit]
Description=Take this machine's name and keys from its seed
DefaultDependencies=no
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key
Requires=dev-disk-by\\x2dlabel-cidata.device
After=dev-disk-by\\x2dlabel-cidata.device local-fs.target
Before=network-pre.target ssh.service ssh.socket cloud-init-local.service shutdown.target
Wants=network-pre.target
Conflicts=shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh /usr/lib/vmbottle/take-seed
"""
_TAKE_SEED = """\
#!/bin/sh
set -eu
seed=/run/vmbottle-seed
mkdir -m 0700 "$seed"
mount -t iso9660 -o ro /dev/disk/by-label/cidata "$seed"
cat "$seed/hostname" > /etc/hostname
cat "$seed/hostname" > /proc/sys/kernel/hostname
/lib/systemd/systemd-growfs / # the disk may be larger than the image
umask 077
mkdir -p /root/.ssh
cat "$seed/authorized-keys" >> /root/.ssh/authorized_keys
(umask 022 && cat "$seed/host-key-public" > /etc/ssh/ssh_host_ed25519_key.pub)
cat "$seed/host-key" > /etc/ssh/ssh_host_ed25519_key # the last: it says that all is done
umount "$seed"
rmdir "$seed"
"""

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
    "lz4",
    "netplan.io-",
    "openssh-server",
    "procps",
    "python3",
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
    "etc/cloud/cloud.cfg.d/90-vmbottle.cfg": _CLOUD_CONFIG,
    "etc/default/locale": "LANG=C.UTF-8\n",
    "etc/hostname": "debian\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
    "etc/machine-id": "",
    "etc/resolv.conf": "nameserver 10.0.2.3\n",  # the name server of QEMU's user network
    "etc/ssh/sshd_config.d/vmbottle.conf": "UseDNS no\nGSSAPIAuthentication no\nPrintMotd no\nMaxSessions 100\nMaxStartups 100\n",
    "etc/systemd/network/80-dhcp.network": "[Match]\nName=e*\n\n[Network]\nDHCP=ipv4\n",
    f"etc/systemd/system/{TAKES_SEED}": _TAKE_SEED_UNIT,
    "usr/lib/vmbottle/take-seed": _TAKE_SEED,
}


# systemd 256 and newer look for a vsock to serve SSH on, which our machines do not have, and complain at each boot.
_NO_VSOCK = {"etc/systemd/system-generators/systemd-ssh-generator": "/dev/null"}


def _debian(release: int, suite: str, *, links: Mapping[str, str] = MappingProxyType({})) -> Recipe:
    """What all releases of Debian have in common, and the little in which they differ."""
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
            "etc/systemd/system/multi-user.target.wants/systemd-networkd.service": "/lib/systemd/system/systemd-networkd.service",
        },
        disk_size=8 << 30,
    )


RECIPES: Mapping[str, Recipe] = {"debian-12": _debian(12, "bookworm"), "debian-13": _debian(13, "trixie", links=_NO_VSOCK)}
