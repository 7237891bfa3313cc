"""`vmbottle machine exec` without options: what takes the quick way, and what it loads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from pytest_vmbottle import MachineSpec
from pytest_vmbottle.__main__ import main
from pytest_vmbottle.channels.port import Command, Finished
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.machine.machine import Machine
from pytest_vmbottle.provision.origins import KeptOrigin
from pytest_vmbottle.standalone.asking import request
from pytest_vmbottle.standalone.client import Kept
from pytest_vmbottle.standalone.daemon import Daemon
from pytest_vmbottle.standalone.line import Line, listen
from pytest_vmbottle.standalone.quick import execute
from pytest_vmbottle.standalone.record import Record
from pytest_vmbottle.testing import FakeBackend, FakeInstance

LOADED = """
import sys
from pytest_vmbottle.standalone.quick import execute
status = execute(["machine", "exec", "web", "true"])
slow = {"click", "attr", "attrs", "subprocess", "cattrs", "json", "pathlib", "re", "socket", "typing"}
print(status, *sorted({name.partition(".")[0] for name in sys.modules} & slow))
"""


Handlers = list[Callable[[Command], Finished]]


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Handlers]:
    """A machine that runs; the last one of these does its commands."""
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(tmp_path))
    handlers: Handlers = [lambda _: Finished(returncode=0)]
    backend = FakeBackend(handler=lambda command: handlers[-1](command))  # noqa: PLW0108 - the one that is the last then
    spec, place = MachineSpec(source="debian-12", name="web"), Kept(tmp_path / "machines" / "web")
    instance = FakeInstance(backend, tmp_path, spec=spec)
    machine = Machine(instance, spec=spec, id="web-1", backend="fake", channel=instance.channel(deadline=Deadline(1)))
    origin = KeptOrigin(name="debian-12", sha256="0", key="0", prepared=True, awaits_boot=False, is_quick=False)
    with place.claimed(again=False) as hold, listen(hold) as server:
        Daemon(machine, place, Record(name="web", source="debian-12", state="running"), origin).listen(server)
        yield handlers


def test_a_command_has_its_words_its_streams_and_its_status(web: Handlers, capfd: pytest.CaptureFixture[str]) -> None:
    def handler(command: Command) -> Finished:
        return Finished(returncode=3 if command.argv[-1] == "three" else -9, stdout=repr(command.argv[-2:]).encode(), stderr=b"err")

    web.append(handler)
    assert execute(["machine", "exec", "web", "--", "-a b", "three"]) == 3
    assert execute(["machine", "exec", "web", "echo", "--help"]) == 137
    said = capfd.readouterr()
    assert said.out == "('-a b', 'three')('echo', '--help')"
    assert said.err == "errerr"


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("machine", "ls"),
        ("machine", "exec"),
        ("machine", "exec", "web"),
        ("machine", "exec", "web", "--"),
        ("machine", "exec", "-u", "nobody", "web", "id"),
        ("machine", "exec", "web", "-t", "top"),
        ("machine", "exec", "web", "-"),
        ("machine", "exec", "nosuch", "true"),
        ("machine", "exec", "../machines/web", "true"),
        ("machine", "exec", ".web", "true"),
        ("--catalog", ".", "machine", "exec", "web", "true"),
    ],
    ids=" ".join,
)
def test_what_is_not_plain_is_left_to_the_command_line(words: tuple[str, ...]) -> None:
    assert execute(words) is None


def test_an_error_is_told_as_by_the_command_line(web: Handlers, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> NoReturn:
        raise MachineError("the guest \x1b[31mis lost")

    web.append(fail)
    assert execute(["machine", "exec", "web", "true"]) == 1
    assert capfd.readouterr().err == "Error: the guest \\x1b[31mis lost\n"


def test_it_asks_for_what_the_command_line_would_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(tmp_path))
    words = ["printf", 'a "b" \\', "\u00e9\udcff\n", ""]
    (tmp_path / "machines" / "web").mkdir(parents=True)
    asked: list[object] = []
    folder = os.open(tmp_path / "machines" / "web", os.O_RDONLY)
    with listen(folder) as server:

        def answer() -> None:
            line = Line(server.accept()[0])
            asked.append(line.receive())
            line.send({"answer": 0})
            line.close()

        thread = threading.Thread(target=answer)
        thread.start()
        assert execute(["machine", "exec", "web", "--", *words]) == 0
        thread.join()
    os.close(folder)
    assert asked == [request(words)]


@pytest.mark.usefixtures("web")
def test_ctrl_c_ends_it_in_a_word(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("pytest_vmbottle.standalone.quick._answer", interrupted)
    assert execute(["machine", "exec", "web", "true"]) == 130
    assert capfd.readouterr().err == "interrupted\n"


@pytest.mark.usefixtures("web")
def test_it_loads_nothing_of_the_command_line() -> None:
    paths = os.pathsep.join(str(Path(each).absolute()) for each in sys.path if each)
    ended = subprocess.run(
        [sys.executable, "-P", "-c", LOADED], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert ended.stdout == "0\n"


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize(("name", "status", "said"), [("web", 0, ""), ("nosuch", 1, "no machine 'nosuch'")])
def test_the_program_takes_either_way(
    name: str, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vmbottle", "machine", "exec", name, "true"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status
    assert said in capsys.readouterr().err
