"""Copies of much data, over a disk that the machine is given for it: on clones, without a trace, and when they fail."""

from __future__ import annotations

import os
import stat
import tarfile
import threading
import zipfile
from pathlib import Path

import attrs
import pytest

from pytest_vmbottle import Machine, MachineDied, TransferError
from pytest_vmbottle.host.deadline import Deadline

pytestmark = pytest.mark.vm("debian-12")

MUCH = 20 << 20
FILES = 500


def plugged(vm: Machine) -> tuple[list[str], list[str], list[str]]:
    """Return the remains of a plugged-in disk: devices, nodes, and block devices in the guest."""
    qmp = vm.lifecycle.instance._qmp  # type: ignore[attr-defined]
    devices = [each["name"] for each in qmp.execute("qom-list", path="/machine/peripheral", deadline=Deadline(10))]
    nodes = [each["node-name"] for each in qmp.execute("query-named-block-nodes", deadline=Deadline(10))]
    seen = vm.exec("cd /sys/block; echo vd*").stdout.split()
    return [name for name in devices if "scratch" in name], [name for name in nodes if "scratch" in name], seen


NOTHING: tuple[list[str], list[str], list[str]] = ([], [], ["vda", "vdb"])


@pytest.fixture
def place(session_vm: Machine) -> str:
    """A folder in the guest for one test."""
    return session_vm.exec(["mktemp", "-d", "/root/t.XXXXXX"]).stdout.strip()


def test_a_large_file_goes_there_and_back_on_a_clone_and_leaves_no_disk(vm: Machine, tmp_path: Path) -> None:
    data = os.urandom(MUCH) + b"not a whole block"
    (tmp_path / "large").write_bytes(data)
    vm.cp(tmp_path / "large", vm.path("/root"))
    assert plugged(vm) == NOTHING
    vm.cp(vm.path("/root/large"), tmp_path / "again")
    assert plugged(vm) == NOTHING
    assert (tmp_path / "again").read_bytes() == data
    assert vm.lifecycle.instance._channels._ssh is None, "it went over the disk"  # type: ignore[attr-defined]


@pytest.mark.guests
def test_many_files_with_modes_and_links_go_there_and_back(session_vm: Machine, place: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(FILES):
        folder = tree / f"d{number % 30}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}").write_bytes(os.urandom(2000))
        (folder / f"f{number}").chmod(0o600 + number % 0o200)
    (tree / "d0" / "link").symlink_to("../d1")
    session_vm.cp(tree, session_vm.path(place))
    session_vm.cp(session_vm.path(place) / "tree", tmp_path / "back")

    assert facts(tmp_path / "back") == facts(tree)
    assert plugged(session_vm) == NOTHING


def facts(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in root.rglob("*"):
        content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = (path.lstat().st_mode, content)
    return found


def test_what_is_excluded_and_what_is_no_file_is_left_out_both_ways(
    session_vm: Machine, place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = tmp_path / "tree"
    (tree / "build").mkdir(parents=True)
    for name in ("large", "build/large.o", "small.pyc"):
        (tree / name).write_bytes(os.urandom(2 << 20))
    os.mkfifo(tree / "pipe")
    session_vm.cp(tree, session_vm.path(place), exclude=["*.pyc", "build/*.o"])
    there = session_vm.path(place) / "tree"
    assert {entry.name for entry in there.rglob("*")} == {"large", "build"}
    assert "tree/pipe" in caplog.text

    session_vm.exec("touch a.pyc build/kept.pyc build/b.o; mkfifo build/pipe; sync", cwd=there)
    session_vm.cp(there, tmp_path / "back", exclude=["build/kept.*", "*.o", "a.*"])
    assert {path.name for path in (tmp_path / "back").rglob("*")} == {"large", "build"}
    assert (tmp_path / "back" / "large").read_bytes() == (tree / "large").read_bytes()
    assert "build/pipe" in caplog.text


@pytest.mark.guests
def test_a_slash_at_the_end_of_the_source_means_what_is_in_the_folder_both_ways(session_vm: Machine, place: str, tmp_path: Path) -> None:
    site, there, back = tmp_path / "site", session_vm.path(place), tmp_path / "back"
    (site / "img").mkdir(parents=True)
    (site / "index.html").write_text("hello\n")
    (tmp_path / "link").symlink_to("site")
    for source, dest in (("site", "srv"), ("site/", "srv"), ("site/", "new"), ("link/", "linked")):
        (there / "srv").mkdir(exist_ok=True)
        session_vm.cp(f"{tmp_path}/{source}", there / dest)
    names = {str(path.relative_to(there)) for path in there.rglob("*.html")}
    assert names == {"srv/site/index.html", "srv/index.html", "new/index.html", "linked/index.html"}

    back.mkdir()
    session_vm.cp(session_vm.path(f"{place}/new/"), back)
    session_vm.cp(session_vm.path(f"{place}/new/"), tmp_path / "made")
    session_vm.cp(there / "new", back)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("index.html")} == {
        "site/index.html",
        "back/index.html",
        "back/new/index.html",
        "made/index.html",
    }
    with pytest.raises(NotADirectoryError):
        session_vm.cp(f"{site}/index.html/", there / "none")
    with pytest.raises(NotADirectoryError):
        session_vm.cp(session_vm.path(f"{place}/new/index.html/"), tmp_path / "none")


@pytest.mark.guests
def test_holes_take_no_space_on_either_side(session_vm: Machine, place: str, tmp_path: Path) -> None:
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(900 << 20)
        file.write(b"data" * 1000)
    session_vm.cp(tmp_path / "holes", session_vm.path(place))
    there = session_vm.exec(["stat", "-c", "%s %b", f"{place}/holes"]).stdout.split()
    session_vm.cp(session_vm.path(place) / "holes", tmp_path / "back")
    back = (tmp_path / "back").stat()

    assert int(there[0]) == back.st_size == 1 << 30
    assert int(there[1]) * 512 < 1 << 20
    assert back.st_blocks * 512 < 1 << 20


@pytest.mark.guests
def test_much_data_goes_by_ssh_where_no_disk_can_be_had(session_vm: Machine, place: str, tmp_path: Path) -> None:
    bulk, data = session_vm.lifecycle.bulk, os.urandom(3 << 20)
    (tmp_path / "f").write_bytes(data)
    had, bulk._has_disks = bulk._has_disks, False
    try:
        session_vm.cp(tmp_path / "f", session_vm.path(place))
        session_vm.cp(session_vm.path(place) / "f", tmp_path / "back")
    finally:
        bulk._has_disks = had
    assert (tmp_path / "back").read_bytes() == data
    assert had


@pytest.mark.guests
def test_a_full_disk_of_the_guest_leaves_neither_a_part_nor_a_disk(session_vm: Machine, place: str, tmp_path: Path) -> None:
    session_vm.exec(["mount", "-t", "tmpfs", "-o", "size=2m", "small", place])
    try:
        (tmp_path / "large").write_bytes(os.urandom(8 << 20))
        with pytest.raises(TransferError, match="No space left"):
            session_vm.cp(tmp_path / "large", session_vm.path(place))
        assert list(session_vm.path(place).iterdir()) == []
    finally:
        session_vm.exec(["umount", place])
    assert plugged(session_vm) == NOTHING


@pytest.mark.guests
def test_a_file_that_changes_all_the_time_is_copied_as_it_was_at_one_moment(session_vm: Machine, place: str, tmp_path: Path) -> None:
    session_vm.exec("head -c 8M /dev/urandom > f; truncate -s 16M f", cwd=place)
    session_vm.exec("nohup sh -c 'while :; do truncate -s 16M f; truncate -s 1M f; done' >/dev/null 2>&1 & echo $! > pid", cwd=place)
    try:
        session_vm.cp(session_vm.path(place) / "f", tmp_path / "f")
    finally:
        session_vm.exec("kill $(cat pid)", cwd=place)
    assert (tmp_path / "f").stat().st_size in {1 << 20, 16 << 20}
    assert plugged(session_vm) == NOTHING


@pytest.mark.guests
def test_a_machine_that_dies_in_the_middle_is_an_error_and_leaves_nothing_on_the_host(vm: Machine, tmp_path: Path) -> None:
    vm.exec("head -c 96M /dev/urandom > /root/f", timeout=120)
    killer = threading.Timer(1.0, os.kill, (vm.pid, 9))
    killer.start()

    def copy_for_ever() -> None:
        while True:
            vm.cp(vm.path("/root/f"), tmp_path / "f")
            (tmp_path / "f").unlink()

    with pytest.raises(MachineDied):
        copy_for_ever()
    killer.join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.guests
def test_a_guest_that_keeps_the_disk_is_waited_for_and_loses_it_before_the_next_copy(session_vm: Machine, tmp_path: Path) -> None:
    instance = session_vm.lifecycle.instance
    port = instance._disk_port  # type: ignore[attr-defined]
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with (tmp_path / "disk").open("rb") as file:
        instance.pause()
        try:
            port._plug(file.fileno(), "vmb-kept", writable=False)
            assert not port.empty(0.3)
        finally:
            instance.resume()
    (tmp_path / "f").write_bytes(os.urandom(9 << 20))
    session_vm.cp(tmp_path / "f", session_vm.path("/root/after"))

    assert session_vm.exec(["stat", "-c", "%s", "/root/after"]).stdout == f"{9 << 20}\n"
    assert plugged(session_vm) == NOTHING


@pytest.mark.guests
def test_an_ordinary_user_copies_too(session_vm: Machine, tmp_path: Path) -> None:
    spec = attrs.evolve(session_vm.spec, env={}, files={}, user="nobody")
    ordinary = Machine(session_vm.lifecycle.instance, spec, id="x", backend="qemu", channel=session_vm.lifecycle.channel)
    (tmp_path / "f").write_bytes(os.urandom(2 << 20))
    ordinary.cp(tmp_path / "f", ordinary.path("/tmp/theirs"))
    assert session_vm.exec(["stat", "-c", "%U %s", "/tmp/theirs"]).stdout == f"nobody {2 << 20}\n"
    with pytest.raises(PermissionError):
        ordinary.cp(ordinary.path("/etc/shadow"), tmp_path)
    with pytest.raises(PermissionError):
        ordinary.cp(tmp_path / "f", ordinary.path("/etc"))


@pytest.mark.parametrize("form", ["zip", pytest.param("tar.gz", marks=pytest.mark.guests)])
def test_a_folder_of_the_guest_is_packed_on_the_host(session_vm: Machine, place: str, tmp_path: Path, form: str) -> None:
    session_vm.exec("mkdir tree; cd tree; printf x > run; chmod 751 run; ln -s run link; head -c 2M /dev/zero > zeros", cwd=place)
    made = session_vm.archive(f"{place}/tree", tmp_path / "packed", format=form)
    modes = {}
    if form == "zip":
        with zipfile.ZipFile(made) as packed:
            modes = {each.filename.rstrip("/"): stat.filemode(each.external_attr >> 16) for each in packed.infolist()}
            assert packed.read("tree/link") == b"run"
    else:
        with tarfile.open(made) as unpacked:
            modes = {each.name: stat.filemode(each.mode | kind(each)) for each in unpacked}
            assert unpacked.getmember("tree/link").linkname == "run"

    assert modes == {"tree": "drwxr-xr-x", "tree/link": "lrwxrwxrwx", "tree/run": "-rwxr-x--x", "tree/zeros": "-rw-r--r--"}
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def kind(member: tarfile.TarInfo) -> int:
    return stat.S_IFDIR if member.isdir() else stat.S_IFLNK if member.issym() else stat.S_IFREG
