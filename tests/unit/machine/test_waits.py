"""Waiting, with a guest that answers what a test says."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from pytest_vmbottle import CommandTimeout, MachineDied, MachineError, MachineTimeout, Result
from pytest_vmbottle.backends.console import Console
from pytest_vmbottle.backends.port import Instance
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.machine import guestlog
from pytest_vmbottle.machine.waits import Wait
from pytest_vmbottle.testing import FakeBackend, FakeInstance

Answer = Callable[[str | Sequence[str]], str | Result]


def result(stdout: str, returncode: int = 0) -> Result:
    return Result(argv=("x",), returncode=returncode, stdout=stdout, stderr="")


@pytest.fixture
def console(tmp_path: Path) -> Console:
    (tmp_path / "console.log").write_text("the last words\n")
    return Console(tmp_path / "console.log")


def wait(console: Console, answer: Answer = lambda _: "", *, seconds: float = 0.1, alive: Callable[[], None] = lambda: None) -> Wait:
    def run(command: str | Sequence[str], deadline: Deadline) -> Result:
        assert 0 < deadline.remaining <= max(20.0, seconds)
        said = answer(command)
        return result(said) if isinstance(said, str) else said

    return Wait(machine="vm", console=console, alive=alive, run=run, deadline=Deadline(seconds))


def test_a_wait_in_vain_says_what_for_how_long_what_it_last_saw_and_what_the_console_said(console: Console) -> None:
    with pytest.raises(MachineTimeout) as caught:
        wait(console).until(lambda: None, "the tide", last=lambda: "low water")
    assert [word for word in ("0.1 s", "the tide", "low water", "the last words") if word not in str(caught.value)] == []
    assert caught.value.machine == "vm"


def test_what_comes_true_at_once_is_returned_although_the_machine_is_gone(console: Console) -> None:
    def gone() -> None:
        raise MachineDied("it powered off")

    assert wait(console, alive=gone).until(lambda: "here", "it") == "here"
    with pytest.raises(MachineDied, match="powered off"):
        wait(console, alive=gone, seconds=60).until(lambda: None, "it")


def test_a_condition_shows_its_last_value_without_control_characters(console: Console) -> None:
    def half_done() -> list[str]:
        return []

    with pytest.raises(MachineTimeout, match="half_done"):
        wait(console).condition(half_done, every=0.01)
    with pytest.raises(MachineTimeout):
        wait(console).condition(lambda: 0, every=0.01)


def test_a_command_that_takes_too_long_counts_as_an_answer(console: Console) -> None:
    def slow(_: str | Sequence[str]) -> str:
        raise CommandTimeout(result("half an answer", -9), 5)

    with pytest.raises(MachineTimeout, match="half an answer"):
        wait(console, slow).command("x", every=0.01)


@pytest.mark.parametrize(
    "state",
    [
        "LoadState=loaded\nActiveState=failed\nSubState=failed\nResult=exit-code\n",
        "LoadState=loaded\nActiveState=inactive\nSubState=dead\nResult=success\n",
        "LoadState=not-found\nActiveState=inactive\nSubState=dead\n",
    ],
)
def test_a_unit_that_cannot_become_active_ends_the_wait_at_once_with_its_journal(console: Console, state: str) -> None:
    with pytest.raises(MachineError, match=r"\\x1b the reason") as caught:
        wait(console, lambda command: "\x1b the reason" if command[0] == "journalctl" else state, seconds=60).unit("web")
    assert not isinstance(caught.value, TimeoutError)


def test_a_unit_that_is_queued_or_on_its_way_is_waited_for(console: Console) -> None:
    states = iter(["ActiveState=inactive\nJob=12\n", "ActiveState=activating\n", "ActiveState=active\n"])
    wait(console, lambda _: next(states), seconds=30).unit("web")
    assert list(states) == []
    with pytest.raises(MachineTimeout, match="ActiveState=activating"):
        wait(console, lambda _: "ActiveState=activating\n").unit("web")


TABLE = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   2: 0F02000A:0016 0202000A:D431 01 00000000:00000000 00:00000000 00000000     0        0 1 1
   3: 0100007F:1F90 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 1 1
"""


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()


def test_a_port_is_open_when_something_listens_and_reached_when_a_connection_has_come_in(
    console: Console, address: tuple[str, int]
) -> None:
    wait(console, lambda _: TABLE).port(8080)
    wait(console, lambda _: TABLE).forwarded_port(22, address)
    with pytest.raises(MachineTimeout, match="22, 8080"):
        wait(console, lambda _: TABLE).port(80)
    with pytest.raises(MachineTimeout, match="22, 8080"):
        wait(console, lambda _: TABLE).forwarded_port(8080, address)


def test_text_is_awaited_on_the_console_as_it_is_and_an_expression_by_its_meaning(console: Console) -> None:
    assert wait(console).output(re.compile("last (.)")).group(1) == "w"
    with pytest.raises(MachineTimeout, match=r"'word\.'"):
        wait(console).output("word.")


class Ended(FakeInstance):
    """A machine that ends as it is told."""

    def __init__(self, folder: Path, exitcode: int | None) -> None:
        super().__init__(FakeBackend(), folder)
        self._exitcode = exitcode

    @property
    def exitcode(self) -> int | None:
        return self._exitcode

    def alive(self) -> None:
        Instance.alive(self)


def test_only_an_orderly_end_is_a_shutdown(console: Console, tmp_path: Path) -> None:
    wait(console).shutdown(Ended(tmp_path, 0))
    crashed = Ended(tmp_path, -9)
    with pytest.raises(MachineDied, match="-9"):
        wait(console, alive=crashed.alive, seconds=60).shutdown(crashed)
    with pytest.raises(MachineTimeout):
        wait(console).shutdown(Ended(tmp_path, None))


WAITS: dict[str, Callable[[Wait], object]] = {
    "unit": lambda wait: wait.unit("web"),
    "port": lambda wait: wait.port(80),
    "file": lambda wait: wait.file("/x"),  # type: ignore[arg-type]
    "command": lambda wait: wait.command("x", every=0.01),
}


@pytest.mark.parametrize("error", [CommandTimeout(result("", -9), 5), MachineTimeout("the agent does not answer")])
@pytest.mark.parametrize("kind", WAITS)
def test_a_guest_too_slow_to_answer_ends_no_wait_before_its_time_and_the_wait_by_its_own_error(
    console: Console, kind: str, error: Exception
) -> None:
    asked: list[object] = []

    def slow(command: str | Sequence[str]) -> str:
        asked.append(command)
        raise error

    with pytest.raises(MachineTimeout) as caught:
        WAITS[kind](wait(console, slow))
    assert caught.value is not error
    assert len(asked) > 1


def test_the_last_answer_is_told_though_the_guest_did_not_answer_again(console: Console) -> None:
    answers = iter(["ActiveState=activating\n"])

    def once(_: str | Sequence[str]) -> str:
        if answer := next(answers, None):
            return answer
        raise CommandTimeout(result("", -9), 5)

    with pytest.raises(MachineTimeout, match="activating"):
        wait(console, once).unit("web")


@pytest.mark.parametrize("kind", ["port", "console"])
def test_a_wait_in_vain_lists_the_units_that_failed_meanwhile_with_their_journals(console: Console, kind: str) -> None:
    def answer(command: str | Sequence[str]) -> str:
        if command == guestlog.UNITS:
            return "9.0 1\nId=web.service\nActiveState=failed\nSubState=failed\nResult=exit-code\nStateChangeTimestampMonotonic=8000000\n"
        return "-- web.service:\n\x1bno such port\n" if "web.service" in command else ""

    with pytest.raises(MachineTimeout) as caught:
        wait(console, answer).port(80) if kind == "port" else wait(console, answer).output("ready")
    assert "web.service" in str(caught.value)
    assert "\\x1bno such port" in str(caught.value)


def test_a_guest_that_cannot_tell_of_its_units_changes_nothing_in_the_error(console: Console) -> None:
    def answer(command: str | Sequence[str]) -> Result | str:
        if command == guestlog.UNITS:
            raise MachineDied("it powered off")
        return ""

    with pytest.raises(MachineTimeout, match="80"):
        wait(console, answer).port(80)
