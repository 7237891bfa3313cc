"""`vmbottle doctor --fix`: the commands that the doctor recommends, run one by one as their user agrees."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from pytest_vmbottle.cli.command import say
from pytest_vmbottle.shown import printable

if TYPE_CHECKING:
    from pytest_vmbottle.host.findings import Command, Finding

__all__ = ["check_call", "mend"]


def check_call(*, fix: bool, yes: bool, as_json: bool) -> None:
    """Refuse options that do not go together.

    Raises:
        click.UsageError: They do not, or there is nobody to ask.
    """
    if yes and not fix:
        raise click.UsageError("--yes is for --fix: without it nothing is run.")
    if fix and as_json:
        raise click.UsageError("--fix tells people what it does: call it without --json.")
    if fix and not yes and not sys.stdin.isatty():
        raise click.UsageError("--fix asks before each command, and there is no terminal to ask on: add --yes to run all of them.")


def mend(findings: Iterable[Finding], *, ask: bool) -> bool:
    """Run the commands that findings recommend, and tell of each what became of it.

    Args:
        findings: The findings; those that are well are left alone.
        ask: Whether to ask before each command.

    Returns:
        Whether any command was run.
    """
    done: dict[Command, bool] = {}
    wanting = [finding for finding in findings if finding.remedy and finding.state != "ok"]
    for finding in wanting:
        say(f"\n{finding.topic}: {finding.text}")
        if not finding.commands:
            say(f"  not run, because it takes your own shell or hand: {finding.remedy}")
        for command in finding.commands:
            if command not in done and not _agreed(command, ask=ask):
                say("  left out, with what follows it")
                break
            # Several findings can have a command in common, such as the one that reads the package lists.
            done[command] = done[command] if command in done else _run(command)
            if not done[command]:
                break
        else:
            _, _, note = finding.remedy.partition("  # ")
            if note:
                say(f"  {note}")
    if not wanting:
        say("There is nothing to fix.")
    return bool(done)


def _agreed(command: Command, *, ask: bool) -> bool:
    return not ask or click.confirm(printable(f"  run  {command} ?"), err=True)


def _run(command: Command) -> bool:
    """Run a command on this terminal, on which sudo may ask for a password; tell how it ended."""
    argv = command.argv[1:] if command.argv[0] == "sudo" and os.geteuid() == 0 else command.argv
    try:
        # Without a shell; what it reads goes through a pipe, and else it has our own input.
        ended = subprocess.run(argv, check=False, text=True, input=command.reads or None)  # noqa: S603
    except FileNotFoundError:
        say(f"  failed: there is no {argv[0]} on this computer, so do in your own way what this was to do: {command}")
        return False
    say(f"  {'done' if ended.returncode == 0 else f'failed, with status {ended.returncode}'}: {command}")
    return ended.returncode == 0
