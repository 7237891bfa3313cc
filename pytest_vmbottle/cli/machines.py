"""`vmbottle machine`: machines without pytest, which run until they are stopped."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytest_vmbottle.cli.command import (
    Failure,
    absolute,
    catalog_root,
    emit,
    examples,
    format_age,
    json_option,
    open_catalog,
    say,
    setting_options,
    show_table,
)
from pytest_vmbottle.errors import MachineError, SpecError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.result import CommandTimeout

if TYPE_CHECKING:
    from pytest_vmbottle.standalone.client import Kept, Record

__all__ = ["machine"]

# As of a spec's `name`, but a folder is named by it, so nothing else than these characters may be in it.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,40}")
# A letter first, so that paths such as `./a:b` and `/a:b` are files of this computer. With DOTALL, because a file's name may have a
# newline.
_GUEST_SIDE = re.compile(r"([A-Za-z][A-Za-z0-9_-]{0,40}):(.*)", re.DOTALL)
_TIMED_OUT = 124
"""Exit status of a command that was killed at its --timeout, as that of timeout(1)."""
# Seconds for a login: without KVM the guest's part of the key exchange takes several.
_LOGIN = 60.0
_ENDING = 150.0
"""Seconds for a machine's daemon to end when it is asked to; the guest's shutdown has a shorter limit."""


@click.group(
    epilog=examples(
        "vmbottle machine start debian-12 --name web --port 80",
        "vmbottle machine exec web -- systemctl status",
        "vmbottle machine cp site/ web:/var/www/html",
        "vmbottle machine shell web",
        "vmbottle machine stop web",
    )
)
def machine() -> None:
    """Machines without pytest, for trying things out by hand.

    They are cloned from the same packs as those of tests, so most start at once. A machine runs until it is stopped, even if the terminal
    is closed; all commands of the same user and catalog see it. Its data is lost when it ends.
    """


# -- its beginning and its end ---------------------------------------------------------------------------------------------------------


def _pairs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not of the form NAME=VALUE")
    # Only the first sign divides: values may have others.
    return dict(value.split("=", 1) for value in values)


_env_option = click.option("-e", "--env", metavar="NAME=VALUE", multiple=True, callback=_pairs, help="A variable of the environment.")


@machine.command(
    epilog=examples(
        "vmbottle machine start debian-12",
        "vmbottle machine start debian-12 --name db --memory 2G --cpus 2 --port 5432",
        "vmbottle machine start fedora-44 --network --package nginx",
        "vmbottle machine start ./disk.qcow2 --json | jq -r .name",
    )
)
@click.argument("source")
@click.option("--name", help="Name of the machine; by default that of its source.")
@click.option("--cpus", type=int, help="Virtual processors; 1 by default.")
@click.option("--cpu", metavar="MODEL", help="Model of the processors, with features, as QEMU names them; by default the best one here.")
@click.option("--nested", is_flag=True, help="Let it run virtual machines itself, by KVM.")
@click.option("--memory", metavar="SIZE", help="RAM, such as 512M or 2G; 1G by default.")
@click.option("--disk", metavar="SIZE", help="Size of its disk; by default the image's own.")
@click.option("--network", is_flag=True, help="Let it reach the network; by default it reaches nothing.")
@click.option("-p", "--port", "ports", type=int, multiple=True, metavar="PORT", help="TCP port of it to forward from this computer.")
@click.option(
    "--package", "packages", multiple=True, metavar="PKG", help="Package to install in it; saved in a pack, so it is installed once."
)
@click.option("--user", help="User that runs commands in it; root by default.")
@_env_option
@click.option("--arch", type=click.Choice(["x86_64", "aarch64"]), help="Its architecture; by default this computer's.")
@click.option("--boot", is_flag=True, help="Boot it instead of restoring it from a pack.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Seconds in which it must become ready; 120 by default, more if emulated.")
@setting_options()
@json_option
def start(*, source: str, name: str | None, as_json: bool, settings: Mapping[str, str], boot: bool, **given: Any) -> None:
    """Start a machine from SOURCE: the name of an image, or the path of a disk image.

    Images are made as tests make them: a missing one is built if there is a recipe for it. Images that the project around the current
    folder declares can be named too. When the command returns, the machine is ready for the other commands. Ctrl-C before that removes
    it.

    The machine's name is written to stdout.
    """
    # What was not given is left out, so that layers and defaults of a spec hold.
    keywords = {key: value for key, value in given.items() if value is not False and value not in (None, (), {})}
    keywords |= {"fresh": "boot"} if boot else {}
    keywords |= {"backend": settings["backend"]} if "backend" in settings else {}
    _check(source, name, keywords)
    from pytest_vmbottle.standalone.client import Kept

    # After the checks: a wrong call makes no folder.
    catalog = open_catalog()
    place = Kept(catalog.machines / (name or _free_name(catalog.machines, source)))
    order = {
        "catalog": str(catalog.root),
        # Here images are looked for that a project declares.
        "folder": str(Path.cwd()),
        "settings": settings,
        # The daemon works in another folder, so a relative path is made absolute here.
        "keywords": keywords | {"source": absolute(source), "name": place.name},
    }
    record = place.start(order, say)
    if as_json:
        emit(_as_record(record))
        return
    # The name alone is on stdout, for `name=$(vmbottle machine start ...)`.
    click.echo(record.name)
    for port, here in record.ports.items():
        say(f"127.0.0.1:{here} leads to port {port} of {record.name}")


def _check(source: str, name: str | None, keywords: Mapping[str, Any]) -> None:
    """Refuse an invalid spec early, as a usage error."""
    from pytest_vmbottle.spec import MachineSpec

    if name is not None and not _NAME.fullmatch(name):
        raise click.BadParameter(f"{name!r}: takes a letter, then letters, digits, - or _, at most 41 in all", param_hint="--name")
    # smolvm takes references to images of registries, which have slashes too.
    if "/" in source and keywords.get("backend") != "smolvm" and not Path(source).exists():
        raise click.BadParameter(f"there is no file {source}", param_hint="SOURCE")
    try:
        # Made for its errors, in this process, which can tell which option was wrong.
        MachineSpec(source=source, **{**keywords, "name": name or "vm"})
    except SpecError as error:
        keyword, assigned, _ = str(error).partition("=")
        option = {"ports": "port", "packages": "package"}.get(keyword, keyword)
        raise click.BadParameter(str(error), param_hint=f"--{option}" if assigned else "SOURCE") from None


def _free_name(machines: Path, source: str) -> str:
    """Return the first free name of web, web-2, web-3 and so on."""
    from pytest_vmbottle.standalone.client import Kept

    # 30 of 41 characters: the rest is for a number.
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", Path(source).name.partition(".qcow2")[0])[:30].strip("-")
    stem = stem if _NAME.fullmatch(stem) else f"vm-{stem}".strip("-")
    number = 1
    # A name is free if no daemon holds it: what a dead machine left behind is replaced. Of two starts at once, `claim` refuses the second.
    while Kept(machines / (name := stem if number == 1 else f"{stem}-{number}")).is_held:
        number += 1
    return name


def _names(command: Callable[..., None]) -> Callable[..., None]:
    return click.argument("names", metavar="NAME...", nargs=-1, required=True)(command)


def _name(command: Callable[..., None]) -> Callable[..., None]:
    return click.argument("name")(command)


def _find(name: str) -> Kept:
    from pytest_vmbottle.standalone.client import find

    return find(catalog_root() / "machines", name)


@machine.command(epilog=examples("vmbottle machine stop web", "vmbottle machine stop --now web db"))
@_names
@click.option("--now", is_flag=True, help="End it at once, without a shutdown.")
def stop(*, names: tuple[str, ...], now: bool) -> None:
    """Shut machines down, and wait until they are off.

    A machine that is still on after a minute and a half is killed. A second `stop --now` ends the wait. A machine's console output can
    still be read, until the machine is removed or another one takes its name.
    """
    for place in [_find(name) for name in dict.fromkeys(names)]:
        _end(place, now=now)
        say(f"{place.name}: {place.record().reason or 'it is not running'}")


def _end(place: Kept, *, now: bool) -> None:
    if not place.is_held:
        return
    try:
        place.ask({"verb": "stop", "now": now})
    except MachineError:
        # A daemon that is starting takes no requests yet, but ends with the command that started it.
        if place.record().state == "starting":
            raise Failure(f"the machine {place.name!r} is still starting: interrupt the command that starts it, or try again") from None
    # The daemon's own limit for a shutdown is shorter, so one that is still there hangs.
    if not place.wait(Deadline(_ENDING)):
        place.kill()
        place.wait(Deadline(_ENDING))


@machine.command("rm", epilog=examples("vmbottle machine rm web", "vmbottle machine rm --force web db"))
@_names
@click.option("-f", "--force", is_flag=True, help="Also end and remove running machines, without a shutdown.")
def remove(*, names: tuple[str, ...], force: bool) -> None:
    """Remove stopped machines: their records and console output."""
    # All names are looked up first: a misspelt one removes nothing.
    places = [_find(name) for name in dict.fromkeys(names)]
    for place in places:
        # Checked for all before the first is removed.
        if place.is_held and not force:
            raise Failure(f"the machine {place.name!r} runs: stop it with `vmbottle machine stop {place.name}`, or remove it with --force")
    for place in places:
        _end(place, now=True)
        # Between the end and the removal somebody may have started another machine of this name.
        if not place.discard():
            raise Failure(f"the machine {place.name!r} was just started again: nothing of it was removed")
        click.echo(place.name)
    open_catalog().gc()


# -- what there is ---------------------------------------------------------------------------------------------------------------------


@machine.command("ls", epilog=examples("vmbottle machine ls", "vmbottle machine ls --json | jq -r '.[] | select(.pid).name'"))
@json_option
def list_machines(*, as_json: bool) -> None:
    """List the machines, with the end of those that no longer run."""
    from pytest_vmbottle.standalone.client import all_kept

    records = []
    for place in all_kept(catalog_root() / "machines"):
        try:
            records.append(place.record())
        except FileNotFoundError:  # it was just removed
            continue
    if as_json:
        emit([_as_record(record) for record in records])
    elif records:
        show_table(("NAME", "STATE", "SOURCE", "CPUS", "MEMORY", "PORTS", "PID", "SINCE", "REASON"), map(_row, records))
    else:
        say("There are no machines: start one with `vmbottle machine start debian-12`.")


def _as_record(record: Record) -> dict[str, Any]:
    import attrs

    facts = attrs.asdict(record)
    facts["since"] = datetime.fromtimestamp(record.since, UTC).isoformat(timespec="seconds")
    facts["keeper"] = record.keeper.pid if record.keeper is not None else None
    facts["ports"] = {port: f"127.0.0.1:{here}" for port, here in record.ports.items()}
    return facts


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


@machine.command(epilog=examples("vmbottle machine argv web", "vmbottle machine argv web --json | jq -r .[0]"))
@_name
@json_option
def argv(*, name: str, as_json: bool) -> None:
    """Show the command line of the hypervisor that runs a machine."""
    record = _find(name).record()
    if not record.argv:
        raise Failure(f"the hypervisor of {name!r} is unknown; the machine is {record.state}: {record.reason or 'it has not begun'}")
    if as_json:
        emit(list(record.argv))
    else:
        click.echo(shlex.join(record.argv))


@machine.command(epilog=examples("vmbottle machine console web", "vmbottle machine console web -f", "vmbottle machine console web -n 20"))
@_name
@click.option("-f", "--follow", is_flag=True, help="Show new output as it comes, until the machine ends or Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(0), help="Show only this many of the last lines.")
def console(*, name: str, follow: bool, lines: int | None) -> None:
    """Show a machine's serial console, even if the machine has ended. Control characters are made visible."""
    from pytest_vmbottle.backends.console import Console

    place = _find(name)
    if place.record().state == "starting":
        raise Failure(f"the machine {name!r} is still starting, so it has no console yet")
    if not place.console.exists():
        raise Failure(f"the console of {name!r} is gone: {place.record().reason or 'it was never recorded'}")
    # It ends with the daemon and not with QEMU, whose last output may still be on its way to the file.
    seen = Console(place.console, ended=lambda: not place.is_held)
    if not follow:
        click.echo(seen.text if lines is None else seen.tail(lines) if lines else "", nl=lines is not None)
        return
    # Counted now: lines that come meanwhile are new, and shown.
    skip = 0 if lines is None else max(0, len(seen.text.splitlines()) - lines)
    for number, line in enumerate(seen.follow()):
        if number >= skip:
            click.echo(line)


# -- what is done to them --------------------------------------------------------------------------------------------------------------


@machine.command(
    "exec",
    epilog=examples(
        "vmbottle machine exec web -- systemctl status nginx",
        "vmbottle machine exec web -u nobody -w /tmp -e LANG=C -- sh -c 'id; env'",
        "tar c site | vmbottle machine exec web -- tar x -C /srv",
    ),
)
@_name
@click.argument("words", metavar="-- COMMAND...", nargs=-1, required=True)
@click.option("-u", "--user", help="User that runs it; by default the one of `machine start`.")
@click.option("-w", "--workdir", "cwd", metavar="DIR", help="Folder in which it runs; / by default.")
@_env_option
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Kill it after this time, and end with status 124."
)
def execute(*, name: str, words: tuple[str, ...], **how: Any) -> None:
    """Run a command in a machine.

    The exit status is the command's; 128 + N if signal N ended it. Its output comes at once and byte for byte. Standard input is passed on
    unless it is a terminal. The words run as they are: for a pipe or a variable write `sh -c '...'`. Ctrl-C ends the command in the guest
    too.
    """
    place = _find(name)
    try:
        with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a device
            # A terminal is not passed on: two readers of one terminal would steal each other's keys.
            source = nothing.fileno() if _is_terminal(0) else 0
            # The three descriptors themselves go to the daemon, which writes to the terminal or pipe without a copy by this process.
            status = place.ask({"verb": "exec", "argv": words, **how}, (source, 1, 2))
    except CommandTimeout as error:
        say(f"the command did not end within {error.timeout:g} s and was killed")
        status = _TIMED_OUT
    # Not a failure of ours, so no message: the command has written its own.
    sys.exit(_exit_status(status))


def _exit_status(status: int) -> int:
    """Return a status as shells do: 128 + N for a command ended by signal N."""
    return status if status >= 0 else 128 - status


def _is_terminal(fd: int) -> bool:
    """Tell whether a descriptor is a terminal or closed; neither is passed on."""
    try:
        os.fstat(fd)
        return os.isatty(fd)
    except OSError:
        return True


@machine.command(
    epilog=examples(
        "vmbottle machine cp site/ web:/var/www/html", "vmbottle machine cp web:/var/log/syslog .", "vmbottle machine cp ./a:b web:/"
    )
)
@click.argument("src")
@click.argument("dst")
def cp(*, src: str, dst: str) -> None:
    """Copy a file or a tree to a machine, or from it; NAME:/PATH is the machine's side.

    Modes and symbolic links are kept. If the destination is a folder, the copy goes into it, as with `cp -r`. A file of this computer with
    a colon in its name needs a slash before it, such as ./a:b.
    """
    # Both are tried, because two sides in machines are a mistake of their own.
    there, here = _GUEST_SIDE.fullmatch(src), _GUEST_SIDE.fullmatch(dst)
    guest = there or here
    if "" in (src, dst):
        raise click.UsageError("a path is empty: perhaps a variable was not set")
    if guest is None or (there and here):
        raise click.UsageError("exactly one side must be in a machine: write it as NAME:/PATH")
    if not guest[2].startswith("/"):
        raise click.UsageError(f"{guest[0]!r}: the path in the machine must begin with a slash, such as {guest[1]}:/tmp")
    # Absolute, since the daemon works in another folder.
    paths = {"src": guest[2], "dst": os.path.abspath(dst)} if there else {"src": os.path.abspath(src), "dst": guest[2]}  # noqa: PTH100 - resolve() follows links
    _find(guest[1]).ask({"verb": "cp", "to_guest": not there, **paths})


@machine.command(epilog=examples("vmbottle machine shell web", "vmbottle machine shell web -u nobody"))
@_name
@click.option("-u", "--user", help="User to log in as; by default the one of `machine start`.")
def shell(*, name: str, user: str | None) -> None:
    """Open a shell in a machine, on this terminal.

    Every key goes to the machine, Ctrl-C and Ctrl-D too, and so does the size of the window. Ctrl-] leaves, whatever the machine does. The
    exit status is that of the shell.
    """
    # The shell logs in by itself and not through the daemon: keys and output would go through one process more, and resizing too.
    from pytest_vmbottle.channels.port import Keys
    from pytest_vmbottle.channels.ssh import SshChannel
    from pytest_vmbottle.machine.terminal import attach

    place = _find(name)
    access = place.ask({"verb": "ssh"})
    host, port = access["address"]

    def alive() -> None:
        if not place.is_held:
            raise MachineError(f"the machine {name!r} has ended: {place.record().reason}", machine=name)

    channel = SshChannel.connect((host, port), Keys(**access["keys"]), deadline=Deadline(_LOGIN), alive=alive)
    try:
        # No deadline: the user ends it.
        status = attach(channel, user=user or access["user"])
    finally:
        channel.close()
    # None is that the user left the shell, which is no failure.
    sys.exit(_exit_status(status or 0))


@machine.command(
    "ssh-config",
    epilog=examples(
        "vmbottle machine ssh-config web",
        "ssh -F $(vmbottle machine ssh-config web) web",
        'rsync -a -e "ssh -F $(vmbottle machine ssh-config web)" site/ web:/srv/',
    ),
)
@_name
@json_option
def ssh_config(*, name: str, as_json: bool) -> None:
    """Write an OpenSSH configuration for a machine, and show its path.

    With it ssh, scp, rsync and Ansible reach the machine by its name.

    They log in as root, with the machine's own key, and only if it shows its own host key. The files are deleted with the machine.
    """
    path = _find(name).ask({"verb": "ssh-config"})
    if as_json:
        emit({"host": name, "path": path})
    else:
        click.echo(path)


@machine.command(epilog=examples("vmbottle machine metrics web", "vmbottle machine metrics web --json | jq .guest_load"))
@_name
@click.option(
    "--seconds",
    type=click.FloatRange(0.05, 3600),
    default=0.5,
    show_default=True,
    help="Seconds over which the use of processors is measured.",
)
@json_option
def metrics(*, name: str, seconds: float, as_json: bool) -> None:
    """Show what a machine uses of this computer and, as `guest_`, its guest's own figures.

    Processor time is in percent of one processor, memory and counts are in bytes. Counts run since the machine was started, or since its
    guest booted.
    """
    figures = _find(name).ask({"verb": "metrics", "seconds": seconds})
    if as_json:
        emit(figures)
        return
    for figure, value in figures.items():
        if figure.endswith("_bytes") and value is not None:
            value = format_size(int(value))  # noqa: PLW2901 - the same for people
        click.echo(f"{figure:30} {'-' if value is None else f'{value:.1f}' if isinstance(value, float) else value}")
