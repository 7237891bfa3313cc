"""`vmbottle machine start`, `run` and `wait`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pytest_vmbottle.cli.command import Failure, catalog_root, emit, examples, json_option, open_catalog, say
from pytest_vmbottle.cli.completion import sources
from pytest_vmbottle.cli.kept import find_all, names_argument, record_facts
from pytest_vmbottle.cli.machine_commands import on_terminal, with_streams
from pytest_vmbottle.cli.options import KEYWORDS, NewMachine, machine_options, naming_options
from pytest_vmbottle.errors import CatalogError, VMBottleError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.shown import printable

if TYPE_CHECKING:
    from pytest_vmbottle.standalone.client import Kept
    from pytest_vmbottle.standalone.record import Record

__all__ = ["run", "start", "wait"]

_BEGINNING = 30.0
"""Seconds until a start in the background has a record that others can see."""
_Beginning = tuple["Kept", Callable[[], "Record"]]
"""A machine, and the function that starts it."""
_source = click.argument("source", shell_complete=sources)


@click.command(
    cls=NewMachine,
    epilog=examples(
        "vmbottle machine start debian-12",
        "vmbottle machine start debian-12 --name db --memory 2G --cpus 2 --port 5432",
        "vmbottle machine start fedora-44 --network --packages nginx,curl --port 8080:80",
        "vmbottle machine start tests/conftest.py::web",
        "vmbottle machine start ./disk.qcow2 --json | jq -r .name",
        "vmbottle machine stop db; vmbottle machine start db",
        "vmbottle machine start web@clean --name other",
    ),
)
@_source
@click.option("--name", help="Name of the machine; by default that of its source.")
@machine_options
@click.option("--wait/--no-wait", "waits", default=True, help="Return when it is ready (the default), or at once; see `machine wait`.")
@json_option
def start(  # noqa: PLR0913 - one for each option
    *, source: str, name: str | None, waits: bool, as_json: bool, keywords: Mapping[str, Any], settings: Mapping[str, str]
) -> None:
    """Start a machine from SOURCE, or a stopped machine again.

    SOURCE is the name of an image, the path of a disk image, a pack (`pack:KEY`), a layer (`tests/conftest.py::web`), a snapshot
    (`web@LABEL`), or the name of a stopped machine, which goes on with its own disk.

    Images are made as tests make them: a missing one is built if there is a recipe for it. Images that the project around the current
    folder declares can be named too. When the command returns, the machine is ready for the other commands. Ctrl-C before that removes a
    new machine.

    The machine's name is written to stdout.
    """
    again = _again(source, settings) if name is None else None
    place, begin = again or _new(source, name, keywords, settings)
    try:
        record = begin() if waits else _begun(place, begin)
    except CatalogError as error:
        # No image has this name, and a machine has it: that was meant, and why it cannot be started is the better answer.
        if again is None and name is None and (meant := _machine(source)) is not None:
            why = "runs already" if meant.is_held else "has no disk of its own to start from"
            raise Failure(f"the machine {source!r} {why}; for a new one: {error}") from error
        raise
    if as_json:
        emit(record_facts(record))
        return
    # The name alone is on stdout, for `name=$(vmbottle machine start ...)`.
    click.echo(record.name)
    for port, here in record.ports.items():
        say(f"127.0.0.1:{here} leads to port {port} of {record.name}")


def _new(source: str, name: str | None, keywords: Mapping[str, Any], settings: Mapping[str, str]) -> _Beginning:
    """Return a new machine's place, and the function that starts it."""
    from pytest_vmbottle.standalone.orders import new_order

    # smolvm takes references to images of registries, which have slashes too.
    if "/" in source and "::" not in source and keywords.get("backend") != "smolvm" and not Path(source).exists():
        raise click.BadParameter(f"there is no file {source}", param_hint="SOURCE")
    root = catalog_root()
    with naming_options():
        order = new_order(
            root / "machines", catalog=root.absolute(), source=source, name=name, keywords=keywords, settings=settings, folder=Path.cwd()
        )
    # After the checks: a wrong call makes no folder.
    open_catalog()
    return order.place, lambda: order.place.start(order.facts, say, snapshot=order.snapshot)


def _machine(name: str) -> Kept | None:
    from pytest_vmbottle.standalone.client import find

    with suppress(CatalogError):
        return find(catalog_root() / "machines", name)
    return None


def _again(source: str, settings: Mapping[str, str]) -> _Beginning | None:
    """Return the stopped machine of this name, if there is one, and the function that starts it again."""
    place = _machine(source)
    # One that runs is no source: the name may be that of an image as well, of which another machine is wanted.
    if place is None or place.is_held or not place.can_start_again:
        return None
    _refuse_keywords(source)
    return place, lambda: place.start_again(say, settings=settings)


def _refuse_keywords(source: str) -> None:
    """Refuse options that a machine that is started again cannot follow."""
    context = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in KEYWORDS and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(
            f"{source} is a stopped machine, which starts again as it was: leave out {', '.join(given)}, or give a new machine a --name"
        )


# -- without waiting -------------------------------------------------------------------------------------------------------------------


def _errors(place: Kept) -> Path:
    """Return the file with the error of a start in the background, of which no machine is left."""
    return place.folder.with_name(f".{place.name}.error")


def _begun(place: Kept, begin: Callable[[], Record]) -> Record:
    """Start a machine in a process of its own, and return its first record."""
    errors = _errors(place)
    errors.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _detached(begin, errors)
    has_begun = Deadline(_BEGINNING).poll(lambda: errors.exists() or (place.is_held and place.record().is_on), every=0.02)
    if not has_begun or errors.exists():
        raise Failure(_taken(errors) or f"the machine {place.name!r} did not begin to start within {_BEGINNING:.0f} s")
    return place.record()


def _detached(begin: Callable[[], Record], errors: Path) -> None:
    """Do the work of a child process that outlives this command, and end it."""
    try:
        # Away from the terminal, whose Ctrl-C and end are meant for others, and from pipes whose readers wait for our end.
        os.setsid()
        with open(os.devnull, "r+b") as nothing:  # noqa: PTH123 - a device
            for fd in (0, 1, 2):
                os.dup2(nothing.fileno(), fd)
        begin()
    except (VMBottleError, OSError) as error:
        errors.write_text(str(error))
    except BaseException:
        errors.write_text(traceback.format_exc())
    finally:
        # Not by an exception: what the parent would do at its end is not to be done twice.
        os._exit(0)


def _taken(errors: Path) -> str:
    with suppress(FileNotFoundError):
        text = printable(errors.read_text())
        errors.unlink()
        return text
    return ""


@click.command(epilog=examples("vmbottle machine start debian-12 --name web --no-wait; vmbottle machine wait web"))
@names_argument
@click.option("--timeout", type=click.FloatRange(0), metavar="SECONDS", help="Fail if one is not ready after this time.")
def wait(*, names: tuple[str, ...], timeout: float | None) -> None:
    """Wait until machines that are starting are ready; fail if one does not run."""
    deadline = Deadline(1e9 if timeout is None else timeout)
    for name in dict.fromkeys(names):
        _await(name, deadline)


def _await(name: str, deadline: Deadline) -> None:
    from pytest_vmbottle.standalone.client import Kept

    errors = _errors(Kept(catalog_root() / "machines" / name))
    deadline.poll(lambda: errors.exists() or not _is_starting(name), every=0.1)
    if words := _taken(errors):
        raise Failure(f"the machine {name!r} could not be started: {words}")
    (place,) = find_all([name])
    record = place.record()
    if record.state == "starting":
        raise Failure(f"the machine {name!r} is still starting after {deadline.seconds:g} s")
    if not record.is_on:
        raise Failure(f"the machine {name!r} is {record.state}: {record.reason}")


def _is_starting(name: str) -> bool:
    from pytest_vmbottle.standalone.client import Kept

    with suppress(FileNotFoundError):
        return Kept(catalog_root() / "machines" / name).record().state == "starting"
    return False


# -- a machine for one command ---------------------------------------------------------------------------------------------------------


@click.command(
    cls=NewMachine,
    epilog=examples(
        "vmbottle machine run debian-12 uname -a",
        "vmbottle machine run debian-12 --packages gcc --memory 2G -- make -C /src test",
        "vmbottle machine run -t tests/conftest.py::web",
    ),
)
@_source
@click.argument("words", metavar="COMMAND...", nargs=-1)
@click.option("--name", help="Name of the machine; by default that of its source.")
@machine_options
@click.option("-w", "--workdir", "cwd", metavar="DIR", help="Folder in which the command runs; / by default.")
@click.option("-i", "--interactive", is_flag=True, help="Pass standard input on, even if it is a terminal.")
@click.option("-t", "--tty", is_flag=True, help="Run the command, or without one a shell, on this terminal.")
def run(  # noqa: PLR0913 - one for each option
    *,
    source: str,
    words: tuple[str, ...],
    name: str | None,
    cwd: str | None,
    interactive: bool,
    tty: bool,
    keywords: Mapping[str, Any],
    settings: Mapping[str, str],
) -> None:
    """Start a machine, run one command in it, and remove the machine.

    SOURCE and the options are those of `start`, which stand before the command. The exit status is the command's. The machine is removed
    in any case, also after Ctrl-C.
    """
    if not words and not tty:
        raise click.UsageError("name a command, or use -t for a shell")
    place, begin = _new(source, name, keywords, settings)
    # A start that fails or is interrupted leaves nothing by itself, and nothing of a machine of this name is touched before it.
    begin()
    try:
        # The variables of `start` are those of all commands in the machine, so that the command has them already.
        status = on_terminal(place, words, cwd=cwd) if tty else with_streams(place, words, cwd=cwd, env={}, interactive=interactive)
    finally:
        with suppress(FileNotFoundError):  # somebody else has removed it
            place.stop(now=True)
        place.discard()
        open_catalog().gc()
    sys.exit(status)
