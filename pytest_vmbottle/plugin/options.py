"""What a run was told on the command line, in the environment and in the ini file."""

from __future__ import annotations

import os
import tomllib
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from pytest_vmbottle._os import parse_size
from pytest_vmbottle.backend import PackKind
from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.spec import check_keywords

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_vmbottle.backends.qemu import Account

__all__ = ["Options"]


@attrs.frozen
class _Option:
    name: str
    default: str
    help: str
    choices: tuple[str, ...] = ()
    flag: bool = False

    @property
    def ini(self) -> str:
        return f"vm_{self.name.replace('-', '_')}"

    @property
    def env(self) -> str:
        return f"VMBOTTLE_{self.name.replace('-', '_').upper()}"


_PACK_KINDS = ("auto", *map(str, PackKind))

_OPTIONS = (
    _Option("backend", "auto", "What runs machines: auto, qemu, smolvm, or a name that a plugin knows"),
    _Option("accel", "auto", "How QEMU runs guest code", ("auto", "kvm", "hvf", "tcg")),
    _Option("catalog", "", "Folder shared by all workers and runs (default: pytest-vmbottle in the user's cache folder)"),
    _Option(
        "missing", "", "What becomes of tests whose machine this host cannot run (default: fail if CI is set, else skip)", ("skip", "fail")
    ),
    _Option("pack", "auto", "Kind of pack that machines are poured from: template and stream have RAM, disk is booted", _PACK_KINDS),
    _Option("run-as", "", "User, or user:group, that QEMU runs as where pytest runs as root (default: root)"),
    _Option("rebuild", "", "Make all packs of this run again", flag=True),
    _Option("timeout-factor", "1", "Multiply all time-outs with this number"),
    _Option("memory-budget", "", "RAM that the machines of all workers and runs have together (default: four fifths of what is to spare)"),
    _Option("infra-retries", "1", "How often a machine that could not be provided is tried again, on a fresh one"),
    _Option("fail-on-leak", "", "Fail a run that leaves machines, folders or locks behind", flag=True),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the `--vm-*` options and their ini twins."""
    group = parser.getgroup("vmbottle", "real machines (pytest-vmbottle)")
    for option in _OPTIONS:
        text = f"{option.help}. Also {option.env} and ini {option.ini}."
        if option.flag:
            group.addoption(f"--vm-{option.name}", action="store_const", const="true", default=None, help=text)
        else:
            group.addoption(f"--vm-{option.name}", metavar="|".join(option.choices) or None, default=None, help=text)
        parser.addini(option.ini, option.help, default=None)
    parser.addini(
        "vm_smolvm_images",
        "What names of images stand for with smolvm, one `name = reference` per line; an empty reference is smolvm's own Alpine",
        type="linelist",
        default=[],
    )
    parser.addini("vm_defaults", "Defaults for the keywords of the vm mark, one `keyword = value` per line", type="linelist", default=[])


@attrs.frozen(kw_only=True)
class Options:
    """All that a run was told, checked.

    Attributes:
        backend: What runs machines, or `auto`.
        accelerator: How QEMU runs guest code, or `auto`.
        catalog: The folder; empty for the user's own.
        skips_missing: Whether a test whose machine this host cannot run is skipped, rather than an error.
        pack_kind: The only kind of pack that is to be poured from, if any.
        account: Who QEMU runs as, if not who runs pytest.
        rebuild: Whether packs are made again.
        timeout_factor: What all time-outs are multiplied with.
        memory_budget: In bytes; None for a share of what is to spare.
        infra_retries: How often a machine that could not be provided is tried again.
        fail_on_leak: Whether a run fails that leaves something behind.
        defaults: Of the keywords of the vm mark.
        smolvm_images: What names of images stand for with smolvm.
    """

    backend: str
    accelerator: str
    catalog: str
    skips_missing: bool
    pack_kind: PackKind | None
    account: Account | None
    rebuild: bool
    timeout_factor: float
    memory_budget: int | None
    infra_retries: int
    fail_on_leak: bool
    defaults: Mapping[str, Any]
    smolvm_images: Mapping[str, str]

    @classmethod
    def read(cls, config: pytest.Config) -> Options:
        """Reads them all.

        Raises:
            pytest.UsageError: One has a value that makes no sense.
        """
        given = {option.name: _value(config, option) for option in _OPTIONS}
        return cls(
            backend=given["backend"],
            accelerator=given["accel"],
            catalog=given["catalog"],
            skips_missing=(given["missing"] or ("fail" if os.environ.get("CI") else "skip")) == "skip",
            pack_kind=None if given["pack"] == "auto" else PackKind(given["pack"]),
            account=_account(given["run-as"]),
            rebuild=_is_yes(given["rebuild"]),
            timeout_factor=_timeout_factor(given["timeout-factor"]),
            memory_budget=_memory_budget(given["memory-budget"]),
            infra_retries=_infra_retries(given["infra-retries"]),
            fail_on_leak=_is_yes(given["fail-on-leak"]),
            defaults=_defaults(config.getini("vm_defaults")),
            smolvm_images=_smolvm_images(config.getini("vm_smolvm_images")),
        )


def _value(config: pytest.Config, option: _Option) -> str:
    """The value of an option: from the command line, the environment, the ini file, or its default."""
    given = (config.getoption(f"--vm-{option.name}"), os.environ.get(option.env), config.getini(option.ini))
    value = next((str(each) for each in given if each not in (None, "")), option.default)
    if option.choices and value and value not in option.choices:
        raise pytest.UsageError(f"--vm-{option.name} takes {' or '.join(option.choices)}, not {value!r}")
    return value


def _is_yes(text: str) -> bool:
    return text.lower() not in ("", "0", "false", "no", "off")


def _timeout_factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise pytest.UsageError(f"--vm-timeout-factor takes a number above 0, not {text!r}")
    return factor


def _memory_budget(text: str) -> int | None:
    try:
        return parse_size(text) if text else None
    except SpecError as error:
        raise pytest.UsageError(f"--vm-memory-budget: {error}") from None


def _infra_retries(text: str) -> int:
    if not text.isdecimal():
        raise pytest.UsageError(f"--vm-infra-retries takes a whole number, 0 or more, not {text!r}")
    return int(text)


def _account(text: str) -> Account | None:
    """Who QEMU runs as. Nobody but root can choose that, and nobody else needs to: it may stand in an ini file for all."""
    if not text:
        return None
    from pytest_vmbottle.backends.qemu import Account

    try:
        account = Account.parse(text)
    except SpecError as error:
        raise pytest.UsageError(f"--vm-run-as: {error}") from None
    return account if os.geteuid() == 0 else None


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
