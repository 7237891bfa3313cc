"""Copies with this host's own shell as the guest: what arrives, what is refused, and what is left when it fails."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_vmbottle.errors import MachineDied, TransferError
from pytest_vmbottle.guest import copy as transfer
from pytest_vmbottle.guest.copy import copy_in, copy_out, pack_out
from pytest_vmbottle.guest.exclusion import Exclusion
from pytest_vmbottle.guest.path import GuestPath, Shell
from pytest_vmbottle.result import Result


class HostShell(Shell):
    """Runs a path's scripts on this host; `stream` is what it gives for a tree instead of it, `dies` whether the guest is lost then."""

    def __init__(self, *, tar: str = "tar") -> None:
        self.stream: bytes | None = None
        self.dies = False
        self.tar = tar

    def script(self, text: str, *words: str) -> Result:
        return self.feed(text, *words, source=BytesIO(), size=0)

    def feed(self, text: str, *words: str, source: BinaryIO, size: int, framed: bool = False) -> Result:
        del framed
        content = source.read()
        assert len(content) == size
        if self.dies and size:
            raise MachineDied("it is gone")
        argv = ("/bin/sh", "-c", text.replace("tar --version", f"{self.tar} --version"), "sh", *words)
        done = subprocess.run(argv, input=content, capture_output=True, check=False)
        out, err = (stream.decode(errors="surrogateescape") for stream in (done.stdout, done.stderr))
        return Result(argv=argv, returncode=done.returncode, stdout=out, stderr=err, duration=0)

    def fetch(self, text: str, *words: str, sink: BinaryIO, size: int) -> Result:
        if self.dies:
            raise MachineDied("it is gone")
        result = self.script(text, *words)
        content = result.stdout_bytes if self.stream is None else self.stream
        assert self.stream is not None or len(content) <= size + (1 << 20)
        sink.write(content)
        return result


def at(path: Path | str, shell: HostShell) -> GuestPath:
    return GuestPath(str(path), shell=shell)


@pytest.fixture
def shell() -> HostShell:
    return HostShell()


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    (tmp_path / "guest").mkdir()
    return tmp_path / "guest"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    (tmp_path / "host").mkdir()
    return tmp_path / "host"


def facts(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        status, name = path.lstat(), str(path.relative_to(root))
        content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[name] = (status.st_mode, int(status.st_mtime), content)
    return found


def grown(root: Path) -> Path:
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "sub" / "a name\nwith 'all' $sorts ü").write_bytes(b"\0\xff")
    (root / "run").write_text("#!/bin/sh\n")
    (root / "run").chmod(0o750)
    (root / "link").symlink_to("sub/empty")
    (root / "dangling").symlink_to("/nowhere/at all")
    (root / "-rf").write_text("x")
    for path in (root / "run", root / "sub" / "empty", root / "sub"):
        os.utime(path, (1e9, 1e9))
    return root


def test_a_tree_arrives_with_modes_times_and_links_both_ways(shell: HostShell, guest: Path, host: Path) -> None:
    tree = grown(host / "tree")
    copy_in(tree, at(guest / "there", shell))
    copy_out(at(guest / "there", shell), host / "back")

    assert facts(host / "back") == facts(tree) == facts(guest / "there")


@pytest.mark.parametrize("tar", ["tar", "false"], ids=["GNU tar", "another tar"])
def test_holes_stay_holes_where_tar_can_and_the_content_is_the_same_where_it_cannot(guest: Path, host: Path, tar: str) -> None:
    shell = HostShell(tar=tar)
    with (host / "holes").open("wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(b"middle" * 999)
    content = (host / "holes").read_bytes()
    copy_in(host / "holes", at(guest, shell))
    copy_out(at(host / "holes", shell), host / "again")

    for copy in (guest / "holes", host / "again"):
        assert copy.read_bytes() == content
        assert (copy.stat().st_blocks * 512 < 1 << 20) == (tar == "tar")


def test_a_source_that_is_a_symbolic_link_is_copied_as_one(shell: HostShell, guest: Path, host: Path) -> None:
    (host / "link").symlink_to("target")
    copy_in(host / "link", at(guest, shell))
    copy_out(at(guest / "link", shell), host / "back")

    assert (guest / "link").readlink() == (host / "back").readlink() == Path("target")


def test_what_is_not_there_is_named_and_says_where(shell: HostShell, guest: Path, host: Path) -> None:
    (host / "f").write_text("x")
    with pytest.raises(FileNotFoundError, match="on the host"):
        copy_in(host / "none", at(guest, shell))
    with pytest.raises(FileNotFoundError, match="in the guest"):
        copy_in(host / "f", at(guest / "no" / "where", shell))
    with pytest.raises(FileNotFoundError, match="in the guest"):
        copy_out(at(guest / "none", shell), host)
    with pytest.raises(FileNotFoundError, match="on the host"):
        copy_out(at("/etc/hostname", shell), host / "no" / "where")
    assert [path.name for path in host.iterdir()] == ["f"]


def test_a_file_in_the_place_of_a_folder_stays_and_the_other_way_round(shell: HostShell, guest: Path, host: Path) -> None:
    for root in (guest, host):
        (root / "tree" / "name").mkdir(parents=True)
        (root / "tree" / "name" / "file").write_text("x")
        (root / "flat").mkdir()
        (root / "flat" / "name").write_text("stays")
    with pytest.raises(TransferError, match="Not a directory"):
        copy_in(host / "tree" / "name", at(guest / "flat" / "name", shell))
    with pytest.raises(TransferError, match="Is a directory"):
        copy_in(host / "flat" / "name", at(guest / "tree", shell))
    with pytest.raises(TransferError, match="Not a directory"):
        copy_out(at(guest / "tree" / "name", shell), host / "flat" / "name")
    with pytest.raises(TransferError, match="Is a directory"):
        copy_out(at(guest / "flat" / "name", shell), host / "tree")

    assert facts(guest).keys() == facts(host).keys() == {"flat", "flat/name", "tree", "tree/name", "tree/name/file"}
    assert (guest / "flat" / "name").read_text() == (host / "flat" / "name").read_text() == "stays"


def test_a_symbolic_link_at_the_destination_is_not_written_through_by_a_tree(shell: HostShell, guest: Path, host: Path) -> None:
    (guest / "tree" / "into").mkdir(parents=True)
    (guest / "tree" / "into" / "evil").write_text("evil")
    (host / "tree").mkdir()
    (host / "outside").mkdir()
    (host / "tree" / "into").symlink_to(host / "outside")
    with pytest.raises(TransferError):
        copy_out(at(guest / "tree", shell), host)

    assert list((host / "outside").iterdir()) == []


def test_something_that_is_no_file_is_not_copied(shell: HostShell, guest: Path, host: Path) -> None:
    os.mkfifo(host / "pipe")
    with pytest.raises(TransferError, match="pipe"):
        copy_in(host / "pipe", at(guest, shell))
    with pytest.raises(TransferError, match="pipe"):
        copy_out(at(host / "pipe", shell), host / "copy")
    assert [path.name for path in host.iterdir()] == ["pipe"]
    assert list(guest.iterdir()) == []


def with_specials(root: Path) -> Path:
    (root / "sub").mkdir(parents=True)
    (root / "file").write_text("x")
    for number in range(4):
        os.mkfifo(root / "sub" / f"pipe{number}")
    return root


def test_sockets_and_fifos_in_a_tree_are_left_out_with_a_warning(
    shell: HostShell, guest: Path, host: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_specials(host / "there")
    with_specials(guest / "back")
    monkeypatch.chdir(host / "there")  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        copy_in(host / "there", at(guest, shell))
    monkeypatch.chdir(guest / "back")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        copy_out(at(guest / "back", shell), host)

    kept = {Path("file"), Path("sub")}
    assert {path.relative_to(guest / "there") for path in (guest / "there").rglob("*")} == kept
    assert {path.relative_to(host / "back") for path in (host / "back").rglob("*")} == kept
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    there, back = (record.getMessage() for record in caplog.records)
    assert there.startswith("not copied, because these are sockets or FIFOs: ")
    assert f"{host}/there/socket, " in there
    assert there.endswith(", 2 more")
    assert "back/socket" in back
    assert back.endswith(", 2 more")


def forest(root: Path) -> Path:
    for name in ("a", "b.o", "build/a.o", "build/deep/a.o", "sub/build/a.o", "sub/b/c", "[a]", "a\\b", "wood/a", "ü"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("tar", ["tar", "no-such-tar"], ids=["GNU's tar", "another tar"])
@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("*.o", {"a", "sub/b/c", "[a]", "a\\b", "wood/a", "ü"}),
        ("build/", {"a", "b.o", "sub/b/c", "[a]", "a\\b", "wood/a", "ü"}),
        ("build/*.o", {"a", "b.o", "build/deep/a.o", "sub/build/a.o", "sub/b/c", "[a]", "a\\b", "wood/a", "ü"}),
        (["sub/*/c", "[[]a]", "a\\b", "?"], {"b.o", "build/a.o", "build/deep/a.o", "sub/build/a.o"}),
        ("wood", {"a", "b.o", "build/a.o", "build/deep/a.o", "sub/build/a.o", "sub/b/c", "[a]", "a\\b", "ü"}),
        (["*"], set()),
    ],
)
def test_what_is_excluded_is_left_out_both_ways(guest: Path, host: Path, tar: str, exclude: str | list[str], left: set[str]) -> None:
    shell, excluded = HostShell(tar=tar), Exclusion.of(exclude)
    copy_in(forest(host / "wood"), at(guest, shell), excluded)
    copy_out(at(forest(guest / "back" / "wood"), shell), host / "back", excluded)

    assert names(guest / "wood") == left
    assert names(host / "back") == left
    if tar == "tar":
        pack_out(at(guest / "back" / "wood", shell), host / "wood.zip", "zip", excluded)
        assert {name.removeprefix("wood/") for name in zipfile.ZipFile(host / "wood.zip").namelist() if name[-1] != "/"} == left


def test_gnus_tar_sends_nothing_of_what_is_excluded(guest: Path, host: Path) -> None:
    class Counting(HostShell):
        def fetch(self, text: str, *words: str, sink: BinaryIO, size: int) -> Result:
            result = super().fetch(text, *words, sink=sink, size=size)
            assert sink.tell() <= 1 << 20
            return result

    (guest / "tree" / "sub").mkdir(parents=True)
    for name in ("sub/large.bin", "only", "small"):
        (guest / "tree" / name).write_bytes(b"x" * (10 if name == "small" else 2 << 20))
    copy_out(at(guest / "tree", Counting()), host, Exclusion.of(["*.bin", "only"]))

    assert names(host / "tree") == {"small"}


PATTERNS = st.lists(st.text("ab*?[]!\\./-", min_size=1, max_size=6), min_size=1, max_size=3)


@given(PATTERNS)
@example([".*"])
@settings(max_examples=60, deadline=None)
def test_gnus_tar_never_leaves_out_more_than_was_asked_for(tmp_path_factory: pytest.TempPathFactory, patterns: list[str]) -> None:
    try:
        excluded = Exclusion.of(patterns)
    except ValueError:
        return
    with TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        top = Path(folder) / "a*b"
        for name in ("a", "b", "ab", "-a", "[a]", "sub/a", "sub/b", "b.a/a.b/ab", "a!/b", "\\a", ".b"):
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).touch()
        ways = {}
        for tar in ("tar", "no-such-tar"):
            copy_out(at(top, HostShell(tar=tar)), Path(folder) / tar, excluded)
            ways[tar] = names(Path(folder) / tar)
        assert ways["tar"] == ways["no-such-tar"]


@pytest.mark.parametrize("pattern", ["", "/etc", "../x", "a//b", ".", "a\0b"])
def test_a_pattern_that_means_nothing_below_the_source_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="takes names such as"):
        Exclusion.of([pattern])


def test_the_whole_file_system_is_not_copied(shell: HostShell, guest: Path, host: Path) -> None:
    with pytest.raises(TransferError):
        copy_in(Path("/"), at(guest, shell))
    with pytest.raises(TransferError):
        copy_out(at("/", shell), host)


def hostile(*names: str) -> bytes:
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 4
            made.addfile(member, BytesIO(b"evil"))
    return stream.getvalue()


@pytest.mark.parametrize("names", [["../evil"], ["f", "../../evil"], ["other"], ["f", "f"], ["f/../../evil"]])
@pytest.mark.parametrize("form", ["", "zip", "tar.gz"])
def test_a_hostile_guest_leaves_nothing_on_the_host(shell: HostShell, guest: Path, host: Path, names: list[str], form: str) -> None:
    (guest / "f").mkdir()
    shell.stream = hostile(*names)
    source = at(guest / "f", shell)
    with pytest.raises(TransferError):
        pack_out(source, host / "packed", form) if form else copy_out(source, host / "copy")

    assert list(host.iterdir()) == []
    assert not list(host.parent.rglob("evil"))


@pytest.mark.parametrize("said", ["", "x y", "1", "-5 1", "99999999999999999999 9"])
def test_a_guest_that_says_nonsense_about_a_size_gets_a_plain_error_or_its_way(
    shell: HostShell, guest: Path, host: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    (guest / "f").write_text("x")
    monkeypatch.setattr(transfer, "_MEASURE", f"echo '{said}'")
    shell.stream = hostile("f")
    try:
        copy_out(at(guest / "f", shell), host)
    except TransferError:
        assert list(host.iterdir()) == []
    else:
        assert (host / "f").read_text() == "evil"


def test_a_guest_that_is_lost_in_the_middle_leaves_nothing(shell: HostShell, guest: Path, host: Path) -> None:
    (host / "f").write_text("x")
    (guest / "g").write_text("x")
    shell.dies = True
    with pytest.raises(MachineDied):
        copy_in(host / "f", at(guest, shell))
    with pytest.raises(MachineDied):
        copy_out(at(guest / "g", shell), host)

    assert set(facts(guest)) == {"g"}
    assert set(facts(host)) == {"f"}


def test_a_command_that_is_killed_in_the_middle_leaves_nothing_in_the_guest(guest: Path, host: Path) -> None:
    class Killed(HostShell):
        def feed(self, text: str, *words: str, source: BinaryIO, size: int, framed: bool = False) -> Result:
            if size:
                super().feed(text.replace("trap", "exit 0; #"), *words, source=source, size=size, framed=framed)
                assert len(list(guest.iterdir())) == 1
                raise MachineDied("no answer")
            return super().feed(text, *words, source=source, size=size, framed=framed)

    (host / "f").write_text("x")
    for target in (guest, guest / "new"):
        with pytest.raises(MachineDied):
            copy_in(host / "f", at(target, Killed()))

        assert list(guest.iterdir()) == []


def test_a_folder_becomes_a_zip_with_modes_and_links_that_is_the_same_each_time(shell: HostShell, guest: Path, host: Path) -> None:
    grown(guest / "tree")
    source = at(guest / "tree", shell)
    assert pack_out(source, host / "a.zip", "zip") == host / "a.zip"
    pack_out(source, host / "b.zip", "zip")

    assert (host / "a.zip").read_bytes() == (host / "b.zip").read_bytes()
    with zipfile.ZipFile(host / "a.zip") as packed:
        names = packed.namelist()
        assert names == sorted(names)
        assert names[0] == "tree/"
        assert packed.testzip() is None
        link, run = (packed.getinfo(f"tree/{name}") for name in ("dangling", "run"))
        assert (stat.S_ISLNK(link.external_attr >> 16), packed.read(link)) == (True, b"/nowhere/at all")
        assert (run.external_attr >> 16, packed.read(run)) == (stat.S_IFREG | 0o750, b"#!/bin/sh\n")


def test_a_folder_becomes_a_tar_gz_that_is_the_same_each_time(shell: HostShell, guest: Path, host: Path) -> None:
    grown(guest / "tree")
    source = at(guest / "tree", shell)
    pack_out(source, host / "a", "tar.gz")
    pack_out(source, host / "b", "tar.gz")

    assert (host / "a").read_bytes() == (host / "b").read_bytes()
    subprocess.run(["tar", "-xzpf", host / "a", "-C", host], check=True)
    assert facts(host / "tree") == facts(guest / "tree")


def test_an_archive_that_cannot_be_made_says_why(shell: HostShell, guest: Path, host: Path) -> None:
    (guest / "tree").mkdir()
    (guest / os.fsdecode(b"tree/\xff")).write_text("x")
    (guest / "file").write_text("x")
    (host / "folder").mkdir()
    tree = at(guest / "tree", shell)
    with pytest.raises(ValueError, match="'rar'"):
        pack_out(tree, host / "x", "rar")
    with pytest.raises(IsADirectoryError, match="on the host"):
        pack_out(tree, host / "folder", "zip")
    with pytest.raises(FileNotFoundError, match="on the host"):
        pack_out(tree, host / "none" / "x", "zip")
    with pytest.raises(FileNotFoundError, match="in the guest"):
        pack_out(at(guest / "none", shell), host / "x", "zip")
    with pytest.raises(NotADirectoryError, match="in the guest"):
        pack_out(at(guest / "file", shell), host / "x", "zip")
    with pytest.raises(TransferError, match="zip"):
        pack_out(tree, host / "x", "zip")
    assert [path.name for path in host.iterdir()] == ["folder"]


@pytest.mark.parametrize("named", [True, False], ids=["named itself", "in a folder"])
def test_a_link_that_one_copy_brought_is_not_followed_by_the_next(shell: HostShell, guest: Path, host: Path, *, named: bool) -> None:
    (host / "outside").mkdir()
    (host / "in").mkdir()
    (guest / "name").symlink_to(host / "outside")
    target = host / "in" / "name" if named else host / "in"
    copy_out(at(guest / "name", shell), target)
    (guest / "name").unlink()
    (guest / "name").mkdir()
    (guest / "name" / "evil").write_text("evil")
    with pytest.raises(TransferError) as caught:
        copy_out(at(guest / "name", shell), target)

    assert caught.value.errno == errno.ENOTDIR
    assert list((host / "outside").iterdir()) == []
    assert [path.name for path in (host / "in").iterdir()] == ["name"]


@pytest.mark.parametrize("mode", [tarfile.DIRTYPE, tarfile.CHRTYPE], ids=["whole", "with a device"])
def test_a_tree_of_any_depth_leaves_nothing_but_what_was_asked_for(shell: HostShell, guest: Path, host: Path, mode: bytes) -> None:
    (guest / "d").mkdir()
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        for depth in range(1, 1101):
            member = tarfile.TarInfo("/".join("d" * depth))
            member.type, member.mode = tarfile.DIRTYPE, 0o500
            made.addfile(member)
        member = tarfile.TarInfo("d/last")
        member.type = mode
        made.addfile(member)
    shell.stream = stream.getvalue()
    if mode == tarfile.CHRTYPE:
        with pytest.raises(TransferError):
            copy_out(at(guest / "d", shell), host)
    else:
        copy_out(at(guest / "d", shell), host)
        pack_out(at(guest / "d", shell), host / "d.zip", "zip")

    assert {path.name for path in host.iterdir()} == (set() if mode == tarfile.CHRTYPE else {"d", "d.zip"})
    subprocess.run(["rm", "-rf", host], check=True)  # deeper than the removal of temporary folders goes


@pytest.mark.parametrize("text", ["No space left on device", "Read-only file system", "Disk quota exceeded"])
def test_what_keeps_a_copy_from_beginning_is_told_by_the_guests_own_number(host: Path, guest: Path, text: str) -> None:
    class Full(HostShell):
        def feed(self, text_: str, *words: str, source: BinaryIO, size: int, framed: bool = False) -> Result:
            broken = f'mkdir() {{ echo "mkdir: cannot create directory: {text}" >&2; return 1; }}\n'
            return super().feed(broken + text_, *words, source=source, size=size, framed=framed)

    (host / "f").write_text("x")
    with pytest.raises(OSError) as caught:  # noqa: PT011 - it is the number that counts
        copy_in(host / "f", at(guest, Full()))

    number = caught.value.errno
    assert number is not None
    assert os.strerror(number) == text
    assert not isinstance(caught.value, PermissionError)


def test_a_source_that_ends_in_two_dots_goes_to_the_destination_itself(
    shell: HostShell, guest: Path, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host / "tree" / "sub").mkdir(parents=True)
    (host / "tree" / "f").write_text("x")
    monkeypatch.chdir(host / "tree" / "sub")
    copy_in(Path(".."), at(guest, shell))
    copy_in(Path(".."), at(guest / "new", shell))
    assert {path.name for path in guest.iterdir()} == {"f", "sub", "new"}
    assert facts(guest / "new") == facts(host / "tree")

    for name in ("there", "fresh"):
        (host / "there").mkdir(exist_ok=True)
        copy_out(at(guest / "new" / "sub" / "..", shell), host / name)
        assert facts(host / name) == facts(host / "tree")
    copy_in(host / "tree" / "f", at(guest / "new" / "sub" / "..", shell))
