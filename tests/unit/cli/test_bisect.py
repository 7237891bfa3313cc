"""The command for a bisection; its searches are tried with real machines."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from pytest_vmbottle.cli import main


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (("debian-12",), 2, "Missing argument 'COMMAND...'"),
        (("--commands", "{steps}", "--upgrades", "debian-12", "true"), 2, "choose one"),
        (("--commands", "{empty}", "debian-12", "true"), 1, "has no commands"),
        (("--commands", "/none", "debian-12", "true"), 2, "does not exist"),
        (("pack:abcdef", "true"), 1, "there is no pack whose key begins with 'abcdef'"),
        (("tests/none.py::web", "true"), 1, "there is no such file"),
    ],
)
def test_what_cannot_be_searched_says_why(tmp_path: Path, words: tuple[str, ...], status: int, reason: str) -> None:
    steps, empty = tmp_path / "steps", tmp_path / "empty"
    steps.write_text("true\n")
    empty.write_text("\n  # nothing\n")
    given = [word.format(steps=steps, empty=empty) for word in words]
    result = CliRunner().invoke(main, ["--catalog", str(tmp_path / "catalog"), "bisect", *given])
    assert result.exit_code == status, result.output
    assert reason in result.stderr
