"""Official cloud images: URLs, and their publishers' checksums."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle.images.store import Readiness, Traits, default_firmware

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["CLOUD_IMAGES", "Checksum", "CloudImage", "checksum_in"]

_DIGITS = {"sha256": 64, "sha512": 128}
_ALONE = re.compile(r"(?P<digest>[0-9a-fA-F]+)")
# As sha256sum(1) writes them: after a blank or, for a file that was read in binary mode, a star comes the name.
_GNU = re.compile(r"(?P<digest>[0-9a-fA-F]+) [ *](?P<file>\S+)")
_BSD = re.compile(r"(?P<algorithm>[A-Z0-9]+) \((?P<file>[^()]+)\) = (?P<digest>[0-9a-fA-F]+)")


def _lower(text: str) -> str:
    return text.strip().lower()


@attrs.frozen
class Checksum:
    """Checksum of a file's content.

    Attributes:
        algorithm: `sha256` or `sha512`.
        digest: The digest in lower-case hexadecimal digits.
    """

    algorithm: str = attrs.field(validator=attrs.validators.in_(_DIGITS))
    digest: str = attrs.field(converter=_lower)

    @digest.validator
    def _check(self, _: object, value: str) -> None:
        if not re.fullmatch(f"[0-9a-f]{{{_DIGITS[self.algorithm]}}}", value):
            raise ValueError(f"{value!r} is not a {self.algorithm}")

    def __str__(self) -> str:
        return f"{self.algorithm} {self.digest}"


@attrs.frozen(kw_only=True)
class CloudImage:
    """A distribution's published cloud image, and how it boots.

    `{arch}` stands for the distribution's word for the architecture.

    Attributes:
        description: A few words for people.
        folder: The URL of the image's folder; ends with a slash.
        file: The image's file name.
        checksums: The name of the file with the checksum; `{file}` stands for the image's.
        algorithm: The checksum's algorithm.
        user: The user who gets the SSH key.
        arches: The distribution's words for architectures, by `uname -m`.
        firmware: The words in the file's name for the firmware, by `uname -m`, if there are any; `{firmware}` stands for them.
        readiness: The condition for the guest to be ready.
    """

    description: str
    folder: str
    file: str
    checksums: str
    algorithm: str
    user: str
    arches: Mapping[str, str]
    firmware: Mapping[str, str] = attrs.field(factory=dict)
    readiness: Readiness = "cloud-init"

    def url(self, arch: str) -> str:
        """Return the URL of the image for an architecture, given as by `uname -m`."""
        words = {"arch": self.arches[arch], "firmware": self.firmware.get(arch, "")}
        return (self.folder + self.file).format(**words)

    def checksums_url(self, arch: str) -> str:
        """Return the URL of its checksum."""
        url = self.url(arch)
        folder, _, file = url.rpartition("/")
        return f"{folder}/{self.checksums}".format(file=file, arch=self.arches[arch])

    def traits(self, arch: str) -> Traits:
        """Return the traits of the image's system.

        The x86_64 images all boot by BIOS, most by UEFI too; for aarch64 there is only UEFI.
        """
        return Traits(firmware=default_firmware(arch), user=self.user, readiness=self.readiness)


_DEBIAN_ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}
_UNAME_ARCHES = {"x86_64": "x86_64", "aarch64": "aarch64"}


def _debian(version: int, suite: str) -> CloudImage:
    # https://cloud.debian.org/images/cloud/: `latest` is the newest point release; SHA512SUMS has GNU lines
    return CloudImage(
        description=f"Debian {version} ({suite}) cloud image",
        folder=f"https://cloud.debian.org/images/cloud/{suite}/latest/",
        file=f"debian-{version}-genericcloud-{{arch}}.qcow2",
        checksums="SHA512SUMS",
        algorithm="sha512",
        user="debian",
        arches=_DEBIAN_ARCHES,
    )


def _ubuntu(version: str, suite: str) -> CloudImage:
    # https://cloud-images.ubuntu.com/releases/: `release` is the newest; SHA256SUMS has GNU lines with the star of binary files
    return CloudImage(
        description=f"Ubuntu {version} LTS ({suite}) cloud image",
        folder=f"https://cloud-images.ubuntu.com/releases/{suite}/release/",
        file=f"ubuntu-{version}-server-cloudimg-{{arch}}.img",
        checksums="SHA256SUMS",
        algorithm="sha256",
        user="ubuntu",
        arches=_DEBIAN_ARCHES,
    )


def _fedora(version: int, compose: str) -> CloudImage:
    # https://fedoraproject.org/cloud/download: a release is made once and stays; CHECKSUM has BSD lines inside a signed message
    return CloudImage(
        description=f"Fedora {version} cloud image",
        folder=f"https://dl.fedoraproject.org/pub/fedora/linux/releases/{version}/Cloud/{{arch}}/images/",
        file=f"Fedora-Cloud-Base-Generic-{version}-{compose}.{{arch}}.qcow2",
        checksums=f"Fedora-Cloud-{version}-{compose}-{{arch}}-CHECKSUM",
        algorithm="sha256",
        user="fedora",
        arches=_UNAME_ARCHES,
    )


def _rocky(version: int) -> CloudImage:
    # https://dl.rockylinux.org/pub/rocky/9/images/: `latest` is the newest minor release; a CHECKSUM file for each, with a BSD line
    return CloudImage(
        description=f"Rocky Linux {version} cloud image",
        folder=f"https://dl.rockylinux.org/pub/rocky/{version}/images/{{arch}}/",
        file=f"Rocky-{version}-GenericCloud-Base.latest.{{arch}}.qcow2",
        checksums="{file}.CHECKSUM",
        algorithm="sha256",
        user="rocky",
        arches=_UNAME_ARCHES,
    )


def _alpine(version: str, patch: int) -> CloudImage:
    # https://alpinelinux.org/cloud/: every patch release stays; beside each image a file with just its digest
    return CloudImage(
        description=f"Alpine Linux {version}.{patch} cloud image",
        folder=f"https://dl-cdn.alpinelinux.org/alpine/v{version}/releases/cloud/",
        file=f"nocloud_alpine-{version}.{patch}-{{arch}}-{{firmware}}-cloudinit-r0.qcow2",
        checksums="{file}.sha512",
        algorithm="sha512",
        user="alpine",
        arches=_UNAME_ARCHES,
        # Alpine publishes a file for each firmware, and aarch64 has no BIOS.
        firmware={"x86_64": "bios", "aarch64": "uefi"},
    )


CLOUD_IMAGES: Mapping[str, CloudImage] = {
    "alpine-3.22": _alpine("3.22", 4),
    "alpine-3.23": _alpine("3.23", 4),
    "debian-12": _debian(12, "bookworm"),
    "debian-13": _debian(13, "trixie"),
    "fedora-43": _fedora(43, "1.6"),
    "fedora-44": _fedora(44, "1.7"),
    "rocky-9": _rocky(9),
    "rocky-10": _rocky(10),
    "ubuntu-22.04": _ubuntu("22.04", "jammy"),
    "ubuntu-24.04": _ubuntu("24.04", "noble"),
    "ubuntu-26.04": _ubuntu("26.04", "resolute"),
}


def checksum_in(text: str, file: str, algorithm: str) -> Checksum | None:
    """Find a file's checksum in a published list, or in a file of its own.

    Lines are `DIGEST  FILE`, `DIGEST *FILE` or `SHA256 (FILE) = DIGEST`; others, such as a signature around them, are ignored.

    Raises:
        ValueError: The file is listed with two different checksums.
    """
    found = {digest.lower() for digest in _digests(text, file, algorithm) if len(digest) == _DIGITS[algorithm]}
    # Two checksums for one file: somebody has tampered with the list, or it is in the middle of an update.
    if len(found) > 1:
        raise ValueError(f"{file} is listed with {len(found)} different checksums")
    return Checksum(algorithm, found.pop()) if found else None


def _digests(text: str, file: str, algorithm: str) -> Iterator[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # A digest without a name: only in a file with nothing else is it surely that of the image beside it.
    if len(lines) == 1 and (alone := _ALONE.fullmatch(lines[0])):
        yield alone["digest"]
    for line in lines:
        match = _BSD.fullmatch(line)
        # A list may have digests of several algorithms. A BSD line names its own; in the others the length tells, see `checksum_in`.
        if match and match["algorithm"].lower() != algorithm:
            continue
        match = match or _GNU.fullmatch(line)
        # Lists made by `sha256sum ./*` have the folder before each name.
        if match and match["file"].removeprefix("./") == file:
            yield match["digest"]
