"""The official images: where they are said to be, and how their makers' lists of checksums are read."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.images import CLOUD_IMAGES, ImageStore, pull, pulled_name
from pytest_vmbottle.images.cloud import Checksum, checksum_in

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import Proxy, Web

OTHER = {"sha256": "a" * 64, "sha512": "b" * 128}
# For each distribution one whole address, and how the file beside it lists the image.
PLACES = {
    ("debian-12", "x86_64"): (
        "https://cloud.debian.org/images/cloud/bookworm/latest/debian-12-genericcloud-amd64.qcow2",
        "https://cloud.debian.org/images/cloud/bookworm/latest/SHA512SUMS",
    ),
    ("ubuntu-24.04", "aarch64"): (
        "https://cloud-images.ubuntu.com/releases/noble/release/ubuntu-24.04-server-cloudimg-arm64.img",
        "https://cloud-images.ubuntu.com/releases/noble/release/SHA256SUMS",
    ),
    ("fedora-44", "aarch64"): (
        "https://dl.fedoraproject.org/pub/fedora/linux/releases/44/Cloud/aarch64/images/Fedora-Cloud-Base-Generic-44-1.7.aarch64.qcow2",
        "https://dl.fedoraproject.org/pub/fedora/linux/releases/44/Cloud/aarch64/images/Fedora-Cloud-44-1.7-aarch64-CHECKSUM",
    ),
    ("rocky-9", "x86_64"): (
        "https://dl.rockylinux.org/pub/rocky/9/images/x86_64/Rocky-9-GenericCloud-Base.latest.x86_64.qcow2",
        "https://dl.rockylinux.org/pub/rocky/9/images/x86_64/Rocky-9-GenericCloud-Base.latest.x86_64.qcow2.CHECKSUM",
    ),
    ("alpine-3.22", "x86_64"): (
        "https://dl-cdn.alpinelinux.org/alpine/v3.22/releases/cloud/nocloud_alpine-3.22.4-x86_64-bios-cloudinit-r0.qcow2",
        "https://dl-cdn.alpinelinux.org/alpine/v3.22/releases/cloud/nocloud_alpine-3.22.4-x86_64-bios-cloudinit-r0.qcow2.sha512",
    ),
}
LAYOUTS = {
    "debian": "{other}  debian-12-generic-amd64.json\n{digest}  {file}\n{other}  {file}.json\n",
    "ubuntu": "{other} *ubuntu-server-cloudimg-amd64.squashfs\n{digest} *{file}\n{other} *{file}.manifest\n",
    "fedora": (
        "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n# {file}: 583729152 bytes\nSHA256 ({file}) = {digest}\n"
        "# Fedora-Cloud-Base-UEFI-UKI.qcow2: 1 bytes\nSHA256 (Fedora-Cloud-Base-UEFI-UKI.qcow2) = {other}\n"
        "-----BEGIN PGP SIGNATURE-----\n\niQIzBAEBCAAdFiEE\n=aaaa\n-----END PGP SIGNATURE-----\n"
    ),
    "rocky": "# {file}: 645988352 bytes\nSHA256 ({file}) = {digest}\n",
    "alpine": "{digest}\n",
}


def published(recipe: str, file: str, digest: str) -> str:
    """A list of checksums as the distribution writes it."""
    return LAYOUTS[recipe.partition("-")[0]].format(file=file, digest=digest, other=OTHER[CLOUD_IMAGES[recipe].algorithm])


@pytest.mark.parametrize(("recipe", "arch"), PLACES)
def test_an_image_and_its_checksum_are_where_the_distribution_publishes_them(recipe: str, arch: str) -> None:
    image = CLOUD_IMAGES[recipe]
    assert (image.url(arch), image.checksums_url(arch)) == PLACES[recipe, arch]


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
@pytest.mark.parametrize("recipe", CLOUD_IMAGES)
def test_every_official_image_is_pulled_checked_and_known_for_what_it_is(
    proxy: Proxy, web: Web, tmp_path: Path, recipe: str, arch: str
) -> None:
    image, disk = CLOUD_IMAGES[recipe], bytearray(1 << 20)
    disk[510:512] = b"\x55\xaa"
    disk[:20] = recipe.encode().ljust(20)
    folder, _, file = image.url(arch).partition("//")[2].partition("/")[2].rpartition("/")
    web.files[f"/{folder}/{file}"] = bytes(disk)
    digest = hashlib.new(image.algorithm, disk).hexdigest()
    web.files[f"/{image.checksums_url(arch).partition('//')[2].partition('/')[2]}"] = published(recipe, file, digest).encode()

    pulled = pull(ImageStore(tmp_path), recipe, arch=arch)

    assert pulled == ImageStore(tmp_path).get(recipe if arch == host_arch() else f"{recipe}-{arch}")
    assert pulled.disk.read_bytes() == disk
    assert (pulled.arch, pulled.firmware) == (arch, "bios" if arch == "x86_64" else "uefi")
    assert (pulled.user, pulled.readiness, pulled.prepared) == (recipe.partition("-")[0], "cloud-init", False)
    assert set(proxy.hosts) == {image.url(arch).split("/")[2]}


@pytest.mark.parametrize("recipe", CLOUD_IMAGES)
def test_the_two_architectures_of_an_image_are_two_files_over_https(recipe: str) -> None:
    image = CLOUD_IMAGES[recipe]
    urls = {image.url(arch) for arch in ("x86_64", "aarch64")} | {image.checksums_url(arch) for arch in ("x86_64", "aarch64")}
    assert len({url for url in urls if url.endswith((".qcow2", ".img"))}) == 2
    for url in urls:
        assert re.fullmatch(r"https://[a-z.-]+/[A-Za-z0-9._/-]+", url), url


def test_an_image_for_another_architecture_is_called_after_it() -> None:
    foreign = {"x86_64": "aarch64"}.get(host_arch(), "x86_64")
    assert pulled_name("debian-12") == pulled_name("debian-12", host_arch()) == "debian-12"
    assert pulled_name("debian-12", foreign) == f"debian-12-{foreign}"


@pytest.mark.parametrize("recipe", CLOUD_IMAGES)
@given(digest=st.integers(0, 2**256 - 1))
def test_the_checksum_of_just_this_file_is_found_in_each_layout(recipe: str, digest: int) -> None:
    algorithm = CLOUD_IMAGES[recipe].algorithm
    text = f"{digest:064x}" if algorithm == "sha256" else f"{digest:0128x}"
    assert checksum_in(published(recipe, "x.qcow2", text.upper()), "x.qcow2", algorithm) == Checksum(algorithm, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>not here</html>",
        f"{OTHER['sha512']}  x.qcow2\n",  # another algorithm's
        f"SHA512 (x.qcow2) = {OTHER['sha256']}\n",
        f"{OTHER['sha256']}  x.qcow2.json\n",
        f"{OTHER['sha256']}  other/x.qcow2\n",
        f"{OTHER['sha256']}\n{OTHER['sha256']}\n",  # alone it would be the file's
        f"{OTHER['sha256'][:-1]}  x.qcow2\n",
        f"# {OTHER['sha256']}  x.qcow2\n",
    ],
)
def test_a_list_without_the_file_has_no_checksum_of_it(text: str) -> None:
    assert checksum_in(text, "x.qcow2", "sha256") is None


def test_a_file_that_is_listed_with_two_checksums_has_none() -> None:
    text = f"{'a' * 64}  x.qcow2\n{'c' * 64}  x.qcow2\n"
    with pytest.raises(ValueError, match=r"x\.qcow2"):
        checksum_in(text, "x.qcow2", "sha256")
    assert checksum_in(f"{'a' * 64}  x.qcow2\n{'A' * 64} *./x.qcow2\n", "x.qcow2", "sha256") == Checksum("sha256", "a" * 64)


@given(st.text(), st.sampled_from(["sha256", "sha512"]))
def test_no_text_upsets_the_reading_of_checksums(text: str, algorithm: str) -> None:
    found = checksum_in(text, "x.qcow2", algorithm)
    assert found is None or found.digest in text.lower()


@pytest.mark.parametrize(("algorithm", "digest"), [("sha256", "a" * 63), ("sha512", "a" * 64), ("sha256", "g" * 64), ("md5", "a" * 32)])
def test_what_is_no_checksum_cannot_be_made_one(algorithm: str, digest: str) -> None:
    with pytest.raises(ValueError, match=algorithm):
        Checksum(algorithm, digest)
