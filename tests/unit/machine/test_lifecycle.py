"""The power switch of a machine that runs nothing: what each call says in each state."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle import Machine, MachineSpec, layer
from pytest_vmbottle.backends.port import State
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.channels.port import Command, Finished
from pytest_vmbottle.errors import CatalogError, MachineDied, MachineError, MachineTimeout, SpecError
from pytest_vmbottle.guest.path import BULK
from pytest_vmbottle.images import ImageStore
from pytest_vmbottle.machine.snapshot import Snapshot
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.testing import FakeBackend, FakeInstance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def provisioner(tmp_path: Path, backend: FakeBackend) -> Iterator[Provisioner]:
    content = bytearray(1 << 20)
    content[510:512] = b"\x55\xaa"
    (tmp_path / "disk.raw").write_bytes(content)
    catalog = Catalog(tmp_path / "catalog")
    ImageStore(catalog.images).add(tmp_path / "disk.raw", name="debian-12")
    made = Provisioner(catalog, backend, name="fake", settings=Settings())
    yield made
    made.close()


@pytest.fixture
def vm(provisioner: Provisioner) -> Iterator[Machine]:
    with provisioner.machine(MachineSpec(source="debian-12")) as machine:
        yield machine


CALLS: dict[str, Callable[[Machine], object]] = {
    "exec": lambda vm: vm.exec("true"),
    "forward": lambda vm: vm.forward(22),
    "pid": lambda vm: vm.pid,
    "spawn": lambda vm: vm.spawn("true"),
    "metrics": lambda vm: vm.metrics(),
    "copy": lambda vm: vm.guest.feed("cat", source=io.BytesIO(bytes(BULK)), size=BULK),
    "wait": lambda vm: vm.wait_until("true"),
    "link": lambda vm: vm.link(up=False),
    "ssh_config": lambda vm: vm.ssh_config(),
    "shell": lambda vm: vm.shell(),
    "reboot": lambda vm: vm.reboot(),
    "poweroff": lambda vm: vm.poweroff(),
    "power_cut": lambda vm: vm.power_cut(),
    "pause": lambda vm: vm.pause(),
    "resume": lambda vm: vm.resume(),
    "snapshot": lambda vm: vm.snapshot("late"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("end", ["poweroff", "power_cut"])
def test_a_machine_that_is_off_says_so_to_each_call(vm: Machine, end: str, call: str) -> None:
    getattr(vm, end)()
    assert vm.state == "off"
    assert "off" in repr(vm)
    with pytest.raises(MachineError, match=r"vm\.start\(\)"):
        CALLS[call](vm)


@pytest.mark.parametrize("call", ["exec", "spawn", "copy", "wait", "shell", "reboot", "poweroff", "snapshot"])
def test_a_machine_that_is_paused_says_so_to_what_its_guest_has_to_answer(vm: Machine, call: str) -> None:
    vm.pause()
    assert vm.state == "paused"
    with pytest.raises(MachineError, match=r"vm\.resume\(\)"):
        CALLS[call](vm)
    vm.resume()
    assert vm.exec(["works"]).stdout == "works"


def test_a_machine_that_ended_by_itself_is_off(vm: Machine) -> None:
    vm.lifecycle.instance.stop()
    assert vm.state == "off"
    with pytest.raises(MachineError, match=r"vm\.start\(\)"):
        vm.poweroff()
    vm.start()
    assert vm.state == "running"


def test_its_console_goes_on_with_the_next_instance_and_ends_when_it_is_off(vm: Machine) -> None:
    console = vm.console
    assert vm.wait_for_console("started")[0] == "started"
    vm.power_cut()
    assert list(console.follow()) == ["vm started", "cut"]
    vm.start()
    assert vm.wait_for_console("started", timeout=5)[0] == "started"
    assert vm.console is console
    assert not console.ended


def test_a_panic_is_told_until_the_machine_runs_again(provisioner: Provisioner) -> None:
    with provisioner.machine(MachineSpec(source="debian-12", panic="expected")) as vm:
        vm.lifecycle.instance._note("[    1.000000] BUG: bad")  # type: ignore[attr-defined]
        vm.power_cut()
        assert vm.panic == "BUG: bad"
        vm.wait_for_shutdown()
        vm.restore()
        assert vm.panic is None


def test_a_machine_that_is_on_is_not_started(vm: Machine) -> None:
    with pytest.raises(MachineError, match="running"):
        vm.start()


def test_it_starts_again_from_its_own_disk_and_from_its_pack_without_any(vm: Machine, backend: FakeBackend) -> None:
    poured = backend.launched[-1]
    assert poured.saved is not None
    vm.poweroff()
    vm.start()
    assert (backend.launched[-1].kept, backend.launched[-1].saved, backend.launched[-1].disks) == (True, None, poured.disks)
    vm.restore()
    assert (backend.launched[-1].kept, backend.launched[-1].saved) == (False, poured.saved)


def test_a_machine_that_died_can_be_ended_started_and_restored_and_nothing_else(vm: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm.lifecycle.instance, "state", lambda: State.DIED)
    with pytest.raises(MachineDied, match=r"vm\.start\(\)"):
        vm.pause()
    vm.start()
    assert vm.state == "running"


def test_what_does_not_power_off_in_time_says_how_to_end_it(vm: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm.lifecycle.instance, "shut_down", lambda deadline: deadline is None)
    with pytest.raises(MachineTimeout, match=r"vm\.power_cut\(\)"):
        vm.poweroff(timeout=3)
    assert vm.state == "running"


def test_a_reboot_without_a_new_boot_id_is_none(vm: Machine, backend: FakeBackend) -> None:
    with pytest.raises(MachineError, match="boot_id"):
        vm.reboot()
    ids = iter(["first", "second"])

    def answer(command: Command) -> Finished:
        return Finished(returncode=0, stdout=next(ids).encode() if "boot_id" in command.argv[-1] else b"")

    backend.handler = answer
    vm.restore()
    vm.reboot()
    assert next(ids, None) is None


def test_a_snapshot_stands_on_the_disks_of_its_machine_and_is_restored_again_and_again(vm: Machine, backend: FakeBackend) -> None:
    poured = backend.launched[-1]
    one = vm.snapshot("one")
    assert isinstance(one, Snapshot)
    one.verify()
    assert (one.manifest.name, one.manifest.kind, one.manifest.parent) == ("one", "stream", poured.saved and poured.saved.name)
    for _ in range(2):
        vm.restore(one)
        assert backend.launched[-1].saved == one.path
        assert [disk.path for disk in backend.launched[-1].disks] == [*(disk.path for disk in poured.disks), one.path / "disk.qcow2"]
    two = vm.snapshot("two")
    vm.restore(two)
    assert len(backend.launched[-1].disks) == len(poured.disks) + 2


def test_a_snapshot_that_cannot_be_written_leaves_nothing_and_the_machine_goes_on(
    vm: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_: FakeInstance, dest: Path, *, whole: bool, deadline: object) -> None:
        assert (bool(deadline), whole) == (True, False)
        (dest / "state.bin").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FakeInstance, "snapshot", fail)
    with pytest.raises(CatalogError, match="No space left"):
        vm.snapshot("it")
    assert list(tmp_path.glob("catalog/run/*/*/snapshots")) != []
    assert list(tmp_path.glob("catalog/run/*/*/snapshots/*")) == []
    assert vm.exec(["works"]).stdout == "works"


def test_a_machine_goes_back_to_snapshots_of_machines_that_boot_like_it(vm: Machine, provisioner: Provisioner) -> None:
    with provisioner.machine(MachineSpec(source="debian-12", cpus=2)) as other:
        snapshot = other.snapshot("two processors")
        with pytest.raises(SpecError, match="cpus"):
            vm.restore(snapshot)
    with pytest.raises(CatalogError, match="'two processors'"):
        vm.restore(snapshot)
    with pytest.raises(TypeError):
        vm.restore("two processors")  # type: ignore[arg-type]
    assert vm.state == "running"


def test_a_layer_cannot_go_back_because_its_disk_would_not_be_whole(provisioner: Provisioner) -> None:
    @layer("debian-12")
    def undecided(vm: Machine) -> None:
        vm.restore(vm.snapshot("before"))

    with pytest.raises(MachineError, match="undecided"):
        provisioner.pack(MachineSpec.resolve(undecided, {}))
