"""What all commands have in common: their errors, their options, and how they write."""

from __future__ import annotations

import errno
import json
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pytest_vmbottle._os import parse_size
from pytest_vmbottle.errors import BackendUnavailable, CatalogError, SpecError, VMBottleError
from pytest_vmbottle.result import printable

if TYPE_CHECKING:
    from pytest_vmbottle.catalog import Catalog

CANNOT, INTERRUPTED = 3, 130
"""Exit statuses: this host cannot do it, and Ctrl-C."""
SHORT = 12
"""Digits of a key that are shown."""


class Failure(click.ClickException):
    """Ends the command with a sentence on stderr."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Cannot(Failure):
    """The same, because of this host."""

    exit_code = CANNOT


class Commands(click.Group):
    """A group that turns errors into sentences, and being stopped into an orderly end."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command."""
        try:
            with ended_in_order():
                return super().invoke(ctx)
        except VMBottleError as error:
            raise (Cannot if isinstance(error, BackendUnavailable) else Failure)(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has had enough; click ends us quietly
                raise
            raise Failure(": ".join(str(part) for part in (error.filename, error.strerror or error) if part)) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP unwind what is going on, as Ctrl-C does, so that nothing is left of it."""

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Has signals wait for the end of a short block that must not be left half done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- parameters and output -------------------------------------------------------------------------------------------------------------


def as_size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """The bytes that an option says, such as 10G."""
    try:
        return None if value is None else parse_size(value)
    except SpecError as error:
        raise click.BadParameter(str(error)) from None


def as_duration(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """The seconds that an option says, such as 12h or 7d."""
    if value is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is not a duration: write a number and s, m, h, d or w, such as '12h' or '7d'")
    return float(match[1]) * units[match[2]]


def as_packages(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[str]:
    """The words of an option that is given several times, or with commas."""
    return [package for value in values for package in value.replace(",", " ").split()]


def examples(*lines: str) -> str:
    """The end of a help text; the mark keeps the lines apart."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def say(words: str) -> None:
    """Writes words for people, to stderr."""
    click.echo(printable(words), err=True)


def emit(value: object) -> None:
    """Writes JSON."""
    click.echo(json.dumps(value, indent=2))


def one_line(text: object) -> str:
    """The text on one line, safe on a terminal: names come from users, versions from programs."""
    return " ".join(printable(str(text)).split())


def show_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Writes aligned columns."""
    lines = [tuple(head), *(tuple(map(one_line, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def format_age(seconds: float) -> str:
    """How long ago, roughly.

    >>> format_age(200), format_age(200_000)
    ('3 min', '2 d')
    """
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON.")


def setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the settings that hold wherever machines are started, as options and by their environment variables.

    The command gets them as `settings`: by their names, those that were given, each of which makes sense.
    """
    from pytest_vmbottle.settings import SETTINGS, Settings

    ours = [setting for setting in SETTINGS if not setting.tests_only]

    @wraps(command)
    def with_settings(**given: Any) -> None:
        found = {setting.name: given.pop(setting.key) for setting in ours}
        settings = {name: "true" if value is True else value for name, value in found.items() if value not in (None, False, "")}
        try:
            Settings.read(lambda setting: settings.get(setting.name))
        except SpecError as error:
            raise click.UsageError(printable(str(error))) from None
        command(settings=settings, **given)

    decorated: Callable[..., None] = with_settings
    for setting in reversed(ours):
        kind: dict[str, Any] = {"is_flag": True} if setting.flag else {"metavar": "|".join(setting.choices) or "TEXT"}
        words = f"{setting.help}; also {setting.env}."
        decorated = click.option(f"--{setting.name}", setting.key, envvar=setting.env, help=words, **kind)(decorated)
    return decorated


def catalog_root() -> Path:
    """Where the catalog is, by option, environment or default."""
    from pytest_vmbottle.catalog import default_root

    given: Path | None = click.get_current_context().obj
    return given.expanduser() if given is not None else default_root()


def open_catalog(*, make: bool = True) -> Catalog:
    """The catalog, made if it is not there, unless it is only looked at."""
    from pytest_vmbottle.catalog import Catalog

    return Catalog(catalog_root(), make=make)


def check_each(checks: Mapping[str, tuple[str, Callable[[], object]]]) -> None:
    """Writes for each label whether its check raises, and fails in the end if one did."""
    bad = 0
    for key, (label, check) in checks.items():
        try:
            check()
        except (CatalogError, OSError) as error:
            bad += 1
            click.echo(f"bad {key}")
            say(f"{label}: {error}")
        else:
            click.echo(f"ok  {key}")
    if bad:
        raise Failure(f"{bad} of {len(checks)} {'is' if bad == 1 else 'are'} not what was stored")
