"""A run's program on the host: it takes a copy of the project, holds it while the run lasts, and removes it.

It says its versions, reads an order and a tar archive, says where the copy is, and waits for the end of its input. That comes whatever
ends the controller.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from pytest_vmbottle.hosts.worker import ORDER

__all__ = ["ARTIFACTS", "GOODBYE", "PACKAGES", "main"]

PACKAGES = ("pytest-vmbottle", "pytest", "pytest-xdist")
"""Packages that both sides need."""
GOODBYE = b"bye\n"
"""Last words of a controller whose workers have ended."""
ARTIFACTS = "artifacts"
"""Folder of a run that its workers write artifacts to."""
_PATIENCE = 8.0
"""Seconds in which workers end whose controller has gone without a word: see `worker`."""


def main() -> None:
    """Hold a copy of a project."""
    _say(python=platform.python_version(), packages={name: _version(name) for name in PACKAGES})
    line = sys.stdin.buffer.readline()
    if not line:
        return
    order = json.loads(line)
    try:
        folder = Path(tempfile.mkdtemp(prefix="vmbottle-", dir=_made(order["folder"])))
    except OSError as error:
        _say(error=str(error))
        return
    try:
        _take(order, folder)
        # Zeros are the end of the archive. What comes then comes at the end of the run.
        if sys.stdin.buffer.read().strip(b"\0") != GOODBYE:
            time.sleep(_PATIENCE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take(order: dict[str, Any], folder: Path) -> None:
    try:
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
            # Older Pythons have no filters, and newer ones by default refuse links that a project may have.
            archive.extraction_filter = getattr(tarfile, "tar_filter", lambda member, _: member)
            archive.extractall(folder)  # noqa: S202 - it comes from the project of the same user
        project = folder / order["name"]
        environment = {**order["environment"], "VMBOTTLE_OUTPUT": str(folder / ARTIFACTS)}
        (folder / ORDER).write_text(json.dumps({"directory": str(project / order["directory"]), "environment": environment}))
    except OSError as error:
        _say(error=str(error))
    else:
        _say(folder=str(folder), project=str(project))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _made(folder: str) -> Path | None:
    if not folder:
        return None
    path = Path(folder)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _say(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
