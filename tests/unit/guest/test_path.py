"""What a path in a guest does, run by the shells and programs of this computer and held against `pathlib` itself."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pytest_vmbottle.guest.path import GuestPath, Shell
from pytest_vmbottle.result import Result

ODD = ["plain", "-dash", "two\nlines\n", "quo\"te's", "$(id)", "back\\slash", "*", "tab\t", " ", "ünï", os.fsdecode(b"\xff\xfe\n"), "~"]
"""Names that something in a shell could trip over."""


def fill(root: Path) -> Path:
    """A small tree with something of each kind."""
    (root / "dir" / "sub" / "deep").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "file").write_bytes(b"content\0\xff\r\n")
    (root / "dir" / ".hidden").write_text("h")
    (root / "dir" / "sub" / "a.txt").write_text("a")
    (root / "dir" / "sub" / "deep" / "b.txt").write_text("b")
    (root / "link").symlink_to("file")
    (root / "dirlink").symlink_to("dir")
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "fifo")
    return root


@pytest.fixture
def there(shell: Any, tmp_path: Path) -> GuestPath:
    """The tree as a guest's."""
    (tmp_path / "guest").mkdir()
    return GuestPath(str(fill(tmp_path / "guest")), shell=shell)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The same tree as pathlib sees it."""
    (tmp_path / "host").mkdir()
    return fill(tmp_path / "host")


def outcome(act: Callable[[Any], Any], root: Any) -> Any:
    """Return the outcome of an act on a tree, without the tree's own name."""
    try:
        value = act(root)
    except OSError as error:
        return type(error), error.errno, str(error.filename).removeprefix(str(root))
    if isinstance(value, Iterator):
        return sorted(str(plain(each, root)) for each in value)
    return plain(value, root)


def plain(value: object, root: object) -> object:
    return str(value).removeprefix(str(root)) if isinstance(value, GuestPath | Path) else value


def tree(root: Path) -> dict[str, object]:
    """Return everything in a tree, except times."""
    facts: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content: object = path.readlink() if path.is_symlink() else path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        facts[str(path.relative_to(root))] = (oct(status.st_mode), content, status.st_nlink)
    return facts


NAMES = ["file", "dir", "empty", "link", "dirlink", "dangling", "loop", "none", "file/below", "none/below", "x" * 300]
CALLS: dict[str, Callable[[Any], Any]] = {
    "read_bytes": lambda path: path.read_bytes(),
    "write_bytes": lambda path: path.write_bytes(b"new"),
    "exists": lambda path: "x" * 300 in str(path) or path.exists(),
    "is_file": lambda path: "x" * 300 in str(path) or path.is_file(),
    "is_dir": lambda path: "x" * 300 in str(path) or path.is_dir(),
    "is_symlink": lambda path: "x" * 300 in str(path) or path.is_symlink(),
    "iterdir": lambda path: sorted(each.name for each in path.iterdir()),
    "mkdir": lambda path: path.mkdir(),
    "mkdir_mode": lambda path: path.mkdir(0o700),
    "mkdir_exist_ok": lambda path: path.mkdir(exist_ok=True),
    "mkdir_parents": lambda path: path.mkdir(parents=True),
    "mkdir_parents_exist_ok": lambda path: path.mkdir(parents=True, exist_ok=True),
    "unlink": lambda path: path.unlink(),
    "unlink_missing_ok": lambda path: path.unlink(missing_ok=True),
    "rmdir": lambda path: path.rmdir(),
    "readlink": lambda path: str(path.readlink()),
    "touch": lambda path: path.touch(),
    "touch_mode": lambda path: path.touch(0o600),
    "touch_new": lambda path: path.touch(exist_ok=False),
    "chmod": lambda path: path.chmod(0o711),
    "stat": lambda path: (path.stat().st_mode, path.stat().st_nlink),
    "lstat": lambda path: (path.lstat().st_mode, path.lstat().st_nlink),
    "symlink_to": lambda path: path.symlink_to("-any thing\n"),
    "owner": lambda path: path.owner(),
}


def on(call: str, name: str, root: Any) -> object:
    """Does it to a file of the tree."""
    return CALLS[call](root / name)


@pytest.mark.parametrize("call", CALLS)
def test_each_verb_comes_to_what_pathlib_comes_to(call: str, there: GuestPath, here: Path) -> None:
    for name in NAMES:
        theirs, ours = (outcome(partial(on, call, name), root) for root in (here, there))
        if call == "symlink_to" and isinstance(theirs, tuple):
            theirs, ours = theirs[:2], ours[:2]
        if call == "mkdir_parents" and name == "file/below":
            theirs, ours = NotADirectoryError, ours[0]
        assert ours == theirs, name
    assert tree(Path(str(there))) == tree(here)


@pytest.mark.parametrize("target", ["file", "dir", "empty", "link", "dirlink", "dangling", "new", "none/new", "dir/sub/inside"])
@pytest.mark.parametrize("source", ["file", "dir", "empty", "link", "dirlink", "dangling", "none"])
def test_renaming_comes_to_what_it_comes_to_in_pathlib(source: str, target: str, there: GuestPath, here: Path) -> None:
    theirs = outcome(lambda root: (root / source).rename(root / target), here)
    assert outcome(lambda root: (root / source).rename(root / target), there) == theirs
    assert tree(Path(str(there))) == tree(here)


def test_a_failed_rename_names_both_paths(there: GuestPath) -> None:
    with pytest.raises(FileNotFoundError) as failed:
        (there / "none").replace(there / "other")
    assert (failed.value.filename, failed.value.filename2) == (str(there / "none"), str(there / "other"))


@pytest.mark.parametrize(
    "pattern", ["*", "*.txt", "**/*.txt", "dir/*", "*/sub/*", "dir/**/b.txt", "*/", "none/*", "file/*", "d?r", "[!d]*", "file"]
)
def test_globbing_finds_what_pathlib_finds(pattern: str, there: GuestPath, here: Path) -> None:
    runs = there.shell.runs  # type: ignore[attr-defined]
    assert outcome(lambda root: root.glob(pattern), there) == outcome(lambda root: root.glob(pattern), here)
    assert there.shell.runs == runs + 1  # type: ignore[attr-defined]
    assert outcome(lambda root: root.rglob("b.*"), there) == ["/dir/sub/deep/b.txt"]


@pytest.mark.parametrize("pattern", ["", "/etc/*", "../*", "a/../b"])
def test_patterns_that_lead_elsewhere_are_refused(pattern: str, there: GuestPath) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(pattern))):
        there.glob(pattern)


def test_a_walk_enters_folders_to_a_depth_from_the_top_down(there: GuestPath) -> None:
    seen = [(str(folder).removeprefix(str(there)), dirs, files) for folder, dirs, files in (there / "dir").walk()]
    assert seen == [("/dir", ["sub"], [".hidden"]), ("/dir/sub", ["deep"], ["a.txt"]), ("/dir/sub/deep", [], ["b.txt"])]
    assert [folder.name for folder, _, _ in (there / "dir").walk(depth=2)] == ["dir", "sub"]
    for _, dirs, _ in (walk := there.walk()):
        dirs.clear()
    assert list(walk) == []
    with pytest.raises(ValueError, match="depth=0"):
        there.walk(depth=0)


def test_a_scan_tells_the_types_of_what_it_finds(there: GuestPath) -> None:
    types = {str(entry.path.relative_to(there)): entry.type for entry in there.scan(depth=2)}
    assert types["dir"] == types["dir/sub"] == "dir"
    assert (types["file"], types["link"], types["dirlink"], types["fifo"]) == ("file", "symlink", "symlink", "fifo")
    assert "dir/sub/a.txt" not in types


@pytest.mark.parametrize("shell", ["sh", "bash"], indirect=True)
def test_a_scan_tells_size_mode_and_time(there: GuestPath, shell: Any) -> None:  # noqa: ARG001
    written = there / "empty" / "written"
    written.write_bytes(b"12345", mode=0o640)
    os.utime(str(written), (1_000_000_000.5, 1_000_000_000.5))
    (entry,) = (there / "empty").scan()
    assert (entry.size, entry.mode, entry.mtime) == (5, 0o640, 1_000_000_000.5)


@pytest.mark.parametrize("shell", ["busybox"], indirect=True)
def test_a_scan_by_another_find_than_gnus_tells_types_alone(there: GuestPath, shell: Any) -> None:  # noqa: ARG001
    entries = {entry.name: entry for entry in there.scan()}
    assert (entries["file"].type, entries["file"].size, entries["file"].mtime) == ("file", None, None)


@pytest.mark.parametrize("shell", ["sh", "bash", "busybox"], indirect=True)
@pytest.mark.parametrize("name", ODD)
def test_any_name_goes_there_and_back(name: str, there: GuestPath, shell: Any) -> None:
    folder = there / "empty" / name
    folder.mkdir()
    path = folder / name
    path.write_bytes(b"\0\xff")
    path.rename(folder / f"{name}2")
    (folder / name).symlink_to(f"{name}2")
    (folder / name).write_text("written through the link")
    (folder / f"{name}3").hardlink_to(folder / f"{name}2")
    (folder / f"{name}3").touch()
    assert str((folder / name).readlink()) == f"{name}2"
    assert (folder / f"{name}2").read_text() == "written through the link"
    assert {each.name for each in folder.iterdir()} == {name, f"{name}2", f"{name}3"}
    assert {str(each) for each in there.rglob(f"{name[0] if name[0] != '*' else '[*]'}*3")} == {str(folder / f"{name}3")}
    assert path.hash("md5") == hashlib.md5(b"written through the link").hexdigest()
    folder.rmtree()
    assert list((there / "empty").iterdir()) == []
    assert shell.runs == 14


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(min_size=1, max_size=40).filter(lambda name: b"/" not in name and b"\0" not in name and name not in {b".", b".."}),
    st.binary(),
)
@example(b"\xff\n\n", b"\0")
def test_contents_of_any_bytes_come_back_from_names_of_any_bytes(tmp_path: Path, local_shell: Any, name: bytes, content: bytes) -> None:
    path = GuestPath(str(tmp_path), shell=local_shell(tmp_path)) / os.fsdecode(name)
    assert path.write_bytes(content) == len(content)
    assert Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).read_bytes() == content
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]
    path.unlink()


def test_output_that_is_cut_is_fetched_whole(tmp_path: Path, local_shell: Any) -> None:
    folder = GuestPath(str(tmp_path), shell=local_shell(tmp_path, limit=100))
    for number in range(20):
        (tmp_path / f"a rather long name {number:02}").write_bytes(bytes(number * 10))
    assert [len(path.read_bytes()) for path in folder.iterdir()] == [number * 10 for number in range(20)]


def test_a_file_keeps_its_mode_and_a_new_one_has_that_of_the_umask_or_the_one_given(there: GuestPath) -> None:
    (there / "file").chmod(0o4751)
    (there / "file").write_text("x")
    (there / "new").write_text("x")
    (there / "secret").write_text("x", mode=0o600)
    (there / "link").write_text("through", mode=0o640)
    modes = [stat.S_IMODE((there / name).stat().st_mode) for name in ("file", "new", "secret")]
    umask = os.umask(0o022)
    os.umask(umask)
    assert modes == [0o640, 0o666 & ~umask, 0o600]
    assert (there / "link").is_symlink()


def test_a_folder_loses_its_set_id_bits_where_the_mode_has_none(there: GuestPath) -> None:
    (there / "empty").chmod(0o2755)
    (there / "empty").chmod(0o755)
    assert stat.S_IMODE((there / "empty").stat().st_mode) == 0o755


def test_what_is_no_regular_file_is_written_in_place(there: GuestPath) -> None:
    device = GuestPath("/dev/null", shell=there.shell)
    assert device.write_text("gone") == 4
    assert stat.S_ISCHR(device.stat().st_mode)
    assert device.stat().st_rdev == os.stat("/dev/null").st_rdev  # noqa: PTH116 - the original
    with pytest.raises(OSError, match="No space left") as full:
        GuestPath("/dev/full", shell=there.shell).write_text("x")
    assert full.value.errno == errno.ENOSPC


def test_the_status_of_a_file_is_that_of_os_stat(there: GuestPath) -> None:
    path = Path(str(there / "file"))
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    ours, theirs = (there / "file").stat(), path.stat()
    for name in (
        "st_mode",
        "st_ino",
        "st_dev",
        "st_nlink",
        "st_uid",
        "st_gid",
        "st_size",
        "st_mtime_ns",
        "st_ctime_ns",
        "st_mtime",
        "st_blocks",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_a_tree_is_removed_and_what_its_links_lead_to_stays(there: GuestPath) -> None:
    (there / "dir" / "out").symlink_to(there / "empty")
    (there / "dir").rmtree()
    assert not (there / "dir").exists()
    assert (there / "empty").is_dir()
    (there / "dir").rmtree(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (there / "dir").rmtree()
    with pytest.raises(NotADirectoryError):
        (there / "dirlink").rmtree()
    for refused in ("/", "/tmp/.."):
        with pytest.raises(ValueError, match=re.escape(refused)):
            GuestPath(refused, shell=NoShell()).rmtree()


def test_owners_that_are_not_there_are_a_lookup_error(there: GuestPath) -> None:
    path = there / "file"
    for owner in ("nobody-has-this-name", ":nobody-has-this-name"):
        with pytest.raises(LookupError, match="nobody-has-this-name"):
            path.write_text("x", owner=owner)
    with pytest.raises(LookupError):
        path.chown("nobody-has-this-name")
    path.chown(os.getuid(), os.getgid())
    path.chown(group=os.getgid())
    assert path.read_bytes().startswith(b"content")
    with pytest.raises(ValueError, match="group"):
        path.chown()
    with pytest.raises(ValueError, match="owner"):
        path.write_text("x", owner="")


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", "sha512"])
def test_hashes_are_those_of_hashlib(algorithm: str, there: GuestPath) -> None:
    assert (there / "file").hash(algorithm) == hashlib.new(algorithm, b"content\0\xff\r\n").hexdigest()
    with pytest.raises(IsADirectoryError):
        (there / "dir").hash(algorithm)
    with pytest.raises(FileNotFoundError):
        (there / "none").hash(algorithm)
    with pytest.raises(ValueError, match="crc32"):
        (there / "file").hash("crc32")


# -- without a guest ------------------------------------------------------------------------------------------------------------------


class NoShell(Shell):
    """A guest that must not be asked anything."""

    def script(self, text: str, *words: str) -> Result:  # noqa: ARG002 - as the base class has it
        raise AssertionError(text)

    def feed(self, text: str, *words: str, source: BinaryIO, size: int, framed: bool = False) -> Result:  # noqa: ARG002
        raise AssertionError(text)

    def fetch(self, text: str, *words: str, sink: BinaryIO, size: int) -> Result:  # noqa: ARG002
        raise AssertionError(text)


class Answering(NoShell):
    """A guest that says the same to everything."""

    def __init__(self, stderr: str, returncode: int = 1) -> None:
        self.result = Result(argv=("sh",), returncode=returncode, stdout="", stderr=stderr)

    def script(self, text: str, *words: str) -> Result:  # noqa: ARG002
        return self.result


def test_a_path_has_the_parts_that_pathlib_gives_it() -> None:
    path, theirs = GuestPath("/srv/www/a.tar.gz", shell=NoShell()), Path("/srv/www/a.tar.gz")
    for name in ("name", "stem", "suffix", "suffixes", "parts"):
        assert getattr(path, name) == getattr(theirs, name)
    assert [str(folder) for folder in path.parents] == ["/srv/www", "/srv", "/"]
    assert str(path.with_name("b")) == "/srv/www/b"
    assert str(path.with_stem("b")) == "/srv/www/b.gz"
    assert str(path.with_suffix(".xz")) == "/srv/www/a.tar.xz"
    assert str(path.relative_to("/srv")) == "www/a.tar.gz"
    assert str(path.relative_to(path.parent)) == "a.tar.gz"
    assert path.is_relative_to("/srv")
    assert not path.is_relative_to("/opt")
    assert path.match("*.gz")
    assert path.joinpath("..", "b") == path / ".." / "b"
    assert sorted([path / "b", path / "a"]) == [path / "a", path / "b"]
    assert {path, GuestPath("/srv/www//a.tar.gz", shell=path.shell)} == {path}
    assert path != GuestPath("/srv/www/a.tar.gz", shell=NoShell())


def test_a_guest_path_is_not_taken_for_a_host_path() -> None:
    path = GuestPath("/etc/hostname", shell=NoShell())
    assert not isinstance(path, os.PathLike)
    with pytest.raises(TypeError, match="GuestPath"):
        open(path)  # type: ignore[call-overload]  # noqa: PTH123, SIM115
    with pytest.raises(TypeError, match="GuestPath"):
        Path(path)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["relative", "", "/nul\0byte", "/\ud800"])
def test_paths_that_cannot_be_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"absolute|NUL|ud800"):
        GuestPath(path, shell=NoShell())
    with pytest.raises(ValueError, match=r"absolute|NUL|ud800"):
        GuestPath("/file", shell=NoShell()).rename(path)


def test_arguments_that_make_no_sense_are_refused() -> None:
    path = GuestPath("/file", shell=NoShell())
    for mode in (-1, 0o10000, True, "644"):
        with pytest.raises(ValueError, match="mode"):
            path.chmod(mode)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="write_bytes"):
        path.write_text(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        path.write_bytes("text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NUL"):
        path.symlink_to("a\0b")
    with pytest.raises(ValueError, match="/other"):
        path.rename(GuestPath("/other", shell=NoShell()))


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("cat: '/x': No space left on device", errno.ENOSPC),
        ("mktemp: (null): Read-only file system\n", errno.EROFS),
        ("mv: can't rename '/x': Filename too long", errno.ENAMETOOLONG),
        ("tar: 0/x: Wrote only 512 of 10240 bytes\ntar: Exiting with failure status due to previous errors", errno.ENOSPC),
        ("sh: 1: cannot create /x/y: Directory nonexistent", errno.ENOENT),
        ("warning: something\nchmod: changing permissions of '/x': Operation not permitted", errno.EPERM),
        ("something new", errno.EIO),
        ("cat: '/Permission denied': something new", errno.EIO),
    ],
)
def test_what_programs_say_becomes_the_error_of_that_number(said: str, number: int) -> None:
    with pytest.raises(OSError, match="/x") as failed:
        GuestPath("/x", shell=Answering(said)).read_bytes()
    assert (failed.value.errno, failed.value.filename) == (number, "/x")
    assert type(failed.value) is type(OSError(number, ""))


def test_an_unknown_failure_is_told_with_its_control_characters_made_visible() -> None:
    with pytest.raises(OSError, match=r"\\x1b\[31mred"):
        GuestPath("/x", shell=Answering("\x1b[31mred")).read_bytes()
    with pytest.raises(OSError, match="status 137"):
        GuestPath("/x", shell=Answering("", returncode=137)).read_bytes()


def test_long_contents_are_fed_with_their_size() -> None:
    sizes = []

    class Feeding(Answering):
        def feed(self, text: str, *words: str, source: BinaryIO, size: int, framed: bool = False) -> Result:  # noqa: ARG002
            sizes.append((size, len(source.read())))
            return Result(argv=("sh",), returncode=0, stdout="", stderr="")

    assert GuestPath("/x", shell=Feeding("")).write_bytes(memoryview(bytes(3000))) == 3000
    assert sizes == [(3000, 3000)]
