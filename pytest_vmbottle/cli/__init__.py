"""The `vmbottle` command: what this host can do, images, packs, and machines.

Data goes to stdout and words to stderr. The exit status is 0 for done, 1 for failed, 2 for called wrongly, 3 for what this host cannot do.
"""

from __future__ import annotations

from pathlib import Path

import click

from pytest_vmbottle.cli import freeze, images, machines, packs
from pytest_vmbottle.cli.command import CANNOT, Commands, Failure, catalog_root, emit, examples, json_option, one_line, open_catalog, say

__all__ = ["main"]


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("vmbottle doctor", "vmbottle image build debian-12", "vmbottle pack ls", "vmbottle pack prune --older-than 7d"),
)
@click.option(
    "--catalog",
    metavar="DIR",
    envvar="VMBOTTLE_CATALOG",
    type=click.Path(path_type=Path),
    help="Folder of images and packs; also VMBOTTLE_CATALOG. By default pytest-vmbottle in your cache folder.",
)
@click.version_option(package_name="pytest-vmbottle")
@click.pass_context
def main(ctx: click.Context, catalog: Path | None) -> None:
    """Real machines for pytest: what this computer can do, base images, packs, and machines without pytest.

    Images and packs lie in a folder that all test runs share, the catalog. pytest fills it by itself when tests need it; these commands
    prepare it, show it and tidy it up.

    The exit status is 0 for done, 1 for failed, 2 for called wrongly, 3 for what this computer cannot do.
    """
    ctx.obj = catalog


@main.command(
    epilog=examples("vmbottle doctor", "vmbottle doctor --accel kvm", "vmbottle doctor --json | jq '.[] | select(.state != \"ok\")'")
)
@click.option(
    "--accel",
    type=click.Choice(["auto", "kvm", "hvf", "tcg"]),
    default="auto",
    envvar="VMBOTTLE_ACCEL",
    show_default=True,
    help="What machines are to be run with.",
)
@json_option
def doctor(*, accel: str, as_json: bool) -> None:
    """Try out what this computer can do, and what mends the rest.

    Nothing is believed that was not tried: an accelerator has to run a guest, and a machine's RAM has to be restored. What was proved is
    remembered until the next boot or another QEMU.

    Each line has a state (ok, degraded, missing or unknown), a topic and a sentence; a command that mends it stands below. The exit status
    is 0 if machines can be run, else 3.
    """
    import attrs

    from pytest_vmbottle.doctor import can_run, examine

    findings = examine(catalog_root(), accel=accel)
    if as_json:
        emit([attrs.asdict(finding) for finding in findings])
    else:
        colours = {"ok": "green", "degraded": "yellow", "missing": "red", "unknown": "magenta"}
        for finding in findings:
            state = click.style(f"{finding.state:8}", fg=colours[finding.state])
            click.echo(f"{state}  {finding.topic:15}  {one_line(finding.text)}")
            if finding.remedy:
                click.echo(f"{'':10}{'':15}  {one_line(finding.remedy)}")
    if not can_run(findings):
        say("No machine can be run here.")
        click.get_current_context().exit(CANNOT)


@main.command(epilog=examples("vmbottle gc --dry-run", "vmbottle gc", "vmbottle gc --json | jq '.[].processes[]'"))
@click.option("--dry-run", is_flag=True, help="Only tell what would be done.")
@json_option
def gc(*, dry_run: bool, as_json: bool) -> None:
    """End and remove what processes left that are dead: machines, their folders, and what was being built.

    That happens by itself: when the process ends, at the latest when the next test run begins. What a living process has is not touched,
    and a process is only killed if it is proven to be such a machine's. Whatever is not, is kept and told; then the exit status is 1.

    One line for each machine goes to stdout: the number of the process that had it, and its name.
    """
    catalog = open_catalog(make=False)
    reaped = catalog.gc(dry_run=dry_run)
    if not dry_run:
        images.sweep(catalog)
    if as_json:
        emit([each._asdict() for each in reaped])
    else:
        for owner, name in ((each.owner.partition("-")[0], name) for each in reaped for name in each.machines):
            click.echo(f"{owner}  {one_line(name)}")
    kept = [sentence for each in reaped for sentence in each.kept]
    for sentence in (*kept, *(sentence for each in reaped for sentence in each.damaged)):
        say(sentence)
    strays = catalog.strays()
    for process in strays:
        say(f"process {process.pid} is a machine's of which no record is left: end it if nobody needs it: kill {process.pid}")
    if not dry_run and (kept or strays):
        raise Failure("not all could be ended and removed")


main.add_command(images.image)
packs.pack.add_command(freeze.build)
main.add_command(packs.pack)
main.add_command(machines.machine)
