"""Processes, over a channel whose commands do what a test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from pytest_vmbottle import CommandTimeout, MachineDied, MachineTimeout, Unsupported
from pytest_vmbottle.channels.port import Channel, Command, Finished
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.machine import process
from pytest_vmbottle.machine.process import Process
from pytest_vmbottle.testing import FakeChannel, FakeRunning


class Stage(FakeRunning):
    """A command that is played: `say` its output, `end` it."""

    def __init__(self) -> None:
        super().__init__(0)
        self.returncode = None
        self.gone = ""
        self.closed = False
        self.input_closed = False

    def wait(self, *, deadline: Deadline) -> int | None:
        if self.gone:
            raise MachineDied(self.gone)
        if self.returncode is None:
            time.sleep(min(0.01, deadline.remaining))
        return self.returncode

    def close_input(self) -> None:
        self.input_closed = True

    def close(self) -> None:
        self.closed = True


class Theatre(FakeChannel):
    """A channel with one command; what else is run there, to send signals, is noted and answered with `status`."""

    def __init__(self) -> None:
        super().__init__(self._note)
        self.stage = Stage()
        self.sent: list[str] = []
        self.status = 0
        self.say: Callable[[bytes], object] = print
        self.say_aside: Callable[[bytes], object] = print

    def _note(self, command: Command) -> Finished:
        self.sent.append(command.argv[-1])
        if command.argv[-1] == "KILL" and self.status == 0:
            self.end(-9)
        return Finished(returncode=self.status)

    def end(self, status: int) -> None:
        self.stage.returncode = status
        self.say(b"")
        self.say_aside(b"")

    def start(
        self,
        command: Command,  # noqa: ARG002
        *,
        stdout: Callable[[bytes], object],
        stderr: Callable[[bytes], object],
        deadline: Deadline,  # noqa: ARG002
    ) -> Stage:
        self.say, self.say_aside = stdout, stderr
        return self.stage


@pytest.fixture
def theatre() -> Theatre:
    return Theatre()


def started(theatre: Theatre, content: bytes = b"") -> Process:
    return Process(theatre, Command(argv=("x",), input=content), argv=("x", "y"), killer=theatre)


def test_lines_are_given_once_and_the_text_is_all_of_them(theatre: Theatre) -> None:
    running = started(theatre)
    theatre.say(b"one\ntwo\nthr")
    assert [next(running.stdout), next(running.stdout)] == ["one\n", "two\n"]
    theatre.say(b"ee\n\xff")
    assert next(running.stdout) == "three\n"
    theatre.end(0)
    assert list(running.stdout) == ["\udcff"]
    assert list(running.stdout) == []
    assert running.stdout.text == "one\ntwo\nthree\n\udcff"
    assert list(running.stderr) == []


def test_who_waits_for_a_line_gets_it_when_it_comes(theatre: Theatre) -> None:
    running = started(theatre)
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.extend(running.stdout))
    reader.start()
    theatre.say(b"a")
    theatre.say(b"b\nc")
    assert Deadline(60).poll(lambda: seen == ["ab\n"], every=0.01)
    theatre.end(0)
    reader.join(5)
    assert seen == ["ab\n", "c"]


def test_no_line_is_longer_than_a_limit_and_none_is_lost_by_that(theatre: Theatre, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_MAX_LINE", 10)
    running = started(theatre)
    theatre.say(b"x" * 25)
    assert [next(running.stdout), next(running.stdout)] == ["x" * 10] * 2
    theatre.say(b"\n" + b"y" * 12 + b"\nz")
    theatre.end(0)
    assert list(running.stdout) == ["xxxxx\n", "y" * 10, "yy\n", "z"]


def test_of_output_that_nobody_reads_the_end_is_kept_and_what_is_missing_is_told(theatre: Theatre, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_OUTPUT", 100)
    running = started(theatre)
    theatre.say(b"first\n")
    assert next(running.stdout) == "first\n"
    for number in range(50):
        theatre.say(b"line %d\n" % number)
    theatre.end(0)
    assert len(running.stdout.text) == 100
    missing, *lines = running.stdout
    assert "290 bytes" in missing
    assert "".join(lines) == running.stdout.text
    assert lines[-1] == "line 49\n"


def test_a_machine_that_dies_ends_whoever_waits_for_a_line_or_the_end(theatre: Theatre) -> None:
    class Lost(Stage):
        @property
        def returncode(self) -> int | None:
            raise MachineDied("the kernel panicked")

        @returncode.setter
        def returncode(self, value: int | None) -> None: ...

        def wait(self, *, deadline: Deadline) -> int | None:  # noqa: ARG002
            raise MachineDied("the kernel panicked")

    theatre.stage = Lost()
    running = started(theatre)
    for attempt in (lambda: next(running.stdout), running.wait, running.poll, running.kill):
        with pytest.raises(MachineDied, match="panicked"):
            attempt()
    running.close()  # it has ended with its machine


def test_a_wait_in_vain_leaves_it_running_with_what_it_has_said(theatre: Theatre) -> None:
    running = started(theatre)
    theatre.say(b"so far\n")
    with pytest.raises(CommandTimeout, match="so far"):
        running.wait(0.1)
    assert theatre.sent == []
    theatre.end(3)
    assert (running.wait(0.1), running.returncode, running.poll()) == (3, 3, 3)


@pytest.mark.parametrize(("signal", "name"), [("TERM", "TERM"), ("sigint", "INT"), (10, "USR1")])
def test_a_signal_has_a_name_or_a_number(theatre: Theatre, signal: str | int, name: str) -> None:
    started(theatre).kill(signal)
    assert theatre.sent == [name]


@pytest.mark.parametrize("signal", ["NONE", "", 4711, "KILL; reboot"])
def test_what_is_no_signal_is_refused_before_anything_is_sent(theatre: Theatre, signal: str | int) -> None:
    with pytest.raises(ValueError, match="signal"):
        started(theatre).kill(signal)
    assert theatre.sent == []


def test_a_signal_is_sent_again_until_it_finds_the_command_and_then_once(theatre: Theatre) -> None:
    running = started(theatre)
    theatre.status = 3
    found = threading.Timer(0.5, lambda: setattr(theatre, "status", 0))
    found.start()
    running.kill("TERM")
    assert len(theatre.sent) > 1
    theatre.end(-15)
    before = list(theatre.sent)
    running.kill()
    assert theatre.sent == before


def test_what_survives_its_signal_is_told_of(theatre: Theatre, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_PATIENCE", 0.3)
    theatre.status = 3
    with pytest.raises(CommandTimeout):
        started(theatre).kill()


def test_the_end_of_a_block_kills_what_still_runs(theatre: Theatre) -> None:
    with started(theatre) as running:
        assert running.poll() is None
    assert (theatre.sent, running.poll(), theatre.stage.closed) == (["KILL"], -9, True)


def test_its_input_is_what_it_is_given_at_the_start_or_later(theatre: Theatre) -> None:
    started(theatre, b"content")
    assert Deadline(60).poll(lambda: theatre.stage.input_closed)
    assert theatre.stage.written == b"content"

    later = Theatre()
    running = started(later)
    running.stdin.write("text ")
    running.stdin.write(b"\xff")
    assert (later.stage.written, later.stage.input_closed) == (b"text \xff", False)
    running.stdin.close()
    assert later.stage.input_closed


def test_a_channel_that_cannot_do_it_is_an_error_in_words(theatre: Theatre) -> None:
    class Plain(Channel):
        def run(self, command: Command, *, deadline: Deadline) -> Finished:
            return theatre.run(command, deadline=deadline)

    with pytest.raises(Unsupported, match="background"):
        Process(Plain(), Command(argv=("x",)), argv=("x",), killer=theatre)


def test_passing_on_keeps_the_first_part_and_shows_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_OUTPUT", 10)
    shown: list[str] = []
    channel = FakeChannel(lambda _: Finished(returncode=5, stdout=b"\x1b[0m\n1234567", stderr=b"err"))
    finished = Process(channel, Command(argv=("x",)), argv=("x",), killer=channel).relay(shown.append, 5)
    assert shown.count("err") == 1
    assert (finished.returncode, finished.stderr, finished.truncated, finished.timed_out) == (5, b"err", True, False)
    assert len(finished.stdout) <= 10


def test_passing_on_ends_at_its_deadline_with_what_was_left_behind(theatre: Theatre) -> None:
    running = started(theatre)
    theatre.say(b"begun\n")
    theatre.stage.returncode = 0  # the command ended, but something holds its output
    finished = running.relay(lambda _: None, 0.2)
    assert (finished.timed_out, finished.returncode, finished.stdout) == (True, -9, b"begun\n")
    assert theatre.sent == ["KILL"]


def test_the_time_for_a_kill_has_the_factor_of_all_time_outs(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[float] = []

    def run(self: Theatre, command: Command, *, deadline: Deadline) -> Finished:
        seconds.append(deadline.seconds)
        return self._note(command)

    monkeypatch.setattr(Theatre, "run", run)
    theatre = Theatre()
    Process(theatre, Command(argv=("x",)), argv=("x",), killer=theatre, factor=3.0).relay(lambda _: None, 0.1)
    assert seconds == [3 * process._PATIENCE]


def test_a_time_out_of_a_machine_is_one_of_pythons() -> None:
    assert issubclass(MachineTimeout, TimeoutError)
    assert issubclass(CommandTimeout, TimeoutError)
