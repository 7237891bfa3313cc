"""The guests that prove an accelerator, as bytes; and what is said of a host that has none."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from pathlib import Path

import pytest

from pytest_vmbottle.backends.qemu import proof
from pytest_vmbottle.backends.qemu.command_line import BOARDS, Emulator
from pytest_vmbottle.backends.qemu.features import Features
from pytest_vmbottle.backends.qemu.firmware import assemble, x86_64
from pytest_vmbottle.errors import BackendUnavailable, SpecError
from pytest_vmbottle.spec.pack_kind import PackKind

PLAIN = Features(sandbox=True, exit_with_parent=False, readonly_ram=False, state_files=False, mapped_ram=False, vmgenid=True)


BOARD = BOARDS["x86_64"]


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path


@pytest.mark.parametrize("listing", [x86_64._START, x86_64.WORK, x86_64.COUNT], ids=["start", "work", "count"])
def test_the_machine_code_of_a_listing_is_what_the_gnu_assembler_makes_of_its_instructions(listing: str, tmp_path: Path) -> None:
    instructions = [re.sub(r"^[0-9a-f]{3}  [0-9a-f ]+?  +", " ", line) for line in listing.strip().splitlines()]
    (tmp_path / "source.s").write_text("\n".join(instructions) + "\n")
    subprocess.run(["as", "--64", tmp_path / "source.s", "-o", tmp_path / "object"], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "object", tmp_path / "code"], check=True)

    assert assemble(listing)[0] == (tmp_path / "code").read_bytes()


def test_a_listing_whose_offsets_do_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match="0x1"):
        assemble("000  90    nop\n002  90    nop")


@pytest.mark.parametrize("listing", [x86_64.WORK, x86_64.COUNT], ids=["work", "count"])
def test_a_firmware_image_is_64_kib_and_begins_at_its_reset_vector(listing: str) -> None:
    image = x86_64.firmware(listing)

    assert len(image) == 64 << 10
    assert image[0xFFF0:0xFFF5] == b"\xea\x00\x00\x00\xf0"  # a far jump to f000:0000


def test_the_code_of_a_program_ends_before_its_tables() -> None:
    for listing in (x86_64.WORK, x86_64.COUNT):
        assert x86_64._BODY + len(assemble(listing)[0]) < 0x1000
    assert len(assemble(x86_64._START)[0]) <= x86_64._BODY


def test_every_interrupt_of_the_working_guest_has_its_handler_and_all_others_are_a_surprise() -> None:
    labels = assemble(x86_64.WORK)[1]
    table = x86_64._interrupt_table(labels)
    handlers = [int.from_bytes(table[16 * vector :][:2], "little") - x86_64._BODY for vector in range(256)]

    for vector, handler in enumerate(handlers):
        assert handler == labels[x86_64._VECTORS.get(vector, "on_surprise")]


def test_the_counts_of_a_guest_go_on_from_any_number_and_wrap_after_127() -> None:
    assert proof.counts(1, 300) == proof.counts(1, 126) + proof.counts(126, 300)
    assert proof.counts(126, 130) == b"\xfe\xff\x80\x81"


def test_how_far_a_guest_came_is_read_off_its_report() -> None:
    assert "first instruction" in proof._progress(x86_64.guests().stages, b"")
    assert re.search("timer interrupts.*CPUID", proof._progress(x86_64.guests().stages, b"RLXT"))


def test_an_accelerator_that_does_not_exist_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="'xen'"):
        proof.choose(Path("/usr/bin/true"), PLAIN, BOARD, "xen", workdir=tmp_path)


def test_a_missing_kvm_device_is_told_with_the_command_that_brings_it(tmp_path: Path) -> None:
    assert "`sudo modprobe" in (proof.kvm_refusal(tmp_path / "kvm") or "")


def test_a_kvm_device_that_may_not_be_opened_is_told_with_group_and_udev_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:  # root may open everything, so the system call has to say so
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    refusal = proof.kvm_refusal(Path("/dev/kvm")) or ""

    assert "`sudo usermod -aG kvm $USER`" in refusal
    assert "/etc/udev/rules.d/" in refusal


def test_a_device_that_opens_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()

    assert proof.kvm_refusal(tmp_path / "kvm") is None


def test_the_first_line_of_qemus_version_is_its_version(tmp_path: Path) -> None:
    qemu = program(tmp_path / "qemu", "echo QEMU emulator version 99.1\necho Copyright")

    assert proof.version(qemu) == "QEMU emulator version 99.1"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("echo hello", "'hello'"),
        ("echo 'libfoo.so: cannot open' >&2; exit 127", "'libfoo.so: cannot open'"),
        ("kill -9 $$", "signal 9"),
    ],
)
def test_a_program_that_is_not_qemu_or_dies_is_told_with_what_it_printed(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=re.escape(told)) as caught:
        proof.version(program(tmp_path / "qemu", text))
    assert "apt" in caught.value.remedy


def test_a_program_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_ANSWER_SECONDS", 0.2)

    with pytest.raises(BackendUnavailable, match=r"0\.2 s"):
        proof.version(program(tmp_path / "qemu", "exec sleep 60"))


@pytest.mark.parametrize("wanted", ["auto", "kvm", "tcg"])
def test_choosing_an_accelerator_of_a_program_that_is_not_qemu_is_refused(wanted: str, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="'hello'"):
        proof.choose(program(tmp_path / "qemu", "echo hello"), PLAIN, BOARD, wanted, workdir=tmp_path)


def test_an_accelerator_that_qemu_was_built_without_is_told(tmp_path: Path) -> None:
    qemu = program(tmp_path / "qemu", "printf 'Accelerators supported in QEMU binary:\\nqtest\\n'")
    verdicts = proof.choose(qemu, PLAIN, BOARD, "auto", workdir=tmp_path)

    assert [verdict.accelerator.name for verdict in verdicts][-1] == "tcg"
    assert len(verdicts) == 2
    for verdict in verdicts:
        assert not verdict.works
        assert "qtest" in verdict.evidence


def test_a_missing_qemu_is_told(tmp_path: Path) -> None:
    missing = tmp_path / "qemu"
    board = BOARDS["x86_64"]
    emulator = Emulator(binary=missing, board=board, accelerator=board.tcg, dialect=PLAIN)

    for call in (
        lambda: proof.version(missing),
        lambda: proof.run_guest(emulator, workdir=tmp_path, seconds=1),
        lambda: proof.prove_restore(emulator, PackKind.TEMPLATE, workdir=tmp_path),
    ):
        with pytest.raises(BackendUnavailable, match=str(missing)):
            call()
    assert list(tmp_path.iterdir()) == []
