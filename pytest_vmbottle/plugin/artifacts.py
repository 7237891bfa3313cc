"""Artifacts of tests: a folder for each test that is kept, with the files of its machines."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
import re
import shutil
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any

import attrs

from pytest_vmbottle.errors import SpecError, VMBottleError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.digests import digest
from pytest_vmbottle.host.locks import tried
from pytest_vmbottle.report.run import EVENTS, MARK, OUTCOME
from pytest_vmbottle.shown import hidden
from pytest_vmbottle.timeline import FORMAT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.plugin.evidence import Evidence

__all__ = ["Artifacts", "TestOutcome"]

_NAME = 80
"""Characters of a folder's name, before what makes it unique."""
# Node ids have slashes, brackets, and whatever a parameter's text is. CI services refuse artifacts with such names.
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_LOCK_TIME = 30.0
_SCREEN = "screenshot.png"
_METRICS = ("time", "cpu_percent", "rss_bytes", "threads", "read_bytes", "write_bytes")


@attrs.frozen(kw_only=True)
class TestOutcome:
    """Outcome of a test, as `report.run.TestArtifacts` reads it."""

    __test__ = False  # it is no class of tests, whatever pytest makes of its name

    nodeid: str
    outcome: str
    phase: str
    error: str
    traceback: str
    sections: Sequence[tuple[str, str]]
    began: float
    ended: float
    worker: str


class Artifacts:
    """Folder of a run's artifacts. It is made when the first test is kept, and emptied of another run's artifacts then."""

    def __init__(self, folder: Path, run: str) -> None:
        """Take the folder and the id of the run, which all of its processes have."""
        self.folder, self._run = folder, run

    @property
    def are_ours(self) -> bool:
        """Tell whether this run has written any."""
        with suppress(OSError):
            # The id of the run and not a flag, since the workers of a run share the folder, and another run may have taken it over.
            return (self.folder / MARK).read_text() == self._run
        return False

    def check(self) -> None:
        """Check that the folder may be written.

        Raises:
            SpecError: It has files that are no artifacts, or is a file.
        """
        if self.folder.is_dir():
            # The folder is emptied later, so one without our mark is never taken: it may be somebody's source.
            if any(self.folder.iterdir()) and not (self.folder / MARK).is_file():
                raise SpecError(f"{self.folder} has files that are no artifacts, and would be emptied: choose another folder")
        elif self.folder.exists():
            raise SpecError(f"{self.folder} is no folder: choose another one")

    def test_folder(self, nodeid: str) -> Path:
        """Make a new folder for a test, with a name that is safe on every file system.

        Raises:
            OSError: It cannot be made.
            SpecError: The run's folder has files that are no artifacts.
        """
        self._begin()
        # The end of the node id, which has the test's own name.
        plain = _UNSAFE.sub("-", nodeid)[-_NAME:].strip("-.")
        # The digest tells tests apart whose names differ only in what was replaced, or in case.
        return _new_folder(self.folder, f"{plain}-{digest(nodeid)[:8]}")

    def _begin(self) -> None:
        if self.are_ours:
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        # The folder above is locked, because one that is just made anew cannot be, and a lock file would stay in the project.
        with tried(self.folder.parent.resolve(), deadline=Deadline(_LOCK_TIME)) as is_locked:
            if not is_locked:
                raise SpecError(f"{self.folder.parent} is locked by another process: choose another folder with --vm-output")
            # Asked again under the lock: another worker may have been first.
            if self.are_ours:
                return
            self.check()
            if self.folder.is_dir():
                shutil.rmtree(self.folder)
            self.folder.mkdir()
            (self.folder / MARK).write_text(self._run)

    def write_test(self, folder: Path, outcome: TestOutcome, found: Sequence[Evidence]) -> list[Path]:
        """Write a test's files, and return the folders of its machines.

        Its outcome comes last, so that a folder with one is complete.

        Raises:
            OSError: They cannot be written.
        """
        # Each machine by itself: several of one test may have the same name.
        places = [_write_machine(folder, evidence) for evidence in found]
        names: dict[str, str] = {}
        for evidence, place in zip(found, places, strict=True):
            # Two machines of a test may have one name; the folders' names differ.
            names[place.name if evidence.machine.name in names else evidence.machine.name] = place.name
        # Sorted over all machines, because a reader looks for the order of what happened between them.
        events = sorted((event for evidence in found for event in evidence.events), key=lambda event: event["time"])
        with (folder / EVENTS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(event, separators=(",", ":")) + "\n" for event in events)
        facts = {"format": FORMAT, **attrs.asdict(outcome), "machines": names}
        (folder / OUTCOME).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        return places


def _write_machine(above: Path, evidence: Evidence) -> Path:
    machine = evidence.machine
    folder = _new_folder(above, _UNSAFE.sub("-", machine.name))
    _write_text(folder / "console.txt", machine.console.text)
    if evidence.journal:
        _write_text(folder / "journal.txt", evidence.journal)
    _write_text(folder / "machine.json", json.dumps(_facts(machine), indent=1, default=str))
    _write_metrics(folder / "metrics.csv", evidence)
    names = [str(event[key]) for event in evidence.events for key in ("stdout_file", "stderr_file") if key in event]
    # Only the files that an event of this test names: a shared machine has those of earlier tests, too.
    if names:
        (folder / "outputs").mkdir()
    for path in map(machine.lifecycle.timeline.output, names):
        with suppress(FileNotFoundError):  # only the newest are kept
            shutil.copyfile(path, folder / "outputs" / path.name)
    for path in machine.lifecycle.captures:
        shutil.copyfile(path, folder / path.name)
    if machine.spec.display:
        # The machine may be off by now, and a screenshot is the least of the evidence.
        with suppress(VMBottleError):
            (folder / _SCREEN).write_bytes(machine.lifecycle.instance.screenshot())
    return folder


def _new_folder(above: Path, name: str) -> Path:
    """Make a folder of this name, with a number if there is one already."""
    for number in count(1):
        path = above / (name if number == 1 else f"{name}-{number}")
        # Made and not looked for first: two workers may want the same name.
        with suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError  # `count` does not end


def _write_text(path: Path, text: str) -> None:
    # `backslashreplace`, because surrogates of bytes that are no text cannot be encoded.
    path.write_text(hidden(text), encoding="utf-8", errors="backslashreplace")


def _write_metrics(path: Path, evidence: Evidence) -> None:
    rows = [event for event in evidence.events if event["kind"] == "metrics"]
    if rows:
        with path.open("w", encoding="utf-8", newline="") as file:
            # Events have fields of their own (`kind`, `machine`), which are left out.
            table = csv.DictWriter(file, _METRICS, extrasaction="ignore")
            table.writeheader()
            table.writerows(rows)


def _facts(machine: Machine) -> dict[str, Any]:
    """Return what a machine was made of, without the values of its environment and its files, which may be secret."""
    spec = {field.name: getattr(machine.spec, field.name) for field in attrs.fields(type(machine.spec))}
    # Names only: artifacts are uploaded by CI jobs, and read by more people than the secrets are meant for.
    spec["env"], spec["files"] = [name for name, _ in machine.spec.env], [path for path, _ in machine.spec.files]
    spec["source"] = str(getattr(machine.spec.source, "name", machine.spec.source))
    with suppress(VMBottleError):  # it may be off
        spec = {**spec, "argv": list(getattr(machine.lifecycle.instance, "argv", ()))}
    return {
        "name": machine.name,
        "id": machine.id,
        "backend": machine.backend,
        "hypervisor": machine.lifecycle.made_by,
        "argv": spec.pop("argv", []),
        "image_sha256": machine.lifecycle.image,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("pytest", "pytest-vmbottle")},
        },
        "spec": spec,
    }
