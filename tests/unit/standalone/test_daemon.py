"""What a keeper says of a machine that runs nothing any more, to other processes that ask by its socket."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import attrs
import pytest

from pytest_vmbottle import MachineSpec
from pytest_vmbottle.errors import GuestPanic, MachineDied, MachineError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.machine.machine import Machine
from pytest_vmbottle.provision.origins import KeptOrigin
from pytest_vmbottle.standalone.client import Kept
from pytest_vmbottle.standalone.daemon import Daemon
from pytest_vmbottle.standalone.line import listen
from pytest_vmbottle.standalone.record import Record
from pytest_vmbottle.testing import FakeBackend, FakeInstance

OFF = MachineDied("QEMU ended with status 0", exitcode=0)
PANIC = GuestPanic("the guest is lost: Kernel panic - not syncing: x")


class Instance(FakeInstance):
    """A machine whose end is what the test says."""

    end: MachineDied | None = None

    def alive(self) -> None:
        """Raises it."""
        if self.end is not None:
            raise self.end


@attrs.frozen
class Held:
    """A machine with its keeper, and how others see it."""

    backend: FakeBackend
    instance: Instance
    keeper: Daemon
    place: Kept

    def ask(self, **request: object) -> object:
        """Return the keeper's answer."""
        # A file and not /dev/null, with which a command has no input, and needs no channel with streams.
        with tempfile.TemporaryFile() as nothing:
            return self.place.ask(request, [nothing.fileno()] * 3)

    def exec(self) -> object:
        """A command, as `machine exec` has it run."""
        return self.ask(verb="exec", argv=["true"], env={}, cwd=None, user=None, timeout=None)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    backend, spec = FakeBackend(), MachineSpec(source="debian-12", name="web")
    instance = Instance(backend, tmp_path, spec=spec)
    place = Kept(tmp_path / "machines" / "web")
    machine = Machine(instance, spec=spec, id="web-1", backend="fake", channel=_channel(instance))
    origin = KeptOrigin(name="debian-12", sha256="0", key="0", prepared=True, awaits_boot=False, is_quick=False)
    keeper = Daemon(machine, place, Record(name="web", source="debian-12", state="running"), origin)
    with place.claimed(again=False) as hold, listen(hold) as server:
        keeper.listen(server)
        yield Held(backend, instance, keeper, place)


def _channel(instance: FakeInstance) -> Any:
    return instance.channel(deadline=Deadline(1))


@pytest.mark.parametrize(("end", "word"), [(OFF, "off"), (PANIC, "Kernel panic")], ids=["off", "panicked"])
@pytest.mark.parametrize("verb", ["exec", "cp", "ssh", "freeze"])
def test_what_the_guest_has_to_answer_fails_at_once_with_the_reason(held: Held, verb: str, end: MachineDied, word: str) -> None:
    assert held.exec() == 0
    held.instance.end = end
    with pytest.raises(MachineError, match=word):
        held.ask(verb=verb, argv=["true"], env={}, cwd=None, user=None, timeout=None, src="/etc/hosts", dst="/x", to_guest=True)


def test_a_guest_that_powers_off_while_a_command_runs_is_off_in_its_error(held: Held) -> None:
    def power_off(_: object) -> NoReturn:
        held.instance.end = OFF
        raise MachineDied("the SSH connection was lost")

    held.backend.handler = power_off
    with pytest.raises(MachineError, match="off"):
        held.exec()


def test_a_command_ends_at_once_whose_input_goes_on_and_says_nothing(held: Held) -> None:
    reader, writer = os.pipe()
    request: dict[str, Any] = {"verb": "exec", "argv": ["true"], "env": {}, "cwd": None, "user": None, "timeout": None}

    def seconds() -> float:
        began = time.perf_counter()
        with tempfile.TemporaryFile() as nothing:
            assert held.place.ask(request, [reader, nothing.fileno(), nothing.fileno()]) == 0
        return time.perf_counter() - began

    try:
        assert min(seconds() for _ in range(5)) < 0.05
    finally:
        os.close(reader)
        os.close(writer)


def test_a_panicked_machine_can_still_be_stopped(held: Held) -> None:
    held.instance.end = PANIC
    assert held.ask(verb="stop", now=True) is None


@pytest.mark.parametrize(("end", "state"), [(OFF, "off"), (MachineDied("QEMU ended with status 1", exitcode=1), "error")])
def test_an_end_that_nobody_asked_for_is_noted_at_once(held: Held, end: MachineDied, state: str) -> None:
    held.instance.end = end
    assert held.keeper.watch()[0] == state
    assert held.place.record().state == state


def test_a_verb_that_there_is_not_is_refused_with_those_that_there_are(held: Held) -> None:
    with pytest.raises(ValueError, match="snapshot"):
        held.ask(verb="fly")


def test_a_path_that_is_not_absolute_is_refused(held: Held) -> None:
    with pytest.raises(ValueError, match="slash"):
        held.ask(verb="mkdir", paths=["srv"])


@pytest.mark.parametrize("label", ["", "../x", ".hidden", "a b", "x" * 62])
def test_a_label_that_is_no_name_of_a_folder_is_refused(held: Held, label: str) -> None:
    with pytest.raises(ValueError, match="label"):
        held.ask(verb="snapshot", label=label)


def test_a_machine_that_is_paused_is_told_as_paused(held: Held) -> None:
    held.keeper.note(state="running")
    held.ask(verb="pause")
    assert held.place.record().state == "paused"
    held.ask(verb="resume")
    assert held.place.record().state == "running"
