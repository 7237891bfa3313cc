"""Commands whose last words are those of a command in a guest, with options of its own."""

from __future__ import annotations

from collections.abc import Sequence

import click

__all__ = ["LeadingOptions", "env_option", "pairs"]


def pairs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Parse the values of an option that is repeated, each NAME=VALUE."""
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not of the form NAME=VALUE")
    # Only the first sign divides: values may have others.
    return dict(value.split("=", 1) for value in values)


env_option = click.option("-e", "--env", metavar="NAME=VALUE", multiple=True, callback=pairs, help="A variable of its environment.")


class LeadingOptions(click.Command):
    """Command with options before and after its first argument; the next word begins a command of the guest.

    So `exec -u nobody web ls -la` and `exec web -u nobody -- ls -la` both run `ls -la`, and no option of `ls` is taken for one of ours.
    """

    allow_interspersed_args = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words, with the options first as click wants it."""
        before, rest = self._split(args)
        after, words = self._split(rest[1:])
        if not rest:
            return super().parse_args(ctx, before)
        return super().parse_args(ctx, [*before, *after, "--", rest[0], *words])

    def _split(self, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """Divide words into the options at their beginning and the rest, without a `--` between them."""
        at = 0
        while at < len(args) and args[at].startswith("-") and args[at] not in ("-", "--"):
            at += 1 + self.values(args[at], next(iter(args[at + 1 :]), ""))
        if at > len(args):
            raise click.BadOptionUsage(args[-1], f"Option {args[-1]!r} requires an argument.")
        return list(args[:at]), list(args[at + 1 :] if args[at : at + 1] == ["--"] else args[at:])

    def values(self, word: str, following: str) -> int:  # noqa: ARG002 - for options whose value is optional
        """Return the number of words that the option takes after its own."""
        takes = {name for each in self.params if isinstance(each, click.Option) and not (each.is_flag or each.count) for name in each.opts}
        if word.startswith("--"):
            return int(word in takes)
        # In -itu NAME, the last letter takes the next word; in -tuNAME the value stands behind its letter.
        first = next((at for at, letter in enumerate(word[1:], 1) if f"-{letter}" in takes), 0)
        return int(first == len(word) - 1)
