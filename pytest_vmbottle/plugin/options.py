"""What a run was told on the command line, in the environment and in the ini file."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs
import pytest

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.settings import SETTINGS, Setting, Settings
from pytest_vmbottle.spec import check_keywords

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Options"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the `--vm-*` options and their ini twins."""
    group = parser.getgroup("vmbottle", "real machines (pytest-vmbottle)")
    for setting in SETTINGS:
        text = f"{setting.help}. Also {setting.env} and ini vm_{setting.key}."
        if setting.flag:
            group.addoption(f"--vm-{setting.name}", action="store_const", const="true", default=None, help=text)
        else:
            group.addoption(f"--vm-{setting.name}", metavar="|".join(setting.choices) or None, default=None, help=text)
        parser.addini(f"vm_{setting.key}", setting.help, default=None)
    parser.addini(
        "vm_smolvm_images",
        "What names of images stand for with smolvm, one `name = reference` per line; an empty reference is smolvm's own Alpine",
        type="linelist",
        default=[],
    )
    parser.addini("vm_defaults", "Defaults for the keywords of the vm mark, one `keyword = value` per line", type="linelist", default=[])


@attrs.frozen(kw_only=True)
class Options(Settings):
    """All that a run was told, checked.

    Attributes:
        defaults: Of the keywords of the vm mark.
        smolvm_images: What names of images stand for with smolvm.
    """

    defaults: Mapping[str, Any] = attrs.field(factory=dict)
    smolvm_images: Mapping[str, str] = attrs.field(factory=dict)

    @classmethod
    def of(cls, config: pytest.Config) -> Self:
        """Reads them all: the command line goes before the environment, and that before the ini file.

        Raises:
            pytest.UsageError: One has a value that makes no sense.
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
        return attrs.evolve(
            told, defaults=_defaults(config.getini("vm_defaults")), smolvm_images=_smolvm_images(config.getini("vm_smolvm_images"))
        )


def _in_ini(config: pytest.Config, setting: Setting) -> object:
    """What the ini file says; a folder there is seen from the root folder, wherever pytest was started."""
    value = config.getini(f"vm_{setting.key}")
    return config.rootpath / Path(value).expanduser() if setting.name == "catalog" and value else value


def _defaults(lines: list[str]) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for line in lines:
        try:
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


def _smolvm_images(lines: list[str]) -> dict[str, str]:
    images = {}
    for line in lines:
        name, equals, reference = (part.strip() for part in line.partition("="))
        if not equals or not name:
            raise pytest.UsageError(f"vm_smolvm_images: {line!r} is not of the form name = reference")
        images[name] = reference.strip("\"'")
    return images
