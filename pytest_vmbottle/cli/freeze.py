"""`vmbottle pack build`: packs as files, from smolvm's machines and images."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pytest_vmbottle.cli.command import Failure, catalog_root, examples, say
from pytest_vmbottle.host.sizes import format_size

if TYPE_CHECKING:
    from pytest_vmbottle.backends.smolvm import Engine

__all__ = ["build"]

_SUFFIX = ".smolmachine"


@click.command(
    epilog=examples(
        "vmbottle pack build --from-machine dev",
        "vmbottle pack build --from-machine dev --yes -o images/dev.smolmachine",
        "vmbottle pack build --image python:3.12-alpine -o python.smolmachine",
        "vmbottle pack build --image ./rootfs/ -o own.smolmachine",
    )
)
@click.option("--from-machine", "machine", metavar="NAME", help="Pack a machine of smolvm, or one of `vmbottle machine start`.")
@click.option(
    "--image", metavar="REF", help="Pack an image: a reference, an archive of `docker save`, or a folder with a root file system."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write; by default NAME.smolmachine in the current folder.",
)
@click.option("--yes", is_flag=True, help="Stop a running machine without asking.")
@click.option("--no-stop", is_flag=True, help="Do not stop a running machine: then it is not packed.")
@click.option(
    "--state-dir", type=click.Path(path_type=Path, file_okay=False), help="Folder in which smolvm keeps the machine; by default its own."
)
@click.option("--backend", type=click.Choice(["smolvm"]), default="smolvm", help="Backend of the pack.")
def build(  # noqa: PLR0913 - one for each option
    *, machine: str | None, image: str | None, output: Path | None, yes: bool, no_stop: bool, state_dir: Path | None, backend: str
) -> None:
    """Write a pack into a file that tests start from.

    A test names the file: `@pytest.mark.vm("./dev.smolmachine", backend="smolvm")`.

    Only a stopped machine can be packed. If it runs, you are asked whether to stop it; `--yes` and `--no-stop` answer in advance. The
    file's path is written to stdout.
    """
    del backend  # there is one
    if (machine is None) == (image is None) or (yes and no_stop):
        raise click.UsageError("use exactly one of --from-machine and --image, and at most one of --yes and --no-stop")
    # With --state-dir the machine is another smolvm's, and ours of the same name have nothing to do with it.
    if machine is not None and state_dir is None:
        _refuse_others(machine)
    from pytest_vmbottle.backends.smolvm import Engine, find_program

    # Before anything is made: without smolvm this ends with what to install.
    engine = Engine(find_program(), state_dir)
    final = _final(output, machine or Path(str(image)).name.partition(":")[0] or "image")
    # In the folder of the result, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".vmbottle-", dir=final.parent) as scratch:
        if image is not None:
            made = engine.pack(Path(scratch, "pack"), image=image)
        else:
            may_stop = partial(_ask_to_stop, str(machine), yes=yes, no_stop=no_stop)
            # First a machine of ours, which runs on afterwards; then one of smolvm's own.
            made = (state_dir is None and _kept_pack(str(machine), Path(scratch), may_stop)) or _frozen(
                engine, str(machine), Path(scratch), may_stop
            )
        # A rename at the end, so that a pack is there in full or not at all.
        made.replace(final)
    say(f"{format_size(final.stat().st_size)}")
    click.echo(final)


def _refuse_others(name: str) -> None:
    """Refuse a machine of `vmbottle machine start` that another hypervisor runs.

    Nothing has been done to it by then.
    """
    from pytest_vmbottle.errors import CatalogError
    from pytest_vmbottle.standalone.client import find

    with suppress(CatalogError):  # there is none: it is one of smolvm's own
        place = find(catalog_root() / "machines", name)
        backend = place.record().backend
        if place.is_held and backend not in ("", "smolvm"):
            raise Failure(f"the machine {name!r} runs on {backend}, and only machines of smolvm can be packed: write a layer instead")


def _final(output: Path | None, name: str) -> Path:
    # By the suffix the backend knows that a source is a pack.
    chosen = output or Path(name)
    final = (chosen if chosen.suffix == _SUFFIX else chosen.with_name(chosen.name + _SUFFIX)).absolute()
    if not final.parent.is_dir():
        raise Failure(f"there is no folder {final.parent}")
    return final


def _frozen(engine: Engine, name: str, scratch: Path, may_stop: Callable[[], None]) -> Path:
    """Stop a machine of smolvm's, and return its pack."""
    there = {each.name: each for each in engine.machines()}
    found = there.get(name)
    if found is None:
        names = ", ".join(sorted(there)) or "none"
        raise Failure(f"smolvm has no machine {name!r} (there: {names}); --state-dir names the folder of another smolvm")
    # Asked only if it must be stopped: one that does not run is packed without a question.
    if found.state not in ("stopped", "created"):
        may_stop()
        engine.stop(name)
        say(f"{name} was stopped; smolvm machine start --name {name} starts it again")
    return engine.pack(scratch / "pack", machine=name)


def _kept_pack(name: str, scratch: Path, may_stop: Callable[[], None]) -> Path | None:
    """Return the pack of a machine that `vmbottle machine start` runs.

    The machine goes on afterwards. None if there is no such machine.
    """
    from pytest_vmbottle.errors import CatalogError
    from pytest_vmbottle.standalone.client import find

    try:
        place = find(catalog_root() / "machines", name)
    except CatalogError:
        return None
    if not place.is_held:
        return None
    # A machine of a daemon is stopped for a moment too, to save it.
    may_stop()
    folder = Path(str(place.ask({"verb": "freeze"})))
    packed = folder / f"machine{_SUFFIX}"
    # The snapshot of another backend is no pack of smolvm's.
    if not packed.exists():
        raise Failure(f"the machine {name!r} is not a machine of smolvm: for QEMU write a layer")
    return Path(shutil.copy(packed, scratch / f"pack{_SUFFIX}"))


def _ask_to_stop(name: str, *, yes: bool, no_stop: bool) -> None:
    """Return if a running machine may be stopped, else raise."""
    if no_stop:
        raise Failure(f"the machine {name!r} runs, so it was not packed: only a stopped machine can be packed")
    if yes:
        return
    # Nobody is there to answer, as in CI.
    if not sys.stdin.isatty():
        raise Failure(f"the machine {name!r} runs, and there is no terminal to ask whether to stop it: use --yes or --no-stop")
    if not click.confirm(f"The machine {name!r} runs. Stop it, with everything that runs in it, to pack it?", err=True):
        raise Failure(f"the machine {name!r} was left running, and was not packed")
