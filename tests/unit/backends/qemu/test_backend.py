"""Which QEMU is taken for which machine, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmbottle.backends.qemu import QemuBackend, backend
from pytest_vmbottle.backends.qemu.backend import Proof
from pytest_vmbottle.backends.qemu.command_line import BOARDS
from pytest_vmbottle.backends.qemu.features import Features
from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.spec.pack_kind import PackKind

OTHER = next(arch for arch in BOARDS if arch != host_arch())
PLAIN = Features(sandbox=True, exit_with_parent=False, readonly_ram=False, state_files=False, mapped_ram=False, vmgenid=True)


def test_another_architecture_is_never_run_by_the_hosts_own_accelerator(tmp_path: Path) -> None:
    assert QemuBackend(proofs=tmp_path).emulator(OTHER).accelerator == BOARDS[OTHER].tcg
    with pytest.raises(BackendUnavailable, match="kvm"):
        QemuBackend(accelerator="kvm", proofs=tmp_path).emulator(OTHER)


def test_a_missing_qemu_for_another_architecture_is_told_with_its_own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(BackendUnavailable, match=f"qemu-system-{OTHER}") as caught:
        QemuBackend(proofs=tmp_path).emulator(OTHER)
    assert BOARDS[OTHER].package in caught.value.remedy


def test_a_host_of_an_unknown_architecture_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "host_arch", lambda: "riscv64")

    with pytest.raises(BackendUnavailable, match="riscv64"):
        QemuBackend(proofs=tmp_path).probe()


@pytest.mark.parametrize(
    ("broken", "best"),
    [
        ({}, PackKind.TEMPLATE),
        ({PackKind.TEMPLATE: "no"}, PackKind.STREAM),
        ({PackKind.TEMPLATE: "no", PackKind.STREAM: "no"}, PackKind.DISK),
    ],
)
def test_the_best_kind_of_pack_is_the_quickest_that_was_not_seen_to_fail(broken: dict[PackKind, str], best: PackKind) -> None:
    assert Proof(version="", dialect=PLAIN, accelerator=BOARDS["x86_64"].tcg, verdicts=(), broken=broken).best is best
