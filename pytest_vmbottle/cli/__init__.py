"""The command `vmbottle`: checks of this host, images, packs and machines.

Data goes to stdout and messages to stderr. The exit status is 0 for done, 1 for failed, 2 for a wrong call, 3 for what this host cannot do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from pytest_vmbottle.cli import freeze, images, machines, packs
from pytest_vmbottle.cli.command import (
    CANNOT,
    Commands,
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
from pytest_vmbottle.settings import SETTINGS, Settings

__all__ = ["main"]

# The one setting that is an option of the command itself: it holds for all subcommands.
_CATALOG = next(setting for setting in SETTINGS if setting.name == "catalog")


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("vmbottle doctor", "vmbottle image build debian-12", "vmbottle pack ls", "vmbottle pack prune --older-than 7d"),
)
@click.option(
    f"--{_CATALOG.name}",
    metavar=_CATALOG.takes,
    envvar=_CATALOG.env,
    type=click.Path(path_type=Path),
    help=f"{_CATALOG.sentence}; also {_CATALOG.env}.",
)
@click.version_option(package_name="pytest-vmbottle")
@click.pass_context
def main(ctx: click.Context, catalog: Path | None) -> None:
    """Real machines for pytest: checks of this computer, base images, packs, and machines without pytest.

    Images and packs are in a folder that all test runs share, the catalog. pytest fills it by itself when tests need it; these commands
    prepare it, show it and clean it up.

    The exit status is 0 for done, 1 for failed, 2 for a wrong call, 3 for what this computer cannot do.
    """
    ctx.obj = catalog


@main.command(
    epilog=examples("vmbottle doctor", "vmbottle doctor --accel kvm", "vmbottle doctor --json | jq '.[] | select(.state != \"ok\")'")
)
@setting_options("backend", "accel", "pack", "run-as", "memory-budget")
@json_option
def doctor(*, settings: Mapping[str, str], as_json: bool) -> None:
    """Test what this computer can do, and show remedies for the rest.

    Everything is tried: an accelerator has to run a guest, and a machine's RAM has to be restored. Results are remembered until the next
    boot or another QEMU.

    Each line has a state (ok, degraded, missing or unknown), a topic and a sentence; a command that fixes it follows. The exit status is 0
    if machines can be run, else 3.
    """
    import attrs

    # Imported here, as in all commands: `--help` and wrong calls load nothing that machines need.
    from pytest_vmbottle.doctor import can_run, examine

    findings = examine(catalog_root(), Settings.read(lambda setting: settings.get(setting.name)))
    if as_json:
        emit([attrs.asdict(finding, filter=lambda field, _: field.name != "needed") for finding in findings])
    else:
        colours = {"ok": "green", "degraded": "yellow", "missing": "red", "unknown": "magenta"}
        for finding in findings:
            state = click.style(f"{finding.state:8}", fg=colours[finding.state])
            click.echo(f"{state}  {finding.topic:15}  {one_line(finding.text)}")
            if finding.remedy:
                click.echo(f"{'':10}{'':15}  {one_line(finding.remedy)}")
    if not can_run(findings):
        say("No machine can be run here.")
        # After the output: a script that asks for JSON gets it in any case.
        click.get_current_context().exit(CANNOT)


@main.command(epilog=examples("vmbottle report vmbottle-artifacts", "vmbottle report vmbottle-artifacts --json | jq '.[].error'"))
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


@main.command(epilog=examples("vmbottle gc --dry-run", "vmbottle gc", "vmbottle gc --json | jq '.[].processes[]'"))
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@json_option
def gc(*, dry_run: bool, as_json: bool) -> None:
    """End and remove the machines, folders and unfinished builds of dead processes.

    This also happens by itself: when the process ends, or at the latest when the next test run begins. Nothing of a living process is
    touched, and a process is killed only if it is proven to belong to such a machine. Without that proof it is kept and reported; then the
    exit status is 1.

    One line for each machine goes to stdout: the id of the process that had it, and its name.
    """
    # Where there is no catalog there is nothing to remove, and none is made.
    catalog = open_catalog(make=False)
    # The same that each run does at its start.
    reaped = catalog.gc(dry_run=dry_run)
    if not dry_run:
        images.sweep(catalog)
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


main.add_command(images.image)
packs.pack.add_command(freeze.build)
main.add_command(packs.pack)
main.add_command(machines.machine)
