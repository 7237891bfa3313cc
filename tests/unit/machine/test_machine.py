"""What a machine says of what its backend does not offer, or what it was asked in vain."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_vmbottle import BackendUnavailable, CommandFailed, CommandTimeout, Machine, MachineSpec, Unsupported
from pytest_vmbottle.channels.port import Command, Finished
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.testing import FakeBackend, FakeChannel, FakeInstance


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    backend = FakeBackend()
    spec = MachineSpec(source="debian-12", display=True)
    return Machine(FakeInstance(backend, tmp_path), spec, id="vm-1", backend="fake", channel=FakeChannel(backend.handler))


def on_a_terminal(machine: Machine) -> None:
    ours, its = os.openpty()
    with os.fdopen(ours, "rb"), os.fdopen(its, encoding="utf-8") as terminal:
        machine.shell(stdin=terminal, stdout=terminal)


@pytest.mark.parametrize(
    ("ask", "lack"),
    [
        (lambda machine: machine.forward(80), "ports"),
        (lambda machine: machine.link(up=False), "cable"),
        (lambda machine: machine.screenshot("screen.png"), "display"),
        (lambda machine: machine.send_keys("ret"), "display"),
        (lambda machine: machine.send_console("sesame\n"), "serial console"),
        (lambda machine: machine.qmp("query-status"), "QMP"),
        (lambda machine: machine.ssh_config(), "SSH"),
        (on_a_terminal, "terminals"),
    ],
)
def test_what_the_backend_lacks_is_said_and_nothing_is_written(
    machine: Machine, ask: Callable[[Machine], object], lack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Unsupported, match=lack):
        ask(machine)

    assert list(tmp_path.iterdir()) == []


def test_without_testinfra_a_machine_says_how_to_install_it(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pytest_vmbottle.machine.testinfra", raising=False)
    monkeypatch.setitem(sys.modules, "testinfra.host", None)
    with pytest.raises(BackendUnavailable, match=r"pytest-vmbottle\[testinfra\]"):
        _ = machine.host


def test_testinfra_runs_its_commands_as_the_machine_does_and_reads_them_as_utf_8(tmp_path: Path) -> None:
    from pytest_vmbottle.channels.port import Finished

    backend = FakeBackend(lambda command: Finished(returncode=3, stdout="ä".encode() + command.argv[-1].encode(), stderr=b"bad"))
    instance = FakeInstance(backend, tmp_path)
    machine = Machine(instance, MachineSpec(source="x", name="web"), id="web-1", backend="fake", channel=FakeChannel(backend.handler))
    done = machine.host.run("ls %s", "a b")

    assert (done.rc, done.stdout, done.stderr) == (3, "äls 'a b'", "bad")
    assert machine.host is machine.host
    assert repr(machine.host) == "<testinfra.host.Host vmbottle://web>"


def test_a_string_runs_by_the_shell_that_is_asked_for(machine: Machine) -> None:
    assert machine.exec("true").argv == ("sh", "-eu", "-c", "true")
    assert machine.exec("true", shell="bash").argv == ("bash", "-euo", "pipefail", "-c", "true")
    assert machine.spawn("true", shell="bash").argv[0] == "bash"


@pytest.mark.parametrize(("command", "shell"), [("true", "zsh"), (["true"], "bash"), (["true"], "fish")])
def test_a_shell_that_would_not_be_used_is_refused(machine: Machine, command: list[str] | str, shell: Any) -> None:
    for run in (machine.exec, machine.spawn):
        with pytest.raises(ValueError, match="shell="):
            run(command, shell=shell)


def test_the_time_for_a_kill_has_the_factor_of_all_time_outs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[float] = []

    def run(self: FakeChannel, command: Command, *, deadline: Deadline) -> Finished:  # noqa: ARG001
        seconds.append(deadline.seconds)
        return Finished(returncode=0)

    monkeypatch.setattr(FakeChannel, "run", run)
    backend = FakeBackend()
    for factor in (1.0, 3.0):
        channel = FakeChannel(backend.handler)
        machine = Machine(FakeInstance(backend, tmp_path), MachineSpec(source="x"), id="m", backend="fake", channel=channel, factor=factor)
        machine.guest.kill(Command(argv=("x",)))
    assert seconds[1] == 3 * seconds[0]


def test_a_copy_of_which_a_side_is_empty_does_nothing(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "content").write_text("of the current folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FakeChannel, "run", lambda *_, **__: pytest.fail("the guest was asked"))

    machine.cp("", machine.path("/srv"))
    machine.cp(machine.path("/srv"), "")
    machine.cp("", "")


@pytest.mark.parametrize(
    "use",
    [
        lambda machine: machine.path(""),
        lambda machine: machine.archive("", "all.zip", "zip"),
        lambda machine: machine.archive("/srv", ""),
        lambda machine: machine.search("x", ""),
        lambda machine: machine.write_files({"": "text"}),
    ],
)
def test_an_empty_path_elsewhere_is_an_error_that_says_so(machine: Machine, use: Callable[[Machine], object]) -> None:
    with pytest.raises(ValueError, match="empty"):
        use(machine)


def _ended_by(finished: Finished, tmp_path: Path, kernel: str = "") -> Machine:
    """A machine whose commands end like this, and what its kernel's log says."""
    backend = FakeBackend()

    def answer(command: Command) -> Finished:
        return Finished(returncode=0, stdout=kernel.encode()) if "dmesg" in " ".join(command.argv) else finished

    spec = MachineSpec(source="debian-12")
    return Machine(FakeInstance(backend, tmp_path), spec, id="vm-1", backend="fake", channel=FakeChannel(answer))


@pytest.mark.parametrize("status", [-9, 137])
def test_a_command_that_was_killed_while_the_oom_killer_was_at_work_says_so(tmp_path: Path, status: int) -> None:
    kernel = "[    9.5] Out of memory: Killed process 631 (python3) total-vm:1kB\n10.0 1\n"
    with pytest.raises(CommandFailed, match="OOM") as caught:
        _ended_by(Finished(returncode=status), tmp_path, kernel).exec("hungry")
    assert "631 (python3)" in caught.value.result.note
    assert _ended_by(Finished(returncode=status), tmp_path, "10.0 1\n").exec("x", check=False).note == ""


def test_a_time_out_says_that_the_command_had_ended_and_something_held_its_output(tmp_path: Path) -> None:
    machine = _ended_by(Finished(returncode=-9, timed_out=True, outlived=True), tmp_path)
    with pytest.raises(CommandTimeout, match="background"):
        machine.exec("sleep 500 & echo started", timeout=4)


@pytest.mark.parametrize(("argv", "hinted"), [(["systemctl restart x"], True), (["a\tb", "c"], True), (["missing"], False)])
def test_a_program_whose_name_has_blanks_was_probably_a_whole_command(tmp_path: Path, argv: list[str], *, hinted: bool) -> None:
    result = _ended_by(Finished(returncode=127), tmp_path).exec(argv, check=False)
    assert ("string" in result.note) is hinted
