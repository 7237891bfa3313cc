"""From a spec to a machine, with a backend that runs nothing: packs, layers, damage, failure."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest

from pytest_vmbottle import (
    BackendUnavailable,
    CatalogError,
    GuestPanic,
    LaunchError,
    Layer,
    Machine,
    MachineDied,
    MachineError,
    MachineSpec,
    MachineTimeout,
    SpecError,
    Unsupported,
    layer,
)
from pytest_vmbottle.backends.port import CannotSave, DataDisk, Instance, Start, State
from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.channels.port import Command, Finished
from pytest_vmbottle.host import resources as host
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.locks import is_locked
from pytest_vmbottle.host.supervisor import Record
from pytest_vmbottle.images import Image, ImageStore, Traits
from pytest_vmbottle.machine.lan import Lans
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.provision.pack_plan import build_spec
from pytest_vmbottle.spec.pack_kind import PackKind
from pytest_vmbottle.testing import FakeBackend, FakeInstance
from tests.conftest import open_files

IMAGE = "debian-12"
Make = Callable[..., Provisioner]


def disk(path: Path, *, mark: int = 0) -> Path:
    """The smallest file that passes for a disk."""
    content = bytearray(1 << 20)
    content[0] = mark
    content[510:512] = b"\x55\xaa"
    path.write_bytes(content)
    return path


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = Catalog(tmp_path / "catalog")
    ImageStore(catalog.images).add(disk(tmp_path / "disk.raw"), name=IMAGE, traits=Traits(prepared=True))
    return catalog


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def said() -> list[str]:
    """Warnings that were given."""
    return []


@pytest.fixture
def make(catalog: Catalog, backend: FakeBackend, said: list[str], request: pytest.FixtureRequest) -> Make:
    """Another provisioner on the same catalog, as another process or a later run has."""

    def make(using: FakeBackend = backend, **settings: Any) -> Provisioner:
        made = Provisioner(catalog, using, name="fake", settings=attrs.evolve(Settings(warn=said.append), **settings))
        request.addfinalizer(made.close)
        return made

    return make


def pour(provisioner: Provisioner, source: str | Layer = IMAGE, **keywords: Any) -> Machine:
    with provisioner.machine(MachineSpec.resolve(source, keywords)) as machine:
        return machine


def left(make: Make, source: str | Layer = IMAGE) -> None:
    """Leave the remains of an earlier run, which has ended."""
    provisioner = make()
    pour(provisioner, source)
    provisioner.close()


ran: list[str] = []


@layer(IMAGE)
def web(vm: Machine) -> None:
    ran.append("web")
    vm.exec("install web")


@layer(web, packages=["nginx"], files={"/srv/x": "hello"}, run=["systemctl start nginx"])
def shop(vm: Machine) -> None:
    ran.append("shop")
    vm.exec("open shop")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    ran.clear()


# -- architectures ---------------------------------------------------------------------------------------------------------------------

OTHER = next(arch for arch in ("x86_64", "aarch64") if arch != host_arch())


def test_a_machine_of_another_architecture_starts_from_the_image_of_that_name_for_it(
    make: Make, backend: FakeBackend, catalog: Catalog, tmp_path: Path
) -> None:
    images = ImageStore(catalog.images)
    foreign = images.add(disk(tmp_path / "foreign.raw", mark=7), name=f"{IMAGE}-{OTHER}", arch=OTHER, traits=Traits(firmware="uefi"))

    pour(make(), arch=OTHER)
    pour(make())

    bottoms = [start.disks[0].path for start in backend.launched]
    assert bottoms[0] == foreign.disk
    assert bottoms[-1] != foreign.disk
    assert backend.launched[0].firmware == "uefi"


def test_an_image_for_another_architecture_than_the_machines_is_refused_with_what_to_say(make: Make, backend: FakeBackend) -> None:
    with pytest.raises(SpecError, match=f"'{IMAGE}'") as caught:
        pour(make(), arch=OTHER)
    assert f"arch='{host_arch()}'" in str(caught.value)
    assert f"{IMAGE}-{OTHER}" in str(caught.value)
    assert backend.launched == []


# -- images that were not made for us --------------------------------------------------------------------------------------------------


def test_what_an_image_lacks_is_installed_once_in_its_pack_if_its_machines_reach_the_network(make: Make, tmp_path: Path) -> None:
    scripts: list[str] = []

    def handler(command: Command) -> Finished:
        scripts.append(command.argv[-1])
        return Finished(returncode=0)

    provisioner = make(FakeBackend(handler))
    foreign = str(disk(tmp_path / "foreign.raw", mark=1))
    for source, network in [(foreign, False), (IMAGE, True), (foreign, True), (foreign, True)]:
        pour(provisioner, source, network=network)

    assert provisioner.tally.built == 3
    assert ["qemu-guest-agent" in script for script in scripts] == [False, False, False, True]


def test_a_guest_whose_packages_cannot_be_reached_is_used_as_it_is_and_that_is_said_once(
    make: Make, tmp_path: Path, said: list[str]
) -> None:
    def handler(command: Command) -> Finished:
        failed = "qemu-guest-agent" in command.argv[-1]
        return Finished(returncode=100, stderr=b"E: Unable to locate\npackage") if failed else Finished(returncode=0)

    foreign = str(disk(tmp_path / "foreign.raw", mark=1))
    for provisioner in (make(FakeBackend(handler)), make(FakeBackend(handler))):
        pour(provisioner, foreign, network=True)

    assert len(said) == 1
    assert said[0].endswith("E: Unable to locate package")


class Asleep(FakeBackend):
    """Its guests cannot be woken."""

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:
        super().launch(spec, source=source, rundir=rundir, deadline=deadline)
        return Sleeper(self, rundir)


class Sleeper(FakeInstance):
    def save(self, dest: Path, *, kind: PackKind, deadline: Deadline) -> None:
        if kind is not PackKind.DISK:
            raise CannotSave("there is no Python")
        super().save(dest, kind=kind, deadline=deadline)


def test_a_guest_that_nothing_can_wake_gets_a_disk_pack_with_the_reason_and_later_runs_use_it(make: Make, said: list[str]) -> None:
    backend = Asleep()
    pour(make(backend), web)
    later = make(backend)
    pour(later, web)

    assert all("there is no Python" in sentence for sentence in said)
    assert len(said) == 2  # the image's, and the layer's
    assert (later.tally.built, later.tally.booted, later.tally.reused) == (0, 1, 1)
    assert [start.saved for start in backend.launched] == [None] * 4


def test_an_image_that_is_ready_with_its_channel_is_not_asked_about_cloud_init(make: Make, catalog: Catalog, tmp_path: Path) -> None:
    asked: list[str] = []

    def handler(command: Command) -> Finished:
        asked.append(command.argv[-1])
        return Finished(returncode=0)

    bare = disk(tmp_path / "bare.raw", mark=1)
    ImageStore(catalog.images).add(bare, name="bare", traits=Traits(readiness="channel"))
    pour(make(FakeBackend(handler)), "bare")
    assert asked == []


def test_a_damaged_image_that_can_be_built_is_put_aside_and_built_again_and_others_are_left_alone(
    make: Make, catalog: Catalog, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageStore(catalog.images)
    images.add(disk(tmp_path / "own.raw", mark=9), name="own")
    for name in (IMAGE, "own"):
        (catalog.images / "names" / f"{name}.json").write_text("{")

    def build(store: ImageStore, name: str, *, progress: Callable[[str], None]) -> Image:
        progress("   0 s  done")
        return store.add(tmp_path / "disk.raw", name=name, traits=Traits(prepared=True), replace=True)

    monkeypatch.setattr("pytest_vmbottle.images.build", build)
    pour(make())
    with pytest.raises(CatalogError, match="vmbottle image rm own"):
        pour(make(), "own")

    assert len(said) == 1
    assert "'debian-12'" in said[0]
    assert str(catalog.root / "quarantine") in said[0]
    assert [path.name.partition(".")[0] for path in catalog.quarantined()] == [IMAGE]
    assert (catalog.images / "names" / "own.json").read_text() == "{"


# -- packs are made once ---------------------------------------------------------------------------------------------------------------


def test_a_pack_is_built_by_one_boot_and_every_machine_is_poured_from_it(make: Make, backend: FakeBackend) -> None:
    provisioner = make()
    pour(provisioner)
    pour(provisioner)

    assert (provisioner.tally.booted, provisioner.tally.built, provisioner.tally.restored, provisioner.tally.reused) == (1, 1, 2, 0)
    assert [start.saved is not None for start in backend.launched] == [False, True, True]
    assert backend.stopped == 3


def test_another_process_uses_the_pack_that_is_there(make: Make, backend: FakeBackend) -> None:
    pour(make())
    later = make()
    pour(later)
    pour(later)

    assert (later.tally.booted, later.tally.built, later.tally.restored, later.tally.reused) == (0, 0, 2, 1)
    assert len(backend.launched) == 4


def test_a_run_notes_that_it_uses_a_pack_and_what_that_stands_on(make: Make, catalog: Catalog) -> None:
    pour(make(), web)
    found = packs.scan(catalog.packs)[0]
    for pack in found:
        os.utime(pack.path, (1, 1))
    began = time.time()
    pour(make(), web)

    assert [pack.manifest.name for pack in found] == [IMAGE, "web"]
    assert all(pack.used > began - 1 for pack in found)


def test_specs_that_differ_only_after_the_boot_share_a_pack_and_others_do_not(make: Make) -> None:
    provisioner = make()
    after: list[dict[str, Any]] = [{}, {"env": {"A": "1"}}, {"user": "joe"}, {"network": True}, {"ports": [80]}, {"name": "other"}]
    for keywords in after:
        pour(provisioner, **keywords)
    assert provisioner.tally.built == 1
    before: list[dict[str, Any]] = [{"cpus": 2}, {"memory": "2G"}, {"user_data": {"a": 1}}]
    for keywords in before:
        pour(provisioner, **keywords)
    assert provisioner.tally.built == 4


def test_layers_are_built_on_layers_each_once_and_disks_lie_in_their_order(make: Make, backend: FakeBackend, catalog: Catalog) -> None:
    provisioner = make()
    pour(provisioner, shop)
    pour(provisioner, web)
    pour(make(), shop)

    assert ran == ["web", "shop"]
    assert provisioner.tally.built == 3
    found = {pack.manifest.name: pack for pack in map(packs.read, catalog.packs.iterdir())}
    assert found["shop"].manifest.parent == found["web"].key
    assert found["shop"].manifest.parent_seal == found["web"].seal
    assert found["web"].manifest.parent == found[IMAGE].key
    names = [IMAGE, "web", "shop"]
    assert [item.path for item in backend.launched[-1].disks[1:]] == [found[name].path / "disk.qcow2" for name in names]
    assert backend.launched[-1].saved == found["shop"].path
    assert backend.launched[-1].seed == found[IMAGE].path / "seed.iso"
    assert [start.building for start in backend.launched] == [True, True, True, False, False, False]


def test_a_layer_does_packages_then_files_then_commands_then_its_function(make: Make) -> None:
    done: list[str] = []

    def note(command: Command) -> Finished:
        done.append(" ".join(command.argv))
        return Finished(returncode=0)

    pour(make(FakeBackend(note)), shop)
    order = [
        next(index for index, line in enumerate(done) if text in line)
        for text in ("sh nginx", "tar -xomf", "systemctl start nginx", "open shop")
    ]

    assert order == sorted(order)
    assert "apt-get install" in done[order[0]]


def test_what_a_mark_prepares_is_bottled_too(make: Make) -> None:
    first, second = make(), make()
    pour(first, run=["touch /x"])
    pour(second, run=["touch /x"])
    pour(second, run=["touch /y"])

    assert first.tally.built == 2
    assert second.tally.built == 1


def test_a_pack_has_the_images_of_its_disks_which_may_change_or_go(make: Make, backend: FakeBackend, tmp_path: Path) -> None:
    image = tmp_path / "image"
    keywords: dict[str, Any] = {"disks": {"data": image}, "run": ["mount it"]}

    def made(mark: int) -> tuple[Provisioner, DataDisk, Path]:
        disk(image, mark=mark)
        provisioner = make()
        pour(provisioner, **keywords)
        (data,) = backend.launched[-1].data
        own, overlay = data.disks
        assert (own.path.read_bytes(), own.format) == (image.read_bytes(), "raw")
        assert own.path.parent == overlay.path.parent != image.parent
        return provisioner, data, own.path.parent

    _, _, before = made(1)
    provisioner, data, folder = made(2)
    assert folder != before
    image.unlink()
    pack, spec = provisioner.pack_of_key(folder.name.partition(".")[0])
    assert provisioner.start(spec, pack).data == (data,)
    assert spec.disks == (("data", 1 << 20),)


def test_a_disk_of_a_mark_alone_stands_on_its_image_in_its_own_place(make: Make, backend: FakeBackend, tmp_path: Path) -> None:
    image = disk(tmp_path / "image")
    (tmp_path / "link").symlink_to(image)
    pour(make(), disks={"data": tmp_path / "link"})
    (data,) = backend.launched[-1].data
    assert [(each.path, each.format) for each in data.disks] == [(image, "raw")]


def test_a_cold_machine_boots_from_the_image_and_builds_nothing(make: Make, backend: FakeBackend, catalog: Catalog) -> None:
    provisioner = make()
    pour(provisioner, fresh="boot")

    assert (provisioner.tally.booted, provisioner.tally.built, provisioner.tally.restored) == (1, 0, 0)
    assert len(backend.launched[0].disks) == 1
    assert not catalog.packs.exists()
    assert list(catalog.root.rglob("staging-*")) == []


def test_a_cold_machine_of_a_layer_boots_from_its_disk(make: Make, backend: FakeBackend) -> None:
    provisioner = make()
    pour(provisioner, web, fresh="boot")

    assert ran == ["web"]
    assert backend.launched[-1].saved is None
    assert len(backend.launched[-1].disks) == 3


def test_two_machines_have_keys_of_their_pack_and_two_images_have_keys_of_their_own(make: Make, backend: FakeBackend) -> None:
    provisioner = make()
    pour(provisioner)
    pour(provisioner, cpus=2)
    built, poured, other, _ = backend.launched

    assert attrs.asdict(built.keys) == attrs.asdict(poured.keys)
    assert built.keys.user_private != other.keys.user_private
    assert built.keys.host_private != built.keys.user_private


def test_packs_made_before_a_moment_are_made_again_with_all_that_stands_on_them_and_only_once(make: Make) -> None:
    pour(make(), web)
    rebuilding = make(rebuild_before=time.time())
    pour(rebuilding, web)
    pour(rebuilding, web)

    assert ran == ["web", "web"]
    assert (rebuilding.tally.built, rebuilding.tally.reused, rebuilding.tally.restored) == (2, 0, 2)
    later = make()
    pour(later, web)
    assert later.tally.built == 0


def test_an_image_that_was_replaced_is_for_later_runs_and_who_has_it_keeps_it(
    make: Make, catalog: Catalog, backend: FakeBackend, tmp_path: Path
) -> None:
    provisioner = make()
    pour(provisioner)
    old = backend.launched[-1].disks[0].path
    other = disk(tmp_path / "other.raw")
    with other.open("r+b") as file:
        file.write(b"other")
    new = ImageStore(catalog.images).add(other, name=IMAGE, replace=True)
    pour(provisioner)

    assert provisioner.tally.built == 1
    assert backend.launched[-1].disks[0].path == old
    assert old.exists()
    later = make()
    pour(later)
    assert later.tally.built == 1
    assert backend.launched[-1].disks[0].path == new.disk
    provisioner.close()
    make()
    assert not old.exists(), "it went with its last holder"


def test_what_a_layer_depends_on_and_cannot_be_read_is_said_once(make: Make, said: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    odd = Layer(source=IMAGE, function=None, depends=(tmp_path,), name="odd")
    provisioner = make()
    pour(provisioner, odd)
    pour(provisioner, odd)

    (line,) = said
    assert str(tmp_path / "fifo") in line


def test_packs_are_made_again_beside_those_that_another_run_uses(make: Make, catalog: Catalog, backend: FakeBackend) -> None:
    running = make()
    pour(running, web)
    used = backend.launched[-1]
    again = make(rebuild_before=time.time())
    pour(again, web)
    new = backend.launched[-1]
    pour(running, web)

    assert again.tally.built == 2
    assert running.tally.built == 2
    assert backend.launched[-1].disks == used.disks != new.disks
    assert used.saved is not None
    packs.read(used.saved).verify()
    running.close()
    catalog.gc()
    assert {path.name for path in catalog.packs.iterdir()} == {f"{pack.key}.2" for pack in packs.scan(catalog.packs)[0]}
    pour(make(), web)
    assert backend.launched[-1].disks == new.disks


def test_a_machine_holds_what_it_was_poured_from_whatever_becomes_of_the_run(make: Make, backend: FakeBackend) -> None:
    provisioner = make()
    with provisioner.machine(MachineSpec.resolve(web, {})):
        provisioner.close()
        folders = [item.path.parent for item in backend.launched[-1].disks]
        assert len(folders) == 3
        assert all(map(is_locked, folders))
    assert not any(map(is_locked, folders))


def test_a_disk_that_is_changed_between_its_pack_and_its_machine_is_no_machine(make: Make, tmp_path: Path) -> None:
    own, provisioner = disk(tmp_path / "own.raw", mark=3), make()
    spec = MachineSpec(source=own)
    pack = provisioner.pack(spec)
    disk(own, mark=4)
    with pytest.raises(CatalogError, match=r"own\.raw"):
        provisioner.start(spec, pack)


def point_elsewhere(path: Path) -> None:
    """Has a disk read what another file of this host holds."""
    path.write_bytes(b"QFI\xfb" + struct.pack(">IQIIQ", 3, 512, 11, 16, 1 << 20) + bytes(1 << 20))


def grow_into_another_format(path: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)


@pytest.mark.parametrize("change", [point_elsewhere, grow_into_another_format, Path.unlink])
@pytest.mark.parametrize("again", [Machine.restore, Machine.start])
def test_a_disk_in_its_own_place_is_read_again_before_each_start(
    make: Make, backend: FakeBackend, tmp_path: Path, change: Callable[[Path], None], again: Callable[[Machine], None]
) -> None:
    own = disk(tmp_path / "own.raw", mark=3)
    with make().machine(MachineSpec(source=own)) as machine:
        machine.power_cut()
        again(machine)
        launched = len(backend.launched)
        machine.power_cut()
        change(own)
        with pytest.raises(CatalogError, match=r"own\.raw"):
            again(machine)

        assert len(backend.launched) == launched
        assert machine.state == State.OFF


def test_a_damaged_pack_that_another_run_uses_stays_and_a_sound_one_stands_beside_it(make: Make, catalog: Catalog, said: list[str]) -> None:
    pour(make())
    bad = named(catalog, IMAGE)
    flip(bad / "disk.qcow2")
    later = make()
    pour(later)

    assert bad.exists()
    assert later.tally.built == 1
    assert len(said) == 1
    packs.read(catalog.pack(bad.name)).verify()
    assert not catalog.quarantined()


def test_the_same_disk_with_another_kernel_is_another_image(make: Make, catalog: Catalog, tmp_path: Path) -> None:
    store = ImageStore(catalog.images)
    store.remove(IMAGE)
    built = []
    for kernel in ("one", "two"):
        (tmp_path / kernel).write_text(kernel)
        store.add(disk(tmp_path / "disk.raw"), name=IMAGE, kernel=tmp_path / kernel, cmdline="root=/dev/vda")
        provisioner = make()
        pour(provisioner)
        built.append(provisioner.tally.built)
        store.remove(IMAGE)

    assert built == [1, 1]


def test_cloud_init_runs_where_there_is_user_data_though_the_image_disables_it(
    make: Make, backend: FakeBackend, catalog: Catalog, tmp_path: Path
) -> None:
    (tmp_path / "kernel").write_text("kernel")
    store = ImageStore(catalog.images)
    store.remove(IMAGE)
    store.add(disk(tmp_path / "disk.raw"), name=IMAGE, kernel=tmp_path / "kernel", cmdline="quiet cloud-init=disabled")
    pour(make())
    pour(make(), user_data={})

    # For each, the first boot and the machine that is poured.
    assert [source.cmdline for source in backend.launched] == ["quiet cloud-init=disabled"] * 2 + ["quiet"] * 2


def test_a_disk_image_can_be_named_by_its_path(make: Make, tmp_path: Path) -> None:
    provisioner = make()
    pour(provisioner, str(tmp_path / "disk.raw"))

    assert provisioner.tally.built == 1


# -- damage ----------------------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def named(catalog: Catalog, name: str) -> Path:
    return next(path for path in catalog.packs.iterdir() if packs.read(path).manifest.name == name)


@pytest.mark.parametrize("name", ["ram.img", "disk.qcow2", "state.bin", "keys.json", "seed.iso"])
def test_a_damaged_pack_is_put_aside_with_a_warning_and_made_again(make: Make, catalog: Catalog, said: list[str], name: str) -> None:
    left(make)
    flip(named(catalog, IMAGE) / name)
    later = make()
    pour(later)

    assert later.tally.built == 1
    (warning,) = said
    assert re.search(rf"\b{re.escape(name)}\b.*{catalog.root / 'quarantine'}", warning)
    assert len(list((catalog.root / "quarantine").iterdir())) == 1
    packs.read(named(catalog, IMAGE)).verify()


def test_damage_that_comes_while_a_process_uses_the_pack_is_seen_at_the_next_machine(make: Make, catalog: Catalog, said: list[str]) -> None:
    provisioner = make()
    pour(provisioner)
    flip(named(catalog, IMAGE) / "ram.img")
    pour(provisioner)

    assert provisioner.tally.built == 2
    assert len(said) == 1


@pytest.mark.parametrize("text", ["", "null", "{}", "[]"])
def test_a_pack_with_a_damaged_manifest_is_made_again(make: Make, catalog: Catalog, said: list[str], text: str) -> None:
    pour(make())
    manifest = named(catalog, IMAGE) / "pack.json"
    manifest.chmod(0o600)
    manifest.write_text(text)
    later = make()
    pour(later)

    assert later.tally.built == 1
    assert len(said) == 1


def test_a_layer_is_made_again_when_what_it_stands_on_was(make: Make, catalog: Catalog, said: list[str]) -> None:
    left(make, shop)
    flip(named(catalog, "web") / "disk.qcow2")
    later = make()
    pour(later, shop)

    assert ran == ["web", "shop", "web", "shop"]
    assert later.tally.built == 2
    assert any("(shop)" in line for line in said)
    for path in catalog.packs.iterdir():
        packs.read(path).verify()


def test_a_pack_that_is_removed_under_a_layer_is_made_again_with_the_layer(make: Make, catalog: Catalog) -> None:
    pour(make(), web)
    shutil.rmtree(named(catalog, IMAGE))
    later = make()
    pour(later, web)

    assert later.tally.built == 2
    assert ran == ["web", "web"]


# -- failure ---------------------------------------------------------------------------------------------------------------------------


class Stubborn(FakeBackend):
    """Restores nothing."""

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:
        if source.saved is not None:
            raise MachineError("the state cannot be loaded", machine=spec.name)
        return super().launch(spec, source=source, rundir=rundir, deadline=deadline)


def test_where_a_pack_cannot_be_poured_the_next_kind_is_tried_down_to_disks_and_each_is_said_once(
    make: Make, said: list[str], catalog: Catalog
) -> None:
    backend = Stubborn()
    provisioner = make(backend)
    pour(provisioner)
    pour(provisioner)

    first, second = said
    assert re.search("template pack of debian-12.* stream packs .*the state cannot be loaded", first)
    assert re.search("stream pack of debian-12.* disk packs .*the state cannot be loaded", second)
    assert [packs.read(path).manifest.kind for path in catalog.packs.iterdir()] == ["disk"]
    assert all(start.saved is None for start in backend.launched)
    assert provisioner.tally.restored == 0
    assert len(list((catalog.root / "quarantine").iterdir())) == 2


def test_a_disk_pack_that_does_not_boot_is_an_error_and_no_reason_to_try_for_ever(make: Make) -> None:
    backend = FakeBackend(pack_kind=PackKind.DISK)
    provisioner = make(backend)
    pour(provisioner)
    backend.broken = "no more"

    with pytest.raises(MachineError, match="no more"):
        pour(provisioner)


def test_a_hypervisor_that_does_not_start_is_no_reason_to_doubt_the_pack(make: Make, said: list[str], catalog: Catalog) -> None:
    backend = FakeBackend()
    provisioner = make(backend)
    pour(provisioner)
    backend.broken = "out of everything"

    with pytest.raises(LaunchError, match="out of everything"):
        pour(provisioner)
    assert said == []
    assert [packs.read(path).manifest.kind for path in catalog.packs.iterdir()] == ["template"]


@layer(IMAGE)
def failing(_: Machine) -> None:
    ran.append("failing")
    raise RuntimeError("the shelf\nis empty")


@layer(failing)
def above(_: Machine) -> None:
    ran.append("above")


def test_a_failing_layer_fails_alike_for_all_who_need_it_and_is_tried_again_by_the_next_run(
    make: Make, backend: FakeBackend, catalog: Catalog
) -> None:
    provisioner = make()
    with pytest.raises(MachineError) as full:
        pour(provisioner, failing)
    with pytest.raises(MachineError) as again:
        pour(provisioner, failing)

    assert "RuntimeError: the shelf\nis empty" in str(full.value)
    assert full.value.console_tail == "vm started"
    assert isinstance(full.value.__cause__, RuntimeError)
    assert (str(again.value), again.value.origin) == (str(full.value), full.value.origin)
    assert again.value.origin
    assert again.value is not full.value
    assert again.value.lasting
    assert ran == ["failing"]
    assert backend.stopped == len(backend.launched)
    assert [packs.read(path).manifest.name for path in catalog.packs.iterdir()] == [IMAGE]
    with pytest.raises(MachineError, match="is empty"):
        pour(make(), failing)
    assert ran == ["failing", "failing"]


def test_a_layer_on_a_failing_layer_is_not_begun(make: Make) -> None:
    provisioner = make()
    origins = set()
    for needed in (above, failing, above):
        with pytest.raises(MachineError) as error:
            pour(provisioner, needed)
        origins.add(error.value.origin)

    assert len(origins) == 1
    assert ran == ["failing"]


@layer(IMAGE)
def commanding(vm: Machine) -> None:
    vm.exec(["false"])


def test_a_command_that_fails_in_a_layer_is_shown_with_its_output(make: Make) -> None:
    def fail(command: Command) -> Finished:
        return Finished(returncode=7 if command.argv == ("false",) else 0, stderr=b"no such package")

    with pytest.raises(MachineError, match="no such package"):
        pour(make(FakeBackend(fail)), commanding)


@pytest.mark.parametrize(("number", "remedy"), [(errno.EMFILE, "ulimit -n"), (errno.ENFILE, "fs.file-max"), (errno.ENOSPC, "pack prune")])
def test_what_the_catalog_lacks_is_told_with_its_own_remedy(make: Make, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str) -> None:
    def staging(_: Catalog) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Catalog, "staging", staging)
    with pytest.raises(CatalogError, match=remedy):
        pour(make())


def test_nothing_half_made_stays_when_no_machine_starts(make: Make, catalog: Catalog) -> None:
    with pytest.raises(LaunchError, match="qemu is ill"):
        pour(make(FakeBackend(broken="qemu is ill")))

    assert not catalog.packs.exists()
    assert [path for path in catalog.root.rglob("*") if path.is_dir() and path.name.startswith(("staging", "build", "vm-"))] == []


def test_a_guest_that_never_comes_up_is_given_up_with_its_console(make: Make) -> None:
    backend = FakeBackend(lambda _: Finished(returncode=1))
    with pytest.raises(MachineTimeout, match="vm started"):
        pour(make(backend, timeout_factor=0.001))

    assert backend.stopped == len(backend.launched) == 1


def test_more_memory_than_the_host_has_is_refused_before_anything_starts(make: Make, backend: FakeBackend) -> None:
    with pytest.raises(SpecError, match="memory="):
        pour(make(), memory=host.total_memory() + (1 << 30))

    assert backend.launched == []


def test_a_disk_smaller_than_the_images_is_refused(make: Make) -> None:
    with pytest.raises(SpecError, match=r"1\.0 MiB"):
        pour(make(), disk="512K")


def test_an_image_that_is_not_there_is_told_with_the_commands_that_bring_it(make: Make) -> None:
    with pytest.raises(CatalogError, match="'debian-99'") as caught:
        pour(make(), "debian-99")

    assert "vmbottle image add FILE --name debian-99" in str(caught.value)
    assert "debian-12" in str(caught.value)
    with pytest.raises(CatalogError, match="vmbottle image pull fedora-44"):
        pour(make(), "fedora-44")


def test_a_path_where_no_image_is_and_a_file_that_is_none_are_told(make: Make, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CatalogError, match="No such file or directory"):
        pour(make(), str(tmp_path / "nothing"))
    with pytest.raises(CatalogError, match="text"):
        pour(make(), str(tmp_path / "text"))


# -- around a machine ------------------------------------------------------------------------------------------------------------------


def test_hooks_are_told_of_a_machine_and_a_failing_one_does_not_keep_it_alive(make: Make, backend: FakeBackend, said: list[str]) -> None:
    seen: list[str] = []

    def stopping(machine: Machine) -> None:
        seen.append(f"stopping {machine.name}, {len(backend.launched) - backend.stopped} alive")
        raise ValueError("oops")

    pour(make(ready=lambda machine: seen.append(f"ready {machine.name}"), stopping=stopping), name="db")

    assert seen == ["ready db", "stopping db, 1 alive"]
    assert backend.stopped == len(backend.launched)
    assert ["'db'" in line and "ValueError('oops')" in line for line in said] == [True]


def test_a_machine_ends_when_its_block_fails_or_its_ready_hook_does(make: Make, backend: FakeBackend) -> None:
    with pytest.raises(RuntimeError), make().machine(MachineSpec(source=IMAGE)):
        raise RuntimeError

    def unready(_: Machine) -> None:
        raise ValueError("not yet")

    with pytest.raises(ValueError, match="not yet"):
        pour(make(ready=unready))
    assert backend.stopped == len(backend.launched)


def test_the_log_tells_of_long_work(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pour(make())

    assert IMAGE in caplog.messages[0]
    assert IMAGE in caplog.messages[-1]


def test_packs_in_use_are_held_until_the_provisioner_is_closed(make: Make, catalog: Catalog) -> None:
    provisioner = make()
    pour(provisioner)
    pack = named(catalog, IMAGE)
    assert not catalog.discard(pack)
    before = {held for held in open_files() if str(pack) in held}
    provisioner.close()
    provisioner.close()

    assert before
    assert not before & open_files()
    assert catalog.discard(pack)


def test_a_machine_on_a_private_lan_is_poured_from_the_pack_of_one_without_a_network(make: Make) -> None:
    @layer(IMAGE, network="lan", run=["true"])
    def member(vm: Machine) -> None:
        assert vm.spec.network is False

    @layer(IMAGE, run=["true"])
    def plain(vm: Machine) -> None:
        assert vm.spec.network is False

    provisioner = make()
    assert provisioner.pack(MachineSpec.resolve(IMAGE, {"network": "lan"})).key == provisioner.pack(MachineSpec.resolve(IMAGE, {})).key
    assert provisioner.pack(MachineSpec.resolve(member, {})).manifest.name == "member"
    assert MachineSpec.resolve(member, {}).lans == ("lan",)
    assert provisioner.pack(MachineSpec.resolve(plain, {"network": "lan"})).key == provisioner.pack(MachineSpec.resolve(plain, {})).key


def test_a_private_lan_is_refused_before_anything_starts_where_there_is_no_test_to_have_it(make: Make, backend: FakeBackend) -> None:
    with pytest.raises(SpecError, match="network='lan'"):
        pour(make(), network="lan")
    assert not backend.launched


def test_a_backend_without_private_lans_says_so_and_the_machine_is_ended(make: Make, backend: FakeBackend) -> None:
    spec = MachineSpec.resolve(IMAGE, {"network": "lan"})
    with closing(Lans()) as lans, pytest.raises(Unsupported, match="LAN"), make().machine(spec, lans=lans):
        pass
    assert backend.stopped == len(backend.launched) == 2  # one was to build the pack


def test_packages_are_installed_with_the_network_on_and_the_machine_itself_keeps_it_off() -> None:
    marked = MachineSpec(source="debian-12", packages=["nginx"])
    layered = Layer(source="debian-12", function=None, keywords={"packages": ["nginx"]}, name="served")

    assert marked.network is False
    assert build_spec(marked, marked.steps[-1]).network is True
    assert build_spec(MachineSpec(source=layered), layered).network is True


# -- trying again ----------------------------------------------------------------------------------------------------------------------


class Moody(FakeBackend):
    """Fails with these, one launch each, before it works; notes the folders of all."""

    def __init__(self, *errors: MachineError) -> None:
        super().__init__()
        self.errors = list(errors)
        self.folders: list[Path] = []

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:
        self.folders.append(rundir)
        if self.errors:
            raise self.errors.pop(0)
        return super().launch(spec, source=source, rundir=rundir, deadline=deadline)


def test_a_machine_that_could_not_be_provided_is_tried_again_in_another_folder(make: Make, said: list[str]) -> None:
    moody = Moody(MachineTimeout("no answer"))
    provisioner = make(moody, retries=1)
    pour(provisioner, fresh="boot")

    assert len(set(moody.folders)) == 2
    assert provisioner.tally.retried == 1
    assert ["'vm'" in line and "MachineTimeout: no answer" in line for line in said] == [True]


def test_the_timeline_of_the_second_machine_has_why_there_was_no_first(make: Make) -> None:
    with make(Moody(MachineTimeout("no answer")), retries=1).machine(MachineSpec(source="debian-12", fresh="boot")) as machine:
        told = [event["text"] for event in machine.lifecycle.timeline.events() if event["kind"] == "infra"]

    assert told == ["MachineTimeout: no answer"]


def test_a_pack_that_could_not_be_built_is_built_at_the_second_trial(make: Make) -> None:
    provisioner = make(Moody(LaunchError("out of memory")), retries=1)
    pour(provisioner, web)

    assert ran == ["web"]
    assert (provisioner.tally.built, provisioner.tally.retried) == (2, 1)


def test_after_the_last_trial_the_error_is_the_last_one_and_says_what_it_is(make: Make) -> None:
    moody = Moody(*(MachineTimeout(f"number {n}") for n in range(9)))
    with pytest.raises(MachineTimeout, match="number 2") as caught:
        pour(make(moody, retries=2), fresh="boot")

    assert caught.value.infra
    assert len(moody.folders) == 3


@pytest.mark.parametrize("error", [GuestPanic("Kernel panic"), BackendUnavailable("there is no QEMU")])
def test_what_a_fresh_machine_would_meet_again_is_not_tried_again(make: Make, error: MachineError) -> None:
    moody = Moody(error)
    with pytest.raises(type(error)) as caught:
        pour(make(moody, retries=5), fresh="boot")

    assert caught.value.infra
    assert len(moody.folders) == 1


class Elsewhere(Moody):
    """Its machines go on without who started them, it keeps something of each, and makes none with a screen."""

    def __init__(self, *errors: MachineError) -> None:
        super().__init__(*errors)
        self.written: list[Record] = []
        self.discarded: list[Path] = []

    def ending(self, rundir: Path) -> tuple[str, ...]:
        return ("end", str(rundir))

    def discard(self, rundir: Path) -> None:
        self.written.append(Record.read(rundir.with_name(f"{rundir.name}.json")))
        self.discarded.append(rundir)

    def close(self) -> None:
        pass

    def unsupported_reason(self, spec: MachineSpec) -> str | None:
        return "display=True: no screen" if spec.display else None


def test_what_ends_a_machine_is_written_down_until_all_that_is_kept_of_it_is_gone(make: Make) -> None:
    elsewhere = Elsewhere(MachineTimeout("no answer"))
    pour(make(elsewhere, retries=1), fresh="boot")

    assert elsewhere.discarded == elsewhere.folders
    assert [each.ending for each in elsewhere.written] == [("end", str(folder)) for folder in elsewhere.folders]
    assert len(elsewhere.folders) == 2


def test_what_a_backend_refuses_is_no_infra_and_neither_started_nor_waited_for(make: Make) -> None:
    provisioner = make(Elsewhere(), retries=5, memory_budget=1)  # of which no machine could have a share
    with pytest.raises(BackendUnavailable, match="no screen") as caught:
        pour(provisioner, display=True)

    assert not caught.value.infra
    assert provisioner.tally.retried == 0


@pytest.mark.parametrize(
    ("error", "builds"),
    [
        (MachineDied("QEMU was killed", exitcode=-9), 2),
        (MachineDied("it powered itself off", exitcode=0), 1),
        (GuestPanic("Kernel panic", exitcode=-9), 1),
        (MachineTimeout("the port was never open"), 1),
        (AssertionError("wrong"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_layer_is_tried_again_only_if_its_hypervisor_crashed(make: Make, error: Exception, builds: int) -> None:
    done = []

    @layer(IMAGE)
    def failing(vm: Machine) -> None:
        done.append(vm.id)
        raise error

    with pytest.raises(MachineError, match="failing"):
        pour(make(retries=1), failing)

    assert len(set(done)) == len(done) == builds


def test_what_a_test_does_with_its_machine_is_not_infra(make: Make) -> None:
    with pytest.raises(MachineDied) as caught, make(retries=1).machine(MachineSpec.resolve(IMAGE, {})):
        raise MachineDied("in the test")

    assert not caught.value.infra
