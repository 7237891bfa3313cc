"""The measures of a source's structure, on a small project."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "structure.py"
SMALL = '''#!/usr/bin/env python
"""What this is for."""

import enum  # noqa: F401


class Wide:
    """Howl at the moon."""

    field: int = 1
    plain = 2
    LIMIT = 3

    def __init__(self) -> None:
        self.given = 4  # why it is 4
        self._hidden = 5

    @property
    def field2(self) -> int:
        """Whether, or not."""
        # Neither.
        return self.field

    async def verb(self) -> None:
        def inner() -> None:
            pass


class Narrow(Wide):
    own = 1
'''


@pytest.fixture
def structure(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; `benchmarks` is no package."""
    spec = spec_from_file_location("structure", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "structure", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A project of two modules and a folder of tests."""
    for name, text in {"src/small/__init__.py": "", "src/small/sub/code.py": SMALL, "testing/test_it.py": "pass\n" * 16}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "src/small/extra.py").write_text("x = 1\n")
    return tmp_path


def column(printed: str, name: str) -> dict[str, str]:
    """The cells of a project's column by their rows' names."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("| ")]
    return {row[0]: row[rows[0].index(name)] for row in rows[1:]}


def test_each_project_has_a_column_with_its_measures(structure: Any, small: Path) -> None:
    printed = structure.table({name: structure.Measures.of(structure.Project.found("small", small)) for name in ("other", "small")})

    assert column(printed, "other") == column(printed, "small")
    assert column(printed, "small") == {
        "lines of source": "31",
        "modules at the root": "1",
        "lines of a function: median / p95 / max": "3 / 4 / 4",
        "lines of a file: median / p95 / max": "1 / 30 / 30",
        "public members of the widest class": "Wide 5",
        "docstrings that begin with What, Who, Whether or How, %": "66.7",
        "lines with a comment, of 100": "6.5",
        "lines of tests for one of source": "0.52",
    }
    assert "small, Wide: field, field2, given, plain, verb" in printed.splitlines()


def test_a_packages_own_folder_has_no_tests(structure: Any, small: Path) -> None:
    measures = structure.Measures.of(structure.Project.found("small", small / "src/small"))

    assert (measures.lines, measures.tests) == (31, None)


def test_a_folder_without_the_package_is_a_usage_error_that_names_both(
    structure: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        structure.main([f"other-name={tmp_path}"])

    assert f"{tmp_path}: no package other_name in it, nor in its src" in capsys.readouterr().err
