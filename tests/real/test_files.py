"""Paths and copies in a real guest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_vmbottle import Machine, TransferError

pytestmark = pytest.mark.vm("debian-12")


@pytest.fixture
def place(either: Machine) -> str:
    """A folder in the guest for one test."""
    return either.exec(["mktemp", "-d", "/root/t.XXXXXX"]).stdout.strip()


def test_a_written_file_is_read_back_byte_for_byte(either: Machine, place: str) -> None:
    path = either.path(place) / "a file's näme\n with $things"
    data = bytes(range(256)) * 9
    assert path.write_bytes(data) == len(data)
    assert path.read_bytes() == data
    assert path.write_text("grüße\n") == 6
    assert path.read_text() == "grüße\n"
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_new_file_has_the_mode_of_a_new_file_and_an_old_one_keeps_its_own(either: Machine, place: str) -> None:
    path = either.path(place) / "f"
    path.write_text("x")
    either.exec(["chmod", "750", str(path)])
    path.write_text("y")
    (path.parent / "new").write_text("z")
    (path.parent / "secret").write_text("z", mode=0o600)
    modes = either.exec(["stat", "-c", "%n %a", "f", "new", "secret"], cwd=place).stdout
    assert modes == "f 750\nnew 644\nsecret 600\n"


def test_paths_raise_what_pathlib_raises(either: Machine, place: str) -> None:
    folder = either.path(place)
    with pytest.raises(FileNotFoundError):
        (folder / "none").read_text()
    with pytest.raises(FileNotFoundError):
        (folder / "none" / "deeper").write_text("x")
    with pytest.raises(IsADirectoryError):
        folder.read_bytes()
    with pytest.raises(IsADirectoryError):
        folder.write_text("x")
    with pytest.raises(FileNotFoundError):
        (folder / "none").unlink()
    with pytest.raises(IsADirectoryError):
        folder.unlink()
    with pytest.raises(FileNotFoundError):
        (folder / "a" / "b").mkdir()
    with pytest.raises(FileExistsError):
        folder.mkdir()
    with pytest.raises(NotADirectoryError):
        list(either.path("/etc/hostname").iterdir())
    with pytest.raises(ValueError, match="absolute"):
        either.path("relative")


def test_folders_are_made_listed_and_emptied(either: Machine, place: str) -> None:
    folder = either.path(place) / "a" / "b"
    folder.mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    (folder / "-dash").write_text("1")
    (folder / "line\nbreak").write_text("2")
    assert {each.name for each in folder.iterdir()} == {"-dash", "line\nbreak"}
    (folder / "-dash").unlink()
    (folder / "-dash").unlink(missing_ok=True)
    assert not (folder / "-dash").exists()
    assert folder.is_dir()


def _tree(root: Path) -> Path:
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "run.sh").write_bytes(b"#!/bin/sh\necho ran\n")
    (root / "run.sh").chmod(0o755)
    (root / "sub" / "näme with space").write_bytes(os.urandom(3000))
    (root / "sub" / "secret").write_text("s")
    (root / "sub" / "secret").chmod(0o600)
    (root / "link").symlink_to("sub/secret")
    (root / "dangling").symlink_to("/nowhere/at all")
    return root


def _facts(root: Path) -> dict[str, object]:
    facts: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            facts[name] = f"-> {path.readlink()}"
        else:
            facts[name] = (oct(path.stat().st_mode), path.read_bytes() if path.is_file() else None)
    return facts


def test_a_tree_survives_the_way_there_and_back_with_modes_and_links(either: Machine, place: str, tmp_path: Path) -> None:
    tree = _tree(tmp_path / "tree")
    either.cp(tree, either.path(place) / "there")
    assert either.exec([f"{place}/there/run.sh"]).stdout == "ran\n"
    assert either.exec(["cat", f"{place}/there/link"]).stdout == "s"
    either.cp(either.path(place) / "there", tmp_path / "back")
    assert _facts(tmp_path / "back") == _facts(tree)
    assert [path.name for path in either.path(place).iterdir()] == ["there"]


def test_a_folder_as_destination_means_a_place_in_it(either: Machine, place: str, tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("content")
    either.cp(tmp_path / "f.txt", either.path(place))
    assert (either.path(place) / "f.txt").read_text() == "content"
    (tmp_path / "into").mkdir()
    either.cp(either.path(place) / "f.txt", tmp_path / "into")
    assert (tmp_path / "into" / "f.txt").read_text() == "content"


def test_copying_a_tree_onto_one_that_is_there_adds_to_it(either: Machine, place: str, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "new").write_text("new")
    (tmp_path / "t" / "both").write_text("from the host")
    there = either.path(place) / "t"
    there.mkdir()
    (there / "old").write_text("old")
    (there / "both").write_text("from the guest")
    either.cp(tmp_path / "t", either.path(place))
    assert {path.name: path.read_text() for path in there.iterdir()} == {"new": "new", "old": "old", "both": "from the host"}


def test_a_large_file_arrives_whole_both_ways(session_vm: Machine, tmp_path: Path) -> None:
    data = os.urandom(5 << 20)
    (tmp_path / "large").write_bytes(data)
    session_vm.cp(tmp_path / "large", session_vm.path("/root/large"))
    session_vm.cp(session_vm.path("/root/large"), tmp_path / "again")
    session_vm.path("/root/large").unlink()
    assert (tmp_path / "again").read_bytes() == data


def test_a_disk_that_fills_up_leaves_no_part_of_a_file(either: Machine, place: str, tmp_path: Path) -> None:
    either.exec(["mount", "-t", "tmpfs", "-o", "size=1m", "small", place])
    try:
        (tmp_path / "large").write_bytes(bytes(2 << 20))
        with pytest.raises(TransferError, match="No space left"):
            either.cp(tmp_path / "large", either.path(place) / "large")
        (tmp_path / "tree").mkdir()
        (tmp_path / "tree" / "large").write_bytes(os.urandom(2 << 20))
        with pytest.raises(TransferError, match="No space left"):
            either.cp(tmp_path / "tree", either.path(place) / "tree")
        assert list(either.path(place).iterdir()) == []
    finally:
        either.exec(["umount", place])


def test_copies_that_cannot_be_say_so(either: Machine, place: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        either.cp(tmp_path / "none", either.path(place))
    with pytest.raises(FileNotFoundError):
        either.cp(either.path(place) / "none", tmp_path)
    with pytest.raises(FileNotFoundError):
        either.cp(either.path("/etc/hostname"), tmp_path / "no" / "where")
    with pytest.raises(TypeError, match="exactly one side"):
        either.cp(tmp_path, tmp_path)
    with pytest.raises(TransferError, match="neither a file nor a folder"):
        either.cp(either.path("/dev/null"), tmp_path / "null")
    assert list(tmp_path.iterdir()) == []
