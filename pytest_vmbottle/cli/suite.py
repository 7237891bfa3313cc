"""`vmbottle warm` and `ci`: what a whole test suite needs, before it runs and on several runners."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pytest_vmbottle.cli.command import Failure, examples
from pytest_vmbottle.cli.groups import Group

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ci", "warm"]

T = TypeVar("T")

_ARGUMENTS = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
_NO_TESTS = 5
_INTERRUPTED = 2


@click.command(
    context_settings=_ARGUMENTS, epilog=examples("vmbottle warm", "vmbottle warm tests/install -m slow", "vmbottle warm --vm-shard=2/4")
)
@click.argument("arguments", nargs=-1, metavar="[PYTEST ARGUMENTS]...", type=click.UNPROCESSED)
def warm(*, arguments: tuple[str, ...]) -> None:
    """Build or pull the packs that tests need, before they run.

    The arguments are those of pytest, which collects the tests but does not run them: paths, -k, -m, --vm-registry and all others. The key
    and the name of each pack are written to stdout. Machines that tests make by a factory are not known before they run.
    """
    from pytest_vmbottle.plugin.warming import warm as warm_up

    packs = _collected(arguments, warm_up, machines=True)
    for pack in packs:
        click.echo(f"{pack.key} {pack.manifest.name}")


@click.group(cls=Group, epilog=examples("vmbottle ci plan --shards 4"))
def ci() -> None:
    """Test suites on several runners of a CI."""


@ci.command(
    context_settings=_ARGUMENTS,
    epilog=examples("vmbottle ci plan --shards 4", "vmbottle ci plan --shards 4 --durations reports/ tests -m 'not slow'"),
)
@click.option("--shards", type=click.IntRange(1, 9999), required=True, metavar="N", help="How many runners there are.")
@click.option(
    "--durations",
    type=click.Path(exists=True, path_type=Path),
    help="JUnit report of an earlier run, or a folder of reports; by default what pytest's cache has.",
)
@click.argument("arguments", nargs=-1, metavar="[PYTEST ARGUMENTS]...", type=click.UNPROCESSED)
def plan(*, shards: int, durations: Path | None, arguments: tuple[str, ...]) -> None:
    """Divide a suite among runners, and write the matrix of their jobs as JSON.

    Each job runs `pytest --vm-shard=I/N` with the same arguments, and with `--vm-durations` where --durations is given here. Tests that
    need the same pack come to as few runners as the times allow; the times balance. Tests that share a machine stay together.
    """
    from pytest_vmbottle.plugin.sharding import shards_of

    given = [f"--vm-durations={durations.absolute()}"] if durations else []
    found = _collected([*given, *arguments], lambda session: shards_of(session.items, shards, session.config), machines=False)
    jobs = [
        {"shard": f"{number}/{shards}", "tests": len(shard.tests), "seconds": round(shard.seconds, 1), "packs": shard.packs}
        for number, shard in enumerate(found, 1)
    ]
    # On one line, as outputs of GitHub's steps are.
    click.echo(json.dumps({"include": jobs}))


def _collected(arguments: Sequence[str], do: Callable[[Any], list[T]], *, machines: bool) -> list[T]:
    from pytest_vmbottle.plugin.selection import run_instead

    given = click.get_current_context().find_root().params.get("catalog")
    status, found = run_instead([*([f"--vm-catalog={given}"] if given else []), *arguments], do, machines=machines)
    if status == _INTERRUPTED:
        click.get_current_context().exit(130)
    if status not in (0, _NO_TESTS):
        raise Failure("pytest could not collect the tests, as it says above")
    return found
