"""Folders of this computer that a guest has, too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_vmbottle import Machine, MachineError, MachineFactory, SpecError

pytestmark = [pytest.mark.guests, pytest.mark.vm("debian-12")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shared = tmp_path / "shared"
    (shared / "src").mkdir(parents=True)
    (shared / "src" / "run").write_text("#!/bin/sh\necho it runs\n")
    (shared / "src" / "run").chmod(0o755)
    return shared


def test_what_one_side_writes_the_other_reads_at_once(vm_factory: MachineFactory, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    machine = vm_factory("debian-12", shares={"/srv/shared": folder, "/mnt/other": other})
    assert machine.exec(["/srv/shared/src/run"]).stdout == "it runs\n"
    (folder / "src" / "run").write_text("#!/bin/sh\necho it was changed\n")
    assert machine.exec(["/srv/shared/src/run"]).stdout == "it was changed\n"
    machine.exec(
        "mkdir /srv/shared/out; head -c 3000000 /dev/urandom > /srv/shared/out/data; sha256sum < /srv/shared/out/data > /mnt/other/sum"
    )
    assert (folder / "out" / "data").stat().st_size == 3_000_000
    assert machine.exec("sha256sum < /srv/shared/out/data").stdout == (other / "sum").read_text()
    machine.exec("ln -s /etc/shadow /srv/shared/link")
    assert (folder / "link").readlink() == Path("/etc/shadow")


def test_a_guest_does_not_get_out_of_its_folder(vm_factory: MachineFactory, folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_text("of the host")
    (folder / "out").symlink_to(secret)
    (folder / "up").symlink_to("../secret")
    machine = vm_factory("debian-12", shares={"/srv/shared": folder})
    for name in ("out", "up", "../secret"):
        assert not machine.exec(["cat", f"/srv/shared/{name}"], check=False).ok


def test_snapshots_forks_and_boots_have_the_folder_as_it_is_now(vm_factory: MachineFactory, folder: Path) -> None:
    machine = vm_factory("debian-12", shares={"/srv/shared": folder})
    before = machine.snapshot("before")
    (folder / "new").write_text("new")
    machine.restore(before)
    assert machine.path("/srv/shared/new").read_text() == "new"
    fork = machine.fork()
    fork.path("/srv/shared/new").write_text("of the fork")
    assert machine.path("/srv/shared/new").read_text() == "of the fork"
    machine.reboot()
    assert machine.path("/srv/shared/new").read_text() == "of the fork"
    machine.power_cut()
    machine.start()
    assert machine.path("/srv/shared/new").read_text() == "of the fork"


def test_a_machine_whose_folder_is_in_use_is_not_saved_and_runs_on(vm_factory: MachineFactory, folder: Path) -> None:
    machine = vm_factory("debian-12", shares={"/srv/shared": folder})
    with machine.spawn(["sleep", "600"], cwd="/srv/shared"):
        with pytest.raises(MachineError, match=r"/srv/shared.*busy"):
            machine.snapshot("none")
        assert machine.exec(["/srv/shared/src/run"]).ok
    assert machine.snapshot("some").path.is_dir()


def test_a_folder_that_is_not_there_is_told(vm_factory: MachineFactory, folder: Path) -> None:
    with pytest.raises(SpecError, match="there is no folder"):
        vm_factory("debian-12", shares={"/srv/shared": folder / "none"})


def test_a_server_that_cannot_serve_is_quoted(
    vm_factory: MachineFactory, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (server := tmp_path / "virtiofsd").write_text("#!/bin/sh\necho out of order >&2\n")
    server.chmod(0o755)
    monkeypatch.setattr("pytest_vmbottle.backends.qemu.shares.find_server", lambda: str(server))
    with pytest.raises(MachineError, match=r"virtiofsd said: out of order"):
        vm_factory("debian-12", shares={"/srv/shared": folder})


def test_the_pack_has_nothing_of_what_is_written_and_no_server_is_left(vm: Machine, vm_factory: MachineFactory, folder: Path) -> None:
    machine = vm_factory("debian-12", shares={"/srv/shared": folder})
    machine.path("/root/mine").write_text("x" * 4096)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    servers = [pid for pid in children.read_text().split() if "virtiofsd" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert servers
    assert not vm.path("/root/mine").exists()
    assert not vm_factory("debian-12", name="other").path("/root/mine").exists()
    machine.power_cut()
    assert not [pid for pid in servers if Path(f"/proc/{pid}").exists()]
