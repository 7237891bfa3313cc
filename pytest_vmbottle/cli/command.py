"""Common parts of all commands: errors, options and output."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytest_vmbottle.errors import BackendUnavailable, CatalogError, SpecError, VMBottleError
from pytest_vmbottle.host.signals import Interruption, left
from pytest_vmbottle.host.sizes import parse_duration, parse_size
from pytest_vmbottle.shown import printable

if TYPE_CHECKING:
    from pytest_vmbottle.catalog.catalog import Catalog

CANNOT, INTERRUPTED = 3, 130
"""Exit statuses: this host cannot do it, and Ctrl-C."""
SHORT = 12
"""Digits of a key that are shown."""
_COLUMNS = 100
"""Columns of a terminal that does not tell its width."""
_NARROWEST = 8
"""Columns that each column of a table has at least, if it needs them."""
_GAP = "  "


class Failure(click.ClickException):
    """Error that ends the command with a sentence on stderr."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Cannot(Failure):
    """Error like `Failure`, for what this host cannot do."""

    exit_code = CANNOT


@contextmanager
def reporting(ctx: click.Context) -> Iterator[None]:
    """Run a command: report its errors in a sentence, and clean up when it is stopped."""
    try:
        # SIGTERM and SIGHUP end the command by an exception, so that locks, downloads and temporary files are cleaned up.
        with Interruption(left, owned=True):
            yield
    except VMBottleError as error:
        # Scripts can tell by the status whether the host or the call was at fault.
        raise (Cannot if isinstance(error, BackendUnavailable) else Failure)(str(error)) from error
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of our output has had enough; click ends us quietly
            raise
        raise Failure(": ".join(str(part) for part in (error.filename, error.strerror or error) if part)) from error
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        ctx.exit(INTERRUPTED)


# -- parameters and output -------------------------------------------------------------------------------------------------------------


def as_size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Parse the size of an option, such as 10G, into bytes."""
    try:
        return None if value is None else parse_size(value)
    except SpecError as error:
        raise click.BadParameter(str(error)) from None


def as_duration(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Parse the duration of an option, such as 12h or 7d, into seconds."""
    try:
        return None if value is None else parse_duration(value)
    except SpecError as error:
        raise click.BadParameter(str(error)) from None


def as_packages(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[str]:
    """Return the words of an option that is repeated or comma-separated."""
    return [package for value in values for package in value.replace(",", " ").split()]


def examples(*lines: str) -> str:
    """Return the examples at the end of a help text; the mark preserves line breaks."""
    # click wraps each paragraph of a help text anew, except one that begins with this mark.
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def say(words: str) -> None:
    """Write a message for people to stderr."""
    click.echo(printable(words), err=True)


def emit(value: object) -> None:
    """Write JSON to stdout."""
    click.echo(json.dumps(value, indent=2))


def one_line(text: object) -> str:
    """Return the text on one line, safe on a terminal.

    Names come from users, versions from programs.
    """
    # A newline in a name could forge a row of a table.
    return " ".join(printable(str(text)).split())


def show_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table with aligned columns, as wide as the terminal; in full where there is none."""
    lines = [tuple(head), *(tuple(map(one_line, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # A program reads all of it, a person would lose the columns in lines that wrap.
    if sys.stdout.isatty():
        widths = _narrowed(widths, shutil.get_terminal_size((_COLUMNS, 24)).columns - len(_GAP) * (len(widths) - 1))
    for line in lines:
        click.echo(_GAP.join(_cut(cell, width).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _narrowed(widths: Sequence[int], room: int) -> list[int]:
    """Return widths that fit together, the widest columns narrowed first."""
    narrowed = list(widths)
    while sum(narrowed) > room and max(narrowed) > _NARROWEST:
        narrowed[narrowed.index(max(narrowed))] -= 1
    return narrowed


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def format_age(seconds: float) -> str:
    """Return a time span in words, rounded.

    >>> format_age(200), format_age(200_000)
    ('3 min', '2 d')
    """
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON.")


def setting_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add settings that hold wherever machines are started, as options and by their environment variables.

    The command gets all of them as `settings`: by their names, those that were given, each of which makes sense.

    Args:
        names: The settings that are options, by default all; the others can only be given by the environment.
    """
    from pytest_vmbottle.settings import SETTINGS, Settings

    ours = [setting for setting in SETTINGS if not setting.tests_only]
    options = [setting for setting in ours if setting.name in names or not names]
    # Settings with paths in them: these are made absolute below.
    pairs = {setting.name for setting in ours if setting.pairs}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        # click reads the name and the help text of the function that it decorates.
        @wraps(command)
        def with_settings(**given: Any) -> None:
            found = {setting.name: given.pop(setting.key) if setting in options else os.environ.get(setting.env) for setting in ours}
            # As text, in which a daemon gets them too, and without those that were not given, so that its defaults hold.
            settings = {name: "true" if value is True else value for name, value in found.items() if value not in (None, False, "")}
            try:
                # For its errors: a wrong setting is a wrong call, and not a failure of a daemon later.
                Settings.read(lambda setting: settings.get(setting.name))
            except SpecError as error:
                raise click.UsageError(printable(str(error))) from None
            command(settings=settings | {name: _anchored(settings[name]) for name in pairs & settings.keys()}, **given)

        decorated: Callable[..., None] = with_settings
        # Decorators are applied from the last to the first, and the help lists options in the order of the table.
        for setting in reversed(options):
            kind: dict[str, Any] = {"is_flag": True} if setting.flag else {"metavar": setting.takes}
            words = f"{setting.sentence}; also {setting.env}."
            decorated = click.option(f"--{setting.name}", setting.key, envvar=setting.env, help=words, **kind)(decorated)
        return decorated

    return decorate


def _anchored(text: str) -> str:
    """Return pairs whose paths hold in every folder: the process that keeps a machine works in another one."""
    from pytest_vmbottle.settings import parse_pairs

    return "\n".join(f"{name} = {absolute(reference)}" for name, reference in parse_pairs(text).items())


def absolute(source: str) -> str:
    """Return a path as one that holds in every folder; names, and references such as `library/alpine`, as they are."""
    # Not `resolve`, which would take the target of a link in place of its name.
    return str(Path(source).absolute()) if "/" in source and Path(source).exists() else source


def catalog_root(ctx: click.Context | None = None) -> Path:
    """Return the catalog's folder, by option, environment or default.

    Args:
        ctx: The context to look in; by default the current one, which completion does not have.
    """
    given: Path | None = (ctx or click.get_current_context()).find_root().params.get("catalog")
    if given is not None:
        return given.expanduser()
    from pytest_vmbottle.catalog.location import default_root

    return default_root()


def open_catalog(*, make: bool = True) -> Catalog:
    """Return the catalog; create it unless it is only looked at."""
    from pytest_vmbottle.catalog.catalog import Catalog

    return Catalog(catalog_root(), make=make)


def check_each(checks: Mapping[str, tuple[str, Callable[[], object]]]) -> None:
    """Run each check and report it by its label; fail at the end if one raised."""
    bad = 0
    for key, (label, check) in checks.items():
        try:
            check()
        # One that is damaged does not end the check of the others.
        except (CatalogError, OSError) as error:
            bad += 1
            click.echo(f"bad {key}")
            say(f"{label}: {error}")
        else:
            click.echo(f"ok  {key}")
    if bad:
        raise Failure(f"{bad} of {len(checks)} {'differs' if bad == 1 else 'differ'} from what was stored")
