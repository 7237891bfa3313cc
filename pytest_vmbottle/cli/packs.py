"""`vmbottle pack`: packs in the catalog."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytest_vmbottle.cli.command import (
    SHORT,
    Failure,
    as_duration,
    as_size,
    check_each,
    emit,
    examples,
    format_age,
    json_option,
    one_line,
    open_catalog,
    say,
    show_table,
)
from pytest_vmbottle.cli.completion import pack_keys
from pytest_vmbottle.cli.groups import Group, Section
from pytest_vmbottle.errors import PackCorrupt
from pytest_vmbottle.host.files import size_on_disk
from pytest_vmbottle.host.records import Damaged
from pytest_vmbottle.host.records import read as read_record
from pytest_vmbottle.host.signals import undisturbed
from pytest_vmbottle.host.sizes import format_size

if TYPE_CHECKING:
    from pytest_vmbottle.catalog.catalog import Catalog
    from pytest_vmbottle.catalog.packs import Pack

__all__ = ["pack"]

# Facts that tell packs of one name apart, beside the kind, the memory and the backend, which have columns of their own.
_FACTS: Mapping[str, Callable[[Any], str]] = {
    "disk_size": lambda size: f"disk {format_size(size)}",
    "image": lambda digest: f"image {digest[:_DIGITS]}",
    "parent": lambda key: f"on {key[:_DIGITS]}" if key else "on its image",
}
_KEYWORDS = ("arch", "cpus", "cpu", "nested", "display", "network", "ports", "user_data", "env", "user")
"""Keywords of their machines' specs that do the same."""
_SPEC = "spec.json"
"""File of a pack with the spec of its machine; that of `provision`, whose import takes long."""
_DIGITS = 6
"""Digits of a key that tell it apart from the few others of a table."""


@click.group(
    cls=Group,
    later=[
        Section("Commands", "freeze", {"build": "Write a pack into a file that tests start from."}),
        Section(
            "Commands",
            "travel",
            {
                "export": "Write a pack into a file, for another computer.",
                "import": "Import the packs of a file.",
                "push": "Push a pack to a registry, with what it stands on.",
                "pull": "Pull a pack from a registry, with what it stands on.",
            },
        ),
    ],
    epilog=examples("vmbottle pack ls", "vmbottle pack show 140eda", "vmbottle pack prune --older-than 7d --dry-run"),
)
def pack() -> None:
    """Packs: prepared machines, of which tests get clones.

    A pack has a machine's disk and, if this computer can restore it, its RAM: then its clones are running when a test gets them. pytest
    makes packs when it needs them, and again if they are gone. KEY is the beginning of a pack's key, long enough to be unique.
    """


@pack.command("ls", epilog=examples("vmbottle pack ls", "vmbottle pack ls --json | jq 'map(.size) | add'"))
@json_option
def list_packs(*, as_json: bool) -> None:
    """List the packs, oldest first; SIZE is what they take on disk."""
    from pytest_vmbottle.catalog import packs

    catalog = open_catalog(make=False)
    found, damaged = packs.scan(catalog.packs)
    taken = packs.sizes(found)
    # One that was removed meanwhile has no size, and is left out.
    records = [_pack_record(catalog, each, taken[each.key]) for each in found if each.key in taken]
    for key, error in damaged.items():
        say(f"{error}; remove it with `vmbottle pack rm {key[:SHORT]}`")
    if as_json:
        emit(records + [{"key": key, "damaged": str(error)} for key, error in damaged.items()])
    elif records:
        show_table(("KEY", "KIND", "NAME", "AGE", "UNUSED", "SIZE", "MEMORY", "IN USE", "BACKEND"), map(_pack_row, _told_apart(records)))
    elif not damaged:
        say("There are no packs yet: pytest makes them when tests need machines.")
    _mention_quarantine(catalog)


def _mention_quarantine(catalog: Catalog) -> None:
    with suppress(OSError):  # what is just being removed
        aside = catalog.quarantined()
        if aside:
            size = format_size(sum(size_on_disk(each) for each in aside))
            say(f"Quarantined packs take {size}; remove them with: vmbottle pack prune")


def _pack_record(catalog: Catalog, found: Pack, size: int) -> dict[str, Any]:
    about = found.manifest
    return {
        "key": found.key,
        "kind": about.kind,
        "name": about.name,
        "created": datetime.fromtimestamp(about.created, UTC).isoformat(timespec="seconds"),
        # The clock may have been set back since it was made.
        "age": max(0.0, time.time() - about.created),
        "used": datetime.fromtimestamp(found.used, UTC).isoformat(timespec="seconds"),
        "unused_for": max(0.0, time.time() - found.used),
        "size": size,
        "memory": about.memory,
        "disk_size": about.disk_size,
        "backend": about.backend,
        "image": about.image,
        "parent": about.parent,
        "spec": _spec(found.path),
        "in_use": catalog.in_use(found.path),
        "path": str(found.path),
        "damaged": None,
    }


def _told_apart(records: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the packs' records for people: where several have one name, it is followed by the facts that differ among them."""
    told = [_facts(record) for record in records]
    for record, facts in zip(records, told, strict=True):
        twins = [each for other, each in zip(records, told, strict=True) if other["name"] == record["name"]]
        differs = [text for fact, text in facts.items() if len({each.get(fact) for each in twins}) > 1]
        yield {**record, "name": f"{record['name']} ({', '.join(differs)})"} if differs else record


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    facts = {fact: show(record[fact]) for fact, show in _FACTS.items()}
    return facts | {key: f"{key}={record['spec'][key]}" for key in _KEYWORDS if key in record["spec"]}


def _spec(path: Path) -> Mapping[str, Any]:
    with suppress(OSError, Damaged):  # packs of earlier versions have none
        return read_record(path / _SPEC)
    return {}


def _pack_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    sizes = (format_size(record["size"]), format_size(record["memory"]))
    use = "yes" if record["in_use"] else "no"
    ages = (format_age(record["age"]), format_age(record["unused_for"]))
    return (record["key"][:SHORT], record["kind"], record["name"], *ages, *sizes, use, record["backend"])


@pack.command(epilog=examples("vmbottle pack show 140eda", "vmbottle pack show 140eda --json"))
@click.argument("key", shell_complete=pack_keys)
@json_option
def show(*, key: str, as_json: bool) -> None:
    """Show a pack, its files, and the packs below it."""
    from pytest_vmbottle.catalog import packs

    catalog = open_catalog(make=False)
    found = packs.read(packs.find(catalog.packs, key))
    record = _pack_record(catalog, found, found.size) | {"files": _files(found), "parents": _parents(catalog, found)}
    if as_json:
        emit(record)
    else:
        for name, value in _described(record):
            click.echo(f"{name:10} {one_line(value)}")


def _files(found: Pack) -> dict[str, dict[str, Any]]:
    # Apparent sizes, as `ls` shows them; what the pack takes in blocks is its own line.
    sizes = {path.name: path.stat().st_size for path in found.path.iterdir()}
    return {name: {"digest": value, "size": sizes.get(name)} for name, value in found.manifest.files.items()}


def _described(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a pack's record for people, as names and values."""
    yield from ((name, record[name]) for name in ("key", "kind", "name"))
    yield "created", f"{record['created']} ({format_age(record['age'])} ago)"
    yield "used", f"{record['used']} ({format_age(record['unused_for'])} ago)"
    yield from ((name.replace("_", " "), format_size(record[name])) for name in ("size", "memory", "disk_size"))
    yield "in use", "yes" if record["in_use"] else "no"
    yield from ((name, record[name]) for name in ("backend", "image", "path"))
    for parent in record["parents"]:
        yield "on", f"{parent['key'][:SHORT]} {parent['name'] or '(missing or damaged)'}"
    for name, file in record["files"].items():
        yield "file", f"{name} ({'missing' if file['size'] is None else format_size(file['size'])}, {file['digest']})"


def _parents(catalog: Catalog, found: Pack) -> list[dict[str, Any]]:
    """Return the packs below one, uppermost first."""
    from pytest_vmbottle.catalog import packs

    parents: list[dict[str, Any]] = []
    key = found.manifest.parent
    # Keys of forged manifests may form a circle.
    while key is not None and key not in {parent["key"] for parent in parents}:
        try:
            below = packs.read(catalog.pack(key)).manifest
        except (PackCorrupt, FileNotFoundError):
            # A pack below that is missing or damaged is told, since it is why the one above cannot be used.
            return [*parents, {"key": key, "name": None, "kind": None}]
        parents.append({"key": key, "name": below.name, "kind": below.kind})
        key = below.parent
    return parents


@pack.command("verify", epilog=examples("vmbottle pack verify", "vmbottle pack verify 140eda"))
@click.argument("keys", metavar="[KEY...]", nargs=-1, shell_complete=pack_keys)
def verify_packs(*, keys: tuple[str, ...]) -> None:
    """Read packs, by default all, and compare them with their manifests. The exit status is 1 if one differs.

    A damaged pack stays where it is; the next pytest that needs it moves it aside and makes it again.
    """
    from pytest_vmbottle.catalog import packs
    from pytest_vmbottle.host.generations import name_of

    catalog = open_catalog(make=False)
    if keys:
        paths = [packs.find(catalog.packs, key) for key in keys]
    else:
        found, damaged = packs.scan(catalog.packs)
        # Damaged ones as well: they are what this command looks for.
        paths = [*(each.path for each in found), *map(catalog.pack, damaged)]
    check_each({name_of(path): (f"pack {path.name[:SHORT]}", partial(_verify, path)) for path in paths})


def _verify(path: Path) -> None:
    from pytest_vmbottle.catalog import packs
    from pytest_vmbottle.host.generations import Holds

    with Holds() as holds:
        # Held while it is read, so that a prune beside it does not look like damage.
        holds.take(path)
        found = packs.read(path)
        found.verify()
        packs.check_parent(found)


@pack.command("rm", epilog=examples("vmbottle pack rm 140eda", "vmbottle pack rm 140eda 573fc2"))
@click.argument("keys", metavar="KEY...", nargs=-1, required=True, shell_complete=pack_keys)
def remove_packs(*, keys: tuple[str, ...]) -> None:
    """Remove packs. One that a test run uses, or that another pack depends on, is not removed."""
    from pytest_vmbottle.catalog import packs
    from pytest_vmbottle.host.generations import name_of

    catalog = open_catalog(make=False)
    # A key may be given twice, by beginnings of different length.
    paths = dict.fromkeys(packs.find(catalog.packs, key) for key in keys)
    found, _ = packs.scan(catalog.packs)
    _check_removable(catalog, paths, found)
    # A pack that another one of the list stands on has to go after it.
    ordered = [each.path for each in packs.children_first(each for each in found if each.path in paths)]
    for path in (*(path for path in paths if path not in ordered), *ordered):
        if not _discard(catalog, path):
            raise Failure(f"the pack {path.name[:SHORT]} is in use by now: try again when the test run that uses it has ended")
        click.echo(name_of(path))


def _check_removable(catalog: Catalog, paths: Iterable[Path], found: Sequence[Pack]) -> None:
    """Refuse the whole removal if one pack cannot be removed."""
    from pytest_vmbottle.host.generations import name_of

    names = set(map(name_of, paths))
    # All are checked before the first one goes: a list of which one cannot be removed removes nothing.
    above = [each for each in found if each.manifest.parent in names and each.key not in names]
    if above:
        those = ", ".join(f"{each.key[:SHORT]} ({each.manifest.name})" for each in above)
        command = " ".join(("vmbottle pack rm", *(each.key[:SHORT] for each in above), *(name[:SHORT] for name in sorted(names))))
        raise Failure(f"{those} would lose the pack below: remove all of them with `{command}`")
    for path in paths:
        if catalog.in_use(path):
            raise Failure(f"the pack {path.name[:SHORT]} is in use: try again when the test run that uses it has ended")


def _discard(catalog: Catalog, path: Path) -> bool:
    # Ctrl-C waits for the end of one removal, which must not be left half done.
    with undisturbed():
        return catalog.discard(path)


@pack.command(
    epilog=examples("vmbottle pack prune --dry-run", "vmbottle pack prune --older-than 7d", "vmbottle pack prune --keep-size 10G")
)
@click.option("--older-than", callback=as_duration, metavar="AGE", help="Remove packs that were made longer ago, such as 12h or 7d.")
@click.option("--unused-for", callback=as_duration, metavar="AGE", help="Remove packs that no run has used for longer.")
@click.option(
    "--keep-size",
    callback=as_size,
    metavar="SIZE",
    help="Remove packs, the least recently used first, until the others take no more than this, such as 10G.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
def prune(*, older_than: float | None, unused_for: float | None, keep_size: int | None, dry_run: bool) -> None:
    """Remove unused packs, the least recently used first, and quarantined files.

    A pack is unused if no test run uses it. Without options all unused packs are removed: pytest builds them again when it needs them. A
    pack below one that is kept is kept too. With several options, a pack is removed if one of them applies. The keys of the removed packs
    are written to stdout.
    """
    from pytest_vmbottle.catalog import packs

    catalog = open_catalog(make=False)
    found, damaged = packs.scan(catalog.packs)
    made, used = (None if age is None else time.time() - age for age in (older_than, unused_for))
    # Children come before their parents in this list, so that a pack goes before the one that it stands on.
    chosen = packs.prunable(found, held=lambda each: catalog.in_use(each.path), made_before=made, used_before=used, keep_size=keep_size)
    # Measured before they go.
    taken = packs.sizes(chosen)
    gone = [key for key in damaged if dry_run or _discard(catalog, catalog.pack(key))]
    stays: set[str | None] = set()
    for each in chosen:
        if each.key not in stays and (dry_run or _discard(catalog, each.path)):
            gone.append(each.key)
        else:  # somebody has begun to use it
            # Then everything below it has to stay as well.
            stays.add(each.manifest.parent)
    # Damaged packs, which were moved there so that somebody can look at them.
    for aside in () if dry_run else catalog.quarantined():
        shutil.rmtree(aside, ignore_errors=True)
    for key in gone:
        click.echo(key)
    of, freed = len(found) + len(damaged), format_size(sum(taken.get(key, 0) for key in gone))
    say(f"{'would remove' if dry_run else 'removed'} {len(gone)} of {of} {'pack' if of == 1 else 'packs'}, {freed}")
