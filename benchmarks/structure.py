"""Measures of the source's structure, side by side with those of other projects: how long, how wide, how well explained.

A project is the folder of an sdist or a clone, or a package's folder, which has no tests. This one is always measured; pluggy,
pytest-django and httpx are where they are installed. NAME=FOLDER adds another one, or replaces one of those. Nothing is downloaded.

    pip download --no-deps --no-binary :all: --dest /tmp/others httpx && tar -C /tmp/others -xf /tmp/others/httpx-*.tar.gz
    python benchmarks/structure.py httpx=/tmp/others/httpx-0.28.1
"""

from __future__ import annotations

import argparse
import ast
import io
import math
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import attrs

OURS = "pytest_vmbottle"
OTHERS = ("pluggy", "pytest_django", "httpx")
QUESTIONS = frozenset({"what", "who", "whether", "how"})
"""First words of docstrings that say neither what a thing does nor what it is."""
TESTS = ("tests", "testing")
"""Folders of tests, by the names that projects give them."""
NOT_FOR_READERS = ("#!", "# noqa", "# type:", "# pragma:", "# fmt:", "# pylint:", "# mypy:")
"""Comments that begin so speak to tools."""

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@attrs.frozen
class Project:
    """A package's folder, and the one with its tests if they are at hand."""

    package: Path
    tests: Path | None = None

    @classmethod
    def found(cls, name: str, folder: Path) -> Project:
        """Find the package and its tests in a project's folder; a package's own folder stands for it without tests."""
        if (folder / "__init__.py").is_file():
            return cls(folder)
        module = name.replace("-", "_")
        for package in (folder / module, folder / "src" / module):
            if (package / "__init__.py").is_file():
                return cls(package, next((folder / tests for tests in TESTS if (folder / tests).is_dir()), None))
        raise ValueError(f"{folder}: no package {module} in it, nor in its src")


@attrs.frozen
class Module:
    """Measures of one file."""

    lines: int
    functions: tuple[int, ...]
    classes: dict[str, tuple[str, ...]]
    docstrings: tuple[str, ...]
    comments: int

    @classmethod
    def read(cls, path: Path) -> Module:
        with tokenize.open(path) as file:
            text = file.read()
        tree = ast.parse(text, path)
        return cls(len(text.splitlines()), tuple(functions(tree)), classes(tree), tuple(docstrings(tree)), comments(text))


@attrs.frozen
class Measures:
    """Measures of one project."""

    root: int
    modules: tuple[Module, ...]
    tests: int | None

    @classmethod
    def of(cls, project: Project) -> Measures:
        modules = tuple(Module.read(path) for path in sorted(project.package.rglob("*.py")))
        tests = None if project.tests is None else sum(len(path.read_bytes().splitlines()) for path in project.tests.rglob("*.py"))
        return cls(sum(not path.name.startswith("__") for path in project.package.glob("*.py")), modules, tests)

    @property
    def lines(self) -> int:
        return sum(module.lines for module in self.modules)

    @property
    def widest(self) -> tuple[str, tuple[str, ...]]:
        """The name of the class with the most public members, and those."""
        found = [each for module in self.modules for each in module.classes.items()]
        return max(found, key=lambda each: len(each[1]), default=("", ()))


def functions(tree: ast.AST) -> Iterator[int]:
    """Sockets of each function, those inside others included, from its `def` on."""
    return (1 + (node.end_lineno or node.lineno) - node.lineno for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def classes(tree: ast.AST) -> dict[str, tuple[str, ...]]:
    """Public members of each class that it defines itself: in its body, or on `self`. Constants, as an enumeration has, are left out."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names = {name for statement in node.body for name in defined(statement)}
            found[node.name] = tuple(sorted(name for name in names if not name.startswith("_") and not name.isupper()))
    return found


def defined(statement: ast.stmt) -> Iterator[str]:
    """Names of the members that a statement of a class's body defines."""
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        yield statement.name
    if isinstance(statement, FUNCTIONS):
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self":
                yield node.attr
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Docstrings of the module, its classes and its functions."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and (text := ast.get_docstring(node)):
            yield text


def is_question(docstring: str) -> bool:
    """True if the first word is one of `QUESTIONS`."""
    return docstring.split(maxsplit=1)[0].rstrip(",:").lower() in QUESTIONS


def comments(text: str) -> int:
    """Number of lines with a comment for readers, beside code or alone."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT and not token.string.startswith(NOT_FOR_READERS) for token in tokens)


def spread(lengths: Iterable[int]) -> str:
    """Median, 95th percentile and maximum, by nearest rank."""
    ranked = sorted(lengths)
    return " / ".join(str(ranked[math.ceil(part * len(ranked)) - 1]) for part in (0.5, 0.95, 1)) if ranked else ""


def questions(measures: Measures) -> str:
    texts = [text for module in measures.modules for text in module.docstrings]
    return f"{100 * sum(map(is_question, texts)) / len(texts):.1f}" if texts else ""


ROWS: dict[str, Callable[[Measures], str]] = {
    "lines of source": lambda each: str(each.lines),
    "modules at the root": lambda each: str(each.root),
    "lines of a function: median / p95 / max": lambda each: spread(length for module in each.modules for length in module.functions),
    "lines of a file: median / p95 / max": lambda each: spread(module.lines for module in each.modules),
    "public members of the widest class": lambda each: f"{each.widest[0]} {len(each.widest[1])}".strip(),
    "docstrings that begin with What, Who, Whether or How, %": questions,
    "lines with a comment, of 100": lambda each: f"{100 * sum(module.comments for module in each.modules) / max(each.lines, 1):.1f}",
    "lines of tests for one of source": lambda each: "" if each.tests is None else f"{each.tests / max(each.lines, 1):.2f}",
}


def table(measured: dict[str, Measures]) -> str:
    """A Markdown table with a column for each project, and below it the members of the widest classes."""
    lines = [f"| measure | {' | '.join(measured)} |", f"|---|{'---:|' * len(measured)}"]
    lines += [f"| {row} | {' | '.join(map(cell, measured.values()))} |" for row, cell in ROWS.items()]
    for name, measures in measured.items():
        kind, members = measures.widest
        lines += ["", f"{name}, {kind}: {', '.join(members)}"]
    return "\n".join(lines)


def importable() -> dict[str, Project]:
    """The other projects' installed packages, by name; their tests are not installed."""
    found = {name: find_spec(name) for name in OTHERS}
    return {name: Project(Path(spec.origin).parent) for name, spec in found.items() if spec is not None and spec.origin is not None}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("projects", nargs="*", metavar="NAME=FOLDER", help="another project, or another folder of one")
    projects = {OURS: Project.found(OURS, Path(__file__).parents[1]), **importable()}
    for word in parser.parse_args(words).projects:
        name, _, folder = word.partition("=")
        try:
            projects[name.replace("-", "_")] = Project.found(name, Path(folder))
        except ValueError as error:
            parser.error(str(error))
    print(table({name: Measures.of(project) for name, project in projects.items()}))


if __name__ == "__main__":
    main()
