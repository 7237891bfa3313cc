"""`vmbottle machine stop`, `rm`, `reboot`, `snapshot` and the like: the life of machines between their start and their end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from pytest_vmbottle.cli.command import Failure, examples, open_catalog, say
from pytest_vmbottle.cli.completion import snapshot_labels
from pytest_vmbottle.cli.kept import ask, find_all, find_machine, name_argument, names_argument

__all__ = ["pause", "plug_disk", "power_cut", "reboot", "remove", "restore", "resume", "snapshot", "stop", "unplug_disk"]


@click.command(epilog=examples("vmbottle machine stop web", "vmbottle machine stop --now web db"))
@names_argument
@click.option("--now", is_flag=True, help="End it at once, without a shutdown.")
def stop(*, names: tuple[str, ...], now: bool) -> None:
    """Shut machines down, and wait until they are off.

    A machine keeps its disk: `vmbottle machine start NAME` starts it again, `vmbottle machine rm NAME` removes it. A machine that is still
    on after a minute and a half is killed. A second `stop --now` ends the wait.
    """
    _end(names, now=now)


@click.command("power-cut", epilog=examples("vmbottle machine power-cut web; vmbottle machine start web"))
@names_argument
def power_cut(*, names: tuple[str, ...]) -> None:
    """Cut the power of machines: their guests lose what they had not yet written to their disks."""
    _end(names, now=True)


def _end(names: Sequence[str], *, now: bool) -> None:
    for place in find_all(names):
        say(f"{place.name}: {place.stop(now=now).reason or 'it is not running'}")


@click.command("rm", epilog=examples("vmbottle machine rm web", "vmbottle machine rm --force web db"))
@names_argument
@click.option("-f", "--force", is_flag=True, help="Also end and remove running machines, without a shutdown.")
def remove(*, names: tuple[str, ...], force: bool) -> None:
    """Remove stopped machines, with their disks and snapshots."""
    places = find_all(names)
    for place in places:
        # Checked for all before the first is removed.
        if place.is_held and not force:
            raise Failure(f"the machine {place.name!r} runs: stop it with `vmbottle machine stop {place.name}`, or remove it with --force")
    for place in places:
        place.stop(now=True)
        # Between the end and the removal somebody may have started another machine of this name.
        if not place.discard():
            raise Failure(f"the machine {place.name!r} was just started again: nothing of it was removed")
        click.echo(place.name)
    open_catalog().gc()


def _ask_each(names: Sequence[str], verb: str) -> None:
    # All names are looked up first: with a misspelt one nothing is done.
    for place in find_all(names):
        ask(place.name, verb)


@click.command(epilog=examples("vmbottle machine reboot web"))
@names_argument
def reboot(*, names: tuple[str, ...]) -> None:
    """Reboot machines, and wait until they are ready again."""
    _ask_each(names, "reboot")


@click.command(epilog=examples("vmbottle machine pause web"))
@names_argument
def pause(*, names: tuple[str, ...]) -> None:
    """Stop the processors of machines; their clocks stand still until `resume`."""
    _ask_each(names, "pause")


@click.command(epilog=examples("vmbottle machine resume web"))
@names_argument
def resume(*, names: tuple[str, ...]) -> None:
    """Let paused machines go on."""
    _ask_each(names, "resume")


@click.command("plug-disk", epilog=examples("vmbottle machine plug-disk web spare 1G", "vmbottle machine plug-disk web data ./data.qcow2"))
@name_argument
@click.argument("disk")
@click.argument("source", metavar="SIZE|PATH")
def plug_disk(*, name: str, disk: str, source: str) -> None:
    """Plug one more disk into a running machine, as /dev/disk/by-id/virtio-DISK.

    It is empty and of this size, or a disk image, which is not written to. The machine keeps it until it is pulled out.
    """
    ask(name, "plug-disk", disk=disk, source=str(Path(source).absolute()) if "/" in source else source)


@click.command("unplug-disk", epilog=examples("vmbottle machine unplug-disk web spare"))
@name_argument
@click.argument("disk")
def unplug_disk(*, name: str, disk: str) -> None:
    """Pull a disk out of a running machine, with everything on it, as if by its cable."""
    ask(name, "unplug-disk", disk=disk)


def _label(_: click.Context, __: click.Parameter, value: str) -> str:
    from pytest_vmbottle.standalone.client import LABEL

    if not LABEL.fullmatch(value):
        raise click.BadParameter(f"{value!r}: takes letters, digits, dashes, dots and underscores, the first of them a letter or a digit")
    return value


@click.command(
    epilog=examples("vmbottle machine snapshot web clean", "vmbottle machine snapshot web clean; vmbottle machine start web@clean")
)
@name_argument
@click.argument("label", callback=_label)
def snapshot(*, name: str, label: str) -> None:
    """Save a running machine, with its RAM, under a LABEL.

    The snapshot lasts until the machine is removed. `restore` sets the machine back to it, and `start NAME@LABEL` makes another machine
    from it.
    """
    ask(name, "snapshot", label=label)


@click.command(epilog=examples("vmbottle machine restore web clean"))
@name_argument
@click.argument("label", callback=_label, shell_complete=snapshot_labels)
def restore(*, name: str, label: str) -> None:
    """Set a machine back to one of its snapshots; a stopped one is started from it.

    The machine's later data is lost.
    """
    place = find_machine(name)
    if place.is_held:
        ask(name, "restore", label=label)
    else:
        place.start_again(say, label=label)
