"""Emulation of aarch64, proved by guests that really run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from pytest_vmbottle.backends.qemu import proof
from pytest_vmbottle.backends.qemu.command_line import BOARDS, Emulator
from pytest_vmbottle.backends.qemu.features import probe_features
from pytest_vmbottle.backends.qemu.firmware import aarch64, assemble
from pytest_vmbottle.spec.pack_kind import PackKind

BOARD = BOARDS["aarch64"]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    found = shutil.which("qemu-system-aarch64")
    assert found, "these tests need qemu-system-aarch64: sudo apt install qemu-system-arm"
    dialect = probe_features(Path(found), workdir=tmp_path_factory.mktemp("asked"))
    return Emulator(binary=Path(found), board=BOARD, accelerator=BOARD.tcg, dialect=dialect)


@pytest.fixture(autouse=True)
def nothing_stays_behind(tmp_path: Path, machines_of: Callable[[Path], list[int]]) -> Iterator[None]:
    yield
    assert list(tmp_path.iterdir()) == []
    assert machines_of(tmp_path) == []


def damage(monkeypatch: pytest.MonkeyPatch, listing: str, instruction: str, machine_code: str) -> None:
    """Has a listing contain other machine code for one instruction."""
    code = getattr(aarch64, listing)
    assert code.count(instruction) == 1
    monkeypatch.setattr(aarch64, listing, code.replace(instruction, machine_code))


@pytest.mark.parametrize("controller", ["max", "2"])
def test_emulation_runs_the_working_guest_with_either_interrupt_controller(emulator: Emulator, controller: str, tmp_path: Path) -> None:
    """Which of them KVM has depends on the host's processor."""
    board = attrs.evolve(BOARD, machine=f"virt,gic-version={controller}")
    verdict = proof.run_guest(attrs.evolve(emulator, board=board), workdir=tmp_path, seconds=60)

    assert verdict.works, verdict.evidence
    assert verdict.evidence.startswith("ran 20,000,000 function calls in kernel and user mode, 500 page faults")
    assert verdict.seconds is not None


@pytest.mark.parametrize("cpu", ["max", "cortex-a57", "neoverse-n1"])
def test_the_working_guest_needs_nothing_of_the_newest_processors(emulator: Emulator, cpu: str, tmp_path: Path) -> None:
    verdict = proof.run_guest(attrs.evolve(emulator, accelerator=attrs.evolve(BOARD.tcg, cpu=cpu)), workdir=tmp_path, seconds=60)

    assert verdict.works, verdict.evidence


def test_emulation_alone_is_tried_for_another_architecture(emulator: Emulator, tmp_path: Path) -> None:
    (verdict,) = proof.choose(emulator.binary, emulator.dialect, emulator.board, "tcg", workdir=tmp_path)

    assert verdict.works, verdict.evidence
    assert verdict.accelerator == BOARD.tcg


def test_a_processor_that_qemu_does_not_know_is_told_in_its_words(emulator: Emulator, tmp_path: Path) -> None:
    puzzled = attrs.evolve(emulator, accelerator=attrs.evolve(BOARD.tcg, cpu="nonsense"))
    verdict = proof.run_guest(puzzled, workdir=tmp_path, seconds=60)

    assert not verdict.works
    assert "status 1" in verdict.evidence


def test_wrong_results_do_not_pass(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, "WORK", "42 7c 03 9b", "42 00 02 8b")  # x + x in the place of 3 * x
    verdict = proof.run_guest(emulator, workdir=tmp_path, seconds=60)

    assert not verdict.works
    assert "wrong results" in verdict.evidence


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        pytest.param(("00 00 00 00", "01 00 00 d4"), "paging with caches", id="a system call by the kernel"),
        pytest.param(("01 00 00 d4", "00 00 20 d4"), "a loop in kernel mode", id="a breakpoint in user mode"),
    ],
)
def test_an_exception_without_a_cause_does_not_pass(
    emulator: Emulator, change: tuple[str, str], stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(monkeypatch, "WORK", *change)
    verdict = proof.run_guest(emulator, workdir=tmp_path, seconds=60)

    assert not verdict.works
    assert stage in verdict.evidence


@pytest.mark.guests
def test_a_timer_that_never_interrupts_does_not_pass(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, "START", "20 e3 1b d5", "3f e3 1b d5")  # zero in the place of one: the timer stays off
    verdict = proof.run_guest(emulator, workdir=tmp_path, seconds=3)

    assert not verdict.works
    assert "timer interrupts" in verdict.evidence


def test_a_guest_that_ends_itself_early_does_not_pass(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `b on_end` in the place of the first breakpoint
    at, end = (assemble(aarch64.START + aarch64.WORK)[1][label] for label in ("breakpoints", "on_end"))
    damage(monkeypatch, "WORK", "00 00 20 d4", (0x14000000 | (end - at) // 4).to_bytes(4, "little").hex(" "))
    verdict = proof.run_guest(emulator, workdir=tmp_path, seconds=60)

    assert not verdict.works
    assert "wrong results" in verdict.evidence


@pytest.mark.parametrize("kind", [PackKind.TEMPLATE, PackKind.STREAM])
@pytest.mark.parametrize("controller", ["max", "2"])
def test_a_counting_guest_is_saved_and_its_clone_counts_on(emulator: Emulator, kind: PackKind, controller: str, tmp_path: Path) -> None:
    board = attrs.evolve(BOARD, machine=f"virt,gic-version={controller}")

    assert proof.prove_restore(attrs.evolve(emulator, board=board), kind, workdir=tmp_path) is None


def test_ram_that_was_changed_before_the_restore_is_noticed_by_the_guest(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_on(bench: proof._Bench, kind: PackKind, counted: int) -> None:
        with bench.ram.open("r+b") as ram:
            ram.seek(0x6FFFFF)  # in the words that it checks
            ram.write(b"\x01")
        restored(bench, kind, counted)

    restored = proof._count_on
    monkeypatch.setattr(proof, "_count_on", count_on)

    assert "continue" in (proof.prove_restore(emulator, PackKind.TEMPLATE, workdir=tmp_path) or "")


def test_a_guest_that_does_not_count_by_one_is_noticed(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, "COUNT", "94 06 00 91", "94 0a 00 91")  # it counts by two
    why = proof.prove_restore(emulator, PackKind.STREAM, workdir=tmp_path)

    assert "count" in (why or "")
