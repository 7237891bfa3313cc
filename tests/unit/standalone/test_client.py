"""Kept machines as other processes see them: records, who holds them, and what is said over a line."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import pytest

from pytest_vmbottle.errors import BackendUnavailable, CatalogError, MachineError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.supervisor import Identity
from pytest_vmbottle.result import CommandTimeout
from pytest_vmbottle.standalone import client as kept
from pytest_vmbottle.standalone.client import Kept, Record


@pytest.fixture
def place(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "machines" / "web")


def record(**changes: Any) -> Record:
    return attrs.evolve(
        Record(name="web", source="debian-12", state="running", keeper=Identity.of(os.getpid()), pid=1, argv=("qemu",)), **changes
    )


def _claim(place: Kept) -> None:
    """Has a keeper hold the machine for a moment."""
    with place.claimed(again=False):
        pass


def test_a_record_is_read_as_it_was_written_while_its_keeper_lives(place: Kept) -> None:
    with place.claimed(again=False):
        written = place.note(record(ports={"80": 4711}))

        assert place.is_held
        assert place.record() == written


def test_a_record_whose_keeper_is_dead_is_never_one_of_a_running_machine(place: Kept) -> None:
    _claim(place)
    place.note(record(ports={"80": 4711}))
    found = place.record()

    assert (found.state, found.pid, dict(found.ports)) == ("stopped", None, {})
    assert not found.is_on


def test_a_machine_whose_keeper_died_is_stopped_since_that_was_found_and_stays_so(place: Kept) -> None:
    _claim(place)
    place.note(record(since=1000.0))
    before = time.time()
    found = place.record()

    assert before <= found.since <= time.time()
    assert place.record() == found
    assert Record.read(place.folder / "record.json") == found


def test_a_dead_machine_is_told_of_by_who_may_not_write_its_record(place: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    _claim(place)
    place.note(record(since=1000.0))

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Record, "write", refuse)
    assert place.record().state == "stopped"
    assert place.record().since > 1000.0


def test_the_last_state_of_a_machine_stays_when_its_keeper_has_ended(place: Kept) -> None:
    _claim(place)
    place.note(record(state="error", reason="QEMU ended with status 1"))

    assert place.record().reason == "QEMU ended with status 1"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"name": 1', b'{"keeper": {"pid": 1}}'])
def test_a_record_that_cannot_be_read_is_an_error_with_its_path_and_can_be_removed(place: Kept, content: bytes) -> None:
    _claim(place)
    (place.folder / "record.json").write_bytes(content)

    assert place.record().state == "error"
    assert str(place.folder / "record.json") in place.record().reason
    assert place.discard()
    assert not place.folder.exists()


def test_a_name_is_claimed_once_and_again_when_its_keeper_is_gone(place: Kept) -> None:
    with place.claimed(again=False):
        place.note(record())
        with pytest.raises(CatalogError, match="vmbottle machine stop web"), place.claimed(again=False):
            pass
        assert not place.discard()
    with place.claimed(again=False):
        assert list(place.folder.iterdir()) == []


def test_the_name_of_a_machine_with_a_disk_is_not_taken_by_a_new_one(place: Kept) -> None:
    _claim(place)
    place.note(record(state="stopped"))
    disk = place.folder / "disk" / "start.json"
    disk.parent.mkdir()
    disk.touch()
    with pytest.raises(CatalogError, match="vmbottle machine rm web"), place.claimed(again=False):
        pass
    with place.claimed(again=True):
        pass

    assert place.can_start_again


def test_a_machine_that_is_gone_cannot_be_started_again(place: Kept) -> None:
    with pytest.raises(FileNotFoundError):
        place.start_again(print)
    _claim(place)
    place.note(record(state="stopped", reason="its disk was lost"))
    with pytest.raises(CatalogError, match="its disk was lost"):
        place.start_again(print)
    assert place.record().state == "stopped"


def test_a_hold_is_passed_on_to_a_child_and_ends_with_it(place: Kept) -> None:
    with place.claimed(again=False) as hold:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(hold,))

    assert place.is_held
    assert not place.wait(Deadline(0))
    child.kill()
    child.wait()
    assert place.wait(Deadline(10))
    assert child.stdin is not None
    child.stdin.close()


def test_looking_does_not_keep_a_name_from_being_claimed(place: Kept) -> None:
    _claim(place)
    looking = os.open(place.folder, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    with pytest.raises(CatalogError), place.claimed(again=False):
        pass
    fcntl.flock(looking, fcntl.LOCK_UN)

    _claim(place)
    os.close(looking)


def test_an_unknown_name_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="'db'"):
        kept.find(tmp_path, "db")
    _claim(Kept(tmp_path / "web"))
    (tmp_path / ".aside").mkdir()
    with pytest.raises(CatalogError, match="web"):
        kept.find(tmp_path, "db")
    assert kept.find(tmp_path, "web").name == "web"


def test_a_machine_without_a_keeper_answers_with_why(place: Kept) -> None:
    with pytest.raises(MachineError, match="web"):
        place.ask({"verb": "metrics"})
    _claim(place)
    place.note(record(state="stopped", reason="the guest powered off"))
    with pytest.raises(MachineError, match="the guest powered off"):
        place.ask({"verb": "metrics"})
    place.note(record(state="off", reason="the guest powered itself off"))
    with pytest.raises(MachineError, match="off"):
        place.ask({"verb": "metrics"})


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ({"error": "BackendUnavailable", "message": "no"}, BackendUnavailable),
        ({"error": "MachineError", "message": "no"}, MachineError),
        ({"error": "GuestPanic", "kinds": ["GuestPanic", "MachineError"], "message": "no"}, MachineError),
        ({"error": "FileNotFoundError", "errno": 2, "message": "no", "filename": "/x"}, FileNotFoundError),
        ({"error": "ValueError", "message": "no"}, ValueError),
        ({"error": "CommandTimeout", "message": "no", "argv": ["a"], "seconds": 2.0}, CommandTimeout),
    ],
)
def test_errors_cross_a_line_as_what_they_are(message: dict[str, object], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        kept._checked(json.loads(json.dumps(message)))


def test_a_process_is_known_by_more_than_its_number() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = Identity.of(child.pid)
    assert known is not None
    known._replace(ticks=known.ticks + 1).kill()
    known._replace(boot="another").kill()
    assert child.poll() is None
    known.kill()

    assert child.wait(60) == -9
    assert Identity.of(child.pid) is None
    assert child.stdin is not None
    child.stdin.close()
