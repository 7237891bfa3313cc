"""Operations of the runner on files: each gives what the script gives that it takes the place of."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import time
from contextlib import closing, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from pytest_vmbottle.channels.port import GUEST_PATH, Command
from pytest_vmbottle.channels.runner import Runner
from pytest_vmbottle.guest import path as scripts
from pytest_vmbottle.guest.path import operation_of, raise_for
from pytest_vmbottle.guest.tar import unpack
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.result import Result
from tests.unit.channels.test_runner import Guest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        guest = Guest(tmp_path_factory.mktemp("guest"), theirs)
        with closing(Runner(ours, alive=guest.alive, changes=lambda: guest.changes, is_there=lambda: guest.there)) as runner:
            assert runner.adopt(deadline=Deadline(30))
            assert runner.has_files
            yield runner
        guest.process.kill()
        guest.process.wait()


def _operations() -> list[psutil.Process]:
    """Processes of operations: copies of a runner, below it."""
    found = []
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "runner.py" in " ".join(each.cmdline()) and each.ppid() != os.getpid():
                found.append(each)
    return found


def _world(folder: Path) -> Path:
    """Files of many kinds."""
    folder.mkdir()
    (folder / "file").write_bytes(b"content\0\xff\n")
    (folder / "file").chmod(0o640)
    (folder / "program").write_text("#!/bin/sh\n")
    (folder / "program").chmod(0o4755)
    (folder / "full").mkdir()
    (folder / "full" / "a\nb").write_text("x")
    (folder / "full" / ".hidden").mkdir(mode=0o700)
    (folder / "full" / "link").symlink_to("nowhere")
    os.mkfifo(folder / "full" / "fifo")
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("file")
    (folder / "over").symlink_to("link")
    (folder / "new-link").symlink_to("empty/made")
    (folder / "broken").symlink_to("nowhere/at/all")
    (folder / "loop").symlink_to("loop")
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, ns=(1_600_000_000_123_456_789, 1_500_000_000_987_654_321), follow_symlinks=False)
    return folder


def _tree(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        inside = path.read_bytes() if stat.S_ISREG(about.st_mode) else path.readlink() if stat.S_ISLNK(about.st_mode) else None
        old = about.st_mtime_ns == 1_500_000_000_987_654_321
        found[str(path.relative_to(folder))] = (oct(about.st_mode), about.st_uid, about.st_gid, about.st_nlink, inside, old)
    return found


def _told(folder: Path, status: int, stdout: bytes, stderr: bytes) -> tuple[object, str]:
    """What a caller hears: the error, or the output, in which inodes and times of changes differ by nature."""
    result = Result(argv=("x",), returncode=status, stdout=stdout.decode(errors="surrogateescape"), stderr=stderr.decode(), duration=0)
    try:
        raise_for(result, "path")
    except OSError as error:
        return (type(error), error.errno), ""
    except LookupError as error:
        return LookupError, str(error)
    text = result.stdout.replace(str(folder), "").rstrip("\n")
    if re.fullmatch(r"[0-9a-f]+ \d+ .*\|\.?.*", text, re.DOTALL):
        about = scripts._stat_result(text)
        return (about[0], *about[3:9], about.st_mtime_ns, about.st_atime_ns, about.st_blocks, about.st_rdev), ""
    return None, "\0".join(sorted(re.sub(r"(\.\d{9})0 ", r"\1 ", text).split("\0")))


_NEW = ("", "")
_PLACES = ("made", "empty", "file", "a/b/c", "file/x", "none/x", "broken")
_RENAMED = (
    *(("file", name) for name in ("program", "new", "empty", "link", "none/x")),
    *(("empty", name) for name in ("file", "full")),
    *(("full", name) for name in ("empty", "full/x")),
    ("none", "x"),
    ("link", "new"),
)
_CASES = [
    *((scripts._STAT, name, how) for name in ("file", "link", "loop", "broken", "file/x", "none", "full") for how in ("-L", "")),
    *((scripts._READ, name) for name in ("file", "link", "full", "none", "loop", "file/x")),
    *((scripts._WRITE, name, "5", *_NEW) for name in ("file", "program", "link", "over", "new", "new-link", "broken", "loop")),
    *((scripts._WRITE, name, "5", *_NEW) for name in ("full", "none/x", "file/x")),
    (scripts._WRITE, "file", "4", *_NEW),
    (scripts._WRITE, "file", "5", "0600", ""),
    (scripts._WRITE, "new", "5", "2755", ""),
    (scripts._WRITE, "new", "5", "", "nosuchuser"),
    (scripts._WRITE, "new", "5", "", "root:nosuchgroup"),
    *((scripts._SCAN, name, "1", "") for name in ("full", "empty", "none", "file", "loop")),
    *((scripts._MKDIR, name, *how, "0777") for name in _PLACES for how in (("", ""), ("1", ""), ("", "1"), ("1", "1"))),
    (scripts._MKDIR, "made", "", "", "3775"),
    *((scripts._TOUCH, name, "0666", ok) for name in ("file", "made", "none/x", "link", "new-link", "broken", "full") for ok in ("1", "")),
    (scripts._TOUCH, "made", "0640", "1"),
    *((scripts._UNLINK, name) for name in ("file", "link", "full", "none", "file/x", "broken")),
    *((scripts._RMDIR, name) for name in ("empty", "full", "file", "none", "link")),
    *((scripts._CHMOD, name, "0601") for name in ("file", "link", "full", "none", "broken")),
    *((scripts._CHMOD, name, "2710") for name in ("program", "full")),
    *((scripts._READLINK, name) for name in ("link", "file", "none", "broken", "full")),
    *((scripts._OWNER, name, which) for name in ("file", "none") for which in ("%U", "%G")),
    (scripts._CHOWN, "file", "nosuchuser"),
    (scripts._CHOWN, "file", ":nosuchgroup"),
    *((scripts._RENAME, old, f"+{new}") for old, new in _RENAMED),
    *((scripts._LINK, name, "file", "-s") for name in ("new", "full", "link", "none/x")),
    *((scripts._LINK, name, "+file", "") for name in ("new", "full", "link", "none/x")),
    (scripts._LINK, "new", "+none", ""),
    (scripts._LINK, "new", "+link", ""),
]


@pytest.mark.parametrize(("script", "words"), [pytest.param(case[0], case[1:]) for case in _CASES])
def test_an_operation_says_and_leaves_what_its_script_does(runner: Runner, tmp_path: Path, script: str, words: tuple[str, ...]) -> None:
    outcomes = []
    for name in ("script", "operation"):
        folder = _world(tmp_path / name)
        full = (f"{folder}/{words[0]}", *(f"{folder}/{word[1:]}" if word.startswith("+") else word for word in words[1:]))
        operation = (operation_of(script, full), "root", *full)
        assert operation[0]
        # With the umask of commands in a guest.
        argv = ("sh", "-c", script, "sh", *full)
        content = b"typed" if script == scripts._WRITE else b""
        if name == "script":
            env = {"PATH": GUEST_PATH, "LC_ALL": "C"}
            ended = subprocess.run(argv, input=content, capture_output=True, env=env, umask=0o022, check=False)
            told = _told(folder, ended.returncode, ended.stdout, ended.stderr)
        else:
            done = runner.run(Command(argv=("false",), input=content, operation=operation), deadline=Deadline(30))
            told = _told(folder, done.returncode, done.stdout, done.stderr)
        outcomes.append((told, _tree(folder)))
    assert outcomes[0] == outcomes[1]


def test_names_of_any_bytes_and_much_data_go_both_ways(runner: Runner, tmp_path: Path) -> None:
    name = os.fsdecode(bytes(tmp_path) + b"/\xff\n'name")
    content = os.urandom(3_000_000)

    def run(*operation: str, content: bytes = b"") -> bytes:
        done = runner.run(Command(argv=("false",), input=content, operation=operation), deadline=Deadline(60))
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout

    run("write", "root", name, str(len(content)), "", "", content=content)
    assert Path(name).read_bytes() == content
    assert run("read", "root", name) == content
    assert [entry for entry in os.listdir(tmp_path)] == [os.path.basename(name)]  # noqa: PTH119, PTH208, C416 - any bytes


def test_one_that_waits_for_ever_holds_up_nothing_and_ends_at_its_deadline(runner: Runner, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reading = Command(argv=("false",), operation=("read", "root", f"{tmp_path}/fifo"))
    # A command beside it, whose input must end though the operation was begun meanwhile.
    got = bytearray()
    cat = runner.start(Command(argv=("cat",), env=(("PATH", GUEST_PATH),)), stdout=got.extend, stderr=lambda _: None, deadline=Deadline(20))
    waiting = runner._job(reading, got.extend, got.extend, has_input=False)
    assert runner.run(Command(argv=("false",), operation=("stat", "root", str(tmp_path), "")), deadline=Deadline(20)).returncode == 0
    cat.write(b"in", deadline=Deadline(20))
    cat.close_input()
    assert cat.wait(deadline=Deadline(20)) == 0
    assert (bytes(got), waiting.returncode) == (b"in", None)
    assert _operations()
    waiting.close()
    assert Deadline(10).poll(lambda: not _operations()), "nobody would end it any more"
    began = time.monotonic()
    late = runner.run(reading, deadline=Deadline(0.5))
    assert (late.timed_out, late.returncode) == (True, -9)
    assert time.monotonic() - began < 9  # it was killed, and not only left


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_it_has_the_rights_of_its_user(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o600)
    for user, status, said in (("nobody", 1, b"Permission denied"), ("root", 0, b""), ("nosuchuser", 125, b"no user nosuchuser")):
        done = runner.run(Command(argv=("false",), operation=("read", user, f"{tmp_path}/secret")), deadline=Deadline(20))
        assert done.returncode == status
        assert said in done.stderr


@pytest.mark.parametrize("size", [0, 1, 511, 512, 70_000])
def test_a_file_alone_comes_as_an_archive_and_goes_with_its_mode_and_its_time(runner: Runner, tmp_path: Path, size: int) -> None:
    content, name = os.urandom(size), "a name\n'" + "x" * 80
    (tmp_path / name).write_bytes(content)
    (tmp_path / name).chmod(0o751)
    os.utime(tmp_path / name, (0, 1_234_567_890))
    fetched = runner.run(Command(argv=("false",), operation=("fetch", "root", f"{tmp_path}/{name}", "99999")), deadline=Deadline(20))
    assert (fetched.returncode, fetched.stderr) == (0, b"")
    (tmp_path / "out").mkdir()
    unpack(BytesIO(fetched.stdout), tmp_path / "out")
    words = (f"{tmp_path}/in", "unused", str(size), "0751", "1234567890")
    placed = runner.run(Command(argv=("false",), input=content, operation=("place", "root", *words)), deadline=Deadline(20))
    assert (placed.returncode, placed.stderr) == (0, b"")
    for path in (tmp_path / "out" / name, tmp_path / "in"):
        about = path.stat()
        assert (path.read_bytes(), about.st_mode & 0o7777, about.st_mtime) == (content, 0o751, 1_234_567_890)


def test_what_is_no_plain_small_file_is_left_to_tar(runner: Runner, tmp_path: Path) -> None:
    _world(tmp_path / "world")
    (tmp_path / "large").write_bytes(bytes(101))
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(100_000)
    for name, status in (("world", 120), ("world/link", 120), ("world/full/fifo", 120), ("large", 120), ("holes", 120), ("none", 1)):
        most = "100" if name == "large" else "999999"
        operation = ("fetch", "root", f"{tmp_path}/{name}", most)
        assert runner.run(Command(argv=("false",), operation=operation), deadline=Deadline(20)).returncode == status
    assert runner.run(Command(argv=("false",), operation=("nonesuch", "root")), deadline=Deadline(20)).returncode == 120


def test_a_file_is_placed_in_a_folder_and_never_in_place_of_one_or_in_part(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "folder" / "taken").mkdir(parents=True)

    def place(target: str, name: str, size: str = "2") -> int:
        operation = ("place", "root", f"{tmp_path}/{target}", name, size, "0644", "1")
        return runner.run(Command(argv=("false",), input=b"in", operation=operation), deadline=Deadline(20)).returncode

    assert (place("folder", "new"), place("folder", "taken"), place("none/x", "x"), place("short", "x", "3")) == (0, 102, 1, 1)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["folder", "folder/new", "folder/taken"]
