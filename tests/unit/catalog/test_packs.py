"""A pack is what was published, to the last bit, or it is refused."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_vmbottle import PackCorrupt
from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.packs import Manifest

FILES = ["disk.qcow2", "ram.img", "state.bin"]
LENGTHS = {"disk.qcow2": 5000, "ram.img": 1 << 20, "state.bin": 1}


def make(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "disk.qcow2").write_bytes(b"disk" * 1250)
    (folder / "state.bin").write_bytes(b"s")
    with (folder / "ram.img").open("wb") as ram:  # sparse, as the RAM of a machine is
        ram.truncate(1 << 20)
        os.pwrite(ram.fileno(), b"kernel", 300_000)
        os.pwrite(ram.fileno(), b"nonce", (1 << 20) - 5)
    manifest = Manifest(
        key=folder.name, kind="template", name="web", parent=None, image="0" * 64, backend="fake 1", memory=1 << 20, disk_size=5000
    )
    packs.seal(folder, attrs.evolve(manifest, **changes))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("packs") / "key")


def test_what_was_sealed_is_read_back_and_verified(tmp_path: Path) -> None:
    folder = make(tmp_path / "key", parent="below", parent_seal="seal")
    pack = packs.read(folder)
    pack.verify()

    assert (pack.key, pack.manifest.kind, pack.manifest.parent, pack.manifest.parent_seal) == ("key", "template", "below", "seal")
    assert sorted(pack.manifest.files) == FILES
    assert 0 < pack.size < 1 << 20
    assert pack.stamp() == packs.read(folder).stamp()


def test_a_sealed_pack_is_private_and_not_writable_but_for_the_ram_that_qemu_opens(tmp_path: Path) -> None:
    folder = make(tmp_path / "key")

    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        "disk.qcow2": 0o400,
        "pack.json": 0o400,
        "ram.img": 0o600,
        "state.bin": 0o400,
    }


def test_a_pack_made_again_with_other_content_has_the_same_key_and_another_seal(tmp_path: Path) -> None:
    first = packs.read(make(tmp_path / "a" / "key"))
    same = packs.read(make(tmp_path / "b" / "key"))
    other = tmp_path / "c" / "key"
    other.mkdir(parents=True)
    (other / "disk.qcow2").write_bytes(b"else")
    packs.seal(other, attrs.evolve(first.manifest, files={}))

    assert first.seal == same.seal
    assert packs.read(other).seal != first.seal
    assert packs.read(other).key == first.key


@settings(max_examples=150)
@given(st.sampled_from(FILES), st.data())
def test_one_changed_byte_anywhere_in_any_file_is_found(published: Path, name: str, data: st.DataObject) -> None:
    path = published / name
    at = data.draw(st.integers(0, LENGTHS[name] - 1))
    flip = data.draw(st.integers(1, 255))
    pack = packs.read(published)
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0o600)
    with path.open("r+b") as file:
        old = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([old[0] ^ flip]), at)
        try:
            with pytest.raises(PackCorrupt, match=re.escape(name)):
                pack.verify()
        finally:
            os.pwrite(file.fileno(), old, at)
            path.chmod(mode)
    pack.verify()


def _remove(pack: Path) -> None:
    (pack / "state.bin").unlink()


def _add(pack: Path) -> None:
    (pack / "extra").touch()


def _add_folder(pack: Path) -> None:
    (pack / "extra").mkdir()


def _truncate(pack: Path) -> None:
    os.truncate(pack / "ram.img", (1 << 20) - 4096)


def _lengthen(pack: Path) -> None:
    os.truncate(pack / "ram.img", (1 << 20) + 1)


def _empty(pack: Path) -> None:
    os.truncate(pack / "disk.qcow2", 0)


def _link(pack: Path) -> None:
    (pack / "disk.qcow2").rename(pack.parent / "elsewhere")
    (pack / "disk.qcow2").symlink_to(pack.parent / "elsewhere")


def _pipe(pack: Path) -> None:
    (pack / "disk.qcow2").unlink()
    os.mkfifo(pack / "disk.qcow2")


def _folder(pack: Path) -> None:
    (pack / "disk.qcow2").unlink()
    (pack / "disk.qcow2").mkdir()


@pytest.mark.parametrize("damage", [_remove, _add, _add_folder, _truncate, _lengthen, _empty, _link, _pipe, _folder])
def test_a_file_that_is_missing_or_extra_or_not_what_it_was_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = make(tmp_path / "key")
    damage(folder)

    with pytest.raises(PackCorrupt, match="key"):
        packs.read(folder).verify()


def test_a_glance_tells_a_file_that_was_touched_or_is_gone(tmp_path: Path) -> None:
    pack = packs.read(make(tmp_path / "key"))
    before = pack.stamp()
    os.utime(pack.path / "ram.img", ns=(1, 1))
    assert pack.stamp() != before
    (pack.path / "ram.img").unlink()

    with pytest.raises(PackCorrupt, match=r"ram\.img"):
        pack.stamp()


RECORD = {
    "format": 1,
    "key": "key",
    "kind": "template",
    "name": "web",
    "parent": None,
    "parent_seal": "",
    "image": "0",
    "backend": "fake",
    "memory": 1,
    "disk_size": 1,
    "created": 1.0,
    "files": {},
}


CHANGES: list[dict[str, Any]] = [
    {"format": 2},
    {"format": "x"},
    {"format": None},
    {"key": "other"},
    {"key": None},
    {"memory": "lots"},
    {"memory": None},
    {"memory": float("inf")},
    {"created": "yesterday"},
    {"created": []},
    {"files": []},
    {"files": None},
    {"files": 5},
    {"files": "x"},
]
NONSENSE = [
    *(b"", b"{", b"\xff\xfe", b"null", b"5", b"[]", b'"pack"', b"{}", b"[" * 100_000),
    *(json.dumps({**RECORD, **change}).encode() for change in CHANGES),
    *(json.dumps({key: value for key, value in RECORD.items() if key != gone}).encode() for gone in ("key", "kind", "name", "memory")),
]


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
def test_a_manifest_that_makes_no_sense_is_a_damaged_pack_and_nothing_else(tmp_path: Path, text: bytes) -> None:
    folder = tmp_path / "key"
    folder.mkdir()
    (folder / "pack.json").write_bytes(text)

    with pytest.raises(PackCorrupt, match="key"):
        packs.read(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(list(RECORD)), inner),
    max_leaves=10,
)


@settings(max_examples=300)
@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_manifest_raises_anything_but_that_its_pack_is_damaged(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed" / "key"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pack.json").write_bytes(text)

    with pytest.raises(PackCorrupt):
        packs.read(folder)


def test_a_folder_without_a_manifest_is_damaged_and_no_folder_is_no_pack(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()

    with pytest.raises(PackCorrupt, match=r"pack\.json"):
        packs.read(tmp_path / "key")
    with pytest.raises(FileNotFoundError):
        packs.read(tmp_path / "other")


def test_a_manifest_that_says_something_more_than_it_should_is_damaged(tmp_path: Path) -> None:
    folder = make(tmp_path / "key")
    path = folder / "pack.json"
    path.chmod(0o600)
    path.write_text(path.read_text().replace('"parent_seal"', '"parent_sea1"'))  # its default is what stood there

    with pytest.raises(PackCorrupt, match="key"):
        packs.read(folder)
