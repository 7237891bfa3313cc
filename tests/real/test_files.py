"""Paths and copies in a real guest."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_vmbottle import Machine, MachineDied, MachineSpec, TransferError

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


@pytest.mark.guests
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


@pytest.mark.guests
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


NAMES = st.binary(min_size=1, max_size=30).filter(lambda name: not set(b"/\0") & set(name) and name not in {b".", b".."})
_SLOW = settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.guests
@_SLOW
@given(files=st.dictionaries(NAMES, st.binary(max_size=200), min_size=5, max_size=20))
def test_files_of_any_name_and_content_are_in_the_guest_what_they_were(either: Machine, place: str, files: dict[bytes, bytes]) -> None:
    folder = either.path(place) / os.fsdecode(next(iter(files)))
    either.write_files({folder / os.fsdecode(name): content for name, content in files.items()}, clean=True)
    names = {os.fsencode(path.name) for path in folder.iterdir()}
    assert names == set(files)
    name, content = max(files.items())
    path = folder / os.fsdecode(name)
    assert path.read_bytes() == content
    assert path.hash("sha256") == hashlib.sha256(content).hexdigest()
    assert path.write_bytes(content * 2) == 2 * len(content)
    assert path.stat().st_size == 2 * len(content)


def test_the_verbs_of_pathlib_work_in_a_guest(either: Machine, place: str) -> None:
    folder = either.path(place) / os.fsdecode(b"\xff -n\n")
    (folder / "a" / "b").mkdir(mode=0o750, parents=True)
    file = folder / "a" / "file.txt"
    file.write_text("x", mode=0o640, owner="nobody:daemon")
    assert (file.owner(), file.group(), stat.S_IMODE(file.stat().st_mode)) == ("nobody", "daemon", 0o640)
    file.write_text("y")
    assert (file.owner(), stat.S_IMODE(file.stat().st_mode)) == ("nobody", 0o640)
    file.chown("daemon", "root")
    file.chmod(0o4711)
    assert (file.stat().st_uid, stat.S_IMODE(file.stat().st_mode)) == (1, 0o4711)
    moved = file.rename(folder / "moved.txt")
    (folder / "link").symlink_to("moved.txt")
    assert (folder / "link").is_symlink()
    assert str((folder / "link").readlink()) == "moved.txt"
    assert (folder / "link").is_file()
    (folder / "touched").touch(0o600)
    assert [path.name for path in folder.glob("*.txt")] == ["moved.txt"]
    assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == {"a", "a/b", "moved.txt", "link", "touched"}
    assert [(str(root.relative_to(folder)), dirs) for root, dirs, _ in folder.walk(depth=2)] == [(".", ["a"]), ("a", ["b"])]
    assert {entry.name: entry.type for entry in folder.scan()} == {"a": "dir", "link": "symlink", "moved.txt": "file", "touched": "file"}
    with pytest.raises(OSError, match="not empty") as failed:
        (folder / "a").rmdir()
    assert (failed.value.errno, failed.value.filename) == (errno.ENOTEMPTY, str(folder / "a"))
    folder.rmtree()
    assert not moved.exists()


@pytest.mark.guests
def test_what_root_may_not_do_either_says_why(either: Machine, place: str) -> None:
    folder = either.path(place)
    either.exec(["mount", "-t", "tmpfs", "-o", "size=1m", "small", place])
    try:
        (folder / "kept").write_text("kept")
        for write in (
            lambda: (folder / "kept").write_bytes(bytes(3 << 19)),
            lambda: either.write_files({f"{place}/n/kept": bytes(3 << 19)}),
        ):
            with pytest.raises(OSError, match="No space left") as full:
                write()
            assert full.value.errno == errno.ENOSPC
            assert full.value.filename in {f"{place}/kept", f"{place}/n/kept"}
        with pytest.raises(OSError, match="cross-device") as across:
            (folder / "kept").rename("/root/kept")
        assert across.value.errno == errno.EXDEV
        either.exec(["mount", "-o", "remount,ro", place])
        changes: list[Callable[[], None]] = [
            (folder / "kept").unlink,
            (folder / "new").mkdir,
            lambda: either.write_files({f"{place}/x": ""}),
        ]
        for change in changes:
            with pytest.raises(OSError, match="Read-only") as readonly:
                change()
            assert readonly.value.errno == errno.EROFS
        assert [path.read_text() for path in folder.iterdir()] == ["kept"]
    finally:
        either.exec(["umount", place])


def test_settings_of_the_kernel_are_written_in_place(either: Machine) -> None:
    setting = either.path("/proc/sys/vm/swappiness")
    before = setting.read_text()
    assert setting.write_text("42\n") == 3
    assert setting.read_text() == "42\n"
    setting.write_text(before)


@pytest.mark.guests
def test_a_path_has_the_rights_of_the_machines_user(session_vm: Machine, place_of_nobody: str) -> None:
    spec = MachineSpec(source="debian-12", user="nobody")
    theirs = Machine(session_vm.lifecycle.instance, spec, id=session_vm.id, backend="qemu", channel=session_vm.lifecycle.channel)
    own = theirs.path(place_of_nobody) / "own"
    own.write_text("mine")
    assert own.owner() == "nobody"
    for act in (
        theirs.path("/root/x").exists,
        theirs.path("/etc/shadow").read_text,
        lambda: theirs.path("/etc/hostname").write_text("x"),
        lambda: theirs.path("/etc/new").touch(),
        lambda: theirs.path("/etc/hostname").unlink(),
        lambda: theirs.path("/root").iterdir(),
        lambda: own.chown("root"),
        lambda: theirs.write_files({place_of_nobody + "/other": "", "/etc/new": ""}),
    ):
        with pytest.raises(PermissionError):
            act()
    assert list(theirs.path("/etc").rglob("*hadow"))
    assert [path.name for path in own.parent.iterdir()] == ["own"]


@pytest.fixture
def place_of_nobody(session_vm: Machine) -> str:
    """A folder that everybody may write."""
    folder = session_vm.exec(["mktemp", "-d"]).stdout.strip()
    session_vm.path(folder).chown("nobody")
    return folder


@pytest.mark.guests
def test_cleaning_refuses_what_a_guest_needs_and_stays_on_its_file_system(either: Machine, place: str) -> None:
    (either.path(place) / "etc").symlink_to("/etc")
    for path in ("/x", "/etc/x", "/usr/bin/x", "/var/lib/x", f"{place}/etc/x"):
        with pytest.raises(ValueError, match="clean=True"):
            either.write_files({path: "", f"{place}/other/y": ""}, clean=True)
    assert either.path("/etc/hostname").exists()
    assert not (either.path(place) / "other").exists()
    mounted = either.path(place) / "app" / "mounted"
    mounted.mkdir(parents=True)
    either.exec(["mount", "-t", "tmpfs", "small", str(mounted)])
    try:
        (mounted / "kept").write_text("kept")
        with pytest.raises(OSError, match="busy") as failed:
            either.write_files({mounted.parent / "x": ""}, clean=True)
        assert failed.value.errno == errno.EBUSY
        assert (mounted / "kept").exists()
    finally:
        either.exec(["umount", str(mounted)])


@pytest.mark.guests
def test_a_thousand_files_go_in_by_one_command(session_vm: Machine, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(os.urandom(2 << 20))
    files: dict[str, str | bytes | Path] = {f"/srv/many/{n % 10}/{n}": f"{n}\n" for n in range(1000)}
    session_vm.write_files({**files, "/srv/many/large": tmp_path / "large"}, owner="nobody", mode=0o600)
    root = session_vm.path("/srv/many")
    assert len(list(root.rglob("*"))) == 1011
    assert (root / "7" / "997").read_text() == "997\n"
    assert (root / "7").owner() == "nobody"
    assert (root / "large").hash() == hashlib.sha256((tmp_path / "large").read_bytes()).hexdigest()
    root.rmtree()


def test_a_machine_that_dies_in_the_middle_of_a_write_is_an_error_at_once(vm: Machine) -> None:
    vm.exec(["mkfifo", "/run/nobody-reads"])
    timer = threading.Timer(1.0, os.kill, (vm.pid, signal.SIGKILL))
    began = time.monotonic()
    timer.start()
    with pytest.raises(MachineDied):
        vm.path("/run/nobody-reads").write_text("x")
    assert time.monotonic() - began < 300, "not before the time-out of the write itself"
    with pytest.raises(MachineDied):
        vm.path("/etc/hostname").read_text()


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


@pytest.mark.guests
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


@pytest.mark.guests
def test_a_large_file_arrives_whole_both_ways(session_vm: Machine, tmp_path: Path) -> None:
    data = os.urandom(5 << 20)
    (tmp_path / "large").write_bytes(data)
    session_vm.cp(tmp_path / "large", session_vm.path("/root/large"))
    session_vm.cp(session_vm.path("/root/large"), tmp_path / "again")
    session_vm.path("/root/large").unlink()
    assert (tmp_path / "again").read_bytes() == data


@pytest.mark.guests
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
    with pytest.raises(TypeError):
        either.cp(tmp_path, tmp_path)
    with pytest.raises(TransferError, match="null"):
        either.cp(either.path("/dev/null"), tmp_path / "null")
    assert list(tmp_path.iterdir()) == []
