"""Artifacts of tests: a folder for each run of a test that is kept, with the files of its machines."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
from contextlib import suppress
from itertools import count
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import attrs

from pytest_vmbottle.errors import SpecError, VMBottleError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.digests import digest
from pytest_vmbottle.host.files import atomic_file
from pytest_vmbottle.host.locks import tried
from pytest_vmbottle.machine.lifecycle import CAPTURES
from pytest_vmbottle.report.run import EVENTS, MARK, OUTCOME
from pytest_vmbottle.shown import hidden
from pytest_vmbottle.timeline import FORMAT, without_secrets

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from pytest_vmbottle.plugin.evidence import Evidence
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["Artifacts", "TestFolder", "TestOutcome"]

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

    def then(self, later: TestOutcome) -> TestOutcome:
        """Return this outcome of a test with that of a later phase; the first failure stands for the test."""
        decides = later if later.outcome == "failed" != self.outcome else self
        sections = [*self.sections, *later.sections]
        if decides is self and later.traceback:
            sections.append((f"error in {later.phase}", later.traceback))
        # As keys, because pytest's own sections are in the reports of all phases.
        return attrs.evolve(decides, sections=list(dict.fromkeys(sections)), began=self.began, ended=later.ended)


class Artifacts:
    """Folder of a run's artifacts. It is made when the first test is kept, and emptied of another run's artifacts then."""

    def __init__(self, folder: Path, run: str, *, suffix: str = "") -> None:
        """Take the folder, the id of the run, which all of its processes have, and the ends of this process's names."""
        self.folder, self._run, self._suffix = folder, run, suffix

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

    def test_folder(self, nodeid: str) -> TestFolder:
        """Make a new folder for a test, with a name that is safe on every file system.

        Raises:
            OSError: It cannot be made.
            SpecError: The run's folder has files that are no artifacts.
        """
        self._begin()
        # The end of the node id, which has the test's own name.
        plain = _UNSAFE.sub("-", nodeid)[-_NAME:].strip("-.")
        # The digest tells tests apart whose names differ only in what was replaced, or in case.
        return TestFolder(_new_folder(self.folder, f"{plain}-{digest(nodeid)[:8]}{self._suffix}"))

    def receive(self, name: str, at: int, part: bytes) -> None:
        """Write a part of a file that a worker on another host has sent.

        Args:
            name: The file's path in the folder.
            at: The place of the part in the file; 0 begins it anew.
            part: Its bytes.

        Raises:
            OSError: It cannot be written.
            SpecError: The path leads elsewhere, or the run's folder has files that are no artifacts.
        """
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or len(path.parts) < 2:  # noqa: PLR2004 - a test's folder and a file in it
            raise SpecError(f"{name!r} is no name of an artifact")
        self._begin()
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("r+b" if at else "wb") as file:
            file.seek(at)
            file.write(part)

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


class TestFolder:
    """Folder of one run of a test: made when something of it is kept, and completed with each phase that follows."""

    __test__ = False

    def __init__(self, path: Path) -> None:
        """Take a folder that is empty."""
        self.path = path
        self._found: dict[str, Evidence] = {}
        self._places: dict[str, Path] = {}
        self._outcome: TestOutcome | None = None

    def add(self, evidence: Evidence) -> Path | None:
        """Write the files of a machine, over those of its earlier evidence; return its folder if it is new.

        Raises:
            OSError: They cannot be written.
        """
        key = evidence.remains.id
        is_new = key not in self._places
        if is_new:
            # Each machine by itself: several of one test may have the same name.
            self._places[key] = _new_folder(self.path, _UNSAFE.sub("-", evidence.name))
        self._found[key] = evidence
        _write_machine(self._places[key], evidence)
        return self._places[key] if is_new else None

    def finish(self, outcome: TestOutcome) -> None:
        """Write the events of all machines and the outcome; a later outcome is joined with it.

        The outcome comes last, so that a folder with one is complete.

        Raises:
            OSError: They cannot be written.
        """
        self._outcome = self._outcome.then(outcome) if self._outcome else outcome
        # Sorted over all machines, because a reader looks for the order of what happened between them.
        events = sorted((event for evidence in self._found.values() for event in evidence.events), key=lambda event: event["time"])
        # Whole or not at all: the run may be killed while what a test has left already is written again.
        with atomic_file(self.path / EVENTS, mode=0o644) as file:
            file.writelines(json.dumps(event, separators=(",", ":")).encode() + b"\n" for event in events)
        facts = {"format": FORMAT, **attrs.asdict(self._outcome), "machines": self._names()}
        with atomic_file(self.path / OUTCOME, mode=0o644) as file:
            file.write(json.dumps(facts, indent=1).encode())

    def _names(self) -> dict[str, str]:
        names: dict[str, str] = {}
        for key, evidence in self._found.items():
            place = self._places[key].name
            # Two machines of a test may have one name; the folders' names differ.
            names[place if evidence.name in names else evidence.name] = place
        return names


def _write_machine(folder: Path, evidence: Evidence) -> None:
    """Write a machine's files into its folder, and leave those of earlier evidence that this one has not."""
    remains = evidence.remains
    _write_text(folder / "console.txt", evidence.console)
    if evidence.journal:
        _write_text(folder / "journal.txt", evidence.journal)
    # Once: an earlier description is of the machine while it ran.
    if not (folder / "machine.json").exists():
        _write_text(folder / "machine.json", json.dumps(without_secrets(_facts(evidence)), indent=1, default=str))
    _write_metrics(folder / "metrics.csv", evidence)
    # Only the files that an event of this test names: a shared machine has those of earlier tests, too.
    names = [str(event[key]) for event in evidence.events for key in ("stdout_file", "stderr_file") if key in event]
    if names:
        (folder / "outputs").mkdir(exist_ok=True)
    _copy(map(remains.timeline.output, names), folder / "outputs")
    _copy((remains.folder / CAPTURES).glob("*.pcap"), folder)
    if remains.spec.display and evidence.machine:
        # The machine may be off by now, and a screenshot is the least of the evidence.
        with suppress(VMBottleError):
            (folder / _SCREEN).write_bytes(evidence.machine.lifecycle.instance.screenshot())


def _copy(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        with suppress(FileNotFoundError):  # only the newest outputs are kept, and none after the machine's end
            shutil.copyfile(path, folder / path.name)


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


def _facts(evidence: Evidence) -> dict[str, Any]:
    """Return what a machine was made of, without values that may be secret."""
    remains = evidence.remains
    return {
        "name": evidence.name,
        "id": remains.id,
        "backend": remains.backend,
        "hypervisor": remains.made_by,
        "argv": list(remains.argv),
        "image_sha256": remains.image,
        "pack": evidence.pack,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("pytest", "pytest-vmbottle")},
        },
        "spec": _spec(remains.spec),
    }


def _spec(spec: MachineSpec) -> dict[str, Any]:
    facts = {field.name: getattr(spec, field.name) for field in attrs.fields(type(spec))}
    # Names only: artifacts are uploaded by CI jobs, and read by more people than the secrets are meant for.
    facts["env"], facts["files"] = [name for name, _ in spec.env], [path for path, _ in spec.files]
    facts["source"] = str(getattr(spec.source, "name", spec.source))
    if spec.user_data is not None:
        # It sets passwords and keys. The digest tells whether two machines had the same.
        facts["user_data"] = {"kind": spec.user_data.partition("\n")[0], "sha256": hashlib.sha256(spec.user_data.encode()).hexdigest()}
    return facts
