"""Where the UEFI firmware of a host is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmbottle.backends.qemu.uefi import _FILES, find_uefi
from pytest_vmbottle.errors import BackendUnavailable


def test_the_file_that_a_variable_names_comes_before_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.fd").touch()
    monkeypatch.setenv("VMBOTTLE_UEFI_AARCH64", str(tmp_path / "own.fd"))

    assert find_uefi("aarch64", Path("/usr/bin/qemu")) == tmp_path / "own.fd"


def test_a_variable_that_names_nothing_is_a_mistake_and_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMBOTTLE_UEFI_X86_64", str(tmp_path))

    with pytest.raises(BackendUnavailable, match="VMBOTTLE_UEFI_X86_64"):
        find_uefi("x86_64", Path("/usr/bin/qemu"))


@pytest.mark.parametrize(("arch", "name"), [(arch, name) for arch, names in _FILES.items() for name in names])
def test_a_file_that_comes_with_qemu_itself_is_found_wherever_that_is(
    arch: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(f"VMBOTTLE_UEFI_{arch.upper()}", raising=False)
    file = tmp_path / "share" / name
    file.parent.mkdir(parents=True)
    file.touch()

    assert find_uefi(arch, tmp_path / "bin" / "qemu") == file


def test_a_host_without_one_is_told_the_package_and_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMBOTTLE_UEFI_AARCH64", raising=False)
    monkeypatch.setattr(Path, "is_file", lambda _: False)

    with pytest.raises(BackendUnavailable, match="UEFI") as caught:
        find_uefi("aarch64", tmp_path / "bin" / "qemu")
    assert "qemu-efi-aarch64" in caught.value.remedy
    assert "VMBOTTLE_UEFI_AARCH64" in caught.value.remedy
