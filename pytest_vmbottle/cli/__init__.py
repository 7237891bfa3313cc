"""The command `vmbottle`: checks of this host, images, packs and machines.

Data goes to stdout and messages to stderr. The exit status is 0 for done, 1 for failed, 2 for a wrong call, 3 for what this host cannot do.

The modules of the commands are imported when one of theirs is called: nothing that takes time may be imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pytest_vmbottle.cli.groups import Group, Section

__all__ = ["main"]

_SECTIONS = (
    Section(
        "This computer",
        "upkeep",
        {
            "doctor": "Test what this computer can do, and show remedies for the rest.",
            "gc": "End and remove the machines, folders and unfinished builds of dead processes.",
        },
    ),
    Section("A project", "beginning", {"init": "Write a first test with a machine, its settings, and a workflow for GitHub."}),
    Section("Other computers", "hosts", {"hosts": "Show what other hosts can do, on which pytest would run tests."}),
    Section("Sources of machines", "images", {"image": "Base images, from which machines start."}),
    Section("Sources of machines", "packs", {"pack": "Packs: prepared machines, of which tests get clones."}),
    Section("Machines", "machines", {"machine": "Machines without pytest, for trying things out by hand."}),
    Section("Machines", "serve", {"serve": "Serve the machines of this catalog over HTTP."}),
    Section(
        "Runs of pytest",
        "suite",
        {"warm": "Build or pull the packs that tests need, before they run.", "ci": "Test suites on several runners of a CI."},
    ),
    Section("Runs of pytest", "upkeep", {"report": "Tell what failed in a run, and what its machines did just before."}),
    Section(
        "Failed tests",
        "capsules",
        {
            "capsule": "Machines of failed tests, as they were at the failure.",
            "replay": "Start the machines of a capsule, as they were when their test failed.",
        },
    ),
    Section("Failed tests", "bisect", {"bisect": "Find the layer, the package upgrade or the command after which COMMAND fails."}),
    Section("This command", "completion", {"completion": "Write the script that completes words of this command in a shell."}),
)


class _Commands(Group):
    """Group whose commands report errors in a sentence and clean up when they are stopped."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command and report its errors."""
        from pytest_vmbottle.cli.command import reporting

        with reporting(ctx):
            return super().invoke(ctx)


def _show_versions(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:  # noqa: FBT001 - as click calls it
    if wanted and not ctx.resilient_parsing:
        from pytest_vmbottle.cli.command import one_line
        from pytest_vmbottle.cli.versions import versions

        for line in versions(ctx.find_root().info_name or "vmbottle"):
            click.echo(one_line(line))
        ctx.exit()


@click.group(
    cls=_Commands,
    later=_SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExamples:\n  vmbottle init\n  vmbottle doctor --fix\n  vmbottle image build debian-12\n  vmbottle machine start debian-12\n"
    "  vmbottle help machine start\n  vmbottle pack prune --older-than 7d",
)
@click.option(
    "--catalog",
    metavar="DIR",
    envvar="VMBOTTLE_CATALOG",
    type=click.Path(path_type=Path),
    help="Folder of images and packs, shared by all workers and runs (default: pytest-vmbottle in the user's cache folder); also "
    "VMBOTTLE_CATALOG.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_versions,
    help="Show the versions of the plugin, of Python, pytest and QEMU, and the system.",
)
def main(**_: Path | None) -> None:
    """Real machines for pytest: checks of this computer, base images, packs, and machines without pytest.

    Images and packs are in a folder that all test runs share, the catalog. pytest fills it by itself when tests need it; these commands
    prepare it, show it and clean it up.

    The exit status is 0 for done, 1 for failed, 2 for a wrong call, 3 for what this computer cannot do.
    """
    # The catalog is read by `catalog_root`, which completion needs too, where no command is run.
