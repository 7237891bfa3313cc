"""`vmbottle doctor`, `gc` and `report`: checks of this computer, what dead processes left, and what failed in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pytest_vmbottle.cli.command import (
    CANNOT,
    Failure,
    catalog_root,
    emit,
    examples,
    json_option,
    one_line,
    open_catalog,
    say,
    setting_options,
)

if TYPE_CHECKING:
    from pytest_vmbottle.doctor import Finding

__all__ = ["doctor", "gc", "report"]


@click.command(
    epilog=examples(
        "vmbottle doctor",
        "vmbottle doctor --fix",
        "vmbottle doctor --accel kvm",
        "vmbottle doctor --json | jq '.[] | select(.state != \"ok\")'",
    )
)
@setting_options("backend", "accel", "pack", "run-as", "memory-budget")
@click.option("--fix", is_flag=True, help="Offer to run each command that it recommends, and look again afterwards.")
@click.option("-y", "--yes", is_flag=True, help="With --fix: run all of them without asking.")
@json_option
def doctor(*, settings: Mapping[str, str], fix: bool, yes: bool, as_json: bool) -> None:
    """Test what this computer can do, and show remedies for the rest.

    Everything is tried: an accelerator has to run a guest, and a machine's RAM has to be restored. Results are remembered until the next
    boot or another QEMU.

    Each line has a state (ok, degraded, missing or unknown), a topic and a sentence; a command that fixes it follows. The exit status is 0
    if machines can be run, else 3.

    --fix shows each of these commands and asks whether to run it. What takes a new login, or a shell of your own, is left to you.
    """
    import attrs

    # Imported here, as in all commands: `--help` and wrong calls load nothing that machines need.
    from pytest_vmbottle.cli.fixing import check_call, mend
    from pytest_vmbottle.doctor import can_run, examine
    from pytest_vmbottle.settings import Settings

    check_call(fix=fix, yes=yes, as_json=as_json)
    look = partial(examine, catalog_root(), Settings.read(lambda setting: settings.get(setting.name)))
    findings = look()
    if as_json:
        emit([attrs.asdict(finding, filter=lambda field, _: field.name != "needed") for finding in findings])
    else:
        _show(findings)
    if fix and mend(findings, ask=not yes):
        findings = look()
        say("")
        _show(findings)
    if not can_run(findings):
        say("No machine can be run here.")
        # After the output: a script that asks for JSON gets it in any case.
        click.get_current_context().exit(CANNOT)


def _show(findings: Sequence[Finding]) -> None:
    colours = {"ok": "green", "degraded": "yellow", "missing": "red", "unknown": "magenta"}
    for finding in findings:
        state = click.style(f"{finding.state:8}", fg=colours[finding.state])
        click.echo(f"{state}  {finding.topic:15}  {one_line(finding.text)}")
        if finding.remedy:
            click.echo(f"{'':10}{'':15}  {one_line(finding.remedy)}")


@click.command(epilog=examples("vmbottle report vmbottle-artifacts", "vmbottle report vmbottle-artifacts --json | jq '.[].error'"))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--events", metavar="NUMBER", type=click.IntRange(0, 10_000), default=10, show_default=True, help="Events before each failure."
)
@json_option
def report(*, folder: Path, events: int, as_json: bool) -> None:
    """Tell what failed in a run, and what its machines did just before.

    DIR is the folder that pytest wrote (`--vm-output`), or a copy of it, such as a CI artifact. Each failed test is listed with its error,
    the last events of its machines and the files about them. `DIR/index.html` shows the same and all other events, in a browser.
    """
    from pytest_vmbottle.report.run import read_run
    from pytest_vmbottle.report.words import as_json as values
    from pytest_vmbottle.report.words import describe

    tests = read_run(folder)
    if as_json:
        emit(values(tests, before=events))
    else:
        click.echo(describe(tests, before=events))


@click.command(epilog=examples("vmbottle gc --dry-run", "vmbottle gc", "vmbottle gc --json | jq '.[].processes[]'"))
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@json_option
def gc(*, dry_run: bool, as_json: bool) -> None:
    """End and remove the machines, folders and unfinished builds of dead processes.

    This also happens by itself: when the process ends, or at the latest when the next test run begins. Nothing of a living process is
    touched, and a process is killed only if it is proven to belong to such a machine. Without that proof it is kept and reported; then the
    exit status is 1.

    One line for each machine goes to stdout: the id of the process that had it, and its name.
    """
    from pytest_vmbottle.images import ImageStore

    # Where there is no catalog there is nothing to remove, and none is made.
    catalog = open_catalog(make=False)
    # The same that each run does at its start.
    reaped = catalog.gc(dry_run=dry_run)
    if not dry_run:
        # Images without a name that nobody holds: they were replaced or removed while somebody used them.
        ImageStore(catalog.images).sweep()
    if as_json:
        emit([each._asdict() for each in reaped])
    else:
        for owner, name in ((each.owner.partition("-")[0], name) for each in reaped for name in each.machines):
            click.echo(f"{owner}  {one_line(name)}")
    kept = [sentence for each in reaped for sentence in each.kept]
    # stderr, because the lines on stdout are for programs.
    for sentence in (*kept, *(sentence for each in reaped for sentence in each.damaged)):
        say(sentence)
    strays = catalog.strays()
    for process in strays:
        say(f"process {process.pid} belongs to a machine without a record: if nobody needs it, run: kill {process.pid}")
    # A dry run leaves the exit status alone: it only tells.
    if not dry_run and (kept or strays):
        raise Failure("some processes or files could not be removed")
