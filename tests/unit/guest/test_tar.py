"""Archives from a guest that may want to do harm: nothing gets out of the folder, and nothing but `Refused` gets out of the reader."""

from __future__ import annotations

import io
import os
import shutil
import socket
import stat
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_vmbottle.guest import tar as archive
from pytest_vmbottle.guest.tar import Refused, pack, unpack

Entry = tuple[str, bytes, str, bytes]
"""Name, type, what it links to, and content."""

FILE, FOLDER, SYM, LINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
CANARY = "do not touch"


def tar(*entries: Entry | tarfile.TarInfo, mode: int = 0o644) -> io.BytesIO:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as made:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                made.addfile(entry)
                continue
            name, kind, target, content = entry
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size, member.mode = kind, target, len(content), mode
            made.addfile(member, io.BytesIO(content))
    stream.seek(0)
    return stream


def file(name: str, content: bytes = b"evil") -> Entry:
    return (name, FILE, "", content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Target folder, three levels below the watched folder, beside a canary."""
    inside = tmp_path / "watched" / "between" / "inside"
    inside.mkdir(parents=True)
    (tmp_path / "watched" / "canary").write_text(CANARY)
    return inside


def outside(folder: Path) -> dict[str, str]:
    """Return everything around the folder."""
    watched = folder.parent.parent
    return {
        str(path.relative_to(watched)): path.read_text() if path.is_file() else ""
        for path in watched.rglob("*")
        if folder not in path.parents
    }


UNTOUCHED = {"canary": CANARY, "between": "", "between/inside": ""}

HOSTILE: dict[str, Callable[[Path], io.BytesIO]] = {
    "a name with two dots": lambda _: tar(file("../evil")),
    "two dots in the middle": lambda _: tar(("a", FOLDER, "", b""), file("a/../../evil")),
    "an absolute name": lambda folder: tar(file(str(folder.parent / "evil"))),
    "the folder itself": lambda _: tar(("..", FOLDER, "", b"")),
    "no name": lambda _: tar(file(".")),
    "a file through a symbolic link": lambda folder: tar(("a", SYM, str(folder.parent), b""), file("a/evil")),
    "a file through a relative symbolic link": lambda _: tar(("a", SYM, "..", b""), file("a/evil")),
    "a folder through a symbolic link": lambda _: tar(("a", SYM, "..", b""), ("a/evil", FOLDER, "", b"")),
    "a file over a symbolic link": lambda _: tar(("a", SYM, "../../canary", b""), file("a")),
    "a folder over a symbolic link": lambda _: tar(("a", SYM, "..", b""), ("a", FOLDER, "", b""), file("a/evil")),
    "a symbolic link in place of a folder": lambda _: tar(("a", FOLDER, "", b""), ("a", SYM, "..", b""), file("a/evil")),
    "a hard link to the outside": lambda _: tar(("a", LINK, "../../canary", b""), file("a")),
    "a hard link to an absolute name": lambda folder: tar(("a", LINK, str(folder.parent.parent / "canary"), b"")),
    "a hard link to a symbolic link": lambda _: tar(("a", SYM, "../../canary", b""), ("b", LINK, "a", b"")),
    "a hard link through a symbolic link": lambda _: tar(("a", SYM, "../..", b""), ("b", LINK, "a/canary", b"")),
    "a hard link to what is not there": lambda _: tar(("b", LINK, "a", b"")),
    "a character device": lambda _: tar(("null", tarfile.CHRTYPE, "", b"")),
    "a block device": lambda _: tar(("sda", tarfile.BLKTYPE, "", b"")),
    "a pipe": lambda _: tar(("pipe", tarfile.FIFOTYPE, "", b"")),
    "an unknown kind": lambda _: tar(("what", b"Z", "", b""), file("what")),
    "the same name twice": lambda _: tar(file("a"), file("a", b"other")),
    "the same name written in another way": lambda _: tar(file("a"), file("./a")),
    "a file without its folder": lambda _: tar(file("a/b")),
    "a file below a file": lambda _: tar(file("a"), file("a/b")),
    "a symbolic link to nothing": lambda _: tar(("a", SYM, "", b"")),
    "not a tar": lambda _: io.BytesIO(b"PK\x03\x04 this is a zip" * 100),
    "nothing": lambda _: io.BytesIO(),
    "a shell's error message": lambda _: io.BytesIO(b"sh: tar: not found\n"),
    "a name with a NUL byte": lambda _: pax(path="a\0b"),
    "a time that no file can have": lambda _: pax(mtime="1e999"),
    "a size below 0": lambda _: pax(size="-1024"),
    "a size that no disk has": lambda _: pax(size="99999999999999999999"),
    "headers without end": lambda _: headers(3000),
    "a sparse file of a pebibyte": lambda _: pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 50)}),
}  # fmt: skip


def pax(**fields: str) -> io.BytesIO:
    """One file whose extended header says what it likes."""
    member = tarfile.TarInfo("a")
    records = b""
    for key, value in fields.items():
        line = f" {key}={value}\n".encode()
        length = next(n for n in range(len(line), len(line) + 9) if len(str(n)) + len(line) == n)
        records += str(length).encode() + line
    header = tarfile.TarInfo("header")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    blocks = header.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)
    return io.BytesIO(blocks + member.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))


def headers(count: int) -> io.BytesIO:
    header = tarfile.TarInfo("header")
    header.type, header.size = tarfile.XHDTYPE, 0
    return io.BytesIO(header.tobuf(tarfile.USTAR_FORMAT) * count + bytes(1024))


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_archive_is_refused_and_touches_nothing_outside(folder: Path, hostile: Callable[[Path], io.BytesIO]) -> None:
    with pytest.raises(Refused):
        unpack(hostile(folder), folder)

    assert outside(folder) == UNTOUCHED


def sparse(*pieces: tuple[int, int], size: int, count: int | None = None) -> io.BytesIO:
    """One file of which an archive holds only pieces, in GNU tar's format 1.0, or a lie in that format."""
    table = "".join(f"{number}\n" for number in (len(pieces) if count is None else count, *(n for piece in pieces for n in piece))).encode()
    member = tarfile.TarInfo("a")
    content = table + bytes(-len(table) % 512) + b"x" * sum(max(length, 0) for _, length in pieces)
    member.size = len(content)
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size), "GNU.sparse.name": "a"}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as made:
        made.addfile(member, io.BytesIO(content))
    stream.seek(0)
    return stream


def test_a_file_of_pieces_gets_its_holes_back(folder: Path) -> None:
    unpack(sparse((1 << 16, 5), (1 << 20, 5), (3 << 20, 0), size=3 << 20), folder)

    expected = bytes(1 << 16) + b"xxxxx" + bytes((1 << 20) - (1 << 16) - 5) + b"xxxxx" + bytes((2 << 20) - 5)
    assert (folder / "a").read_bytes() == expected
    assert (folder / "a").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(
    "hostile",
    [
        sparse((0, 5), size=1 << 50),
        sparse((0, 5), (3, 5), size=100),
        sparse((50, 5), (0, 5), size=100),
        sparse((98, 5), size=100),
        sparse((-5, 5), size=100),
        sparse((0, -5), size=100),
        sparse((0, 5), size=100, count=10**9),
        sparse(*[(n, 1) for n in range(0, 2_000_000, 2)], size=2_000_000),
        sparse((0, 5), size=-1),
    ],
    ids=["a pebibyte", "overlapping", "not in order", "behind the end", "before the begin", "below 0", "no end", "a million", "no size"],
)
def test_pieces_that_make_no_file_or_no_honest_one_are_refused(folder: Path, hostile: io.BytesIO) -> None:
    with pytest.raises(Refused):
        unpack(hostile, folder)

    assert outside(folder) == UNTOUCHED
    assert sum(path.stat().st_blocks for path in folder.iterdir()) <= 8


def test_many_files_with_holes_have_to_fit_together(folder: Path) -> None:
    size = shutil.disk_usage(folder).free // 4
    with io.BytesIO() as stream:
        for number in range(6):
            one = sparse((0, 5), size=size).getvalue()
            stream.write(one[: len(one.rstrip(b"\0")) + -len(one.rstrip(b"\0")) % 512].replace(b"name=a", b"name=%d" % number))
        stream.write(bytes(1024))
        stream.seek(0)
        with pytest.raises(Refused, match=r"'\d'"):
            unpack(stream, folder)


def test_headers_that_would_fill_the_memory_are_refused(folder: Path) -> None:
    with pytest.raises(Refused, match="headers"):
        unpack(pax(comment="x" * (archive._MAX_HEADERS + 1)), folder)


def test_what_is_no_file_is_not_packed(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(Refused, match=str(tmp_path / "s")):
            pack(tmp_path / "s", io.BytesIO(), name="s")
    with pytest.raises(Refused, match="/dev/null"):
        pack(Path("/dev/null"), io.BytesIO(), name="null")


@pytest.mark.parametrize("size", [(3 << 20) + 7, 3 << 20], ids=["data at the end", "a hole at the end"])
def test_gnu_tar_unpacks_what_was_packed_without_its_holes(tmp_path: Path, size: int) -> None:
    (tmp_path / "tree").mkdir()
    with (tmp_path / "tree" / "holes").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"middle" * 500)
        if size % 512:
            file.seek(size - 9)
            file.write(b"at an end")
        file.truncate(size)
    (tmp_path / "tree" / "twin").hardlink_to(tmp_path / "tree" / "holes")
    with (tmp_path / "made.tar").open("w+b") as stream:
        pack(tmp_path / "tree", stream, name="tree", sparse=lambda: True)
        stream.seek(0)
        (tmp_path / "ours").mkdir()
        unpack(stream, tmp_path / "ours")
    (tmp_path / "its").mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "made.tar", "-C", tmp_path / "its"], check=True)

    assert (tmp_path / "made.tar").stat().st_size < 1 << 20
    for root in (tmp_path / "ours" / "tree", tmp_path / "its" / "tree"):
        assert (root / "holes").read_bytes() == (tmp_path / "tree" / "holes").read_bytes()
        assert (root / "holes").stat().st_blocks * 512 < 1 << 20
        assert (root / "twin").samefile(root / "holes")


@pytest.mark.parametrize("bit", [stat.S_ISUID, stat.S_ISGID, stat.S_ISVTX])
def test_set_id_bits_do_not_come_out(folder: Path, bit: int) -> None:
    unpack(tar(("bin", FOLDER, "", b""), file("bin/su"), mode=0o755 | bit), folder)

    assert stat.S_IMODE((folder / "bin" / "su").stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / "bin").stat().st_mode) == 0o755


def test_an_archive_with_too_many_entries_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_ENTRIES", 3)
    unpack(tar(*(file(str(n)) for n in range(3))), folder)
    again = folder / "again"
    again.mkdir()

    with pytest.raises(Refused, match="3"):
        unpack(tar(*(file(str(n)) for n in range(4))), again)


def test_an_archive_that_breaks_off_is_refused_wherever_that_is(tmp_path: Path) -> None:
    whole = tar(("tree", FOLDER, "", b""), file("tree/a", b"x" * 700), ("tree/l", SYM, "a", b""), file("tree/b", b"y")).getvalue()
    end = len(whole.rstrip(b"\0"))
    cuts = sorted({*range(0, len(whole), 512), *range(1, end, 97)})
    for number, cut in enumerate(cut for cut in cuts if cut < end + 1024):
        inside = tmp_path / str(number)
        inside.mkdir()
        with pytest.raises(Refused):
            unpack(io.BytesIO(whole[:cut]), inside)


@settings(max_examples=400)
@given(st.data())
def test_a_damaged_archive_is_refused_or_stays_inside(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = bytearray(
        tar(("t", FOLDER, "", b""), file("t/a"), ("t/l", SYM, "a", b""), ("t/h", LINK, "t/a", b""), file("t/\udcff" + "n" * 120)).getvalue()
    )
    whole = whole[: len(whole.rstrip(b"\0")) + 1024]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    block = data.draw(st.integers(0, len(whole) // 512 - 1)) * 512
    header = whole[block : block + 512]
    header[148:156] = b" " * 8
    whole[block + 148 : block + 156] = b"%06o\0 " % sum(header)  # so that the damage is not just a wrong checksum
    inside = tmp_path_factory.mktemp("a") / "inside"
    inside.mkdir()

    with suppress(Refused, OSError):  # the file system has its own word on names
        unpack(io.BytesIO(bytes(whole)), inside)
    assert [path.name for path in inside.parent.iterdir()] == ["inside"]


def test_a_tree_comes_back_with_modes_links_times_and_odd_names(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for name, mode in (
        ("plain", 0o644),
        ("run me", 0o755),
        ("-rf", 0o400),
        ("new\nline", 0o600),
        ("ünï", 0o644),
        ("n" * 200, 0o644),
        (os.fsdecode(b"\xff\xfe"), 0o640),
    ):
        (tree / name).write_text(name, errors="surrogateescape")
        (tree / name).chmod(mode)
        os.utime(tree / name, (1_000_000_000, 1_000_000_000))
    (tree / "sub" / "to file").symlink_to("../plain")
    (tree / "sub" / "dangling").symlink_to("/nowhere/at all")
    (tree / "hard").hardlink_to(tree / "plain")
    (tree / "empty").mkdir(mode=0o500)
    stream = io.BytesIO()
    pack(tree, stream, name="tree")
    stream.seek(0)
    (tmp_path / "out").mkdir()
    unpack(stream, tmp_path / "out")

    assert snapshot(tmp_path / "out" / "tree") == snapshot(tree)
    assert (tmp_path / "out" / "tree" / "hard").samefile(tmp_path / "out" / "tree" / "plain")


def snapshot(tree: Path) -> dict[str, tuple[int, str, float]]:
    found = {}
    for path in sorted(tree.rglob("*")):
        status = path.lstat()
        content = str(path.readlink()) if path.is_symlink() else path.read_text(errors="surrogateescape") if path.is_file() else ""
        found[str(path.relative_to(tree))] = (status.st_mode, content, status.st_mtime if path.is_file() and not path.is_symlink() else 0.0)
    return found


def test_everything_in_an_archive_of_ours_belongs_to_root(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.chown(tmp_path / "file", os.getuid(), os.getgid())
    stream = io.BytesIO()
    pack(tmp_path / "file", stream, name="file")
    stream.seek(0)

    with tarfile.open(fileobj=stream) as made:
        (member,) = made.getmembers()
    assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "root", "root")
