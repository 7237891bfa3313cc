"""QEMU's accelerators on this host, proved by guests that really run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from pytest_vmbottle.backends.qemu import proof
from pytest_vmbottle.backends.qemu.command_line import BOARDS, KVM, Emulator
from pytest_vmbottle.backends.qemu.features import probe_features
from pytest_vmbottle.backends.qemu.firmware import x86_64
from pytest_vmbottle.spec.pack_kind import PackKind

TCG = BOARDS["x86_64"].tcg
TEMPLATE = PackKind.TEMPLATE


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    found = shutil.which("qemu-system-x86_64")
    assert found, "these tests need qemu-system-x86_64: sudo apt install qemu-system-x86"
    dialect = probe_features(Path(found), workdir=tmp_path_factory.mktemp("asked"))
    return Emulator(binary=Path(found), board=BOARDS["x86_64"], accelerator=TCG, dialect=dialect)


def choose(emulator: Emulator, wanted: str, workdir: Path) -> tuple[proof.ProbeResult, ...]:
    return proof.choose(emulator.binary, emulator.dialect, emulator.board, wanted, workdir=workdir)


@pytest.fixture(autouse=True)
def nothing_stays_behind(tmp_path: Path, machines_of: Callable[[Path], list[int]]) -> Iterator[None]:
    yield
    assert list(tmp_path.iterdir()) == []
    assert machines_of(tmp_path) == []


def puzzled(emulator: Emulator) -> Emulator:
    return attrs.evolve(emulator, accelerator=attrs.evolve(TCG, cpu="nonsense"))


def damaged(listing: str, instruction: str, machine_code: str) -> str:
    """The listing with other machine code for one instruction, which must be as long."""
    assert listing.count(instruction) == 1
    assert len(instruction) == len(machine_code)
    return listing.replace(instruction, machine_code)


def test_emulation_runs_the_working_guest_and_says_what_it_did(emulator: Emulator, tmp_path: Path) -> None:
    verdict = proof.run_guest(emulator, workdir=tmp_path, seconds=60)

    assert verdict.works, verdict.evidence
    assert verdict.evidence.startswith("ran 20,000,000 function calls in kernel and user mode, 500 page faults")
    assert verdict.seconds is not None


def test_a_scratch_folder_may_have_commas_and_spaces_in_its_name(emulator: Emulator, tmp_path: Path) -> None:
    odd = tmp_path / "a,b c"
    odd.mkdir()

    assert proof.prove_restore(emulator, TEMPLATE, workdir=odd) is None
    odd.rmdir()  # fails if anything is left in it


def test_the_chosen_accelerator_works_and_hardware_is_chosen_only_if_it_is_faster(emulator: Emulator, tmp_path: Path) -> None:
    *hardware, emulated = choose(emulator, "auto", tmp_path)

    assert emulated.accelerator == TCG
    assert emulated.works, emulated.evidence
    assert hardware
    for verdict in hardware:
        assert verdict.evidence
        if verdict.works:
            assert verdict.seconds is not None
            assert emulated.seconds is not None
            assert verdict.seconds <= proof._SLACK * emulated.seconds + 2 * proof._TICK


def test_emulation_alone_is_tried_when_it_is_wanted(emulator: Emulator, tmp_path: Path) -> None:
    (verdict,) = choose(emulator, "tcg", tmp_path)

    assert verdict.works
    assert verdict.accelerator == TCG


def test_wanting_kvm_tries_nothing_but_kvm(emulator: Emulator, tmp_path: Path) -> None:
    verdicts = choose(emulator, "kvm", tmp_path)

    assert {verdict.accelerator.name for verdict in verdicts} == {KVM.name}


def test_a_guest_that_has_not_finished_in_time_is_stopped_and_its_progress_told(emulator: Emulator, tmp_path: Path) -> None:
    verdict = proof.run_guest(emulator, workdir=tmp_path, seconds=0)

    assert not verdict.works
    assert "finished" in verdict.evidence


def test_a_processor_that_qemu_does_not_know_is_told_in_its_words(emulator: Emulator, tmp_path: Path) -> None:
    verdict = proof.run_guest(puzzled(emulator), workdir=tmp_path, seconds=60)

    assert not verdict.works
    assert "status 1" in verdict.evidence
    assert "unable to find CPU model 'nonsense'" in verdict.evidence


def test_wrong_results_do_not_pass(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # x + x in the place of 3 * x
    monkeypatch.setattr(x86_64, "WORK", damaged(x86_64.WORK, "48 0f af c3", "48 01 c0 90"))
    verdict = proof.run_guest(emulator, workdir=tmp_path, seconds=60)

    assert not verdict.works
    assert "results" in verdict.evidence


def test_an_interrupt_without_a_cause_does_not_pass(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86_64, "WORK", damaged(x86_64.WORK, "0f 0b   ", "cd 99   "))
    verdict = proof.run_guest(emulator, workdir=tmp_path, seconds=60)

    assert not verdict.works
    assert "long mode" in verdict.evidence


def test_a_guest_that_resets_itself_does_not_pass(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No interrupt table, so that the first exception is a triple fault.
    monkeypatch.setattr(x86_64, "_interrupt_table", lambda _: b"")
    verdict = proof.run_guest(emulator, workdir=tmp_path, seconds=60)

    assert not verdict.works
    assert "status 0" in verdict.evidence


@pytest.mark.parametrize("kind", [PackKind.TEMPLATE, PackKind.STREAM])
def test_a_counting_guest_is_saved_and_its_clone_counts_on(emulator: Emulator, kind: PackKind, tmp_path: Path) -> None:
    assert proof.prove_restore(emulator, kind, workdir=tmp_path) is None


def test_ram_that_was_changed_before_the_restore_is_noticed_by_the_guest(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_on(bench: proof._Bench, kind: PackKind, counted: int) -> None:
        with bench.ram.open("r+b") as ram:
            ram.seek(0x6FFFFF)
            ram.write(b"\x01")
        restored(bench, kind, counted)

    restored = proof._count_on
    monkeypatch.setattr(proof, "_count_on", count_on)

    assert "continue" in (proof.prove_restore(emulator, TEMPLATE, workdir=tmp_path) or "")


def test_a_clone_that_writes_to_the_shared_file_is_noticed(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = proof._Bench._argv
    monkeypatch.setattr(proof._Bench, "_argv", lambda bench, report, ram, *, share: argv(bench, report, ram, share=share or True))

    assert "RAM file" in (proof.prove_restore(emulator, TEMPLATE, workdir=tmp_path) or "")


def test_a_clone_that_does_not_go_on_where_it_was_is_noticed(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restored = proof._count_on
    monkeypatch.setattr(proof, "_count_on", lambda bench, kind, counted: restored(bench, kind, counted + 1))

    assert "count" in (proof.prove_restore(emulator, TEMPLATE, workdir=tmp_path) or "")


def test_a_qemu_that_refuses_to_start_is_why_templates_do_not_work(emulator: Emulator, tmp_path: Path) -> None:
    why = proof.prove_restore(puzzled(emulator), TEMPLATE, workdir=tmp_path)

    assert "unable to find CPU model 'nonsense'" in (why or "")
