"""Commands for machines that do not run: what their records say, and what is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pytest_vmbottle.cli import main
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.locks import try_lock
from pytest_vmbottle.standalone.client import DISK, SNAPSHOTS, Kept
from pytest_vmbottle.standalone.record import Record


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalog with the machine `web`, which was stopped and has a disk and a snapshot, and `db`, which has none."""
    root = tmp_path / "catalog"
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(root))
    for name, spec in (("web", {"cpus": 2, "memory": 1 << 30}), ("db", {})):
        place = Kept(root / "machines" / name)
        place.folder.mkdir(parents=True)
        place.note(
            Record(name=name, source="debian-12", state="stopped", reason="it was shut down as asked", spec=spec, argv=("qemu", "a b"))
        )
    for folder in (DISK, f"{SNAPSHOTS}/clean", f"{SNAPSHOTS}/later"):
        (root / "machines" / "web" / folder).mkdir(parents=True)
        (root / "machines" / "web" / folder / "start.json").write_text("{}")
    return root


@pytest.fixture
def running(root: Path) -> Iterator[Kept]:
    """The machine `db` with a daemon that holds it."""
    place = Kept(root / "machines" / "db")
    hold = try_lock(place.folder, deadline=Deadline(10))
    assert hold is not None
    place.note(Record(name="db", source="debian-12", state="running"))
    yield place
    os.close(hold)


def run(*words: str) -> Result:
    result = CliRunner().invoke(main, ["machine", *words], prog_name="vmbottle")
    assert "Traceback" not in result.output
    return result


@pytest.mark.usefixtures("root")
def test_machines_are_listed_all_or_by_name_and_a_wrong_name_is_told() -> None:
    assert [line.split()[:2] for line in run("ls").stdout.splitlines()[1:]] == [["db", "stopped"], ["web", "stopped"]]
    assert [each["name"] for each in json.loads(run("ls", "web", "web", "--json").stdout)] == ["web"]
    assert run("ls", "wbe").exit_code == 1
    assert "'wbe'" in run("ls", "wbe").stderr


@pytest.mark.usefixtures("root")
def test_a_machine_is_shown_with_its_snapshots_and_whether_it_can_start_again() -> None:
    facts = json.loads(run("show", "web", "--json").stdout)
    shown = run("show", "web").stdout

    assert (facts["state"], facts["can_start_again"], facts["snapshots"]) == ("stopped", True, ["clean", "later"])
    assert facts["argv"] == ["qemu", "a b"]
    assert re.search(r"^spec.memory +1.0 GiB$", shown, re.MULTILINE)
    assert re.search(r"^snapshots +clean$", shown, re.MULTILINE)
    assert not json.loads(run("show", "db", "--json").stdout)["can_start_again"]


@pytest.mark.usefixtures("root")
def test_snapshots_are_listed_and_removed() -> None:
    assert [each["label"] for each in json.loads(run("snapshots", "web", "--json").stdout)] == ["clean", "later"]
    assert run("snapshots", "web", "--rm", "clean").exit_code == 0
    assert [line.split()[0] for line in run("snapshots", "web").stdout.splitlines()] == ["LABEL", "later"]
    assert "(there: later)" in run("snapshots", "web", "--rm", "clean").stderr
    assert "vmbottle machine snapshot db LABEL" in run("snapshots", "db").stderr


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("words", [("--memory", "2G"), ("-e", "A=b"), ("--network",)])
def test_a_stopped_machine_starts_as_it_was_and_options_that_would_change_it_are_refused(words: tuple[str, ...]) -> None:
    result = run("start", "web", *words)

    assert result.exit_code == 2
    assert "is a stopped machine" in result.stderr
    assert words[0] in result.stderr or "--env" in result.stderr


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(("words", "told"), [(("wait", "web"), "'web' is stopped"), (("wait", "nosuch"), "no machine 'nosuch'")])
def test_waiting_for_a_machine_that_does_not_start_fails_with_the_reason(words: tuple[str, ...], told: str) -> None:
    result = run(*words)

    assert result.exit_code == 1
    assert told in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("exec", "web", "true"),
        ("reboot", "web"),
        ("pause", "web"),
        ("journal", "web"),
        ("read", "web", "/etc/motd"),
        ("cp", "web:/etc/motd", "."),
        ("ls-dir", "web", "/"),
        ("search", "web", "x", "/"),
        ("forward", "web", "80"),
        ("ssh-config", "web"),
        ("snapshot", "web", "new"),
        ("metrics", "web"),
    ],
    ids=" ".join,
)
def test_what_only_a_running_machine_can_do_is_refused_with_how_it_ended(root: Path, words: tuple[str, ...]) -> None:
    result = run(*words)

    assert result.exit_code == 1
    assert result.stderr == "Error: the machine 'web' is not running: it was shut down as asked\n"
    assert {path.name for path in (root / "machines" / "web").iterdir()} == {"record.json", DISK, SNAPSHOTS}


def test_nothing_is_removed_if_one_of_the_machines_runs(root: Path, running: Kept) -> None:
    result = run("rm", "web", "db")

    assert result.exit_code == 1
    assert "--force" in result.stderr
    assert running.folder.exists()
    assert (root / "machines" / "web").exists()


def test_stopped_machines_are_removed_with_their_disks(root: Path) -> None:
    assert run("delete", "web", "db", "web").stdout == "web\ndb\n"
    assert not list((root / "machines").iterdir())


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("label", ["", "../up", ".hidden", "a b", "x" * 80])
def test_a_label_that_could_be_a_path_is_refused(label: str) -> None:
    for verb in ("snapshot", "restore"):
        assert run(verb, "web", label).exit_code == 2


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("arguments", ["not JSON", "[1]", ""])
def test_arguments_of_qmp_are_an_object(arguments: str) -> None:
    result = run("qmp", "web", "query-status", arguments)
    assert result.exit_code == 2
    assert repr(arguments) in result.output


@pytest.mark.usefixtures("root")
def test_keys_or_text_must_be_given() -> None:
    assert run("send-keys", "web").exit_code == 2
