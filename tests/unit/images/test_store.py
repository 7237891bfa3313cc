"""The image store, the check of what is a disk, and what a build is made of; builds themselves are in tests/real."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shlex
import shutil
import struct
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmbottle.errors import BackendUnavailable, CatalogError
from pytest_vmbottle.host import digests, records
from pytest_vmbottle.host.generations import Holds
from pytest_vmbottle.images import RECIPES, Image, ImageStore, Traits, build, can_build, disk_format
from pytest_vmbottle.images import builder as building
from pytest_vmbottle.images import store as store_module
from pytest_vmbottle.images.apt import apt_sources, keyrings

MIB = 1 << 20
CMDLINE = "root=/dev/vda rw console=ttyS0"


def qcow2(**changes: int) -> bytes:
    """A version 3 header for a disk of 8 GiB, as QEMU writes it, with some fields changed, and the end of its extensions."""
    fields = {
        "version": 3,
        "backing_at": 0,
        "backing_len": 0,
        "cluster_bits": 16,
        "size": 8 << 30,
        "crypt": 0,
        "l1_len": 16,
        "l1_at": 3 << 16,
        "refs_at": 1 << 16,
        "refs_len": 1,
        "snapshots": 0,
        "snapshots_at": 0,
        "features": 0,
        "compatible": 0,
        "autoclear": 0,
        "refcount_order": 4,
        "length": 112,
        "compression": 0,
    }
    return struct.pack(">4sIQIIQIIQQIIQQQQIIB7x8x", b"QFI\xfb", *(fields | changes).values())


def judged(head: bytes, size: int) -> tuple[str, int]:
    """The format and size, or the reason why it is no disk."""
    try:
        return disk_format(head, size)
    except CatalogError as error:
        return str(error), 0


def raw(size: int = MIB, fill: bytes = b"") -> bytes:
    """A small disk with a partition table's signature."""
    content = bytearray(size)
    content[510:512] = b"\x55\xaa"
    content[4096 : 4096 + len(fill)] = fill
    return bytes(content)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "a disk.img"
    path.write_bytes(raw())
    return path


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def whole(store: ImageStore) -> list[str]:
    """Everything below the store's folder."""
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*"))


class TestWhatADiskIs:
    def test_a_plain_qcow2_is_one_and_says_how_large_the_guest_sees_it(self) -> None:
        assert disk_format(qcow2(), MIB) == ("qcow2", 8 << 30)

    @pytest.mark.parametrize(
        "options",
        ["", "compat=0.10", "compression_type=zstd", "extended_l2=on", "cluster_size=512", "cluster_size=2M", "lazy_refcounts=on"],
    )
    def test_what_qemu_img_makes_is_one(self, tmp_path: Path, options: str) -> None:
        if not shutil.which("qemu-img"):
            pytest.skip("qemu-img is not installed")
        path = tmp_path / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, "3G"], check=True)
        assert disk_format(path.read_bytes()[:65608], path.stat().st_size) == ("qcow2", 3 << 30)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"version": 1}, "version 1"),
            ({"version": 4}, "version 4"),
            ({"backing_at": 200, "backing_len": 11}, "backing file"),
            ({"version": 2, "backing_at": 200, "backing_len": 11}, "backing file"),
            ({"backing_len": 11}, "backing file"),
            ({"crypt": 1}, "encrypted"),
            ({"crypt": 2}, "encrypted"),
            ({"snapshots": 1}, "snapshots"),
            ({"size": 0}, "0 bytes"),
            ({"size": (16 << 40) + 1}, "bytes"),
            ({"size": 1 << 63}, "bytes"),
            ({"cluster_bits": 8}, "clusters"),
            ({"cluster_bits": 22}, "clusters"),
            ({"cluster_bits": 2**32 - 1}, "clusters"),
            ({"features": 1}, "qemu-img check"),
            ({"features": 2}, "qemu-img check"),
            ({"features": 4}, "data"),
            ({"features": 32}, "0x20"),
            ({"features": 1 << 63}, "0x8000000000000000"),
            ({"features": 8, "compression": 2}, "compression"),
            ({"features": 8, "compression": 1, "length": 104}, "compression"),
            ({"compression": 1}, "compression"),
            ({"snapshots_at": 1}, "snapshot table"),
            ({"size": (8 << 30) + 1}, "multiple"),
            ({"features": 16, "cluster_bits": 12, "l1_len": 1 << 16}, "extended L2"),
            ({"autoclear": 1}, "bitmaps"),
            ({"autoclear": 2}, "bitmaps"),
            ({"refcount_order": 7}, "refcounts"),
            ({"length": 72}, "header"),
            ({"length": 1 << 17}, "header"),
            ({"l1_len": 15}, "L1 table"),
            ({"l1_len": 1 << 30}, "L1 table"),
            ({"l1_at": 0}, "L1 table"),
            ({"l1_at": 1 << 40}, "L1 table"),
            ({"l1_at": (3 << 16) + 8}, "L1 table"),
            ({"refs_len": 0}, "refcount table"),
            ({"refs_len": 1 << 20}, "refcount table"),
            ({"refs_at": 1 << 62}, "refcount table"),
        ],
    )
    def test_a_qcow2_that_refers_elsewhere_or_makes_no_sense_is_refused(self, changes: dict[str, int], reason: str) -> None:
        with pytest.raises(CatalogError, match=reason):
            disk_format(qcow2(**changes), MIB)

    def test_a_version_2_header_has_no_feature_bits(self) -> None:
        assert disk_format(qcow2(version=2, features=4), MIB) == ("qcow2", 8 << 30)

    @pytest.mark.parametrize("length", [4, 71, 103, 111, 119])
    def test_a_header_that_is_cut_off_is_refused(self, length: int) -> None:
        with pytest.raises(CatalogError, match="qcow2"):
            disk_format(qcow2()[:length], MIB)

    @given(head=st.binary(max_size=4096), size=st.integers(0, 1 << 64))
    def test_any_bytes_are_a_disk_or_a_sentence(self, head: bytes, size: int) -> None:
        kind, seen = judged(head, size)
        assert kind in ("qcow2", "raw") or len(kind) > 10
        assert 0 <= seen <= 16 << 40

    @given(data=st.data(), size=st.integers(0, 1 << 50))
    def test_any_qcow2_header_is_sound_or_a_sentence(self, data: st.DataObject, size: int) -> None:
        head = bytearray(qcow2())
        for at, value in data.draw(st.dictionaries(st.integers(4, len(head) - 1), st.integers(0, 255), max_size=8)).items():
            head[at] = value
        kind, seen = judged(bytes(head), size)
        if kind == "qcow2":
            assert head[8:20] == bytes(12), "no backing file"
            assert head[32:36] == bytes(4), "no encryption"
            assert head[7] == 2 or not head[79] & 0b100111, "no feature but another compression and extended L2"
            assert 0 < seen <= 16 << 40
        else:
            assert len(kind) > 10

    @pytest.mark.parametrize(
        ("at", "magic"),
        [(510, b"\x55\xaa"), (1080, b"\x53\xef"), (0, b"XFSB"), (0, b"hsqs"), (1024, b"\x10\x20\xf5\xf2"), (0x10040, b"_BHRfS_M")],
    )
    def test_a_raw_disk_is_known_by_its_partition_table_or_file_system(self, at: int, magic: bytes) -> None:
        content = bytearray(MIB)
        content[at : at + len(magic)] = magic
        assert disk_format(bytes(content[:65608]), MIB) == ("raw", MIB)

    @pytest.mark.parametrize(
        ("head", "size", "reason"),
        [
            (b"", 0, "disk"),
            (bytes(4096), MIB, "disk"),
            (raw(), MIB + 1, "disk"),
            (raw(), MIB - 512, "disk"),
            (raw(), (16 << 40) + 512, "16 TiB"),
            (b"#!/bin/sh\n" + bytes(4096), MIB, "disk"),
            (b"\x1f\x8b\x08" + raw()[3:], MIB, "gzip"),
            (b"\xfd7zXZ\0" + raw()[6:], MIB, "xz"),
            (b"KDMV" + raw()[4:], MIB, "VMDK"),
        ],
    )
    def test_anything_else_is_refused_with_what_it_is_where_that_is_known(self, head: bytes, size: int, reason: str) -> None:
        with pytest.raises(CatalogError, match=reason):
            disk_format(head, size)


class TestStore:
    def test_looking_into_a_store_that_is_not_there_makes_nothing(self, store: ImageStore) -> None:
        assert (store.names(), store.list(), store.get("debian-12")) == ((), (), None)
        assert not store.root.exists()

    def test_an_added_disk_is_found_by_name_under_the_digest_of_its_content(self, store: ImageStore, disk: Path) -> None:
        added = store.add(disk, name="mine", description="a test")
        digest = hashlib.sha256(disk.read_bytes()).hexdigest()
        assert added == store.get("mine") == store.list()[0]
        assert added.sha256 == digest
        assert added.disk == store.root / "sha256" / digest / "disk.raw"
        assert added.disk.read_bytes() == disk.read_bytes()
        assert (added.format, added.virtual_size, added.description) == ("raw", MIB, "a test")
        assert (added.kernel, added.initrd, added.cmdline) == (None, None, "")
        assert added.arch == os.uname().machine

    def test_what_is_stored_is_read_only_and_its_folders_are_private_whatever_the_umask(self, store: ImageStore, disk: Path) -> None:
        old = os.umask(0o077)
        try:
            folder = store.add(disk, name="mine").disk.parent
            os.umask(0)
            private = ImageStore(store.root.parent / "other").add(disk, name="mine").disk
        finally:
            os.umask(old)
        assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {"disk.raw": 0o444, "image.json": 0o444}
        assert {path.stat().st_mode & 0o777 for path in list(private.parents)[:3]} == {0o700}

    def test_a_kernel_is_kept_beside_the_disk(self, store: ImageStore, disk: Path, tmp_path: Path) -> None:
        kernel, initrd = tmp_path / "k", tmp_path / "i"
        kernel.write_bytes(b"kernel")
        initrd.write_bytes(b"initrd")
        image = store.add(disk, name="mine", kernel=kernel, initrd=initrd, cmdline=CMDLINE)
        assert image.kernel == image.disk.parent / "vmlinuz"
        assert image.initrd == image.disk.parent / "initrd.img"
        assert (image.kernel.read_bytes(), image.initrd.read_bytes(), image.cmdline) == (b"kernel", b"initrd", CMDLINE)
        files = records.read(image.disk.parent / "image.json")["files"]
        assert files["vmlinuz"] == {"sha256": hashlib.sha256(b"kernel").hexdigest(), "size": 6}

    def test_the_key_tells_apart_what_boots_differently(self, tmp_path: Path, disk: Path) -> None:
        kernel = tmp_path / "k"
        kernel.write_bytes(b"kernel")
        images = [
            ImageStore(tmp_path / "0").add(disk, name="mine"),
            ImageStore(tmp_path / "1").add(disk, name="mine", kernel=kernel, cmdline=CMDLINE),
            ImageStore(tmp_path / "2").add(disk, name="mine", kernel=kernel, cmdline=CMDLINE + " quiet"),
            ImageStore(tmp_path / "3").add(disk, name="mine", kernel=disk, cmdline=CMDLINE),
        ]
        assert len({image.sha256 for image in images}) == 1
        assert len({image.key for image in images}) == 4
        assert ImageStore(tmp_path / "4").add(disk, name="other").key == images[0].key

    def test_what_is_known_of_a_disk_is_kept_with_it(self, store: ImageStore, disk: Path) -> None:
        traits = Traits(firmware="uefi", user="admin", readiness="channel", prepared=True)
        image = store.add(disk, name="mine", arch="aarch64", traits=traits)
        assert image == store.get("mine")
        assert (image.traits, image.arch) == (traits, "aarch64")
        assert store.import_path(disk, arch="aarch64", traits=traits).key == image.key

    def test_a_record_from_before_there_were_traits_is_read_as_an_unprepared_bios_image(self, store: ImageStore, disk: Path) -> None:
        image = store.add(disk, name="mine", arch="x86_64")
        path = image.disk.parent / "image.json"
        record = records.read(path)
        path.chmod(0o600)
        path.write_text(json.dumps({key: value for key, value in record.items() if key not in attrs.fields_dict(Traits)}))
        assert store.get("mine") == image
        assert image.traits == Traits(firmware="bios", user="", readiness="cloud-init", prepared=False)

    @pytest.mark.parametrize("change", [{"firmware": "coreboot"}, {"user": "a b"}, {"readiness": "soon"}, {"prepared": 1}])
    def test_a_record_with_an_impossible_trait_is_damaged(self, store: ImageStore, disk: Path, change: dict[str, object]) -> None:
        path = store.add(disk, name="mine").disk.parent / "image.json"
        path.chmod(0o600)
        records.write(path, records.read(path) | change)
        with pytest.raises(CatalogError, match="mine"):
            store.get("mine")

    def test_the_firmware_is_part_of_the_key_only_where_it_boots_the_disk_and_is_no_bios(self, tmp_path: Path, disk: Path) -> None:
        def key(firmware: Literal["bios", "uefi"], **boot: Any) -> str:
            store = ImageStore(tmp_path / f"{firmware}{len(boot)}")
            return store.add(disk, name="mine", arch="x86_64", traits=Traits(firmware=firmware), **boot).key

        assert key("bios") != key("uefi")
        assert key("bios", kernel=disk, cmdline=CMDLINE) == key("uefi", kernel=disk, cmdline=CMDLINE)
        digest = hashlib.sha256(disk.read_bytes()).hexdigest()
        assert key("bios") == digests.digest("image", {"disk.raw": digest}, "raw", "x86_64", "")

    @pytest.mark.parametrize(("arch", "firmware"), [("x86_64", "bios"), ("aarch64", "uefi")])
    def test_a_disk_is_taken_to_boot_by_what_its_architecture_has(self, store: ImageStore, disk: Path, arch: str, firmware: str) -> None:
        assert store.add(disk, name="mine", arch=arch).firmware == firmware

    def test_other_traits_for_the_same_disk_are_taken_on_request_unless_another_name_stands_for_it(
        self, store: ImageStore, disk: Path
    ) -> None:
        store.add(disk, name="mine")
        with pytest.raises(CatalogError, match="mine"):
            store.add(disk, name="mine", traits=Traits(user="admin"))
        assert store.add(disk, name="mine", traits=Traits(user="admin"), replace=True).user == "admin"
        found = store.get("mine")
        assert found is not None
        assert (found.user, found.disk.read_bytes()) == ("admin", disk.read_bytes())
        assert not list(store.root.glob("sha256/.*"))
        store.add(disk, name="other", traits=Traits(user="admin"))
        with pytest.raises(CatalogError, match="other"):
            store.add(disk, name="mine", traits=Traits(user="root"), replace=True)

    @pytest.mark.parametrize(("boot", "reason"), [({"cmdline": "quiet"}, "kernel"), ({"kernel": True}, "root=")])
    def test_a_kernel_and_its_command_line_go_together(self, store: ImageStore, disk: Path, boot: dict[str, object], reason: str) -> None:
        with pytest.raises(CatalogError, match=reason):
            store.add(disk, name="mine", kernel=disk if "kernel" in boot else None, cmdline=str(boot.get("cmdline", "")))
        assert not store.root.exists()

    def test_one_disk_under_two_names_is_stored_once_until_the_last_name_goes(self, store: ImageStore, disk: Path) -> None:
        first, second = store.add(disk, name="first"), store.add(disk, name="second")
        assert first.disk == second.disk
        store.remove("first")
        assert store.get("second") == second
        store.remove("second")
        assert whole(store) == ["names", "sha256"]

    def test_adding_the_same_again_changes_nothing(self, store: ImageStore, disk: Path) -> None:
        first = store.add(disk, name="mine")
        assert store.add(disk, name="mine") == first

    def test_a_disk_that_is_stored_to_boot_in_another_way_is_not_passed_off_as_the_new_one(self, store: ImageStore, disk: Path) -> None:
        store.add(disk, name="mine")
        with pytest.raises(CatalogError, match="vmbottle image rm mine"):
            store.add(disk, name="other", kernel=disk, cmdline=CMDLINE)
        assert store.names() == ("mine",)

    def test_a_name_is_taken_from_another_image_only_on_request(self, store: ImageStore, disk: Path) -> None:
        old = store.add(disk, name="mine")
        disk.write_bytes(raw(fill=b"new"))
        with pytest.raises(CatalogError, match="vmbottle image rm mine"):
            store.add(disk, name="mine")
        assert store.get("mine") == old
        new = store.add(disk, name="mine", replace=True)
        assert store.get("mine") == new != old
        assert not old.disk.exists()

    @pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-x", "a/b", "../a", "a b", "é", "a\n", "a\0", "x" * 101])
    def test_a_name_that_is_no_plain_word_is_refused(self, store: ImageStore, disk: Path, name: str) -> None:
        with pytest.raises(CatalogError):
            store.add(disk, name=name)
        assert store.get(name) is None
        assert not store.root.exists()

    @pytest.mark.parametrize("prefix", ["", "sha256:"])
    def test_the_demanded_digest_is_compared(self, store: ImageStore, disk: Path, prefix: str) -> None:
        actual = hashlib.sha256(disk.read_bytes()).hexdigest()
        with pytest.raises(CatalogError) as caught:
            store.add(disk, name="mine", sha256=prefix + "0" * 64)
        assert actual in str(caught.value)
        assert "0" * 64 in str(caught.value)
        assert whole(store) == ["sha256"]
        assert store.add(disk, name="mine", sha256=prefix + actual.upper()).sha256 == actual

    def test_a_digest_that_is_none_is_refused(self, store: ImageStore, disk: Path) -> None:
        with pytest.raises(CatalogError, match="'abc'"):
            store.add(disk, name="mine", sha256="abc")

    @pytest.mark.timeout(20)
    def test_what_is_not_even_a_file_is_refused_without_waiting_for_it(self, store: ImageStore, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path, reason in ((tmp_path / "pipe", "pipe"), (tmp_path, tmp_path.name), (tmp_path / "none", "No such file")):
            with pytest.raises(CatalogError, match=reason) as caught:
                store.add(path, name="mine")
            assert str(path) in str(caught.value)
            with pytest.raises(CatalogError, match=reason):
                store.import_path(path)
        assert store.names() == ()

    def test_a_file_that_is_not_a_disk_image_leaves_nothing(self, store: ImageStore, tmp_path: Path) -> None:
        path = tmp_path / "notes.txt"
        path.write_text("no disk")
        with pytest.raises(CatalogError, match=r"notes\.txt"):
            store.add(path, name="mine")
        assert whole(store) == ["sha256"]

    def test_a_qcow2_with_a_backing_file_is_refused_before_any_tool_could_follow_it(self, store: ImageStore, tmp_path: Path) -> None:
        path = tmp_path / "evil.qcow2"
        path.write_bytes(qcow2(backing_at=112, backing_len=11) + b"/etc/shadow" + bytes(MIB))
        with pytest.raises(CatalogError, match="backing file"):
            store.add(path, name="mine")
        with pytest.raises(CatalogError, match="backing file"):
            store.import_path(path)

    def test_a_full_or_closed_file_system_is_a_sentence(self, disk: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(CatalogError, match="File exists"):
            ImageStore(tmp_path / "file" / "images").add(disk, name="mine")

    def test_removing_an_unknown_name_says_which_there_are(self, store: ImageStore, disk: Path) -> None:
        with pytest.raises(CatalogError, match="debian-12"):
            store.remove("debian-12")
        store.add(disk, name="debian-12")
        with pytest.raises(CatalogError, match="'debian-12'"):
            store.remove("debain-12")
        with pytest.raises(CatalogError, match=r"'\.\./names/debian-12'"):
            store.remove("../names/debian-12")
        assert store.names() == ("debian-12",)

    def test_an_image_that_is_held_stays_whatever_becomes_of_its_name(self, store: ImageStore, tmp_path: Path) -> None:
        images = {}
        with Holds() as holds:
            for fill in (b"removed", b"replaced", b"kept"):
                (tmp_path / "disk").write_bytes(raw(fill=fill))
                images[fill] = store.add(tmp_path / "disk", name="mine", replace=True)
                holds.take(images[fill].disk.parent)
                if fill == b"removed":
                    store.remove("mine")
            store.sweep()
            for fill, image in images.items():
                assert fill in image.disk.read_bytes()
        store.sweep()
        assert [image.disk.exists() for image in images.values()] == [False, False, True]

    def test_the_same_disk_of_which_more_is_known_stands_beside_the_one_that_is_held(self, store: ImageStore, disk: Path) -> None:
        old = store.add(disk, name="mine")
        with Holds() as holds:
            holds.take(old.disk.parent)
            new = store.add(disk, name="mine", traits=Traits(user="admin"), replace=True)
            assert new.disk != old.disk
            assert old.disk.read_bytes() == new.disk.read_bytes()
            assert store.get("mine") == new
            store.verify("mine")
        store.sweep()
        assert not old.disk.exists()
        assert store.get("mine") == new

    @pytest.mark.parametrize(
        ("content", "keyword"),
        [
            (b"conectix" + raw()[8:], "VHD"),
            (raw() + b"conectix".ljust(512, b"\0"), "VHD"),
            (b"LUKS\xba\xbe" + raw()[6:], "LUKS"),
            (raw() + b"x", "multiple"),
        ],
        ids=["dynamic VHD", "fixed VHD", "LUKS", "odd size"],
    )
    def test_what_is_no_disk_is_called_by_its_name(self, store: ImageStore, tmp_path: Path, content: bytes, keyword: str) -> None:
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(CatalogError, match=keyword):
            store.add(tmp_path / "file", name="mine")

    @pytest.mark.parametrize("options", [(), ("-o", "extended_l2=on,cluster_size=16k"), ("-c",), ("-o", "compat=0.10")])
    def test_a_qcow2_that_was_cut_off_is_refused_and_a_whole_one_is_not(
        self, store: ImageStore, tmp_path: Path, options: tuple[str, ...]
    ) -> None:
        plain, path = tmp_path / "plain", tmp_path / "file"
        plain.write_bytes(os.urandom(4 * MIB))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, plain, path], check=True)
        assert store.add(path, name="whole").format == "qcow2"
        os.truncate(path, path.stat().st_size - MIB)
        with pytest.raises(CatalogError, match="whole"):
            store.add(path, name="mine")
        with pytest.raises(CatalogError, match="whole"):
            store.import_path(path)

    def test_holes_stay_holes(self, store: ImageStore, tmp_path: Path) -> None:
        path = tmp_path / "sparse.img"
        path.write_bytes(raw())
        os.truncate(path, 64 * MIB)
        image = store.add(path, name="mine")
        assert image.disk.stat().st_size == 64 * MIB
        assert image.disk.stat().st_blocks * 512 < 2 * MIB

    def test_what_a_killed_process_left_half_done_goes_when_its_owner_is_known_to_be_dead(
        self, store: ImageStore, disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pytest_vmbottle.images.store._FRESH", 0)
        with store.staging() as alive:
            (store.root / "sha256" / ".new-dead").mkdir()
            image = store.add(disk, name="mine")
            assert {path.name for path in alive.parent.iterdir()} == {alive.name, image.sha256}

    def test_what_has_just_been_made_is_not_taken_for_abandoned(self, store: ImageStore, disk: Path) -> None:
        with store.staging() as folder:
            (folder.parent / ".new-young").mkdir()
            store.add(disk, name="mine")
            assert (folder.parent / ".new-young").exists()

    def test_many_can_add_and_remove_at_once(self, tmp_path: Path, disk: Path) -> None:
        errors: list[BaseException] = []

        def work(number: int) -> None:
            store = ImageStore(tmp_path / "images")
            try:
                for _ in range(5):
                    image = store.add(disk, name=f"n{number}")
                    assert image.disk.read_bytes() == disk.read_bytes()
                    store.remove(f"n{number}")
            except BaseException as error:  # reported below
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert whole(ImageStore(tmp_path / "images")) == ["names", "sha256"]


def rewrite(folder: Path, **changes: object) -> None:
    record = folder / "image.json"
    record.chmod(0o600)
    records.write(record, records.read(record) | changes)


def rename_disk(folder: Path, name: str, **changes: object) -> None:
    files = records.read(folder / "image.json")["files"]
    rewrite(folder, files={name if part == "disk.raw" else part: entry | changes for part, entry in files.items()})


def replace_file(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def link_disk(folder: Path) -> None:
    (folder / "disk.raw").rename(folder / "moved")
    (folder / "disk.raw").symlink_to("moved")


# What can befall the folder of an image named "mine".
DAMAGE: dict[str, Callable[[Path], object]] = {
    "file missing": lambda folder: (folder / "disk.raw").unlink(),
    "file cut": lambda folder: replace_file(folder / "disk.raw", bytes(4096)),
    "file is a link": link_disk,
    "folder missing": shutil.rmtree,
    "name leads out": lambda folder: (folder.parent.parent / "names" / "mine.json").write_text('{"sha256": "../../etc"}'),
    "name is a list": lambda folder: (folder.parent.parent / "names" / "mine.json").write_text("[]"),
    "another disk": lambda folder: rename_disk(folder, "disk.raw", sha256="0" * 64),
    "strange file": lambda folder: rename_disk(folder, "../disk"),
    "no disk": lambda folder: rename_disk(folder, "disk.qcow2"),
    "wrong type": lambda folder: rewrite(folder, virtual_size="8G"),
    "unknown field": lambda folder: rewrite(folder, surprise=1),
    "empty": lambda folder: replace_file(folder / "image.json", b""),
    "not JSON": lambda folder: replace_file(folder / "image.json", b"\xff{"),
    "deep": lambda folder: replace_file(folder / "image.json", b"[" * 100_000),
}


@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_change_waits_for_one_that_is_under_way(store: ImageStore, disk: Path, tmp_path: Path, change: str) -> None:
    store.add(disk, name="mine")
    other = tmp_path / "other.img"
    other.write_bytes(raw(fill=b"other"))
    work = {"add": lambda: store.add(other, name="other"), "remove": lambda: store.remove("mine")}[change]
    thread = threading.Thread(target=work)
    with store._exclusive():
        before = store.names()
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert store.names() == before
    thread.join()
    assert store.names() != before


class TestDamage:
    @pytest.fixture
    def image(self, store: ImageStore, disk: Path) -> Image:
        return store.add(disk, name="mine", kernel=disk, cmdline=CMDLINE)

    def test_a_sound_image_is_verified(self, store: ImageStore, image: Image) -> None:
        store.verify("mine")
        assert store.get("mine") == image

    @pytest.mark.parametrize("part", ["disk.raw", "vmlinuz"])
    def test_a_flipped_bit_is_found_in_the_file_it_is_in(self, store: ImageStore, image: Image, part: str) -> None:
        path = image.disk.parent / part
        path.chmod(0o600)
        with path.open("r+b") as file:
            file.seek(5000)
            file.write(b"\1")
        with pytest.raises(CatalogError, match=part):
            store.verify("mine")

    def test_verifying_an_unknown_name_says_which_there_are(self, store: ImageStore, image: Image) -> None:
        with pytest.raises(CatalogError, match="'mine'"):
            store.verify(image.name + "s")

    @pytest.mark.parametrize("how", DAMAGE)
    def test_a_damaged_image_says_how_to_get_rid_of_it_and_that_works(self, store: ImageStore, image: Image, disk: Path, how: str) -> None:
        DAMAGE[how](image.disk.parent)
        for look in (lambda: store.get("mine"), lambda: store.verify("mine"), store.list):
            with pytest.raises(CatalogError, match="vmbottle image rm mine"):
                look()
        assert store.names() == ("mine",)
        store.remove("mine")
        assert whole(store) == ["names", "sha256"]
        assert store.add(disk, name="mine").sha256 == image.sha256

    def test_no_files_are_deleted_while_a_damaged_name_may_stand_for_them(self, store: ImageStore, image: Image, tmp_path: Path) -> None:
        other = tmp_path / "other.img"
        other.write_bytes(raw(fill=b"other"))
        store.add(other, name="other")
        DAMAGE["name is a list"](image.disk.parent)
        store.remove("other")
        assert image.disk.exists()

    def test_a_damaged_image_is_not_used_for_a_new_name(self, store: ImageStore, image: Image, disk: Path) -> None:
        DAMAGE["not JSON"](image.disk.parent)
        with pytest.raises(CatalogError, match="vmbottle image rm mine"):
            store.add(disk, name="other", kernel=disk, cmdline=CMDLINE)


class TestUseInPlace:
    def test_a_disk_is_used_where_it_is(self, store: ImageStore, disk: Path) -> None:
        image = store.import_path(disk)
        assert image.disk == disk
        assert image.sha256 == hashlib.sha256(disk.read_bytes()).hexdigest()
        assert (image.name, image.format, image.virtual_size, image.kernel) == (str(disk), "raw", MIB, None)
        assert store.names() == ()

    def test_it_is_the_same_as_if_it_had_been_added(self, store: ImageStore, disk: Path) -> None:
        assert store.import_path(disk).key == store.add(disk, name="mine").key

    def test_a_relative_path_and_a_link_lead_to_the_file(self, store: ImageStore, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(disk.parent)
        Path("link.img").symlink_to(disk)
        assert store.import_path(Path("link.img")).disk == disk

    def test_its_digest_is_read_again_only_when_the_file_looks_different(
        self, store: ImageStore, disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[int] = []
        digest = digests.content_digest

        def counted(fd: int, *told: Any) -> str:
            read.append(fd)
            return digest(fd, *told)

        monkeypatch.setattr(store_module, "content_digest", counted)
        first = store.import_path(disk)
        assert store.import_path(disk) == first
        assert len(read) == 1
        disk.write_bytes(raw(fill=b"changed"))
        assert store.import_path(disk).sha256 != first.sha256
        assert len(read) == 2

    def test_a_damaged_note_of_its_digest_is_as_good_as_none(self, store: ImageStore, disk: Path) -> None:
        first = store.import_path(disk)
        (note,) = (store.root / "seen").iterdir()
        for content in ("", "[]", "{}", json.dumps(records.read(note) | {"sha256": "../x"})):
            note.write_text(content)
            assert store.import_path(disk) == first

    def test_a_store_that_cannot_be_written_to_costs_time_only(self, disk: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        assert ImageStore(tmp_path / "file" / "images").import_path(disk).disk == disk


DEB822 = """\
# the archive
Types: deb deb-src
URIs: http://deb.example.org/debian
# a comment between fields
Suites: bookworm bookworm-updates trixie
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://security.example.org
Suites: bookworm-security
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb-src
URIs: http://deb.example.org/debian
Suites: bookworm

Enabled: no
Types: deb
URIs: http://off.example.org/debian
Suites: bookworm

Types: deb
URIs: cdrom:[Debian]/
Suites: bookworm
Components: main

Types: deb
URIs: http://deb.example.org/other
Suites: bookwormish nodistro
"""

ONE_LINE = """\
# deb http://off.example.org/debian bookworm main
deb cdrom:[Debian]/ bookworm main
deb-src http://deb.example.org/debian bookworm main
deb [ arch=amd64 signed-by=/etc/apt/keyrings/vendor.gpg ] http://deb.example.org/debian bookworm main contrib # ours
deb http://deb.example.org/debian bookworm-updates main
deb http://deb.example.org/debian trixie main
"""


# What may stand beside Debian's own sources; a release's name in it does not make it Debian's.
BESIDE_DEB822 = """
Types: deb
URIs: http://security.debian.org/debian-security
Suites: bookworm-security bookworm-backports
Components: main non-free-firmware

Types: deb
URIs: http://vendor.example.org/linux/debian
Suites: bookworm
Components: main
Signed-By: /etc/apt/keyrings/vendor.asc
"""
BESIDE_ONE_LINE = """\
deb http://deb.example.org/debian/ bookworm main contrib non-free-firmware
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example.org/d bookworm-updates main
deb http://mirror.example.org/ bookworm-security main
deb [signed-by=/etc/apt/keyrings/vendor.gpg] http://vendor.example.org/debian bookworm main
deb http://packages.example.org/apt cloud-sdk-bookworm main
"""
VENDORS = """\
deb [signed-by=/usr/share/keyrings/vendor.gpg] http://vendor.example.org/debian bookworm main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg,/etc/apt/keyrings/vendor.gpg] http://both.example.org/debian bookworm main
deb http://vendor.example.org/linux/debian bookworm stable
deb http://vendor.example.org/apt bookworm main
deb http://[vendor bookworm main
deb http://vendor.example.org/debian bookworm-pgdg main
deb http://vendor.example.org/debian nodistro main
"""


class TestSources:
    @pytest.fixture
    def apt(self, tmp_path: Path) -> Path:
        (tmp_path / "apt" / "sources.list.d").mkdir(parents=True)
        return tmp_path / "apt"

    def test_of_a_deb822_file_the_suite_and_its_updates_are_taken(self, apt: Path) -> None:
        (apt / "sources.list.d" / "debian.sources").write_text(DEB822)
        assert apt_sources("bookworm", apt) == {
            "debian.sources": "Types: deb\nUris: http://deb.example.org/debian\nSuites: bookworm bookworm-updates\nComponents: main\n"
            "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n"
            "Types: deb\nUris: http://security.example.org\nSuites: bookworm-security\nComponents: main contrib\n"
            "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n -----END PGP PUBLIC KEY BLOCK-----\n"
        }

    def test_of_one_line_files_the_suite_and_its_updates_are_taken(self, apt: Path) -> None:
        (apt / "sources.list").write_text(ONE_LINE)
        (apt / "sources.list.d" / "more.list").write_text("deb http://more.example.org bookworm main\n")
        (apt / "sources.list.d" / "more.list.off").write_text("deb http://off.example.org bookworm main\n")
        sources = apt_sources("bookworm", apt)
        assert sources == {
            "debian.list": "deb [ arch=amd64 signed-by=/etc/apt/keyrings/vendor.gpg ] http://deb.example.org/debian bookworm main contrib\n"
            "deb http://deb.example.org/debian bookworm-updates main\n"
            "deb http://more.example.org bookworm main\n"
        }
        assert keyrings(sources.values()) == {Path("/etc/apt/keyrings/vendor.gpg")}

    @pytest.mark.parametrize("suite", ["noble", "trixie-security"])
    def test_a_host_of_another_distribution_has_none(self, apt: Path, suite: str) -> None:
        (apt / "sources.list.d" / "debian.sources").write_text(DEB822)
        (apt / "sources.list").write_text(ONE_LINE)
        assert apt_sources(suite, apt) == {}

    def test_deb822_sources_of_one_debian_release_serve_another(self, apt: Path) -> None:
        (apt / "sources.list.d" / "debian.sources").write_text(DEB822.replace(" trixie", "") + BESIDE_DEB822)
        assert apt_sources("trixie", apt) == {
            "debian.sources": "Types: deb\nUris: http://deb.example.org/debian\nSuites: trixie trixie-updates\nComponents: main\n"
            "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n"
            "Types: deb\nUris: http://security.debian.org/debian-security\nSuites: trixie-security\n"
            "Components: main non-free-firmware\n"
        }

    def test_one_line_sources_of_one_debian_release_serve_another(self, apt: Path) -> None:
        (apt / "sources.list").write_text(BESIDE_ONE_LINE)
        assert apt_sources("trixie", apt) == {
            "debian.list": "deb http://deb.example.org/debian/ trixie main contrib non-free-firmware\n"
            "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example.org/d trixie-updates main\n"
        }

    def test_sources_of_the_release_itself_go_before_those_of_another(self, apt: Path) -> None:
        (apt / "sources.list").write_text("deb http://a.example.org/debian bookworm main\ndeb http://b.example.org/debian trixie main\n")
        assert apt_sources("trixie", apt) == {"debian.list": "deb http://b.example.org/debian trixie main\n"}
        assert apt_sources("bookworm", apt) == {"debian.list": "deb http://a.example.org/debian bookworm main\n"}

    def test_sources_that_others_keep_for_a_debian_release_do_not_serve_another(self, apt: Path) -> None:
        (apt / "sources.list").write_text(VENDORS)
        assert apt_sources("trixie", apt) == {}

    def test_updates_alone_are_not_enough_to_build_from(self, apt: Path) -> None:
        (apt / "sources.list").write_text("deb http://deb.example.org/debian bookworm-updates main\n")
        assert apt_sources("bookworm", apt) == {}

    def test_a_host_without_apt_has_none(self, tmp_path: Path) -> None:
        assert apt_sources("bookworm", tmp_path / "none") == {}

    @given(text=st.text(max_size=300))
    def test_any_text_can_be_read(self, text: str) -> None:
        from pytest_vmbottle.images import apt

        found = [*apt._lines(text), *apt._stanzas(text)]
        assert all(suite in source.text for source in found for suite in source.suites)
        assert apt._of_another_release(found, "noble") == []

    def test_without_sources_the_archives_keys_are_needed(self, tmp_path: Path) -> None:
        recipe = attrs.evolve(RECIPES["debian-12"], keyring=(tmp_path / "keys.gpg", "some-keyring"))
        with pytest.raises(BackendUnavailable) as caught:
            building._default_keyring(recipe)
        assert caught.value.remedy == "sudo apt-get install some-keyring"
        recipe.keyring[0].write_bytes(b"")
        assert building._default_keyring(recipe) == f"--keyring={tmp_path / 'keys.gpg'}"

    def test_foreign_keys_go_into_the_guest(self, tmp_path: Path) -> None:
        key = tmp_path / "vendor.gpg"
        key.write_bytes(b"key")
        text = f"deb [signed-by={key}] http://x bookworm main\nSigned-By: {RECIPES['debian-12'].keyring[0]}\nSigned-By: /none.gpg\n"
        assert building._foreign_keys([text], RECIPES["debian-12"]) == {str(key)[1:]: b"key"}


class TestBuilding:
    def test_debian_12_and_13_can_be_built(self) -> None:
        assert can_build("debian-12")
        assert can_build("debian-13")
        assert not can_build("windows-95")

    @pytest.mark.parametrize(
        ("recipe", "options", "reason"),
        [
            ("windows-95", {}, "'windows-95'"),
            ("debian-12", {"name": "../x"}, "'../x'"),
            ("debian-12", {"include": ["nginx;reboot"]}, "'nginx;reboot'"),
            ("debian-12", {"include": ["--option"]}, "'--option'"),
            ("debian-12", {"include": ["a,b"]}, "'a,b'"),
            ("debian-12", {"include": ["/etc/shadow"]}, "'/etc/shadow'"),
        ],
    )
    def test_nonsense_is_refused_before_anything_is_done(
        self, store: ImageStore, recipe: str, options: dict[str, object], reason: str
    ) -> None:
        with pytest.raises(CatalogError, match=reason):
            build(store, recipe, **options)  # type: ignore[arg-type]  # what is refused
        assert not store.root.exists()

    def test_a_missing_tool_is_named_with_the_command_that_brings_it(
        self, store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(building._TOOLS, "no-such-tool", "its-package")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with pytest.raises(BackendUnavailable) as caught:
            build(store, "debian-12")
        assert "no-such-tool" in caught.value.reason
        assert caught.value.remedy.startswith("sudo apt-get install ")
        assert "its-package" in caught.value.remedy
        assert list(tmp_path.iterdir()) == []

    def test_a_temporary_folder_that_is_too_small_is_refused(
        self, store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for tools in (building._TOOLS, building._ROOT_TOOLS, building._USER_TOOLS):
            for tool in list(tools):
                monkeypatch.delitem(tools, tool)
        monkeypatch.setattr(building, "_NEEDED_SPACE", 1 << 70)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with pytest.raises(BackendUnavailable, match="TMPDIR"):
            build(store, "debian-12")
        assert list(tmp_path.iterdir()) == []

    def test_a_user_without_subordinate_ids_is_told_how_to_get_some_that_nobody_has(self, tmp_path: Path) -> None:
        files = tmp_path / "subuid", tmp_path / "subgid"
        user = pwd.getpwuid(os.geteuid()).pw_name
        files[0].write_text(f"somebody:100000:65536\n{user}:300000:65536\nnonsense\n")
        files[1].write_text("somebody:100000:65536\n")
        missing = building._no_namespaces("", files)
        assert missing.remedy == f"sudo usermod --add-subuids 365536-431071 --add-subgids 365536-431071 {user}"
        files[1].write_text(f"{os.geteuid()}:300000:65536\n")
        assert "its words" in building._no_namespaces("its words", files).reason
        files[0].unlink()
        assert "subordinate" in building._no_namespaces("", files).reason

    def test_a_user_without_a_name_gets_subordinate_ids_by_number(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = tmp_path / "subuid", tmp_path / "subgid"
        monkeypatch.setattr(os, "geteuid", lambda: 2_000_000_001)
        files[0].write_text("somebody:100000:65536\n")
        remedy = building.without_ids(files)
        assert remedy == " && ".join(f"echo 2000000001:165536:65536 | sudo tee -a {file}" for file in files)
        for file in files:
            file.write_text("2000000001:165536:65536\n")
        assert building.without_ids(files) is None

    def test_an_architecture_without_a_recipe_is_refused(self, store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(building, "host_arch", lambda: "m68k")
        with pytest.raises(BackendUnavailable, match="m68k"):
            build(store, "debian-12")

    @pytest.mark.parametrize(
        ("script", "written"),
        [("useradd web\n", "#!/bin/sh -eu\nuseradd web\n"), ("#!/usr/bin/python3\n'$(id)'", "#!/usr/bin/python3\n'$(id)'")],
    )
    def test_a_script_goes_into_the_system_as_a_file_and_never_through_a_shell_of_the_host(
        self, tmp_path: Path, script: str, written: str
    ) -> None:
        folder = tmp_path / "it's $(a) folder"
        folder.mkdir()
        hooks = building._run_in(building._Workshop(folder, print), script)
        assert hooks == [
            f"--customize-hook=tar-in {shlex.quote(str(folder / 'script.tar'))} /",
            f'--customize-hook=sh -eu {shlex.quote(str(folder / "run-script"))} "$1"',
        ]
        with tarfile.open(folder / "script.tar") as tar:
            (member,) = tar
            content = tar.extractfile(member)
            assert content is not None
            assert (member.name, member.mode, content.read().decode()) == ("vmbottle-script", 0o700, written)

    def test_the_overlay_belongs_to_root_and_has_the_folders_it_needs(self, tmp_path: Path) -> None:
        building._write_tar(tmp_path / "x.tar", {"etc/a/b.conf": "text\n"}, {"etc/unit": "/dev/null"})
        with tarfile.open(tmp_path / "x.tar") as tar:
            members = {member.name: (member.type, member.mode, member.uid, member.gid, member.linkname) for member in tar}
            content = tar.extractfile("etc/a/b.conf")
            assert content is not None
            assert content.read() == b"text\n"
        assert members == {
            "etc": (tarfile.DIRTYPE, 0o755, 0, 0, ""),
            "etc/a": (tarfile.DIRTYPE, 0o755, 0, 0, ""),
            "etc/a/b.conf": (tarfile.REGTYPE, 0o644, 0, 0, ""),
            "etc/unit": (tarfile.SYMTYPE, 0o777, 0, 0, "/dev/null"),
        }


class TestTools:
    @pytest.fixture
    def said(self) -> list[str]:
        return []

    @pytest.fixture
    def shop(self, tmp_path: Path, said: list[str]) -> building._Workshop:
        return building._Workshop(tmp_path, said.append)

    def test_a_tool_that_fails_is_an_error_with_the_end_of_its_output(self, shop: building._Workshop) -> None:
        script = "for n in $(seq 99); do echo line $n; done; printf 'E: \\033[31mbad\\n' >&2; exit 3"
        with pytest.raises(CatalogError) as caught:
            shop.run("sh", "-c", script)
        message = str(caught.value)
        assert "status 3" in message
        assert "line 99\nE:  [31mbad" in message
        assert "line 9\n" not in message

    def test_the_steps_of_mmdebstrap_are_passed_on_in_plain_words(self, shop: building._Workshop, said: list[str]) -> None:
        for line in ("I: automatically chosen mode: root", "I: running apt-get update...", "I: done", "W: extracting archives"):
            shop._report(line)
        assert said == ["reading the package lists"]

    @pytest.mark.timeout(60)
    @pytest.mark.parametrize("trap", ["", "trap '' TERM;"])
    def test_an_interrupted_tool_takes_all_that_it_started_with_it(
        self, shop: building._Workshop, trap: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(building, "_UNMOUNTING", 0.5)
        pids: list[int] = []

        def interrupt(line: str) -> None:
            pids.extend(int(word) for word in line.split())
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            shop.run("sh", "-c", f"{trap} sleep 300 & echo $$ $!; wait; sleep 300", on_line=interrupt)
        assert len(pids) == 2
        assert [pid for pid in pids if _runs(pid)] == []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("answer", "command"), [("exit 1", building._LEASH), ("exit 0", building._NAMESPACES)])
def test_namespaces_are_used_where_they_are_to_be_had(
    answer: str, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "unshare"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    assert building._Workshop(tmp_path, lambda _: None)._namespaces() == command


def test_reading_a_large_disk_tells_how_far_it_is_and_keeps_its_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_EVERY", 0.0)
    path, store = tmp_path / "sparse.raw", ImageStore(tmp_path / "store")
    added, verified, in_place = list[str](), list[str](), list[str]()
    with path.open("wb") as file:
        file.write(bytes(510) + b"\x55\xaa")
        file.truncate(16 << 20)
    image = store.add(path, name="sparse", progress=added.append)
    store.verify("sparse", progress=verified.append)
    store.import_path(path, progress=in_place.append)

    assert all(any("%" in line for line in lines) for lines in (added, verified, in_place))
    assert image.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert image.disk.stat().st_blocks * 512 < 1 << 20
