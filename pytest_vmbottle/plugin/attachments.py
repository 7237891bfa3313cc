"""Artifacts of a test in the reports of pytest-html and of Allure, for runs that write one."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

__all__ = ["attach"]

_SHOWN = (".jsonl", ".pcap", ".png", ".txt")
"""Suffixes of the files that a reader looks for."""


def attach(config: pytest.Config, folder: Path, report: pytest.TestReport) -> None:
    """Add a test's artifacts to its row in pytest-html's report, and to its result in Allure's."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in _SHOWN]
    # By the other plugin's own option, because an installed plugin writes no report unless it is asked to.
    if getattr(config.option, "htmlpath", None):
        _attach_to_html(report, folder, files, Path(config.option.htmlpath).absolute().parent)
    if getattr(config.option, "allure_report_dir", None):
        _attach_to_allure(folder, files)


def _attach_to_html(report: pytest.TestReport, folder: Path, files: Sequence[Path], above: Path) -> None:
    from pytest_html import extras

    # Relative, so that report and artifacts can be moved or uploaded together.
    links = [extras.url(Path(os.path.relpath(path, above)).as_posix(), name=str(path.relative_to(folder))) for path in files]
    # By their content: pytest-html embeds them or stores them beside its report, as its options say.
    screens = [extras.png(base64.b64encode(path.read_bytes()).decode()) for path in files if path.suffix == ".png"]
    # The attribute that pytest-html reads; other plugins may have put something there.
    vars(report).setdefault("extras", []).extend([*screens, *links])


def _attach_to_allure(folder: Path, files: Sequence[Path]) -> None:
    import allure

    for path in files:
        allure.attach.file(path, name=str(path.relative_to(folder)), extension=path.suffix[1:])
