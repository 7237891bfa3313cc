"""A machine's timeline: events in order, of bounded size, without secrets."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_vmbottle import shown
from pytest_vmbottle.result import CommandTimeout, Result
from pytest_vmbottle.timeline import Timeline, now, recorded
from pytest_vmbottle.timeline.ring import Ring
from tests.conftest import open_files


@pytest.fixture
def timeline(tmp_path: Path) -> Timeline:
    return Timeline(tmp_path, machine="vm")


@pytest.fixture
def secret() -> Iterator[str]:
    before = dict(shown._SECRETS)
    shown.redact("hunter2 hunter2")
    yield "hunter2 hunter2"
    shown._SECRETS.clear()
    shown._SECRETS.update(before)


class Robot:
    """Has verbs of which one uses the other."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    @recorded("file")
    def walk(self, where: str, *, data: bytes = b"") -> str:
        """Walk."""
        del data
        return self.step(where)

    @recorded("file", lambda robot: {"path": type(robot).__name__})
    def step(self, where: str) -> str:
        """Step."""
        if where == "wall":
            raise ValueError("there is a wall")
        return where


def test_an_event_has_its_time_its_machine_and_its_duration(timeline: Timeline) -> None:
    before = now()
    with timeline.span("command", argv=["true"]):
        pass
    timeline.note("note", text="done")

    command, note = timeline.events()
    assert before <= command["time"] <= note["time"] <= now()
    assert (command["machine"], command["kind"], command["argv"]) == ("vm", "command", ["true"])
    assert command["seconds"] >= 0
    assert "seconds" not in note


def test_of_verbs_that_use_others_only_the_outermost_is_an_event(timeline: Timeline) -> None:
    robot = Robot(timeline)
    assert robot.walk("home", data=b"12345") == "home"
    assert robot.step("out") == "out"

    walked, stepped = timeline.events()
    assert (walked["verb"], walked["args"]) == ("walk", ["home", "data=<5 bytes>"])
    assert (stepped["verb"], stepped["path"]) == ("step", "Robot")


def test_a_verb_that_fails_is_an_event_with_its_error(timeline: Timeline) -> None:
    with pytest.raises(ValueError, match="wall"):
        Robot(timeline).walk("wall")

    (event,) = timeline.events()
    assert event["error"] == "ValueError: there is a wall"
    assert Robot(timeline).step("on") == "on"
    assert len(timeline.events()) == 2


def test_verbs_of_other_threads_are_events_of_their_own(timeline: Timeline) -> None:
    robot = Robot(timeline)
    with timeline.span("wait"):
        thread = threading.Thread(target=robot.step, args=("aside",))
        thread.start()
        thread.join()

    assert sorted(event["kind"] for event in timeline.events()) == ["file", "wait"]


def test_a_command_that_timed_out_is_recorded_with_its_output(timeline: Timeline) -> None:
    result = Result(argv=("sleep", "9"), returncode=-9, stdout="so far", stderr="", duration=1.0)
    with pytest.raises(CommandTimeout), timeline.span("command", argv=["sleep", "9"]):
        raise CommandTimeout(result, 1.0)

    (event,) = timeline.events()
    assert (event["status"], event["stdout"]) == (-9, "so far")
    assert event["error"].startswith("CommandTimeout")


@pytest.mark.parametrize("size", [10_000, 3 << 20])
def test_of_a_failed_command_an_event_has_the_end_and_a_file_has_the_rest(timeline: Timeline, size: int) -> None:
    text = "x" * (size - 3) + "end"
    with timeline.span("command", argv=["false"]) as event:
        event.finish(Result(argv=("false",), returncode=1, stdout=text, stderr="short", duration=0.1))

    (known,) = timeline.events()
    assert known["stdout"] == text[-4096:]
    assert "stderr_file" not in known
    assert timeline.output(known["stdout_file"]).read_text() == text[-(1 << 20) :]


def test_whole_outputs_take_8_mib_at_most_and_the_newest_are_kept(timeline: Timeline, tmp_path: Path) -> None:
    for number in range(12):
        with timeline.span("command") as event:
            event.finish(Result(argv=("false",), returncode=1, stdout=f"{number}" * (1 << 20), stderr="", duration=0.1))

    kept = sorted((tmp_path / "outputs").iterdir())
    assert sum(path.stat().st_size for path in kept) <= 8 << 20
    assert kept[-1].read_text().endswith("11")


def test_a_command_that_succeeded_leaves_no_file(timeline: Timeline, tmp_path: Path) -> None:
    with timeline.span("command") as event:
        event.finish(Result(argv=("seq",), returncode=0, stdout="1\n" * 10_000, stderr="", duration=0.1))

    assert not (tmp_path / "outputs").exists()


def test_lines_of_the_console_come_before_the_event_that_followed_them(timeline: Timeline) -> None:
    pieces = [b"booting\r\nlog", b"in: \n", b""]
    timeline.watch(lambda: pieces.pop(0) if pieces else b"")
    timeline.note("note", text="first")
    timeline.note("note", text="second")

    assert [event["text"] for event in timeline.events()] == ["booting", "first", "login: ", "second"]


def test_a_console_without_line_ends_is_passed_on_in_pieces(timeline: Timeline) -> None:
    pieces = [b"y" * 10_000]
    timeline.watch(lambda: pieces.pop() if pieces else b"")
    timeline.look()

    (line,) = timeline.events()
    assert line["text"] == "y" * 4096


def test_a_talkative_console_costs_no_events_and_both_are_bounded(timeline: Timeline, tmp_path: Path) -> None:
    timeline.note("note", text="the first event")
    timeline.watch(lambda: b"all work and no play makes no events, however much of it there is, and however long the day is\n" * 3_000)
    for _ in range(40):
        timeline.look()

    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 16 << 20
    assert timeline.events()[0]["text"] == "the first event"


def test_old_events_give_way_to_new_ones(timeline: Timeline, tmp_path: Path) -> None:
    for number in range(2_000):
        timeline.note("note", text=f"{number} {'z' * 8_000}")

    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 6 << 20
    kept = [int(event["text"].split()[0]) for event in timeline.events()]
    assert kept == list(range(kept[0], 2_000))
    assert kept[0] > 0


def test_what_began_earlier_and_lasted_until_then_counts(timeline: Timeline) -> None:
    timeline.note("note", text="before")
    with timeline.span("wait"):
        middle = now()
        timeline.note("answer", text="no")

    assert [event["kind"] for event in timeline.events(since=middle)] == ["wait", "answer"]


def test_secrets_are_in_no_file(timeline: Timeline, tmp_path: Path, secret: str) -> None:
    timeline.watch(f"password: {secret}\n".encode)

    def fail() -> None:
        with timeline.span("command", argv=["login", secret], more={"key": [secret]}) as event:
            event.finish(Result(argv=("login",), returncode=1, stdout=secret * 1000, stderr=f"wrong: {secret}", duration=0.1))
            raise RuntimeError(secret)

    with pytest.raises(RuntimeError):
        fail()

    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hunter2" not in written
    assert b"[redacted]" in written


def test_odd_text_and_odd_values_are_recorded(timeline: Timeline) -> None:
    timeline.note("note", text="\0\x1b[31m\udcff\u202e", path=Path("/srv"), number=1.5, nothing=None)

    (event,) = timeline.events()
    assert event["text"] == "\0\x1b[31m\udcff\u202e"
    assert (event["path"], event["number"], event["nothing"]) == ("PosixPath('/srv')", 1.5, None)


def test_a_folder_that_cannot_be_written_costs_events_and_no_error(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "gone", machine="vm")
    timeline.watch(lambda: b"line\n")
    with timeline.span("command") as event:
        event.finish(Result(argv=("false",), returncode=1, stdout="x" * 10_000, stderr="", duration=0.1))

    assert timeline.events() == []


def test_a_line_that_is_not_whole_costs_that_event_alone(timeline: Timeline, tmp_path: Path) -> None:
    timeline.note("note", text="one")
    timeline.close()
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"machine":"vm","time":1,"ki\n[]\n{}\n')
    timeline.note("note", text="two")

    assert [event["text"] for event in timeline.events()] == ["one", "two"]


def test_without_a_folder_nothing_is_recorded() -> None:
    timeline = Timeline(None)
    with timeline.span("command") as event:
        event.finish(Result(argv=("false",), returncode=1, stdout="x" * 10_000, stderr="", duration=0.1))

    assert timeline.events() == []


def test_closed_files_are_opened_again_and_no_descriptor_is_left(timeline: Timeline) -> None:
    before = open_files()
    for _ in range(3):
        timeline.note("note", text="again")
        timeline.close()

    assert len(timeline.events()) == 3
    timeline.close()
    assert open_files() <= before


def test_a_forked_child_records_nothing_of_its_parents_machines_and_does_not_wait_for_it(timeline: Timeline) -> None:
    with timeline._lock:  # as if another thread wrote at the moment of the fork
        child = os.fork()
        if not child:
            timeline.note("note", text="of the child")
            timeline.look()
            timeline.close()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    assert timeline.events() == []


def test_a_ring_keeps_its_last_lines_and_leaves_out_one_that_is_too_long(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "log", 1000)
    for number in range(200):
        ring.append(f"{number:09}\n".encode())
    ring.append(b"x" * 600 + b"\n")
    ring.close()

    lines = [int(line) for line in ring.lines()]
    assert lines == list(range(lines[0], 200))
    assert 50 <= len(lines) <= 100


def test_lines_are_json_of_their_own(timeline: Timeline, tmp_path: Path) -> None:
    timeline.note("note", text="two\nlines\u2028three")
    timeline.close()

    (line,) = (tmp_path / "events.jsonl").read_bytes().splitlines()
    assert json.loads(line)["text"] == "two\nlines\u2028three"


@pytest.mark.parametrize("value", ["", "abc"])
def test_a_short_value_is_no_secret_because_it_is_in_ordinary_words(value: str) -> None:
    with pytest.raises(ValueError, match="characters"):
        shown.redact(value)


def test_each_line_of_a_secret_is_hidden_wherever_text_is_shown(secret: str) -> None:
    shown.redact("-----BEGIN KEY-----\nabcdefgh\n-----END KEY-----")

    assert shown.printable(f"<{secret}>") == "<[redacted]>"
    assert shown.coloured("\x1b[31mabcdefgh\x1b[0m") == "\x1b[31m[redacted]\x1b[0m"
    assert shown.printable("-----BEGIN KEY-----\nabcdefgh\n-----END KEY-----") == "[redacted]"
