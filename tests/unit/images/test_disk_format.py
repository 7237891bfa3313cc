"""Disk images that were made to do harm: none gets past our own reading of its header, and that reading opens nothing else."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pytest_vmbottle.cli import main
from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.images import ImageStore, disk_format

MIB = 1 << 20
HEAD = 65608
SECRET = b"only for the eyes of this user\n"
LIMITS = ("prlimit", "--cpu=30", f"--as={1 << 30}")


@pytest.fixture(autouse=True)
def _qemu_img() -> None:
    if not shutil.which("qemu-img"):
        pytest.skip("qemu-img is not installed")


def qemu_img(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    """Runs qemu-img within limits."""
    return subprocess.run([*LIMITS, "qemu-img", *words], check=check, capture_output=True, timeout=60)


def create(path: Path, *options: str, size: str = "1M") -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *options, path, size)
    return path


def patched(path: Path, at: int, value: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value)
    return path


class World:
    """A secret file and a server, both of which nobody must touch."""

    def __init__(self, folder: Path, server: socket.socket) -> None:
        self.folder, self._server = folder, server
        self.secret = folder / "secret"
        self.secret.write_bytes(SECRET + bytes(MIB - len(SECRET)))

    @property
    def nbd(self) -> str:
        return f"nbd://127.0.0.1:{self._server.getsockname()[1]}/disk"

    def visited(self) -> bool:
        """Tell whether somebody has connected."""
        try:
            self._server.accept()[0].close()
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0)
        yield World(tmp_path, server)


def backed(world: World, backing: str, kind: str = "raw", *options: str) -> Path:
    return create(world.folder / "evil.qcow2", "-u", "-b", backing, "-F", kind, *options)


def with_data_file(world: World) -> Path:
    path = create(world.folder / "evil.qcow2", "-o", f"data_file={world.folder / 'SECRET'},data_file_raw=on")
    return patched(path, path.read_bytes().index(b"/SECRET"), b"/secret")  # a name in the header is as good as any


def with_bitmap(world: World) -> Path:
    path = create(world.folder / "evil.qcow2")
    qemu_img("bitmap", "--add", path, "dirty")
    return path


def with_dropped_bitmap(world: World) -> Path:
    return patched(with_bitmap(world), 88, bytes(8))


def with_snapshot(world: World) -> Path:
    path = create(world.folder / "evil.qcow2")
    qemu_img("snapshot", "-c", "before", path)
    return path


def with_field(at: int, value: bytes) -> Callable[[World], Path]:
    return lambda world: patched(create(world.folder / "evil.qcow2"), at, value)


def with_extension(kind: int, length: int = 16) -> Callable[[World], Path]:
    return with_field(112, struct.pack(">II", kind, length) + b"/etc/passwd\0\0\0\0\0")


ATTACKS: dict[str, tuple[Callable[[World], Path], str]] = {
    "a file as backing": (lambda world: backed(world, str(world.secret)), "backing file"),
    "a relative backing": (lambda world: backed(world, "../" + world.folder.name + "/secret"), "backing file"),
    "a backing of version 2": (lambda world: backed(world, str(world.secret), "raw", "-o", "compat=0.10"), "backing file"),
    "a backing as json": (
        lambda world: backed(world, "json:" + json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(world.secret)}})),
        "backing file",
    ),
    "a server as backing": (lambda world: backed(world, world.nbd), "backing file"),
    "a server in json": (
        lambda world: backed(world, "json:" + json.dumps({"driver": "raw", "file": {"driver": "nbd", "path": "/run/s"}})),
        "backing file",
    ),
    "a data file": (with_data_file, "data"),
    "the name of a data file alone": (with_extension(0x44415441), "data file"),
    "bitmaps": (with_bitmap, "bitmaps"),
    "bitmaps that are not valid any more": (with_dropped_bitmap, "bitmaps"),
    "encryption by LUKS": (with_field(32, b"\0\0\0\2"), "encrypted"),
    "encryption by AES": (with_field(32, b"\0\0\0\1"), "encrypted"),
    "an encryption header alone": (with_extension(0x0537BE77), "encryption"),
    "an unknown extension": (with_extension(0x12345678), "0x12345678"),
    "an extension that is longer than its cluster": (with_extension(0x6803F857, 1 << 31), "extension"),
    "a long name of a backing format": (with_extension(0xE2792ACA), "16 bytes"),
    "an internal snapshot": (with_snapshot, "snapshots"),
    "an unknown incompatible feature": (with_field(79, b"\x20"), "features"),
    "the dirty bit": (with_field(79, b"\x01"), "qemu-img check"),
    "an unknown autoclear feature": (with_field(95, b"\x80"), "bitmaps"),
    "a huge L1 table": (with_field(36, b"\x7f\xff\xff\xff"), "L1 table"),
    "a huge refcount table": (with_field(56, b"\x7f\xff\xff\xff"), "refcount table"),
    "a huge disk": (with_field(24, b"\x7f"), "bytes"),
}


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Records every file in a folder that this process opens, and every process and connection that it starts."""
    seen: list[str] = []
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event == "open" and str(arguments[0]).startswith(str(folder)):
            seen.append(str(arguments[0]))
        elif active and event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "socket.connect"):
            seen.append(f"{event} {arguments}")

    sys.addaudithook(hook)  # for good, so it is switched off below
    try:
        yield seen
    finally:
        active = False


@pytest.mark.parametrize(("craft", "reason"), ATTACKS.values(), ids=ATTACKS)
def test_a_crafted_qcow2_is_refused_before_anything_it_names_is_touched(
    world: World, craft: Callable[[World], Path], reason: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = craft(world)
    root = tmp_path_factory.mktemp("catalog")
    store = ImageStore(root / "images")
    with watched(world.folder) as seen:
        with pytest.raises(CatalogError, match=reason):
            store.add(path, name="evil")
        with pytest.raises(CatalogError, match=reason):
            store.import_path(path)
        result = CliRunner().invoke(main, ["--catalog", str(root), "image", "add", str(path), "--name", "evil"])
    assert result.exit_code == 1
    assert reason in result.stderr
    assert set(seen) == {str(path)}
    assert store.names() == ()
    assert not world.visited()


def test_the_crafted_images_do_work_on_qemus_own_tools(world: World) -> None:
    """Else it would mean nothing that they are refused."""
    copy = world.folder / "copy"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", backed(world, str(world.secret)), copy)
    assert copy.read_bytes().startswith(SECRET)
    assert not world.visited()
    chain = backed(world, world.nbd)
    with subprocess.Popen([*LIMITS, "qemu-img", "info", "--backing-chain", chain], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        assert Deadline(60).poll(world.visited)
    assert qemu_info(with_data_file(world))["format-specific"]["data"]["data-file"] == str(world.secret)


def qemu_info(path: Path) -> dict[str, Any]:
    """Return QEMU's own reading of one image without those below it; empty if it refuses the image."""
    done = qemu_img("info", "-U", "-f", "qcow2", "--output=json", path, check=False)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Images as qemu-img makes them."""
    folder = tmp_path_factory.mktemp("genuine")
    kinds = ("compat=1.1", "compat=0.10", "compression_type=zstd", "extended_l2=on", "cluster_size=4k", "lazy_refcounts=on")
    images = [create(folder / f"{number}.qcow2", "-o", options).read_bytes() for number, options in enumerate(kinds)]
    removed = create(folder / "removed.qcow2", "-u", "-b", "base", "-F", "raw")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", removed)
    return [*images, removed.read_bytes()]


# Mostly small numbers and single bits at the places of fields, sometimes anything anywhere in the header.
FIELDS = {8: 8, 16: 4, 20: 4, 24: 8, 32: 4, 36: 4, 40: 8, 48: 8, 56: 4, 60: 4, 64: 8, 72: 8, 80: 8, 88: 8, 96: 4, 100: 4, 104: 8}
VALUES = st.integers(0, 255) | st.integers(0, 63).map(lambda bit: 1 << bit) | st.integers(0, (1 << 64) - 1)
EDITS = st.lists(
    st.sampled_from(sorted(FIELDS.items())).flatmap(
        lambda field: VALUES.map(lambda value: (field[0], (value & (1 << 8 * field[1]) - 1).to_bytes(field[1], "big")))
    )
    | st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=16)),
    max_size=3,
)
EXTENSIONS = st.lists(
    st.tuples(
        st.sampled_from([0, 0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441]) | st.integers(0, (1 << 32) - 1),
        st.binary(max_size=40),
        st.integers(0, 8),
    ),
    max_size=3,
)


def extension(kind: int, data: bytes, excess: int) -> bytes:
    return struct.pack(">II", kind, len(data) + excess) + data + bytes(-len(data) % 8)


def mutated(image: bytes, edits: list[tuple[int, bytes]], extensions: list[tuple[int, bytes, int]]) -> bytes:
    """An image with other extensions, if any are given, and then with some bytes changed."""
    content = bytearray(image)
    if extensions:
        new = b"".join(extension(*each) for each in extensions)
        start = 72 if content[7] == 2 else struct.unpack_from(">I", content, 100)[0]
        content[start : start + len(new)] = new
    for at, value in edits:
        content[at : at + len(value)] = value
    return bytes(content)


def judged(content: bytes, size: int | None = None) -> tuple[str, int]:
    """The format and size, or the reason why it is no disk: anything else is an error."""
    try:
        return disk_format(content[:HEAD], len(content) if size is None else size)
    except CatalogError as error:
        return str(error), 0


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(which=st.integers(0, 6), edits=EDITS, extensions=EXTENSIONS)
def test_a_mutated_header_is_a_disk_or_a_sentence(
    genuine: list[bytes], which: int, edits: list[tuple[int, bytes]], extensions: list[tuple[int, bytes, int]]
) -> None:
    kind, seen = judged(mutated(genuine[which], edits, extensions))
    assert kind in ("qcow2", "raw") or len(kind) > 10
    assert 0 <= seen <= 16 << 40


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(which=st.integers(0, 6), edits=EDITS, extensions=EXTENSIONS)
@example(which=0, edits=[(8, (600).to_bytes(8, "big")), (16, (11).to_bytes(4, "big")), (600, b"/etc/passwd")], extensions=[])
@example(which=0, edits=[(72, (4).to_bytes(8, "big"))], extensions=[(0x44415441, b"/etc/passwd", 0)])
@example(which=0, edits=[], extensions=[(0x44415441, b"/etc/passwd", 0)])
@example(which=1, edits=[(72, (4).to_bytes(8, "big"))], extensions=[])
@example(which=0, edits=[], extensions=[(0xE2792ACA, b"raw", 0)])
def test_whatever_is_taken_for_a_disk_qemu_finds_to_name_nothing_outside_itself(
    genuine: list[bytes], tmp_path: Path, which: int, edits: list[tuple[int, bytes]], extensions: list[tuple[int, bytes, int]]
) -> None:
    content = mutated(genuine[which], edits, extensions)
    if judged(content)[0] != "qcow2":
        return
    path = tmp_path / "disk.qcow2"
    path.write_bytes(content)
    told = qemu_info(path)
    assert told, "QEMU opens it too"
    inner = told.get("format-specific", {}).get("data", {})
    assert not {"backing-filename", "full-backing-filename", "backing-filename-format", "encrypted", "snapshots"} & {*told}
    assert not {"data-file", "bitmaps", "encrypt"} & {*inner}
    assert told["virtual-size"] == judged(content)[1]


def test_what_qemu_img_makes_is_taken_for_a_disk(genuine: list[bytes]) -> None:
    assert [judged(content) for content in genuine] == [("qcow2", MIB)] * 7


def test_a_header_full_of_extensions_is_read_to_its_end_and_no_further(genuine: list[bytes]) -> None:
    endless = struct.pack(">II", 0x6803F857, 0) * ((HEAD - 112) // 8)
    wide = genuine[0][:20] + struct.pack(">I", 21) + genuine[0][24:112] + endless  # clusters of 2 MiB
    assert "header" in judged(wide, 1 << 30)[0]
    full = genuine[0][:112] + endless[: (1 << 16) - 112] + genuine[0][1 << 16 :]
    assert judged(full) == ("qcow2", MIB)


@pytest.mark.parametrize("content", [b"QFI\xfb", b"QFI\xfb" + bytes(100), b"QFI\xfb\0\0\0\2" + b"\xff" * 200])
def test_a_raw_disk_that_begins_like_a_qcow2_is_never_taken_for_a_raw_one(content: bytes) -> None:
    head = bytearray(content.ljust(HEAD, b"\0"))
    head[510:512] = b"\x55\xaa"
    kind, _ = judged(bytes(head), MIB)
    assert kind not in ("raw", "qcow2")


def test_an_image_is_added_without_any_program(tmp_path: Path, genuine: list[bytes]) -> None:
    (tmp_path / "disk.qcow2").write_bytes(genuine[0])
    store = ImageStore(tmp_path / "images")
    with watched(Path("/nowhere")) as seen:
        store.add(tmp_path / "disk.qcow2", name="mine")
        store.verify("mine")
        store.import_path(tmp_path / "disk.qcow2")
    assert seen == []
    assert os.listdir(tmp_path / "images" / "names") == ["mine.json"]  # noqa: PTH208
