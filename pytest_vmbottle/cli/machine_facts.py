"""`vmbottle machine ls`, `show`, `console` and the like: all that is known of machines, running or not."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytest_vmbottle.cli.command import Failure, catalog_root, emit, examples, format_age, json_option, one_line, say, show_table
from pytest_vmbottle.cli.completion import machine_names
from pytest_vmbottle.cli.kept import ask, described, find_all, find_machine, name_argument, record_facts
from pytest_vmbottle.host.sizes import format_size

if TYPE_CHECKING:
    from pytest_vmbottle.backends.console import Console
    from pytest_vmbottle.standalone.client import Kept
    from pytest_vmbottle.standalone.record import Record

__all__ = ["argv", "console", "list_machines", "metrics", "show", "snapshots"]


@click.command(
    "ls", epilog=examples("vmbottle machine ls", "vmbottle machine ls web", "vmbottle machine ls --json | jq -r '.[] | select(.pid).name'")
)
@click.argument("names", metavar="[NAME...]", nargs=-1, shell_complete=machine_names)
@json_option
def list_machines(*, names: tuple[str, ...], as_json: bool) -> None:
    """List the machines, with the end of those that no longer run."""
    from pytest_vmbottle.standalone.client import all_kept

    records = list(_records(find_all(names) or all_kept(catalog_root() / "machines")))
    if as_json:
        emit([record_facts(record) for record in records])
    elif records:
        show_table(("NAME", "STATE", "SOURCE", "CPUS", "MEMORY", "PORTS", "PID", "SINCE", "REASON"), map(_row, records))
    else:
        say("There are no machines: start one with `vmbottle machine start debian-12`.")


def _records(places: Iterable[Kept]) -> Iterator[Record]:
    for place in places:
        try:
            yield place.record()
        except FileNotFoundError:  # it was just removed
            continue


def _row(record: Record) -> tuple[str, ...]:
    memory = record.spec.get("memory")
    ports = ",".join(f"{here}->{port}" for port, here in record.ports.items())
    return (
        record.name,
        record.state,
        Path(record.source).name or "-",
        str(record.spec.get("cpus", "-")),
        format_size(memory) if memory else "-",
        ports or "-",
        str(record.pid or "-"),
        f"{format_age(time.time() - record.since)} ago",
        record.reason,
    )


@click.command(epilog=examples("vmbottle machine show web", "vmbottle machine show web --json | jq .ports"))
@name_argument
@json_option
def show(*, name: str, as_json: bool) -> None:
    """Show all that is known of a machine."""
    place = find_machine(name)
    record = place.record()
    facts = record_facts(record) | {
        "age": max(0.0, time.time() - record.since),
        "can_start_again": place.can_start_again,
        "snapshots": [saved.label for saved in place.snapshots()],
        "folder": str(place.folder),
        "console": str(place.console),
        "log": str(place.log),
    }
    if as_json:
        emit(facts)
        return
    age = f"{facts.pop('since')} ({format_age(facts.pop('age'))} ago)"
    facts["spec"] = {key: format_size(value) if key in ("memory", "disk") and value else value for key, value in facts["spec"].items()}
    # A screen full of words, for which there is `argv`.
    del facts["argv"]
    for key, value in described({"name": facts.pop("name"), "state": facts.pop("state"), "since": age, **facts}):
        click.echo(f"{key:16} {one_line(value)}")


@click.command(
    epilog=examples(
        "vmbottle machine snapshots web",
        "vmbottle machine snapshots web --json | jq -r '.[].label'",
        "vmbottle machine snapshots web --rm old",
    )
)
@name_argument
@click.option("--rm", "gone", metavar="LABEL", multiple=True, help="Remove this snapshot.")
@json_option
def snapshots(*, name: str, gone: tuple[str, ...], as_json: bool) -> None:
    """List the snapshots of a machine, oldest first, or remove some.

    A machine starts from NAME@LABEL: `vmbottle machine start web@LABEL`.
    """
    place = find_machine(name)
    for label in gone:
        place.forget(label)
        say(f"removed the snapshot {label} of {name}")
    found = () if gone else place.snapshots()
    if as_json:
        emit([{"label": saved.label, "created": saved.created, "size": saved.size} for saved in found])
    elif found:
        ages = (f"{format_age(time.time() - saved.created)} ago" for saved in found)
        show_table(("LABEL", "MADE", "SIZE"), [(saved.label, age, format_size(saved.size)) for saved, age in zip(found, ages, strict=True)])
    elif not gone:
        say(f"The machine {name} has no snapshots: make one with `vmbottle machine snapshot {name} LABEL`.")


@click.command(epilog=examples("vmbottle machine argv web", "vmbottle machine argv web --json | jq -r .[0]"))
@name_argument
@json_option
def argv(*, name: str, as_json: bool) -> None:
    """Show the command line of the hypervisor that runs a machine."""
    record = find_machine(name).record()
    if not record.argv:
        raise Failure(f"the hypervisor of {name!r} is unknown; the machine is {record.state}: {record.reason or 'it has not begun'}")
    if as_json:
        emit(list(record.argv))
    else:
        click.echo(shlex.join(record.argv))


@click.command(
    epilog=examples(
        "vmbottle machine console web",
        "vmbottle machine console web -f",
        "vmbottle machine console web -n 20 --json | jq -r '.lines[]'",
    )
)
@name_argument
@click.option("-f", "--follow", is_flag=True, help="Show new output as it comes, until the machine ends or Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(0), help="Show only this many of the last lines.")
@json_option
def console(*, name: str, follow: bool, lines: int | None, as_json: bool) -> None:
    """Show a machine's serial console, even if the machine has ended.

    Control characters are made visible. With --follow, --json writes an object for each line.
    """
    from pytest_vmbottle.backends.console import Console

    place = find_machine(name)
    if place.record().state == "starting":
        raise Failure(f"the machine {name!r} is still starting, so it has no console yet")
    if not place.console.exists():
        raise Failure(f"the console of {name!r} is gone: {place.record().reason or 'it was never recorded'}")
    # It ends with the daemon and not with QEMU, whose last output may still be on its way to the file.
    seen = Console(place.console, ended=lambda: not place.is_held)
    if follow:
        for line in _new_lines(seen, lines):
            click.echo(json.dumps({"line": line}) if as_json else line)
        return
    text = seen.text if lines is None else seen.tail(lines) if lines else ""
    if as_json:
        emit({"name": name, "lines": text.splitlines()})
    else:
        click.echo(text, nl=lines is not None)


def _new_lines(seen: Console, lines: int | None) -> Iterator[str]:
    # Counted now: lines that come meanwhile are new, and shown.
    skip = 0 if lines is None else max(0, len(seen.text.splitlines()) - lines)
    for number, line in enumerate(seen.follow()):
        if number >= skip:
            yield line


@click.command(epilog=examples("vmbottle machine metrics web", "vmbottle machine metrics web --json | jq .guest_load"))
@name_argument
@click.option(
    "--seconds",
    type=click.FloatRange(0.05, 3600),
    default=0.5,
    show_default=True,
    help="Seconds over which the use of processors is measured.",
)
@json_option
def metrics(*, name: str, seconds: float, as_json: bool) -> None:
    """Show the use of this computer by a machine and, as `guest_`, its guest's own figures.

    Processor time is in percent of one processor, memory and counts are in bytes. Counts run since the machine was started, or since its
    guest booted.
    """
    figures: dict[str, Any] = ask(name, "metrics", seconds=seconds)
    if as_json:
        emit(figures)
        return
    for figure, value in figures.items():
        if figure.endswith("_bytes") and value is not None:
            value = format_size(int(value))  # noqa: PLW2901 - the same for people
        click.echo(f"{figure:30} {'-' if value is None else f'{value:.1f}' if isinstance(value, float) else value}")
