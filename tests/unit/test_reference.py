"""The reference has every name that the code has: what is public, fixtures, keywords of the mark, hooks, errors, events."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import click
import pytest

import pytest_vmbottle
from pytest_vmbottle import Machine, MachineKeywords, VMBottleError, errors, result
from pytest_vmbottle.cli import main
from pytest_vmbottle.plugin import fixtures, hookspec
from pytest_vmbottle.report import events, words

DOCS = Path(__file__).parents[2] / "docs"
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)


def shown() -> dict[str, str]:
    """The objects whose docstrings the pages of the reference show, with the page of each."""
    return {name: page.name for page in (DOCS / "reference").glob("*.md") for name in DIRECTIVE.findall(page.read_text())}


def found(name: str) -> object:
    """An object of the package, by its module and its name, or the module."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        return getattr(import_module(module), last)


def first_cells(page: str, heading: str) -> set[str]:
    """The code in the first cells of the tables of a section."""
    section = re.split(rf"^#+ {heading}$", (DOCS / page).read_text(), flags=re.MULTILINE)[1]
    rows = re.findall(r"^\| (`.*?) \|", re.split(r"^#+ ", section, flags=re.MULTILINE)[0], re.MULTILINE)
    return {code.partition("(")[0] for row in rows for code in re.findall(r"`([^`]+)`", row)}


def test_every_public_name_has_its_docstring_on_a_page() -> None:
    wanted = {f"pytest_vmbottle.{pytest_vmbottle._LATER[name]}" + f".{name}" for name in pytest_vmbottle.__all__}
    # A page can show a module with all that is in it.
    missing = {name for name in wanted if name not in shown() and name.rpartition(".")[0] not in shown()}

    assert missing == set()


@pytest.mark.parametrize("name", sorted(shown()))
def test_what_a_page_shows_is_there_and_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(found(name))


def test_every_error_is_on_the_page_of_errors() -> None:
    public = {each.__name__: each for module in (errors, result) for each in vars(module).values() if inspect.isclass(each)}
    ours = {f"{each.__module__}.{name}" for name, each in public.items() if issubclass(each, VMBottleError)}
    directives = {name for name, page in shown().items() if page == "errors.md"}

    assert {name for name in ours if name not in directives and name.rpartition(".")[0] not in directives} == set()
    assert {name.rpartition(".")[2] for name in ours} <= set(re.findall(r"\w+", errors.__doc__ or ""))


def test_every_fixture_is_in_the_table_of_fixtures() -> None:
    ours = {name for name, each in vars(fixtures).items() if isinstance(each, type(fixtures.vm))}

    assert len(ours) > 10
    assert first_cells("tests.md", "Fixtures") == {name for name in ours if not name.startswith("_")}


def test_every_keyword_of_the_mark_is_in_its_table() -> None:
    assert first_cells("tests.md", "The mark") == set(MachineKeywords.__annotations__)


@pytest.mark.parametrize("page", sorted((DOCS / "how-to").glob("*.md")), ids=lambda page: page.stem)
def test_how_tos_name_verbs_keywords_and_commands_that_there_are(page: Path) -> None:
    text = page.read_text()
    code = re.findall(r"`([^`\n]+)`", text)
    verbs = {verb for each in code for verb in re.findall(r"(?<!\.)\bvm\.(\w+)", each)}
    commands = {tuple(words.split()) for each in code for words in re.findall(r"^vmbottle ((?:machine |pack |image )?[a-z-]+)", each)}
    keywords = set(re.findall(r"`(\w+)=(?!\w+`)", text))

    assert {verb for verb in verbs if not hasattr(Machine, verb) and verb not in ATTRIBUTES} == set()
    assert {words for words in commands if not _is_command(words)} == set()
    assert {word for word in keywords if word not in MachineKeywords.__annotations__ and word not in PARAMETERS} == set()


ATTRIBUTES = {"console", "name"}
"""Attributes of a machine that its class does not have."""
PARAMETERS = {"check", "number", "closed", "depends", "finished", "user", "timeout"}
"""Parameters of its verbs, and of `layer`, that pages name."""


def _is_command(words: tuple[str, ...]) -> bool:
    group: click.Command | None = main
    for word in words:
        group = group.get_command(click.Context(group), word) if isinstance(group, click.Group) else None
    return group is not None


def test_every_hook_is_in_the_table_of_hooks() -> None:
    ours = {name for name in vars(hookspec) if name.startswith("pytest_vmbottle_")}

    assert first_cells("extending.md", "Hooks") == ours


def test_every_event_is_in_the_table_of_events() -> None:
    told = first_cells("timeline.md", "Events") - {"kind"}

    # The last two are told by their texts alone.
    assert told == {*words._WORDS, *events._LANE_OF, "note", "infra"}
    assert recorded() <= told


def recorded() -> set[str]:
    """The kinds of events that verbs of the package are recorded as."""
    package = Path(pytest_vmbottle.__file__).parent
    return {kind for path in package.rglob("*.py") for kind in re.findall(r"@recorded\(\"(\w+)\"", path.read_text())}
