"""Options of a run: command line, environment and ini file."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import attrs
import pytest

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.settings import SETTINGS, Setting, Settings
from pytest_vmbottle.shown import redact_variables
from pytest_vmbottle.spec import check_keywords

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Options"]

_PATHS = ("catalog", "output", "baselines", "durations")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the `--vm-*` options and their ini twins."""
    group = parser.getgroup("vmbottle", "real machines (pytest-vmbottle)")
    for setting in SETTINGS:
        text = f"{setting.sentence}. Also {setting.env} and ini {setting.ini}."
        if setting.flag:
            # Not `store_true`, whose default False could not be told from a flag that was not given, and would hide the environment.
            group.addoption(f"--vm-{setting.name}", action="store_const", const="true", default=None, help=text)
        else:
            # As text without a default, so that an option which was not given can be told from one that says the default.
            group.addoption(f"--vm-{setting.name}", metavar=setting.takes, default=None, help=text)
        kind: Literal["linelist", "string"] = "linelist" if setting.pairs else "string"
        parser.addini(setting.ini, setting.sentence, type=kind, default=None)
    parser.addini("vm_defaults", "Defaults for the keywords of the vm mark, one `keyword = value` per line", type="linelist", default=[])
    parser.addini(
        "vm_redact", "Names of environment variables whose values are hidden in all that is shown or recorded", type="linelist", default=[]
    )


@attrs.frozen(kw_only=True)
class Options(Settings):
    """Values of all options of a run, checked.

    Attributes:
        defaults: Default values of the vm mark's keywords.
    """

    defaults: Mapping[str, Any] = attrs.field(factory=dict)

    @classmethod
    def of(cls, config: pytest.Config) -> Self:
        """Read all options: the command line, then the environment, then the ini file.

        Raises:
            pytest.UsageError: An option has an invalid value.
        """
        try:
            told = cls.read(
                lambda setting: config.getoption(f"--vm-{setting.name}"),
                lambda setting: os.environ.get(setting.env),
                lambda setting: _in_ini(config, setting),
                prefix="--vm-",
            )
        except SpecError as error:
            raise pytest.UsageError(str(error)) from None
        # As early as this, so that no report of this process has shown the values before.
        redact_variables(os.environ, names=map(str.strip, config.getini("vm_redact")))
        return attrs.evolve(told, defaults=_defaults(config.getini("vm_defaults")))


def _in_ini(config: pytest.Config, setting: Setting) -> object:
    """Return the ini file's value; a path there is seen from the root folder, wherever pytest was started."""
    value = config.getini(setting.ini)
    if setting.pairs:
        return "\n".join(value or ())
    # An absolute path stays as it is: `/` of two paths takes the second one then.
    return config.rootpath / Path(value).expanduser() if setting.name in _PATHS and value else value


def _defaults(lines: list[str]) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for line in lines:
        try:
            # First as TOML, so that numbers and lists keep their types; a bare word is taken for a text.
            defaults.update(tomllib.loads(line))
        except tomllib.TOMLDecodeError:
            keyword, equals, value = line.partition("=")
            if not equals:
                raise pytest.UsageError(f"vm_defaults: {line!r} is not of the form keyword = value") from None
            defaults[keyword.strip()] = value.strip()
    try:
        check_keywords({key: value for key, value in defaults.items() if key != "source"})
    except SpecError as error:
        raise pytest.UsageError(f"vm_defaults: {error}") from None
    return defaults
