"""What all that starts machines is told: one table, and the values as they hold for pytest and for the command line alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import attrs

from pytest_vmbottle._os import parse_size
from pytest_vmbottle.backend import PackKind
from pytest_vmbottle.errors import SpecError

if TYPE_CHECKING:
    from pytest_vmbottle.backends.qemu import Account

__all__ = ["SETTINGS", "Setting", "Settings"]


@attrs.frozen
class Setting:
    """One of them.

    Attributes:
        name: With hyphens, as in options.
        default: What holds if nobody says anything.
        help: What it decides.
        choices: All values that it takes, if they can be listed.
        flag: Whether it is on or off.
        tests_only: Whether it means nothing without pytest.
    """

    name: str
    default: str
    help: str
    choices: tuple[str, ...] = ()
    flag: bool = False
    tests_only: bool = False

    @property
    def key(self) -> str:
        """Its name as a word of Python and of ini files, there after `vm_`."""
        return self.name.replace("-", "_")

    @property
    def env(self) -> str:
        """The environment variable that says it."""
        return f"VMBOTTLE_{self.key.upper()}"


_PACK_KINDS = ("auto", *map(str, PackKind))

SETTINGS = (
    Setting("backend", "auto", "What runs machines: auto, qemu, smolvm, or a name that a plugin knows"),
    Setting("accel", "auto", "How QEMU runs guest code", ("auto", "kvm", "hvf", "tcg")),
    Setting(
        "catalog", "", "Folder shared by all workers and runs (default: pytest-vmbottle in the user's cache folder)", tests_only=True
    ),  # the command line says it before its subcommand
    Setting(
        "missing",
        "",
        "What becomes of tests whose machine this host cannot run (default: fail if CI is set, else skip)",
        ("skip", "fail"),
        tests_only=True,
    ),
    Setting("pack", "auto", "Kind of pack that machines are poured from: template and stream have RAM, disk is booted", _PACK_KINDS),
    Setting("run-as", "", "User, or user:group, that QEMU runs as where root starts it (default: root)"),
    Setting("rebuild", "", "Make all packs that are used again", flag=True),
    Setting("timeout-factor", "1", "Multiply all time-outs with this number"),
    Setting("memory-budget", "", "RAM that the machines of all workers and runs have together (default: four fifths of what is to spare)"),
    Setting("infra-retries", "1", "How often a machine that could not be provided is tried again, on a fresh one"),
    Setting("fail-on-leak", "", "Fail a run that leaves machines, folders or locks behind", flag=True, tests_only=True),
)


@attrs.frozen(kw_only=True)
class Settings:
    """All that was told, checked.

    Attributes:
        backend: What runs machines, or `auto`.
        accelerator: How QEMU runs guest code, or `auto`.
        catalog: The folder; empty for the user's own.
        skips_missing: Whether a test whose machine this host cannot run is skipped, rather than an error.
        pack_kind: The only kind of pack that is to be poured from, if any.
        account: Who QEMU runs as, if not who starts it.
        rebuild: Whether packs are made again.
        timeout_factor: What all time-outs are multiplied with.
        memory_budget: In bytes; None for a share of what is to spare.
        infra_retries: How often a machine that could not be provided is tried again.
        fail_on_leak: Whether a run fails that leaves something behind.
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

    @classmethod
    def read(cls, *sources: Callable[[Setting], object], prefix: str = "--") -> Self:
        """Reads them all; the first source that says something of one counts, then its default.

        Args:
            sources: Give what is said of a setting; None or an empty text for nothing.
            prefix: What options begin with: for messages.

        Raises:
            SpecError: One has a value that makes no sense; the message begins with its option.
        """

        def given(name: str, read: Callable[[str], Any]) -> Any:
            setting = next(each for each in SETTINGS if each.name == name)
            found = (source(setting) for source in sources)
            text = next((str(value) for value in found if value not in (None, "")), setting.default)
            try:
                if setting.choices and text and text not in setting.choices:
                    raise SpecError(f"takes {' or '.join(setting.choices)}, not {text!r}")
                return read(text)
            except SpecError as error:
                between = " " if str(error).startswith("takes ") else ": "
                raise SpecError(f"{prefix}{name}{between}{error}") from None

        return cls(**{field: given(name, read) for field, (name, read) in _FIELDS.items()})


def _is_yes(text: str) -> bool:
    return text.lower() not in ("", "0", "false", "no", "off")


def _skips(text: str) -> bool:
    return (text or ("fail" if os.environ.get("CI") else "skip")) == "skip"


def _pack_kind(text: str) -> PackKind | None:
    return None if text == "auto" else PackKind(text)


def _timeout_factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise SpecError(f"takes a number above 0, not {text!r}")
    return factor


def _memory_budget(text: str) -> int | None:
    return parse_size(text) if text else None


def _infra_retries(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:  # noqa: PLR2004 - more is a mistake
        raise SpecError(f"takes a whole number, 0 or more, not {text!r}")
    return int(text)


def _account(text: str) -> Account | None:
    """Who QEMU runs as. Nobody but root can choose that, and nobody else needs to: it may stand in an ini file for all."""
    if not text:
        return None
    # Imported here and not above: most runs have no need of it, nor of what it takes.
    from pytest_vmbottle.backends.qemu import Account

    account = Account.parse(text)
    return account if os.geteuid() == 0 else None


_FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "backend": ("backend", str),
    "accelerator": ("accel", str),
    "catalog": ("catalog", str),
    "skips_missing": ("missing", _skips),
    "pack_kind": ("pack", _pack_kind),
    "account": ("run-as", _account),
    "rebuild": ("rebuild", _is_yes),
    "timeout_factor": ("timeout-factor", _timeout_factor),
    "memory_budget": ("memory-budget", _memory_budget),
    "infra_retries": ("infra-retries", _infra_retries),
    "fail_on_leak": ("fail-on-leak", _is_yes),
}
