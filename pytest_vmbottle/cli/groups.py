"""Groups whose commands are imported when they are called, with aliases and `help`.

A command costs the import of its own module and no other one, and `--help` of a group none at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["Group", "Section"]

# Names that hands know from other programs. Each holds wherever its command is there.
_ALIASES = {"list": "ls", "delete": "rm", "logs": "console", "ssh": "shell"}


class Section(NamedTuple):
    """Commands of one module, and their place in the help.

    Attributes:
        title: The heading in the help; sections with the same one are shown together.
        module: The module in this package that has the commands.
        commands: The first sentence of each command's help, by its name. A test compares it with the real one.
    """

    title: str
    module: str
    commands: Mapping[str, str]


class Group(click.Group):
    """Group whose commands may be in modules that are not yet imported."""

    def __init__(self, *args: Any, later: Sequence[Section] = (), **kwargs: Any) -> None:
        """Take the sections of the commands that are imported later, beside what click's own groups take."""
        super().__init__(*args, **kwargs)
        self.later = tuple(later)

    def list_commands(self, _: click.Context) -> list[str]:
        """Return the names of all commands in the order of the help, without aliases."""
        return [*(name for section in self.later for name in section.commands), *self.commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name or an alias, and import its module if need be."""
        for section in self.later:
            if cmd_name in section.commands:
                return _imported(section.module, cmd_name)
        found = super().get_command(ctx, cmd_name)
        if found is None and cmd_name in _ALIASES:
            return self.get_command(ctx, _ALIASES[cmd_name])
        return _help if found is None and cmd_name == _help.name else found

    def format_commands(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by their sections."""
        titles: dict[str, list[tuple[str, str]]] = {}
        for section in self.later:
            titles.setdefault(section.title, []).extend(section.commands.items())
        for name, command in self.commands.items():
            titles.setdefault("Commands", []).append((name, command.get_short_help_str(limit=formatter.width)))
        for title, rows in titles.items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands that begin with a text, and the options."""
        from click.shell_completion import CompletionItem

        # As click does it, but for the help texts, for which it would import every module.
        texts = {name: text for section in self.later for name, text in section.commands.items()}
        texts |= {name: command.get_short_help_str() for name, command in self.commands.items()}
        names = [CompletionItem(name, help=texts[name]) for name in self.list_commands(ctx) if name.startswith(incomplete)]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]


def _imported(module: str, name: str) -> click.Command:
    found = vars(import_module(f"pytest_vmbottle.cli.{module}")).values()
    return next(each for each in found if isinstance(each, click.Command) and each.name == name)


@click.command("help", epilog="\b\nExamples:\n  vmbottle help machine start")
@click.argument("words", metavar="[COMMAND...]", nargs=-1)
@click.pass_context
def _help(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Show the help of a command."""
    shown = ctx.parent or ctx
    for word in words:
        found = shown.command.get_command(shown, word) if isinstance(shown.command, click.Group) else None
        if found is None:
            raise click.UsageError(f"No such command {word!r}.", shown)
        shown = click.Context(found, info_name=word, parent=shown)
    click.echo(shown.get_help())
