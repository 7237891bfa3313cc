"""Artifacts that workers on other hosts send."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.plugin.artifacts import Artifacts


def test_a_file_comes_in_parts_and_a_later_one_replaces_it(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / "artifacts", "run")
    artifacts.receive("test/vm/console.txt", 0, b"one, ")
    artifacts.receive("test/vm/console.txt", 5, b"two")
    console = tmp_path / "artifacts" / "test" / "vm" / "console.txt"

    assert console.read_bytes() == b"one, two"
    artifacts.receive("test/vm/console.txt", 0, b"new")
    assert console.read_bytes() == b"new"
    assert artifacts.are_ours


@pytest.mark.parametrize("name", ["/etc/passwd", "test/../../passwd", "../passwd", "index.html", ""])
def test_no_file_is_written_outside_of_the_folders_of_tests(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="is no name of an artifact"):
        Artifacts(tmp_path / "artifacts", "run").receive(name, 0, b"x")

    assert not (tmp_path / "artifacts").exists()
