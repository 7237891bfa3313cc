"""The groups of `vmbottle`: which modules a call loads, what the help says, and the other names of commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import click
import pytest
from click.testing import CliRunner

from pytest_vmbottle.cli import main
from pytest_vmbottle.cli.groups import Group, Section
from pytest_vmbottle.settings import SETTINGS

# Besides those that `import pytest_vmbottle` loads.
FOR_HELP = {
    f"pytest_vmbottle.{name}"
    for name in ("cli", "cli.groups", "cli.command", "cli.machines", "errors", "host", "host.signals", "host.sizes", "shown")
}
FOR_VERSION = {f"pytest_vmbottle.{name}" for name in ("cli.versions", "host.arch", "host.commands")}
MOST_FOR_LISTING = 30
LOADED = """
import json, sys
import pytest_vmbottle
before = set(sys.modules)
from pytest_vmbottle.cli import main
try:
    main({words!r}, prog_name="vmbottle", standalone_mode=False)
except SystemExit:
    pass
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def loaded(*words: str) -> list[str]:
    """The modules that a call of the command loads."""
    ended = subprocess.run([sys.executable, "-c", LOADED.format(words=words)], capture_output=True, text=True, check=True)
    names: list[str] = json.loads(ended.stdout.splitlines()[-1])
    return names


def groups(group: Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Group]]:
    """All groups, by the words that call them."""
    yield path, group
    for name in group.list_commands(click.Context(group)):
        if name in ("image", "pack", "machine"):
            found = group.get_command(click.Context(group), name)
            assert isinstance(found, Group)
            yield from groups(found, (*path, name))


GROUPS = dict(groups(main))


def sections() -> Iterator[tuple[str, Section]]:
    for path, group in GROUPS.items():
        for section in group.later:
            if find_spec(f"pytest_vmbottle.cli.{section.module}"):
                yield from ((" ".join((*path, name)), section) for name in section.commands)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [(("--help",), set()), (("machine", "--help"), set()), (("--version",), FOR_VERSION)],
    ids=["help", "machine-help", "version"],
)
def test_the_help_loads_no_module_of_a_command(words: tuple[str, ...], wanted: set[str]) -> None:
    ours = {name for name in loaded(*words) if name.startswith("pytest_vmbottle.")}

    assert ours <= FOR_HELP | wanted


def test_a_list_of_machines_loads_nothing_that_only_machines_need() -> None:
    names = loaded("--catalog", "/nonexistent", "machine", "ls")
    ours = [name for name in names if name.startswith("pytest_vmbottle.")]

    assert len(ours) <= MOST_FOR_LISTING, ours
    assert not {"paramiko", "cryptography", "urllib3", "yaml", "qemu", "pycdlib", "asyncio", "pytest"} & set(names)
    assert not {"backends", "channels", "machine", "provision", "images"} & {name.split(".")[1] for name in ours}


@pytest.mark.parametrize(("words", "section"), list(sections()), ids=[words for words, _ in sections()])
def test_the_help_of_a_group_says_of_each_command_what_the_command_says_itself(words: str, section: Section) -> None:
    *path, name = words.split()
    command = GROUPS[tuple(path)].get_command(click.Context(main), name)

    assert command is not None
    assert section.commands[name] == command.get_short_help_str(limit=200)


@pytest.mark.parametrize("path", [(), ("image",), ("pack",), ("machine",)], ids=" ".join)
def test_the_help_of_a_group_has_all_its_commands(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(main, [*path, "--help"]).stdout

    assert all(f"\n  {name} " in shown for name in GROUPS[path].list_commands(click.Context(main)))


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("machine list", "machine ls"),
        ("machine delete", "machine rm"),
        ("machine logs", "machine console"),
        ("machine ssh", "machine shell"),
        ("image list", "image ls"),
        ("pack delete", "pack rm"),
    ],
)
def test_a_command_answers_to_the_name_that_hands_know_from_other_programs(alias: str, name: str) -> None:
    shown, known = (CliRunner().invoke(main, [*words.split(), "--help"], prog_name="vmbottle").stdout for words in (alias, name))

    assert shown == known.replace(f"vmbottle {name}", f"vmbottle {alias}", 1)
    group, _, word = alias.partition(" ")
    assert f"\n  {word} " not in CliRunner().invoke(main, [group, "--help"]).stdout


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["help"], ["--help"]),
        (["help", "machine", "start"], ["machine", "start", "--help"]),
        (["pack", "help", "ls"], ["pack", "ls", "--help"]),
    ],
)
def test_help_is_a_command_too(words: list[str], same: list[str]) -> None:
    shown, known = (CliRunner().invoke(main, each, prog_name="vmbottle") for each in (words, same))

    assert (shown.exit_code, shown.stdout) == (0, known.stdout)


@pytest.mark.parametrize("words", [["help", "nosuch"], ["help", "pack", "ls", "deeper"]])
def test_help_for_a_command_that_there_is_not_is_a_wrong_call(words: list[str]) -> None:
    result = CliRunner().invoke(main, words)

    assert result.exit_code == 2
    assert f"No such command '{words[-1]}'" in result.stderr


def test_the_catalogs_option_says_what_the_table_of_settings_says() -> None:
    setting = next(each for each in SETTINGS if each.name == "catalog")
    option = next(each for each in main.params if each.name == "catalog")

    assert isinstance(option, click.Option)
    assert (option.help, option.envvar, option.metavar) == (f"{setting.sentence}; also {setting.env}.", setting.env, setting.takes)
