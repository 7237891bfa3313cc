"""Artifacts of a run, as a folder has them: one folder for each test, with its outcome, its events and the files of its machines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle.errors import VMBottleError

__all__ = ["EVENTS", "MARK", "OUTCOME", "ArtifactsError", "TestArtifacts", "read_run"]

MARK = "VMBOTTLE_ARTIFACTS"
"""Name of the file that tells a folder of artifacts from any other, with the id of the run that wrote it."""
OUTCOME, EVENTS = "test.json", "timeline.jsonl"


class ArtifactsError(VMBottleError):
    """A folder has no artifacts, or they cannot be read."""


@attrs.frozen(kw_only=True)
class TestArtifacts:
    """Artifacts of one test.

    Attributes:
        folder: Its folder.
        nodeid: The test's node id.
        outcome: `passed`, `failed` or `skipped`.
        phase: The phase that decided the outcome: `setup`, `call` or `teardown`.
        error: The first line of the error; empty if there was none.
        traceback: The report of the failure as pytest shows it, without colours.
        sections: Titles and texts below it.
        began: Start of the test, in seconds since 1970.
        ended: End of the test, likewise.
        worker: The process of pytest-xdist, such as `gw0`; empty without.
        machines: Folders of the test's machines by their names, relative to its own.
    """

    __test__ = False  # it is no class of tests, whatever pytest makes of its name

    folder: Path
    nodeid: str
    outcome: str = "failed"
    phase: str = "call"
    error: str = ""
    traceback: str = ""
    sections: tuple[tuple[str, str], ...] = ()
    began: float = 0.0
    ended: float = 0.0
    worker: str = ""
    machines: dict[str, str] = attrs.field(factory=dict)

    @property
    def failed(self) -> bool:
        """Tell whether the test failed."""
        return self.outcome == "failed"

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of all its machines in their order; a line that is not whole is left out."""
        with (self.folder / EVENTS).open("rb") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:  # the run was killed while it was written
                    continue
                # Everything that reads events computes with their time.
                if isinstance(event, dict) and isinstance(event.get("time"), int | float):
                    yield event

    def files(self) -> list[Path]:
        """Return its files, sorted by name."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink())


def read_run(folder: Path) -> list[TestArtifacts]:
    """Read the folder of a run; failed tests come first, then in the order of their start.

    Raises:
        ArtifactsError: It is no folder of artifacts, or a file in it cannot be read.
    """
    if not (folder / MARK).is_file():
        raise ArtifactsError(f"{folder} has no artifacts of a run: pytest writes them with --vm-artifacts, to --vm-output")
    # Folders without an outcome are of tests whose artifacts were being written when the run was killed.
    tests = [_read(path.parent) for path in folder.glob(f"*/{OUTCOME}")]
    return sorted(tests, key=lambda test: (not test.failed, test.began, test.nodeid))


def _read(folder: Path) -> TestArtifacts:
    try:
        known = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        known["sections"] = tuple((str(title), str(text)) for title, text in known.get("sections", ()))
        return TestArtifacts(
            folder=folder, **{field.name: known[field.name] for field in attrs.fields(TestArtifacts)[1:] if field.name in known}
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactsError(f"{folder / OUTCOME} cannot be read: {error}") from error
