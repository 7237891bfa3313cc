"""Which processor a guest gets, and what is said where it cannot run guests of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_vmbottle.backends.qemu.command_line import BOARDS, HVF, KVM, Accelerator
from pytest_vmbottle.backends.qemu.processor import accelerator_for
from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.spec import MachineSpec

TCG = BOARDS["x86_64"].tcg


def cpu(accelerator: Accelerator, modules: Path, **keywords: Any) -> str:
    return accelerator_for(MachineSpec(source="x", arch="x86_64", **keywords), accelerator, modules=modules).cpu


def module(folder: Path, name: str, nested: str) -> Path:
    (folder / name / "parameters").mkdir(parents=True)
    (folder / name / "parameters" / "nested").write_text(f"{nested}\n")
    return folder


def test_a_machine_that_asks_for_nothing_is_run_as_the_host_runs_all(tmp_path: Path) -> None:
    for accelerator in (TCG, KVM, HVF):
        assert accelerator_for(MachineSpec(source="x"), accelerator, modules=tmp_path) == accelerator


def test_a_model_that_was_asked_for_is_taken_as_it_was_written(tmp_path: Path) -> None:
    assert cpu(TCG, tmp_path, cpu="EPYC-v1,-avx2") == "EPYC-v1,-avx2"
    assert cpu(KVM, tmp_path, cpu="host,pmu=off") == "host,pmu=off"


def test_emulation_gives_amds_virtualisation_to_any_model(tmp_path: Path) -> None:
    assert cpu(TCG, tmp_path, nested=True).endswith(",+svm,+npt")
    assert cpu(TCG, tmp_path, nested=True, cpu="Opteron_G5") == "Opteron_G5,+svm,+npt"
    assert "tb-size=512" in accelerator_for(MachineSpec(source="x", arch="x86_64", nested=True), TCG, modules=tmp_path).option


@pytest.mark.parametrize(("name", "switch", "features"), [("kvm_amd", "1", ",+svm,+npt"), ("kvm_intel", "Y", ",+vmx")])
def test_kvm_passes_on_what_the_hosts_processor_has(tmp_path: Path, name: str, switch: str, features: str) -> None:
    modules = module(tmp_path, name, switch)

    assert cpu(KVM, modules, nested=True) == KVM.cpu  # the host's own has it
    assert cpu(KVM, modules, nested=True, cpu="Skylake-Client") == f"Skylake-Client{features}"


@pytest.mark.parametrize(("name", "switch"), [("kvm_amd", "0"), ("kvm_intel", "N")])
def test_a_host_whose_kvm_does_not_nest_is_told_how_to_turn_it_on(tmp_path: Path, name: str, switch: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"{name}/parameters/nested is not 1") as caught:
        cpu(KVM, module(tmp_path, name, switch), nested=True)
    assert f"options {name} nested=1" in caught.value.remedy
    assert "--vm-accel tcg" in caught.value.remedy


def test_a_host_with_another_virtualisation_is_told_what_to_use(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="kvm_intel or kvm_amd"):
        cpu(KVM, tmp_path, nested=True)
    with pytest.raises(BackendUnavailable, match="not known to work by hvf"):
        cpu(HVF, tmp_path, nested=True)
