"""Search for the UEFI firmware of this host.

Packages and systems agree on neither folder nor name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pytest_vmbottle.errors import BackendUnavailable

__all__ = ["find_uefi"]

# Below a `share` folder. All of them are code and variables in one, or code that goes without: what a guest sets in them is not kept.
_FILES = {
    "aarch64": (
        "qemu-efi-aarch64/QEMU_EFI.fd",  # Debian, Ubuntu
        "AAVMF/AAVMF_CODE.fd",  # Debian, Ubuntu, Fedora
        "edk2/aarch64/QEMU_EFI.fd",  # Fedora, RHEL
        "edk2/aarch64/QEMU_CODE.fd",  # Arch Linux
        "edk2-armvirt/aarch64/QEMU_EFI.fd",  # Arch Linux, formerly
        "qemu/edk2-aarch64-code.fd",  # QEMU's own, Homebrew and MacPorts
        "qemu/aavmf-aarch64-code.bin",  # openSUSE
    ),
    "x86_64": (
        "ovmf/OVMF.fd",  # Debian, Ubuntu
        "edk2/ovmf/OVMF.amdsev.fd",  # Fedora
        "edk2-ovmf/x64/OVMF.fd",  # Arch Linux, formerly
        "edk2/x64/OVMF.4m.fd",  # Arch Linux
        "qemu/OVMF.fd",  # Debian's link
        "qemu/ovmf-x86_64.bin",  # openSUSE
    ),
}
_PACKAGES = {"aarch64": "qemu-efi-aarch64", "x86_64": "ovmf"}


def find_uefi(arch: str, binary: Path) -> Path:
    """Find the firmware file for guests of an architecture.

    Args:
        arch: The architecture, as `uname -m` names it.
        binary: The QEMU that it is for, which may come with a firmware.

    Raises:
        BackendUnavailable: There is none in the usual places, or the file that `VMBOTTLE_UEFI_<ARCH>` names does not exist.
    """
    variable = f"VMBOTTLE_UEFI_{arch.upper()}"
    named = os.environ.get(variable)
    if named:
        if not Path(named).is_file():
            raise BackendUnavailable(f"{variable}={named}: this is not a file", f"Set it to a UEFI firmware for {arch}, or unset it")
        return Path(named).absolute()
    # Beside this QEMU first: one that was built by hand comes with the firmware that fits it.
    for candidate in _candidates(arch, (binary.parent.parent / "share", Path("/usr/local/share"), Path("/usr/share"))):
        if candidate.is_file():
            return candidate
    raise BackendUnavailable(
        f"no UEFI firmware for {arch} was found, and this image needs it to boot",
        f"sudo apt-get install {_PACKAGES[arch]}, or name the file: export {variable}=/path/to/firmware.fd",
    )


def _candidates(arch: str, shares: Iterable[Path]) -> Iterator[Path]:
    # Each folder once: a QEMU in /usr/bin has /usr/share for its neighbour.
    yield from (share / name for share in dict.fromkeys(shares) for name in _FILES[arch])
