"""The guide for contributors names files, folders and definitions that exist."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pytest_vmbottle"
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
MADE = (".tox/", ".venv/")
"""Folders that tools make."""
_QUOTED = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"[\w.-]*(?:/[\w.-]*)+|[\w-]+\.(?:py|md|toml)")
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


def found(path: str) -> list[Path]:
    """Files and folders that the page can mean: from the root or the package on, else any of this name in the package or benchmarks."""
    places = [folder / path for folder in (ROOT, PACKAGE) if (folder / path).exists()]
    return places or [each for folder in (PACKAGE, ROOT / "benchmarks") for each in folder.rglob(path.rstrip("/"))]


def paths(text: str) -> list[str]:
    words = [word for quoted in _QUOTED.findall(text) for word in quoted.split()]
    return [word for word in words if _PATH.fullmatch(word) and not word.startswith(MADE)]


def names(text: str) -> list[str]:
    return [quoted for quoted in _QUOTED.findall(text) if _NAME.fullmatch(quoted) and not _PATH.fullmatch(quoted)]


def definitions(path: Path) -> Iterator[str]:
    """Names that a module, or all modules of a folder, define: functions, classes with their members, and constants."""
    for module in path.rglob("*.py") if path.is_dir() else [path] if path.suffix == ".py" else []:
        for node in ast.parse(module.read_text()).body:
            yield from _defined(node)
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{name}" for member in node.body for name in _defined(member))


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def entries(heading: str) -> list[str]:
    """Rows, list items and paragraphs of a section."""
    section = re.split(rf"^#+ {heading}\n", PAGE, flags=re.MULTILINE)[1]
    return re.split(r"\n(?=\||\d+\. |\* |\n)", re.split(r"^## ", section, flags=re.MULTILINE)[0])


def test_every_path_in_the_guide_exists() -> None:
    assert [path for path in paths(PAGE) if not found(path)] == []


def test_every_name_in_the_map_is_defined_in_a_module_that_stands_beside_it() -> None:
    unknown = {}
    for entry in filter(names, entries("Where things are")):
        defined = {name for path in paths(entry) for place in found(path) for name in definitions(place)}
        unknown[entry] = {*names(entry)} - defined
    assert {entry: missing for entry, missing in unknown.items() if missing} == {}
    assert len(unknown) > 10


def test_the_floors_in_the_guide_are_those_of_the_import_contract() -> None:
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    floors = {name: len(layers) - above for above, layer in enumerate(layers) for name in layer.split(" | ")}
    rows = (re.match(r"\| (\d+) \| `(\w+)(?:/|\.py)` \|", entry.strip()) for entry in entries("Where things are"))
    assert {row[2]: int(row[1]) for row in rows if row} == floors
