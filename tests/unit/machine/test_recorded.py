"""What the verbs of a machine leave in its timeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_vmbottle import CommandFailed, Machine, MachineSpec, MachineTimeout, Unsupported
from pytest_vmbottle.channels.port import Command, Finished
from pytest_vmbottle.machine.sampler import Sampler
from pytest_vmbottle.testing import FakeBackend, FakeChannel, FakeInstance
from pytest_vmbottle.timeline import Timeline


def answer(command: Command) -> Finished:
    words = " ".join(command.argv)
    if "exit 7" in words:
        return Finished(returncode=7, stdout=b"out\n", stderr=b"broken\n")
    return Finished(returncode=0, stdout=words.encode())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "timeline").mkdir()
    spec = MachineSpec(source="debian-12", env={"TOKEN": "s3cret-of-the-spec"})
    timeline = Timeline(tmp_path / "timeline", machine="vm")
    return Machine(
        FakeInstance(FakeBackend(answer), tmp_path), spec, id="vm-1", backend="fake", channel=FakeChannel(answer), timeline=timeline
    )


def events(machine: Machine) -> list[dict[str, Any]]:
    return machine.lifecycle.timeline.events()


def test_a_command_is_recorded_with_its_end_and_with_the_names_of_its_environment_only(machine: Machine) -> None:
    with pytest.raises(CommandFailed):
        machine.exec("exit 7", env={"PASSWORD": "s3cret-of-the-call"}, cwd="/srv", user="nobody")

    (event,) = events(machine)
    assert (event["kind"], event["argv"], event["status"]) == ("command", ["sh", "-eu", "-c", "exit 7"], 7)
    assert (event["stdout"], event["stderr"], event["env"], event["cwd"], event["user"]) == (
        "out\n",
        "broken\n",
        ["PASSWORD"],
        "/srv",
        "nobody",
    )
    assert "error" not in event
    assert not any(b"s3cret" in path.read_bytes() for path in (machine.console.path.parent / "timeline").iterdir())


@pytest.mark.parametrize(
    ("do", "kind", "verb"),
    [
        (lambda machine: machine.path("/etc/hosts").read_text(), "file", "read_text"),
        (lambda machine: machine.path("/etc").iterdir(), "file", "iterdir"),
        (lambda machine: machine.search("x", "/etc"), "search", "search"),
        (lambda machine: machine.wait_until(lambda: True), "wait", "wait_until"),
        (lambda machine: machine.pause(), "power", "pause"),
        (lambda machine: machine.power_cut(), "power", "power_cut"),
        (lambda machine: machine.note("hello"), "note", None),
    ],
)
def test_each_verb_is_one_event(machine: Machine, do: Callable[[Machine], object], kind: str, verb: str | None) -> None:
    do(machine)

    (event,) = [event for event in events(machine) if event["kind"] not in ("answer", "console")]
    assert (event["kind"], event.get("verb")) == (kind, verb)


def test_a_file_is_recorded_with_its_path(machine: Machine) -> None:
    machine.path("/srv/data").write_bytes(b"123")

    (event,) = events(machine)
    assert (event["verb"], event["path"], event["args"]) == ("write_bytes", "/srv/data", ["<3 bytes>"])


def test_what_a_backend_cannot_do_is_recorded_as_an_error(machine: Machine) -> None:
    with pytest.raises(Unsupported):
        machine.link(up=False)

    (event,) = events(machine)
    assert event["args"] == ["up=False"]
    assert event["error"].startswith("Unsupported: ")


def test_a_wait_is_recorded_with_each_answer_that_is_new(machine: Machine) -> None:
    answers = iter(["starting", "starting", "ready", "ready"])
    with pytest.raises(MachineTimeout):
        machine.wait_until(lambda: next(answers, "ready") == "never", timeout=0.2, every=0.02)
    seen: list[str] = []

    def state() -> str:
        seen.append("x")
        return "" if len(seen) < 5 else "done"

    machine.wait_until(state)

    kinds = [(event["kind"], event.get("text")) for event in events(machine) if event["kind"] in ("wait", "answer")]
    assert kinds == [("wait", None), ("answer", "False"), ("wait", None), ("answer", "''"), ("answer", "'done'")]


def test_a_command_in_the_background_is_recorded_at_its_start_and_at_its_end(machine: Machine) -> None:
    process = machine.spawn(["exit 7"])
    assert process.wait(timeout=5) == 7
    assert process.poll() == 7

    assert [(event["kind"], event["argv"], event.get("status")) for event in events(machine)] == [
        ("spawn", ["exit 7"], None),
        ("exit", ["exit 7"], 7),
    ]


def test_a_command_whose_output_is_passed_on_is_one_event(machine: Machine) -> None:
    machine.exec(["echo", "hi"], stream=lambda _: None)

    assert [event["kind"] for event in events(machine)] == ["command"]


def test_resources_and_console_are_recorded_while_a_machine_is_followed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_vmbottle.machine.sampler._EVERY", 0.01)
    with Sampler().following(machine):
        found = machine.wait_until(lambda: [event for event in events(machine) if event["kind"] == "metrics"])
        machine.lifecycle.stop()  # samples of a machine that is off fail, and must not end the thread

    assert found[0]["rss_bytes"] > 0
    assert found[0]["threads"] > 0
