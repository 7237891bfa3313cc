"""Which processor a guest gets, and what is said where it cannot run guests of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_vmbottle.backends.qemu.command_line import BOARDS, HVF, KVM, Accelerator
from pytest_vmbottle.backends.qemu.processor import accelerator_for, host_processor
from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.spec import MachineSpec

TCG = BOARDS["x86_64"].tcg
VERSION = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"


def chosen(accelerator: Accelerator, modules: Path, *, version: str = VERSION, **keywords: Any) -> Accelerator:
    return accelerator_for(MachineSpec(source="x", arch="x86_64", **keywords), accelerator, emulation=TCG, version=version, modules=modules)


def cpu(accelerator: Accelerator, modules: Path, **keywords: Any) -> str:
    return chosen(accelerator, modules, **keywords).cpu


def module(folder: Path, name: str, nested: str) -> Path:
    (folder / name / "parameters").mkdir(parents=True)
    (folder / name / "parameters" / "nested").write_text(f"{nested}\n")
    return folder


def test_a_machine_that_asks_for_nothing_is_run_as_the_host_runs_all(tmp_path: Path) -> None:
    for accelerator in (TCG, KVM, HVF):
        assert chosen(accelerator, tmp_path) == accelerator


@pytest.mark.parametrize("version", [VERSION, "QEMU emulator version 8.0.5", "QEMU emulator version of somebody's own"])
def test_several_emulated_processors_take_turns_where_qemu_misses_code_that_one_of_them_writes(version: str, tmp_path: Path) -> None:
    assert "thread=single" in chosen(TCG, tmp_path, version=version, cpus=2).option
    assert "thread=multi" in chosen(TCG, tmp_path, version=version, cpus=2, nested=True).option  # it would be too slow for its guests
    assert "thread=multi" in chosen(TCG, tmp_path, version=version).option
    assert chosen(KVM, tmp_path, version=version, cpus=2) == KVM


@pytest.mark.parametrize("version", ["QEMU emulator version 8.1.0", "QEMU emulator version 10.0.8 (Debian 1:10.0.8+ds-0+deb13u1)"])
def test_several_emulated_processors_run_at_once_where_qemu_misses_nothing(version: str, tmp_path: Path) -> None:
    assert chosen(TCG, tmp_path, version=version, cpus=2) == TCG


def test_instructions_are_counted_by_emulation_whatever_the_host_could_do(tmp_path: Path) -> None:
    for accelerator in (TCG, KVM):
        counting = chosen(accelerator, tmp_path, cpu_clock="instructions")
        assert counting.name == "tcg"
        assert counting.counting == "shift=1,sleep=off"
        assert "thread=single" in counting.option  # the only way in which QEMU counts


def test_a_model_that_was_asked_for_is_taken_as_it_was_written(tmp_path: Path) -> None:
    assert cpu(TCG, tmp_path, cpu="EPYC-v1,-avx2") == "EPYC-v1,-avx2"
    assert cpu(KVM, tmp_path, cpu="host,pmu=off") == "host,pmu=off"


def test_a_level_is_a_plain_model_with_all_that_it_has_and_what_lacks_any_of_it_is_refused(tmp_path: Path) -> None:
    levels = [cpu(KVM, tmp_path, cpu=f"x86-64-v{number}").split(",") for number in (2, 3, 4)]
    for each in levels:
        assert (each[0], each[-1]) == ("qemu64", "enforce=on")
    assert set(levels[0]) < set(levels[1]) < set(levels[2])
    assert cpu(TCG, tmp_path, cpu="x86-64-v2,+aes") == ",".join((*levels[0][:-1], "+aes", "enforce=on"))
    assert cpu(TCG, tmp_path, cpu="x86-64-v2", nested=True).endswith(",+svm,+npt")


def test_a_level_depends_on_the_maker_of_the_hosts_processor_and_anything_else_on_all_that_it_has(tmp_path: Path) -> None:
    here = "vendor_id\t: AuthenticAMD\nmodel name\t: EPYC\nflags\t\t: avx avx2\n"

    def key(text: str, accelerator: Accelerator = KVM, **keywords: Any) -> str:
        (tmp_path / "cpuinfo").write_text(text)
        return host_processor(MachineSpec(source="x", arch="x86_64", **keywords), accelerator, cpuinfo=tmp_path / "cpuinfo")

    other = here.replace("EPYC", "Opteron").replace(" avx2", "")
    for level in ("x86-64-v2", "x86-64-v3,+aes"):
        assert key(here, cpu=level) == key(other, cpu=level) != key(here.replace("AMD", "Hygon"), cpu=level)
        assert key(here, cpu=level, nested=True) != key(other, cpu=level, nested=True)
    for model in (None, "EPYC-v1"):
        assert key(here, cpu=model) != key(other, cpu=model)
        assert key(here, TCG, cpu=model) == key(other, TCG, cpu=model) == ""


def test_emulation_gives_amds_virtualisation_to_any_model(tmp_path: Path) -> None:
    assert cpu(TCG, tmp_path, nested=True).endswith(",+svm,+npt")
    assert cpu(TCG, tmp_path, nested=True, cpu="Opteron_G5") == "Opteron_G5,+svm,+npt"
    assert "tb-size=512" in chosen(TCG, tmp_path, nested=True).option


@pytest.mark.parametrize(("name", "switch", "features"), [("kvm_amd", "1", ",+svm,+npt"), ("kvm_intel", "Y", ",+vmx")])
def test_kvm_passes_on_what_the_hosts_processor_has(tmp_path: Path, name: str, switch: str, features: str) -> None:
    modules = module(tmp_path, name, switch)

    assert cpu(KVM, modules, nested=True) == KVM.cpu  # the host's own has it
    assert cpu(KVM, modules, nested=True, cpu="Skylake-Client") == f"Skylake-Client{features}"


@pytest.mark.parametrize(("name", "switch"), [("kvm_amd", "0"), ("kvm_intel", "N")])
def test_a_host_whose_kvm_does_not_nest_is_told_how_to_turn_it_on(tmp_path: Path, name: str, switch: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"{name}/parameters/nested") as caught:
        cpu(KVM, module(tmp_path, name, switch), nested=True)
    assert f"options {name} nested=1" in caught.value.remedy
    assert "--vm-accel tcg" in caught.value.remedy


def test_a_host_with_another_virtualisation_is_told_what_to_use(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="kvm_intel"):
        cpu(KVM, tmp_path, nested=True)
    with pytest.raises(BackendUnavailable, match="hvf"):
        cpu(HVF, tmp_path, nested=True)
