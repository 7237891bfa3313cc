"""Many files written at once, by the shells and programs of this computer."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pytest_vmbottle.guest.path import GuestPath
from pytest_vmbottle.guest.write_files import Content, File, write_files
from pytest_vmbottle.host.package_data import read_script

ODD = ["-dash", "two\nlines\n", "quo\"te's", "$(id)", "back\\slash", "*", "ünï", os.fsdecode(b"\xff\n"), "x" * 250, ".hidden"]


@pytest.fixture
def root(shell: Any, tmp_path: Path) -> GuestPath:
    """A folder, of which each name could trip a shell over something."""
    (tmp_path / "ro ot\n").mkdir()
    return GuestPath(str(tmp_path / "ro ot\n"), shell=shell)


def write(root: GuestPath, files: Mapping[str, File], **options: Any) -> None:
    """Writes files below a folder, and looks that this was one command that left nothing behind."""
    runs = root.shell.runs  # type: ignore[attr-defined]
    options = {"clean": False, "mode": None, "owner": None, **options}
    try:
        write_files(root.shell, {root / name: content for name, content in files.items()}, **options)
    finally:
        assert root.shell.runs <= runs + 1  # type: ignore[attr-defined]
        assert list(Path(str(root)).rglob(".vmbottle*")) == []


def tree(root: GuestPath) -> dict[str, bytes]:
    """The files below a folder and their contents."""
    host = Path(str(root))
    return {str(path.relative_to(host)): path.read_bytes() for path in host.rglob("*") if path.is_file() and not path.is_symlink()}


def test_files_of_any_name_and_content_are_written_with_the_folders_above_them(root: GuestPath, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"\0from a file\xff")
    files: dict[str, Content] = {f"{name}/{name}/{name}": name.encode("utf-8", "surrogateescape") for name in ODD}
    files |= {f"{name}/below": b"" for name in ODD}
    write(root, {**files, "text": "grüße\n", "deep/er/file": tmp_path / "source"})
    assert tree(root) == {**files, "text": "grüße\n".encode(), "deep/er/file": b"\0from a file\xff"}


def test_nothing_to_write_asks_nothing_of_the_guest(root: GuestPath) -> None:
    write(root, {})
    assert root.shell.runs == 0  # type: ignore[attr-defined]


def test_files_that_are_there_keep_their_mode_and_links_are_written_through(root: GuestPath) -> None:
    host = Path(str(root))
    (host / "old").write_text("old")
    (host / "old").chmod(0o750)
    (host / "other").mkdir()
    (host / "link").symlink_to("other/linked")
    (host / "folder").symlink_to("other")
    write(root, {"old": "new", "new": "new", "link": "through", "folder/inside": "in"})
    assert tree(root) == {"old": b"new", "new": b"new", "other/linked": b"through", "other/inside": b"in"}
    assert (host / "link").is_symlink()
    assert stat.S_IMODE((host / "old").stat().st_mode) == 0o750
    write(root, {"old": "1", "new": "2"}, mode=0o600, owner=os.getuid())
    assert {stat.S_IMODE((host / name).stat().st_mode) for name in ("old", "new")} == {0o600}


def test_a_file_may_have_permission_bits_of_its_own(root: GuestPath, tmp_path: Path) -> None:
    host = Path(str(root))
    (host / "old").write_text("old")
    (host / "old").chmod(0o640)
    (tmp_path / "source").touch(mode=0o755)
    own = {f"{name}/{name}": (name.encode("utf-8", "surrogateescape"), 0o604) for name in ODD}
    write(root, {**own, "old": ("new", 0o700), "source": (tmp_path / "source", 0o4711), "rest": "rest"}, mode=0o444)
    modes = {str(path.relative_to(host)): stat.S_IMODE(path.stat().st_mode) for path in host.rglob("*") if path.is_file()}
    assert modes == {**dict.fromkeys(own, 0o604), "old": 0o700, "source": 0o4711, "rest": 0o444}
    assert set(tree(root)) == modes.keys()
    with pytest.raises(ValueError, match="mode"):
        write(root, {"old": ("newer", 0o17777)})
    assert tree(root)["old"] == b"new"


def test_cleaning_leaves_in_the_folders_of_the_files_nothing_else(root: GuestPath) -> None:
    host = Path(str(root))
    (host / "kept").write_text("kept")
    for name in ("app/old/deep", "app/sub/old", "other"):
        (host / name).mkdir(parents=True)
        (host / name / ".old\n").write_text("old")
    (host / "app" / "link").symlink_to("../other")
    (host / "app" / "file").mkdir()
    write(root, {"app/file": "1", "app/sub/file": "2"}, clean=True)
    assert tree(root) == {"kept": b"kept", "app/file": b"1", "app/sub/file": b"2", "other/.old\n": b"old"}
    assert not (host / "app" / "old").exists()
    write(root, {"new/file": "3"}, clean=True)
    assert tree(root)["new/file"] == b"3"


NEEDED = [
    "/",
    "/etc",
    "/usr",
    "/usr/bin",
    "/usr/bin/x",
    "/bin",
    "/lib64",
    "/var",
    "/var/lib",
    "/proc/self",
    "/dev/shm",
    "/tmp",
    "/root",
    "/usr/local/bin",
    "/home",
    "/srv",
]
FREE = [
    "/data",
    "/srv/app",
    "/home/alice",
    "/etc/nginx",
    "/var/lib/app",
    "/var/www",
    "/usr/local/lib/app",
    "/usr/share/app/x",
    "/tmp/t.1",
    "/root/x",
    "/libx",
]


def test_what_a_guest_needs_is_told_from_what_may_be_emptied(shell: Any) -> None:
    script = read_script("pytest_vmbottle.guest", "write_files_vital.sh") + 'vital "$1"'
    vital = [folder for folder in NEEDED + FREE if shell.script(script, folder).ok]
    assert vital == NEEDED


@pytest.mark.parametrize("options", [{}, {"clean": True}])
def test_what_cannot_be_written_is_named_and_nothing_is(options: dict[str, bool], root: GuestPath) -> None:
    host = Path(str(root))
    (host / "file").write_text("file")
    (host / "in").mkdir()
    (host / "in" / "old").write_text("old")
    before = tree(root)
    with pytest.raises(NotADirectoryError) as failed:
        write(root, {"in/new": "x", "file/below/deep": "x"}, **options)
    assert failed.value.filename == str(root / "file")
    with pytest.raises(LookupError, match="nobody-has-this-name"):
        write(root, {"in/new": "x"}, owner="nobody-has-this-name", **options)
    assert tree(root) == before


def test_a_folder_or_a_pipe_in_a_files_place_stops_it_before_anything_is_written(root: GuestPath) -> None:
    host = Path(str(root))
    (host / "sub" / "taken").mkdir(parents=True)
    os.mkfifo(host / "pipe")
    for name, kind in (("sub/taken", IsADirectoryError), ("pipe", FileExistsError)):
        with pytest.raises(kind) as failed:
            write(root, {"a": "x", name: "x", "z": "x"})
        assert failed.value.filename == str(root / name)
    assert tree(root) == {}


def test_paths_that_make_no_sense_are_refused_before_the_guest_is_asked(root: GuestPath, tmp_path: Path) -> None:
    for files in ({"a": "x", "a/b": "x"}, {"a/../b": "x"}):
        with pytest.raises(ValueError, match="a/"):
            write(root, files)
    with pytest.raises(FileNotFoundError):
        write(root, {"a": tmp_path / "none"})
    with pytest.raises(ValueError, match="mode"):
        write(root, {"a": "x"}, mode=0o77777)
    with pytest.raises(TypeError):
        write(root, {"a": 5})  # type: ignore[dict-item]
    assert root.shell.runs == 0  # type: ignore[attr-defined]


def test_a_file_of_the_host_that_is_executable_is_so_in_the_guest_unless_a_mode_is_given(root: GuestPath, tmp_path: Path) -> None:
    host, script = Path(str(root)), tmp_path / "script"
    script.write_text("exit\n")
    script.chmod(0o700)
    (host / "old").write_text("old")
    (host / "old").chmod(0o640)
    write(root, {"new": script, "old": script, "text": "plain"})
    assert [os.access(host / name, os.X_OK) for name in ("new", "old", "text")] == [True, True, False]
    write(root, {"new": script}, mode=0o640)
    assert stat.S_IMODE((host / "new").stat().st_mode) == 0o640
