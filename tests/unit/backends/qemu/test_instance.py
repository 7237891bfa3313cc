"""Where the RAM of a machine comes from, and how its console tells that it is in trouble."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmbottle import MachineError, MachineSpec
from pytest_vmbottle.backends.kernel_watch import KernelWatch
from pytest_vmbottle.backends.port import Start
from pytest_vmbottle.backends.qemu.ram import Ram
from pytest_vmbottle.channels.port import Keys
from pytest_vmbottle.host import resources as host


def ram(rundir: Path, memory: str) -> Ram:
    keys = Keys(user_private="", user_public="", host_private="", host_public="")
    start = Start(disks=(), disk_size=1, kernel=None, initrd=None, cmdline="", seed=rundir / "seed", keys=keys)
    return Ram(MachineSpec.resolve("x", {"memory": memory}), start, rundir, None)


def test_ram_is_memory_without_a_name(tmp_path: Path) -> None:
    held = ram(tmp_path, "64M")
    try:
        assert held.path.stat().st_size == 64 << 20
        assert list(tmp_path.iterdir()) == []
    finally:
        held.close()


def test_where_memory_is_short_it_is_a_file_with_room_for_every_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_memory", lambda: 32 << 20)
    held = ram(tmp_path, "64M")
    held.close()
    (file,) = tmp_path.iterdir()

    assert file.stat().st_size == 64 << 20
    assert file.stat().st_blocks * 512 >= 64 << 20
    assert file.stat().st_mode & 0o777 == 0o600


def test_where_the_disk_is_short_too_nothing_is_started_and_what_to_do_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_memory", lambda: 32 << 20)
    with pytest.raises(MachineError, match="1024 TiB"):
        ram(tmp_path, "1024T")

    assert list(tmp_path.iterdir()) == []


def test_the_kernels_first_trouble_is_told_and_its_end_is_noticed_line_by_line(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    watch = KernelWatch(console)
    assert watch.look().trouble is None
    with console.open("ab", buffering=0) as guest:
        guest.write(b"[   1.0] BUG: unable to ")
        watch.look()
        guest.write(b"handle page fault\n")
        assert (watch.look().trouble, watch.is_over) == ("BUG: unable to handle page fault", False)
        guest.write(b"words\n[   2.0] Kernel panic - not syncing: Fatal exception\n")
        assert (watch.look().trouble, watch.is_over) == ("BUG: unable to handle page fault", True)


def test_a_hung_task_is_no_trouble_where_the_guests_time_runs_ahead_of_its_disk(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    watch, ahead = KernelWatch(console), KernelWatch(console, hung_tasks=False)
    console.write_bytes(b"[ 243.0] INFO: task touch:812 blocked for more than 120 seconds.\n")
    assert (ahead.look().trouble, watch.look().trouble is not None) == (None, True)
    with console.open("ab") as guest:
        guest.write(b"[ 244.0] BUG: another\n")
    assert ahead.look().trouble == "BUG: another"


def test_after_a_reset_only_what_is_said_then_counts(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    watch = KernelWatch(console)
    console.write_bytes(b"[   2.0] Kernel panic - not syncing: x\nYou are in emergency mode.\n")
    assert watch.look().is_over
    watch.forget()
    assert (watch.look().trouble, watch.is_over, watch.stuck) == (None, False, None)
    with console.open("ab") as guest:
        guest.write(b"(initramfs)")
    assert "initial RAM disk" in (watch.look().stuck or "")


def test_what_an_earlier_machine_said_on_the_same_console_does_not_count(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    console.write_bytes(b"[   2.0] Kernel panic - not syncing: x\nYou are in emergency mode.\n")
    watch = KernelWatch(console)
    assert (watch.look().trouble, watch.is_over, watch.stuck) == (None, False, None)
    with console.open("ab") as guest:
        guest.write(b"[   3.0] BUG: new\n")
    assert watch.look().trouble == "BUG: new"
