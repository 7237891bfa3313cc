"""`vmbottle capsule` and `replay`: the machines of failed tests, as they were at the failure."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytest_vmbottle.cli.command import (
    SHORT,
    Failure,
    as_duration,
    catalog_root,
    emit,
    examples,
    json_option,
    one_line,
    open_catalog,
    say,
    show_table,
)
from pytest_vmbottle.cli.completion import capsule_names
from pytest_vmbottle.cli.groups import Group
from pytest_vmbottle.cli.kept import described
from pytest_vmbottle.cli.travel import check_folder, public_key_option, qemu_backend, read_secret_key, settings_of_environment, sign_option
from pytest_vmbottle.host.sizes import format_size

if TYPE_CHECKING:
    from pytest_vmbottle.catalog.catalog import Catalog
    from pytest_vmbottle.machine.shared_lan import Seat
    from pytest_vmbottle.standalone.capsules import Capsule
    from pytest_vmbottle.standalone.client import Kept
    from pytest_vmbottle.standalone.stored import Stored

__all__ = ["capsule", "replay"]

_name = click.argument("name", metavar="CAPSULE", shell_complete=capsule_names)


@click.group(cls=Group, epilog=examples("vmbottle capsule ls", "vmbottle replay test_it-py-test_web --shell", "vmbottle capsule prune"))
def capsule() -> None:
    """Machines of failed tests, as they were at the failure.

    `pytest --vm-capsule=failed` saves them, and `vmbottle replay` starts them again. A capsule has the RAM of its machines, and so what was
    secret in them: passwords, keys, data.
    """


def _find(name: str) -> Capsule:
    from pytest_vmbottle.standalone.capsules import CAPSULES, Capsule

    # A path has a slash, and no name has.
    return Capsule(Path(name) if "/" in name else catalog_root() / CAPSULES / name)


def _facts(found: Capsule) -> dict[str, Any]:
    return {
        "name": found.name,
        "test": found.test,
        "error": found.error,
        "created": datetime.fromtimestamp(found.created, UTC).isoformat(timespec="seconds"),
        "machines": list(found.machines),
        "size": found.size,
        "path": str(found.path),
    }


@capsule.command("ls")
@json_option
def list_capsules(*, as_json: bool) -> None:
    """List the capsules, the oldest first."""
    from pytest_vmbottle.standalone.capsules import all_in

    found = [_facts(each) for each in all_in(catalog_root())]
    if as_json:
        emit(found)
        return
    rows = ((each["name"], each["created"], format_size(each["size"]), ", ".join(each["machines"]), each["test"]) for each in found)
    show_table(("NAME", "CREATED", "SIZE", "MACHINES", "TEST"), rows)


@capsule.command("show")
@_name
@json_option
def show(*, name: str, as_json: bool) -> None:
    """Show what is in a capsule, whether it is whole, and whether it can be restored here.

    Of each machine: its image, its memory, what is its own on disk, the pack that it stands on, its place on a private LAN, and the
    obstacle, if it cannot be restored by this computer.
    """
    found = _find(name)
    facts = _facts(found)
    with closing(open_catalog()) as catalog:
        details = {machine: _details(found, machine, catalog) for machine in found.machines}
    if as_json:
        emit(facts | {"details": details})
        return
    shown = {machine: _readable(each) for machine, each in details.items()}
    for key, value in described({**facts, "size": format_size(facts["size"]), "machines": shown}):
        click.echo(f"{key}: {one_line(value)}")
    say("it has the RAM of these machines, and so what was secret in them")


def _details(found: Capsule, machine: str, catalog: Catalog) -> dict[str, Any]:
    from pytest_vmbottle.catalog import packs
    from pytest_vmbottle.errors import VMBottleError

    stored = found.stored(machine)
    spec, pack = stored.spec(), packs.read(stored.start.ram).manifest if stored.start.ram is not None else None
    try:
        _check_fit(found, {machine: stored}, catalog)
        obstacle = ""
    except (VMBottleError, Failure) as error:
        obstacle = str(error)
    return {
        "image": stored.origin.name,
        "memory": spec.memory,
        "size": packs.read(stored.snapshot().path).size,
        "pack": f"{pack.name} ({pack.key[:SHORT]})" if pack is not None else None,
        "lan": " ".join(spec.lans) or None,
        "address": found.addresses.get(machine),
        "obstacle": obstacle,
    }


def _readable(details: Mapping[str, Any]) -> dict[str, Any]:
    return {**details, "memory": format_size(details["memory"]), "size": format_size(details["size"])}


@capsule.command("rm")
@click.argument("names", metavar="CAPSULE...", nargs=-1, required=True, shell_complete=capsule_names)
def remove(*, names: tuple[str, ...]) -> None:
    """Remove capsules."""
    for found in [_find(name) for name in dict.fromkeys(names)]:
        found.remove()


@capsule.command("prune", epilog=examples("vmbottle capsule prune", "vmbottle capsule prune --older-than 1d"))
@click.option("--older-than", callback=as_duration, metavar="DURATION", help="Remove only those that are older, such as 12h or 7d.")
def prune(*, older_than: float | None) -> None:
    """Remove all capsules that no machine runs from; their names are written to stdout."""
    from pytest_vmbottle.errors import CatalogError
    from pytest_vmbottle.standalone.capsules import all_in

    for found in all_in(catalog_root()):
        if older_than is None or time.time() - found.created > older_than:
            with suppress(CatalogError):  # a machine runs from it
                found.remove()
                click.echo(found.name)


@capsule.command(
    "export",
    epilog=examples(
        "vmbottle capsule export test_web-py-test_it -o failed.vmcapsule", "vmbottle capsule export test_web-py-test_it -o F --with-pack"
    ),
)
@_name
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File to write.")
@click.option(
    "--with-pack", is_flag=True, help="Write the packs and the image that it stands on too, for a computer that has not got them."
)
@sign_option
def export_capsule(*, name: str, output: Path, with_pack: bool, sign: Path | None) -> None:
    """Write a capsule into a file, for another computer.

    The file has what the machines have beyond their packs. Whoever imports it must have those, unless they are in the file too. Its path is
    written to stdout.

    It has the RAM of the machines, and so what was secret in them: passwords, keys, data. Only you can read the file; give it to nobody who
    must not know them.
    """
    from pytest_vmbottle.standalone.capsule_files import CapsuleExporter

    check_folder(output)
    # First, since it may have to ask for a password, which may be wrong.
    key = read_secret_key(sign) if sign is not None else None
    catalog, found = open_catalog(), _find(name)
    exporter = CapsuleExporter(catalog=catalog, fingerprint=qemu_backend(catalog, settings_of_environment()).fingerprint, say=say)
    exporter.write(found, output.absolute(), with_packs=with_pack)
    say(f"{format_size(output.stat().st_size)}; it has the RAM of these machines, and so what was secret in them")
    if key is not None:
        say(f"signed: {key.sign(output.absolute())}")
    click.echo(output)


@capsule.command("import", epilog=examples("vmbottle capsule import failed.vmcapsule", "vmbottle replay test_web-py-test_it --shell"))
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@public_key_option
def import_capsule(*, file: Path, public_key: str | None) -> None:
    """Import the capsule of a file, with the packs that are in it.

    It is checked in full, and refused if this computer could not restore it, or lacks a pack that it stands on. Its name is written to
    stdout.

    A capsule has the RAM of running machines and the state of their devices: import only files of people whom you trust.
    """
    from pytest_vmbottle.standalone.capsule_files import CapsuleImporter
    from pytest_vmbottle.travel.minisign import PublicKey

    signer = PublicKey.read(public_key) if public_key is not None else None
    catalog = open_catalog()
    importer = CapsuleImporter(catalog=catalog, fingerprint=qemu_backend(catalog, settings_of_environment()).fingerprint, say=say)
    click.echo(importer.read(file, signer).name)


@click.command(
    epilog=examples(
        "vmbottle replay test_web-py-test_it",
        "vmbottle replay test_web-py-test_it --exec 'systemctl status nginx'",
        "vmbottle replay test_web-py-test_it --machine db --shell",
        "vmbottle replay test_web-py-test_it --keep",
    )
)
@_name
@click.option("--machine", metavar="NAME", help="The machine for the command or the shell; by default the test's own.")
@click.option("--exec", "command", metavar="COMMAND", help="Run a command, as `vm.exec` runs a string, and end with its status.")
@click.option("--shell", is_flag=True, help="Open a shell (the default on a terminal).")
@click.option("--keep", is_flag=True, help="Leave the machines running, for `vmbottle machine`; their names are written to stdout.")
def replay(*, name: str, machine: str | None, command: str | None, shell: bool, keep: bool) -> None:
    """Start the machines of a capsule, as they were when their test failed.

    Their processes go on from there; clocks are right. Those of a private LAN are on one of their own, with the names and addresses that
    they had. The machines end with the command or the shell.
    """
    if command is not None and shell:
        raise click.UsageError("--exec and --shell: choose one")
    if not keep and command is None and not shell and not sys.stdin.isatty():
        raise click.UsageError("standard input is no terminal: name a command with --exec, or use --keep")
    found = _find(name)
    chosen = machine or found.machines[0]
    # The chosen one first, for its error.
    stored = {each: found.stored(each) for each in dict.fromkeys((chosen, *found.machines))}
    with _started(found, {each: stored[each] for each in found.machines}, keep=keep) as places:
        if keep and command is None and not shell:
            for place in places.values():
                click.echo(place.name)
            return
        status = _used(places[chosen], command)
    sys.exit(status)


def _used(place: Kept, command: str | None) -> int:
    from pytest_vmbottle.cli.machine_commands import on_terminal, with_streams

    return on_terminal(place) if command is None else with_streams(place, ["sh", "-c", command], env={})


@contextmanager
def _started(found: Capsule, stored: Mapping[str, Stored], *, keep: bool) -> Iterator[dict[str, Kept]]:
    """Start the machines of a capsule, and end them after the block."""
    from pytest_vmbottle.standalone.client import LANS, Kept
    from pytest_vmbottle.standalone.orders import free_name
    from pytest_vmbottle.standalone.replaying import lans_of

    catalog = open_catalog()
    places: dict[str, Kept] = {}
    lans = lans_of(found, stored)
    # Of the name of a machine, which no other one has as long as it is there.
    names: dict[str, str] = {}
    try:
        _check_fit(found, stored, catalog)
        for name, each in stored.items():
            place = places[name] = Kept(catalog.machines / free_name(catalog.machines, f"replay-{name}"))
            joined = [lan for lan in lans if name in lan.machines]
            seats = {names.setdefault(lan.name, f"{place.name}-lan{len(names) or ''}"): lan.seat(name) for lan in joined}
            _start(place, each, catalog, seats)
        yield places
    finally:
        if not keep:
            for place in places.values():
                with suppress(FileNotFoundError):
                    place.stop(now=True)
                place.discard()
            for lan_name in names.values():
                shutil.rmtree(catalog.root / LANS / lan_name, ignore_errors=True)
            catalog.gc()


def _check_fit(found: Capsule, stored: Mapping[str, Stored], catalog: Catalog) -> None:
    """Check that all machines can be restored here, before the first one is started."""
    from pytest_vmbottle.backends.make import make

    settings = settings_of_environment()
    for name, each in stored.items():
        spec = each.spec()
        backend = make(settings.backend_for(spec.backend), settings, folder=catalog.root, warn=say)
        if backend is None:
            raise Failure(f"there is no backend {spec.backend!r} here")
        found.check_fits(backend.fingerprint(spec), name)


def _start(place: Kept, stored: Stored, catalog: Catalog, seats: Mapping[str, Seat]) -> None:
    """Start a machine, on its LANs if it can be there."""
    import attrs

    from pytest_vmbottle.errors import MachineError, SpecError

    spec = stored.spec()
    # A shared folder may have been the test's, which is gone.
    shares = {path: str(folder) for path, folder in spec.shares if folder.is_dir()}
    keywords = {"name": place.name, "source": str(spec.image), "shares": shares}
    order = {"catalog": str(catalog.root), "folder": str(Path.cwd()), "settings": {}}
    if seats:
        plain = {name: attrs.asdict(seat) for name, seat in seats.items()}
        try:
            place.start(order | {"keywords": keywords | {"network": list(seats)}, "seats": plain}, say, snapshot=stored)
        except (MachineError, SpecError) as error:
            say(f"{spec.name} comes back without its private LAN {' and '.join(spec.lans)}: {str(error).partition(chr(10))[0]}")
        else:
            for seat in seats.values():
                say(f"{place.name} is {seat.name} ({seat.members[seat.name]}) on a private LAN of its own")
            return
    place.start(order | {"keywords": keywords | {"network": spec.nat}}, say, snapshot=stored)
