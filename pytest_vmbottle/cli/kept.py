"""Machines without pytest as the commands see them: by their names, with their records and their answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytest_vmbottle.cli.command import Failure, catalog_root
from pytest_vmbottle.cli.completion import machine_names

if TYPE_CHECKING:
    from pytest_vmbottle.standalone.client import Kept
    from pytest_vmbottle.standalone.record import Record

__all__ = [
    "STANDARD",
    "ask",
    "described",
    "find_all",
    "find_machine",
    "name_argument",
    "names_argument",
    "record_facts",
    "sink",
]

STANDARD = "-"
"""Name of the standard streams in place of a file's."""


def name_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Add the argument NAME of a machine."""
    return click.argument("name", shell_complete=machine_names)(command)


def names_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Add the argument NAME... of machines."""
    return click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=machine_names)(command)


def find_machine(name: str) -> Kept:
    """Return a machine by its name."""
    from pytest_vmbottle.standalone.client import find

    return find(catalog_root() / "machines", name)


def find_all(names: Sequence[str]) -> list[Kept]:
    """Return machines by their names, each once; a misspelt one ends the command before anything is done."""
    return [find_machine(name) for name in dict.fromkeys(names)]


def ask(name: str, verb: str, descriptors: Sequence[int] = (), **arguments: Any) -> Any:
    """Send a request to the daemon of a machine, and return its answer."""
    try:
        return find_machine(name).ask({"verb": verb, **arguments}, descriptors)
    except ValueError as error:  # an argument that only the machine can judge, such as a regular expression
        raise Failure(str(error)) from error


def record_facts(record: Record) -> dict[str, Any]:
    """Return a machine's record for JSON."""
    import attrs

    facts = attrs.asdict(record)
    facts["since"] = datetime.fromtimestamp(record.since, UTC).isoformat(timespec="seconds")
    facts["keeper"] = record.keeper.pid if record.keeper is not None else None
    facts["ports"] = {port: f"127.0.0.1:{here}" for port, here in record.ports.items()}
    return facts


@contextmanager
def sink(output: str) -> Iterator[int]:
    """Yield a descriptor for a file that is there when it is complete, or for standard output.

    Raises:
        Failure: Standard output is a terminal, which would show what is no text.
    """
    if output == STANDARD:
        if sys.stdout.isatty():
            raise Failure("standard output is a terminal: name a file with -o FILE, or redirect it")
        sys.stdout.flush()
        yield 1
        return
    from pytest_vmbottle.host.files import atomic_file

    path = Path(output)
    if path.is_dir():
        raise Failure(f"{path} is a folder: name a file in it")
    # As any file that a program makes, but for the umask; what it makes by default is private.
    with atomic_file(path, mode=0o666) as file:
        yield file.fileno()


def described(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield facts for people, as names and values: mappings in lines of their own."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", each) for key, each in described(value))
        elif isinstance(value, list | tuple):
            yield from ((name, str(each)) for each in value)
        elif value not in (None, ""):
            yield name, str(value)
