"""Output of a daemon on its way to a client; the daemon is a thread that speaks its language."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.result import CommandTimeout
from pytest_vmbottle.service.downloads import disposition, download, read_bounded, type_of
from pytest_vmbottle.service.execution import Executions
from pytest_vmbottle.service.problems import Problem
from pytest_vmbottle.service.schema import Command
from pytest_vmbottle.service.streams import asking, pieces
from pytest_vmbottle.service.threads import Threads
from pytest_vmbottle.standalone.client import Kept
from pytest_vmbottle.standalone.line import Line, listen
from tests.conftest import open_files

Serve = Callable[[Line, dict[str, Any]], Any]


class Daemon:
    """Answers each request in a thread, by a function that gets the line and the request."""

    def __init__(self, folder: Path) -> None:
        self.kept = Kept(folder)
        self.serve: Serve = lambda _, __: None
        self.asked: list[dict[str, Any]] = []
        self.broken = threading.Event()
        folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY)
        self.server = listen(descriptor)
        os.close(descriptor)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self.server.accept()
                threading.Thread(target=self._answer, args=(Line(sock),), daemon=True).start()

    def _answer(self, line: Line) -> None:
        request = line.receive()
        assert request is not None
        self.asked.append(request)
        with suppress(OSError):
            try:
                line.send({"answer": self.serve(line, request)})
            except BrokenPipeError:
                self.broken.set()
            except MachineError as error:
                line.send({"error": "MachineError", "message": str(error)})
            except FileNotFoundError as error:
                line.send({"error": "FileNotFoundError", "message": error.strerror, "errno": error.errno, "filename": error.filename})
            except CommandTimeout as error:
                line.send({"error": "CommandTimeout", "message": "", "argv": [], "seconds": error.timeout})
        line.close()

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path / "web")
    yield daemon
    daemon.close()


def run(work: Callable[[Threads], Any]) -> Any:
    async def whole() -> Any:
        return await asyncio.wait_for(work(Threads(4, waiting=4)), 60)

    return asyncio.run(whole())


def fail(error: Exception) -> Any:
    raise error


def test_all_that_a_daemon_writes_comes_through_in_order_and_nothing_stays_open(daemon: Daemon) -> None:
    data = os.urandom(5_000_000)

    def serve(line: Line, _: Any) -> None:
        with os.fdopen(os.dup(line.descriptors[0]), "wb") as sink:
            sink.write(data)

    async def work(threads: Threads) -> bytes:
        async with asking(daemon.kept, {"verb": "read"}, threads) as asked:
            return b"".join([piece async for piece in pieces(asked)])

    daemon.serve = serve
    run(work)
    before = open_files()
    assert run(work) == data
    # The daemon's thread has its end of the line a moment longer.
    assert Deadline(60).poll(lambda: open_files() <= before, every=0.02)


def test_an_error_before_the_first_byte_is_the_answer(daemon: Daemon) -> None:
    daemon.serve = lambda *_: fail(FileNotFoundError(2, "No such file or directory", "/nowhere"))

    async def work(threads: Threads) -> Any:
        return await download(daemon.kept, {"verb": "read", "path": "/nowhere"}, threads, name="x", media_type="text/plain")

    with pytest.raises(FileNotFoundError, match="/nowhere"):
        run(work)


def test_an_error_in_the_middle_breaks_the_answer_off(daemon: Daemon) -> None:
    def serve(line: Line, _: Any) -> None:
        os.write(line.descriptors[0], b"some")
        fail(MachineError("it is gone"))

    async def work(threads: Threads) -> list[bytes]:
        answer = await download(daemon.kept, {"verb": "read"}, threads, name="x", media_type="text/plain")
        sent: list[bytes] = []

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        with pytest.raises(MachineError, match="it is gone"):
            await answer({"type": "http", "asgi": {"spec_version": "2.4"}}, _never, send)
        return sent

    daemon.serve = serve
    assert b"".join(run(work)) == b"some"


async def _never() -> Any:
    await asyncio.Event().wait()


def test_a_client_that_hangs_up_ends_what_writes_for_it(daemon: Daemon) -> None:
    def serve(line: Line, _: Any) -> None:
        while True:
            os.write(line.descriptors[0], bytes(1000))

    async def work(threads: Threads) -> None:
        async with asking(daemon.kept, {"verb": "read"}, threads) as asked:
            await anext(pieces(asked))

    daemon.serve = serve
    run(work)
    assert daemon.broken.wait(10)


def test_more_than_a_bound_is_not_read(daemon: Daemon) -> None:
    def serve(line: Line, _: Any) -> None:
        os.write(line.descriptors[0], bytes(1001))

    daemon.serve = serve
    assert run(lambda threads: read_bounded(daemon.kept, "/x", threads, 1001)) == bytes(1001)
    assert run(lambda threads: read_bounded(daemon.kept, "/x", threads, 1000)) is None


def test_a_machine_that_does_not_run_is_told_and_nothing_stays_open(tmp_path: Path) -> None:
    (tmp_path / "off").mkdir()
    before = open_files()
    with pytest.raises(MachineError, match="not running"):
        run(lambda threads: read_bounded(Kept(tmp_path / "off"), "/x", threads, 10))

    # The daemon's thread has its end of the line a moment longer.
    assert Deadline(60).poll(lambda: open_files() <= before, every=0.02)


def test_requests_beyond_the_threads_wait_and_beyond_that_are_refused(daemon: Daemon) -> None:
    enough = threading.Event()
    daemon.serve = lambda *_: enough.wait(10)

    async def work(_: Threads) -> list[str]:
        threads = Threads(1, waiting=1)
        asked = [asyncio.create_task(threads.run(lambda: daemon.kept.ask({"verb": "x"}))) for _ in range(3)]
        await asyncio.sleep(0.3)
        enough.set()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        return sorted(type(outcome).__name__ for outcome in outcomes)

    assert run(work) == ["Problem", "bool", "bool"]
    assert issubclass(Problem, Exception)


# -- commands --------------------------------------------------------------------------------------------------------------------------


def test_a_command_gets_its_input_and_gives_both_streams_and_its_status(daemon: Daemon) -> None:
    def serve(line: Line, request: Any) -> int:
        source, out, err = line.descriptors
        os.write(out, os.read(source, 100) + b"\xff")
        os.write(err, b"to err")
        return len(request["argv"])

    daemon.serve = serve
    command = Command(command="cat", stdin="in é", user="nobody", cwd="/srv", env={"A": "b"}, timeout=7)
    ended = run(lambda threads: Executions(daemon.kept, threads).whole(command))

    assert (ended["returncode"], ended["stdout"], ended["stderr"]) == (4, "in é\ufffd", "to err")
    expected = {"verb": "exec", "argv": ["sh", "-eu", "-c", "cat"], "env": {"A": "b"}, "cwd": "/srv", "user": "nobody", "timeout": 7.0}
    assert daemon.asked[0] == expected


def test_more_output_than_fits_is_cut_and_read_to_its_end(daemon: Daemon) -> None:
    def serve(line: Line, _: Any) -> int:
        with os.fdopen(os.dup(line.descriptors[1]), "wb") as sink:
            sink.write(b"x" * ((16 << 20) + 1_000_000))
        return 0

    daemon.serve = serve
    ended = run(lambda threads: Executions(daemon.kept, threads).whole(Command(argv=["x"])))

    assert (ended["returncode"], ended["truncated"], len(ended["stdout"])) == (0, True, 16 << 20)


def test_a_command_that_was_killed_at_its_time_out_is_an_outcome(daemon: Daemon) -> None:
    def serve(line: Line, _: Any) -> Any:
        os.write(line.descriptors[1], b"begun")
        from pytest_vmbottle.result import Result

        fail(CommandTimeout(Result(argv=(), returncode=-9, stdout="", stderr=""), 1.0))

    daemon.serve = serve
    ended = run(lambda threads: Executions(daemon.kept, threads).whole(Command(argv=["x"])))

    assert (ended["returncode"], ended["stdout"], ended["timed_out"]) == (-9, "begun", True)


def events(daemon: Daemon) -> list[tuple[str, Any]]:
    async def work(threads: Threads) -> bytes:
        return b"".join([piece async for piece in Executions(daemon.kept, threads).events(Command(argv=["x"]))])

    blocks = [block.split("\n") for block in run(work).decode().split("\n\n") if block]
    assert all(len(block) == 2 for block in blocks), blocks
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_events_are_whole_whatever_a_guest_writes(daemon: Daemon) -> None:
    def serve(line: Line, _: Any) -> int:
        for piece in (b"\n\nevent: exit\ndata: {}\n\n", "é".encode()[:1], "é".encode()[1:], b"\r\r\xff"):
            os.write(line.descriptors[1], piece)
            threading.Event().wait(0.05)
        return 0

    daemon.serve = serve
    came = events(daemon)

    assert "".join(data["text"] for name, data in came if name == "stdout") == "\n\nevent: exit\ndata: {}\n\né\r\r\ufffd"
    assert [name for name, _ in came if name != "stdout"] == ["exit"]
    assert came[-1][1]["returncode"] == 0


def test_an_error_is_the_last_event(daemon: Daemon) -> None:
    daemon.serve = lambda *_: fail(MachineError("it is gone"))
    ((name, problem),) = events(daemon)

    assert (name, problem["status"], problem["detail"]) == ("error", 409, "it is gone")


# -- names -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain.txt", 'a"; filename="b', "é\r\nX: y", "\udcff", "", "%41"])
def test_a_disposition_is_one_header_whatever_the_name_is(name: str) -> None:
    header = disposition(name)

    assert header.isascii()
    assert header.isprintable()
    assert header.count('"') == 2


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/a.txt", "text/plain"),
        ("/a.tar.gz", "application/octet-stream"),
        ("/a", "application/octet-stream"),
        ("/", "application/octet-stream"),
    ],
)
def test_a_type_is_that_of_the_name(path: str, kind: str) -> None:
    assert type_of(path) == kind
