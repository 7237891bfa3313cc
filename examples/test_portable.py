"""Ten tests that pass on every backend: with QEMU, and with `--vm-backend=smolvm`. They use a shell and what any Linux has."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmbottle import CommandFailed, CommandTimeout, Machine, layer


@layer("debian-12", files={"/opt/app/greet": '#!/bin/sh\necho "Hello, ${1:-nobody}!"\n'}, run=["chmod 755 /opt/app/greet"])
def app(vm: Machine) -> None:
    vm.path("/etc/app.conf").write_text("colour = green\n")


pytestmark = pytest.mark.vm(app)


def test_kernel_is_the_machines_own(vm: Machine) -> None:
    assert vm.path("/proc/version").read_text().startswith("Linux version")
    assert vm.path("/proc/sys/kernel/random/boot_id").read_text() != Path("/proc/sys/kernel/random/boot_id").read_text()


def test_program_greets(vm: Machine) -> None:
    assert vm.exec(["/opt/app/greet", "World"]).stdout == "Hello, World!\n"


def test_prepared_settings_are_there(vm: Machine) -> None:
    assert vm.path("/etc/app.conf").read_text() == "colour = green\n"
    assert {path.name for path in vm.path("/opt").iterdir()} == {"app"}


def test_failure_shows_what_was_said(vm: Machine) -> None:
    with pytest.raises(CommandFailed, match="no such colour"):
        vm.exec("echo no such colour >&2; exit 3")


def test_command_that_hangs_is_ended(vm: Machine) -> None:
    with pytest.raises(CommandTimeout):
        vm.exec(["sleep", "1000"], timeout=1)


def test_ordinary_user_may_not_write_settings(vm: Machine) -> None:
    refused = vm.exec("echo red > /etc/app.conf", user="nobody", check=False)
    assert refused.returncode != 0
    assert vm.path("/etc/app.conf").read_text() == "colour = green\n"


def test_whole_folder_can_go(vm: Machine) -> None:
    vm.path("/opt/app").rmtree()
    assert not vm.path("/opt/app/greet").exists()


def test_and_is_back_in_the_next_test(vm: Machine) -> None:
    assert vm.path("/opt/app/greet").exists()


def test_tree_is_copied_there_and_back(vm: Machine, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "numbers").write_bytes(bytes(range(256)) * 100)
    vm.cp(tmp_path / "data", vm.path("/srv/data"))
    vm.cp(vm.path("/srv/data/numbers"), tmp_path / "numbers")
    assert (tmp_path / "numbers").read_bytes() == bytes(range(256)) * 100


def test_background_command_is_spoken_with(vm: Machine) -> None:
    with vm.spawn('while read -r name; do /opt/app/greet "$name"; done') as process:
        process.stdin.write("Ada\n")
        assert next(iter(process.stdout)) == "Hello, Ada!\n"
