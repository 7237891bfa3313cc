"""The page about older systems names things that there are."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import click
import pytest

import pytest_vmbottle
from pytest_vmbottle import Machine
from pytest_vmbottle.cli import main
from pytest_vmbottle.service.app import openapi_of
from pytest_vmbottle.service.options import Options
from pytest_vmbottle.service.routes import sockets
from pytest_vmbottle.settings import SETTINGS
from pytest_vmbottle.spec import MachineSpec

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
ENTRY = re.compile(r"(command|option|variable|route|member|keyword|setting|name) `([^`]+)`")


def rows() -> list[tuple[str, str]]:
    """Rows: the older thing, and ours."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return [(there, here) for there, here in cells if there != "there"]


def command(words: str) -> click.Command | None:
    """A command by its words."""
    found: click.Command | None = main
    for word in words.split()[1:]:
        found = found.get_command(click.Context(found), word) if isinstance(found, click.Group) else None
    return found


def variables(group: click.Command) -> Iterator[str]:
    """Variables of the options of a command and of all below it."""
    yield from (str(each.envvar) for each in group.params if each.envvar)
    if isinstance(group, click.Group):
        for name in group.list_commands(click.Context(group)):
            below = group.get_command(click.Context(group), name)
            yield from variables(below) if below is not None else ()


def routes() -> set[str]:
    document = openapi_of(Options(root=Path("/nonexistent"), token="0123456789abcdef0123456789abcdef"))
    found = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    return found | {f"WS {route.path}" for route in sockets.routes}  # type: ignore[attr-defined] # each has a path


def has_option(text: str) -> bool:
    words, _, option = text.rpartition(" ")
    found = command(words)
    return found is not None and any(option in param.opts for param in found.params)


def has_variable(name: str) -> bool:
    uefi = importlib.import_module("pytest_vmbottle.backends.qemu.uefi")
    of_firmware = name.startswith("VMBOTTLE_UEFI_") and "VMBOTTLE_UEFI_" in Path(str(uefi.__file__)).read_text()
    return of_firmware or name in {setting.env for setting in SETTINGS} | set(variables(main))


KINDS: dict[str, Callable[[str], bool]] = {
    "command": lambda text: command(text) is not None,
    "option": has_option,
    "variable": has_variable,
    "route": lambda text: text in routes(),
    # Attributes that the constructor sets count too.
    "member": lambda text: hasattr(Machine, text) or f"self.{text}: " in inspect.getsource(Machine.__init__),
    "keyword": lambda text: text in {field.name for field in attrs.fields(MachineSpec)},
    "setting": lambda text: text in {setting.name for setting in SETTINGS},
    "name": lambda text: text in pytest_vmbottle.__all__,
}


@pytest.mark.parametrize(("there", "here"), rows())
def test_what_an_older_system_had_is_here(there: str, here: str) -> None:
    entries = ENTRY.findall(here)

    assert here == "; ".join(f"{kind} `{text}`" for kind, text in entries), "it has names of a known kind, and nothing else"
    assert [(kind, text) for kind, text in entries if not KINDS[kind](text)] == [], there


def test_every_route_of_the_older_service_is_named_by_the_page() -> None:
    there = {re.sub(r"`", "", row) for row, _ in rows()}
    shared = {route for route in routes() if route in there}

    assert len(shared) >= 16
