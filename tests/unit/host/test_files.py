"""Time limits, atomic files, sparse copies and short-lived processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_vmbottle import CatalogError
from pytest_vmbottle.host import records
from pytest_vmbottle.host.commands import run_tool
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.digest_cache import file_digest, remembered_digest
from pytest_vmbottle.host.digests import content_digest, sparse_digest
from pytest_vmbottle.host.files import atomic_file, copy_sparse, private_dir, size_on_disk
from pytest_vmbottle.host.locks import FileLock, is_locked, lock, locked, new, tried, try_lock

BLOCK = 1 << 16
PIECES = st.lists(
    st.tuples(st.sampled_from(["hole", "zeros", "data"]), st.sampled_from([1, 4095, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])),
    max_size=6,
)


def lay(path: Path, pieces: list[tuple[str, int]], *, dense: bool) -> bytes:
    """Writes a file of pieces; a hole is left out, or with `dense` written as zeros."""
    content = b""
    with path.open("wb") as file:
        for number, (kind, length) in enumerate(pieces, start=1):
            piece = bytes([number]) * length if kind == "data" else bytes(length)
            if kind == "hole" and not dense:
                file.seek(length, os.SEEK_CUR)
            else:
                file.write(piece)
            content += piece
        file.truncate(len(content))
    return content


@settings(max_examples=60)
@given(PIECES)
def test_equal_contents_have_equal_digests_wherever_the_holes_are(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("digest")
    content = lay(folder / "sparse", pieces, dense=False)
    lay(folder / "dense", pieces, dense=True)

    assert sparse_digest(folder / "sparse") == sparse_digest(folder / "dense")
    (folder / "longer").write_bytes(content + b"\0")
    assert sparse_digest(folder / "longer") != sparse_digest(folder / "dense")


@settings(max_examples=60)
@given(PIECES, st.data())
def test_any_changed_byte_changes_the_digest(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[str, int]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("digest") / "file"
    content = lay(path, [*pieces, ("data", 1)], dense=False)
    before = sparse_digest(path)
    at = data.draw(st.integers(0, len(content) - 1))
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([content[at] ^ data.draw(st.integers(1, 255))]))

    assert sparse_digest(path) != before


@settings(max_examples=60)
@given(PIECES)
def test_a_sparse_copy_has_the_same_content_and_no_more_blocks(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("copy")
    content = lay(folder / "source", pieces, dense=True)
    with (folder / "source").open("rb") as source, (folder / "copy").open("wb") as target:
        copy_sparse(source.fileno(), target.fileno())

    assert (folder / "copy").read_bytes() == content
    assert size_on_disk(folder / "copy") <= size_on_disk(folder / "source")


def test_the_same_blocks_at_another_place_have_another_digest(tmp_path: Path) -> None:
    for name, at in (("here", 0), ("there", 5 * BLOCK)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(10 * BLOCK)
            os.pwrite(file.fileno(), b"x", at)

    assert sparse_digest(tmp_path / "here") != sparse_digest(tmp_path / "there")


@pytest.mark.parametrize("size", [0, 1, 65536, (1 << 20) + 5, 5 << 20])
@pytest.mark.parametrize("at", [None, 0, 70_000, 3 << 20])
def test_the_digest_of_a_file_with_holes_is_that_of_its_whole_content_and_holes_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, at: int | None
) -> None:
    path, told, read = tmp_path / "disk", list[tuple[int, int]](), list[bytes]()
    with path.open("wb") as file:
        file.truncate(size)
        if at is not None and at < size:
            file.seek(at)
            file.write(b"x"[: size - at])
    expected, pread = hashlib.sha256(path.read_bytes()).hexdigest(), os.pread

    def counted(fd: int, length: int, offset: int) -> bytes:
        read.append(pread(fd, length, offset))
        return read[-1]

    monkeypatch.setattr(os, "pread", counted)
    with path.open("rb") as disk:
        assert content_digest(disk.fileno(), lambda done, size: told.append((done, size))) == expected
    assert sum(map(len, read)) <= 2 * 65536
    assert not size or told[-1] == (size, size)


def test_a_sparse_copy_of_a_file_of_many_gibibytes_of_nothing_takes_no_disk(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as big, (tmp_path / "copy").open("wb") as target:
        big.truncate(64 << 30)
        os.pwrite(big.fileno(), b"x", 40 << 30)
        with (tmp_path / "big").open("rb") as source:
            copy_sparse(source.fileno(), target.fileno())

    assert (tmp_path / "copy").stat().st_size == 64 << 30
    assert size_on_disk(tmp_path / "copy") <= 1 << 20
    assert sparse_digest(tmp_path / "copy") == sparse_digest(tmp_path / "big")


def test_polling_returns_the_first_answer_and_stops_asking() -> None:
    answers = iter([None, False, 0, "", "yes", "no"])

    assert Deadline(30).poll(lambda: next(answers), every=0.001) == "yes"
    assert next(answers) == "no"


def test_polling_asks_at_least_once_even_when_the_time_is_over_and_once_more_at_the_end() -> None:
    asked: list[float] = []
    late = Deadline(0)
    assert late.poll(lambda: asked.append(1)) is None
    assert len(asked) == 1

    deadline = Deadline(0.05)
    assert deadline.poll(lambda: asked.append(deadline.remaining), every=10) is None
    assert asked[-1] == 0.0
    assert deadline.expired


def test_pauses_grow_from_the_first_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    answers = iter([None] * 6 + [True])
    assert Deadline(1000).poll(lambda: next(answers), every=0.2, first=0.1)

    assert pauses == pytest.approx([0.1, 0.15, 0.2, 0.2, 0.2, 0.2])


def test_a_file_keeps_its_old_content_when_writing_the_new_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="in the middle"), atomic_file(path) as file:  # noqa: PT012
        file.write(b"new")
        raise RuntimeError("in the middle")

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_gets_its_name_mode_and_content_at_the_end_and_the_umask_takes_nothing_private_away(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path) as file:
        file.write(b"new")
        assert not path.exists()

    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(private_dir(tmp_path / "a" / "b").stat().st_mode) == 0o700


READER = """
import sys
seen = set()
while True:
    text = open(sys.argv[1], "rb").read()
    assert len(text) == 100_000 and len(set(text)) == 1, f"torn: {len(text)} {set(text)}"
    if not seen:
        print("reading", flush=True)
    seen.add(text[0])
    if text[0] == ord("z"):
        break
print(len(seen))
"""


def test_another_process_never_reads_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 100_000)
    reader = subprocess.Popen([sys.executable, "-c", READER, path], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    try:
        assert reader.stdout.readline() == "reading\n"
        for number in range(150):
            with atomic_file(path) as file:
                for _ in range(10):
                    file.write(bytes([ord("a") + number % 20]) * 10_000)
                    file.flush()
        with atomic_file(path) as file:
            file.write(b"z" * 100_000)
        output, _ = reader.communicate(timeout=30)
    finally:
        reader.kill()
        reader.wait()

    assert reader.returncode == 0
    assert int(output) > 1


def test_a_tool_that_takes_too_long_is_killed_and_what_it_printed_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "tool"
    script.write_text("#!/bin/sh\necho $$\nexec sleep 600\n")
    script.chmod(0o700)
    ended = run_tool([script], timeout=1)

    assert ended.returncode is None
    assert not ended.ok
    with pytest.raises(ProcessLookupError):
        os.kill(int(ended.output), 0)


def test_a_tool_that_takes_too_long_is_killed_with_its_children_who_hold_its_output(tmp_path: Path) -> None:
    script = tmp_path / "tool"
    script.write_text("#!/bin/sh\nsleep 20 &\necho $!\nsleep 600\n")
    script.chmod(0o700)
    ended = run_tool([script], timeout=1)

    assert ended.returncode is None
    assert gone(int(ended.output))


def test_a_child_that_left_its_tools_group_does_not_keep_us_waiting(tmp_path: Path) -> None:
    script = tmp_path / "tool"
    script.write_text("#!/bin/sh\nsetsid sh -c 'echo $$; exec sleep 30' &\nsleep 600\n")
    script.chmod(0o700)
    ended = run_tool([script], timeout=1)
    child = int(ended.output)
    lives = not gone(child, seconds=0)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)

    assert ended.returncode is None
    assert lives, "we waited until it ended by itself"


def gone(pid: int, seconds: float = 10) -> bool:
    """Tell whether a process ends within a short time."""

    def ended() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    return Deadline(seconds).poll(ended) is True


def test_a_tool_is_given_its_words_as_they_are_and_its_status_never_raises() -> None:
    assert run_tool(["printf", "%s|", "a b", "$HOME", "", "*"], timeout=10).output == "a b|$HOME||*|"
    assert run_tool(["sh", "-c", "echo oops >&2; exit 3"], timeout=10).returncode == 3
    assert run_tool(["sh", "-c", "kill -9 $$"], timeout=10).returncode == -9
    assert run_tool(["cat"], timeout=10).ok
    assert run_tool(["printf", "\\377"], timeout=10).output == "\N{REPLACEMENT CHARACTER}"
    with pytest.raises(FileNotFoundError):
        run_tool(["/nowhere/at/all"], timeout=1)


def test_the_digest_of_a_file_is_remembered_until_the_file_looks_different(tmp_path: Path) -> None:
    path, memory = tmp_path / "file", tmp_path / "memory"
    path.write_bytes(b"old")
    assert file_digest(path, memory) == hashlib.sha256(b"old").hexdigest()
    (note,) = memory.iterdir()
    records.write(note, records.read(note) | {"sha256": "0" * 64})
    assert file_digest(path, memory) == "0" * 64
    path.write_bytes(b"new")
    assert file_digest(path, memory) == hashlib.sha256(b"new").hexdigest()
    with path.open("rb") as file, pytest.raises(CatalogError, match="was changed while it was read"):
        remembered_digest(file, path.with_name("other"), memory, lambda: str(path.write_bytes(b"while it was read")))
    assert list(memory.iterdir()) == [note]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_a_lock_is_taken_unless_another_holder_keeps_us_from_it(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "it"
    make(path)
    with locked(path, shared=True):
        with tried(path, shared=True) as is_shared:
            assert is_shared, "those who share keep nobody from sharing"
        with tried(path) as is_ours:
            assert not is_ours
        assert is_locked(path)
        assert not is_locked(path, shared=True)
    with tried(path) as is_ours:
        assert is_ours
        assert is_locked(path, shared=True)
    assert not is_locked(path)
    assert not is_locked(tmp_path / "nothing")


@pytest.mark.parametrize("replace", [Path.exists, Path.mkdir])
def test_a_lock_of_what_has_lost_its_name_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: Callable[[Path], object]
) -> None:
    path, flock = tmp_path / "it", fcntl.flock

    def late(fd: int, how: int) -> None:
        path.rename(tmp_path / secrets.token_hex(4))
        replace(path)
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    path.mkdir()
    assert try_lock(path) is None
    path.mkdir(exist_ok=True)
    with pytest.raises(FileNotFoundError):
        lock(path)
    path.mkdir(exist_ok=True)
    assert is_locked(path) is path.exists()


def test_a_new_lock_that_is_taken_for_a_dead_ones_is_made_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flock, removed = tmp_path / "it", fcntl.flock, iter([True])

    def late(fd: int, how: int) -> None:
        if next(removed, False):
            path.unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    fd = new(path)
    assert os.path.samestat(os.fstat(fd), path.stat())
    assert is_locked(path)
    with pytest.raises(FileExistsError):
        new(path)
    os.close(fd)


def test_a_lock_is_not_taken_through_a_symbolic_link_nor_waited_for_at_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="symbolic links"):
        try_lock(tmp_path / "link")
    with tried(tmp_path / "pipe") as is_ours:
        assert is_ours


def test_a_lock_that_is_a_file_is_one_threads_and_can_be_asked_for_again(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "it"), FileLock(tmp_path / "it")
    assert first.acquire(Deadline(0))
    assert not second.acquire(Deadline(0.05))
    first.release()
    assert second.acquire(Deadline(0.05))
    second.release()
    second.release()
    assert (tmp_path / "it").stat().st_mode & 0o777 == 0o600
