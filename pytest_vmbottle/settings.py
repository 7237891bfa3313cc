"""Settings of everything that starts machines: one table, for pytest and the command line alike.

Options, their help, environment variables, ini options and the documentation's table are made from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import attrs

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.host.sizes import parse_duration, parse_size
from pytest_vmbottle.spec.pack_kind import PackKind

if TYPE_CHECKING:
    from pytest_vmbottle.host.account import Account
    from pytest_vmbottle.spec.host_address import HostAddress

__all__ = ["SETTINGS", "Setting", "Settings", "parse_pairs"]


@attrs.frozen
class Setting:
    """One setting.

    Attributes:
        name: Its name with hyphens, as in options.
        default: The default value.
        help: Its purpose, for help texts.
        meaning: The effect of the default, in words.
        metavar: The kind of value, in a word for people.
        choices: All values that it takes, if they can be listed.
        flag: Whether it has no value, but is on or off.
        pairs: Whether it takes any number of `name = reference`, separated by commas or by the ends of lines.
        tests_only: Whether it applies to pytest only.
    """

    name: str
    default: str
    help: str
    meaning: str = attrs.field(default="", kw_only=True)
    metavar: str = attrs.field(default="", kw_only=True)
    choices: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    flag: bool = attrs.field(default=False, kw_only=True)
    pairs: bool = attrs.field(default=False, kw_only=True)
    tests_only: bool = attrs.field(default=False, kw_only=True)

    @property
    def key(self) -> str:
        """Its name as a Python identifier."""
        return self.name.replace("-", "_")

    @property
    def env(self) -> str:
        """Its environment variable."""
        return f"VMBOTTLE_{self.key.upper()}"

    @property
    def ini(self) -> str:
        """Its option in pytest's ini file."""
        return f"vm_{self.key}"

    @property
    def takes(self) -> str:
        """Placeholder of its value in help texts; empty for a flag."""
        return "|".join(self.choices) or self.metavar

    @property
    def sentence(self) -> str:
        """Help text with the default."""
        return f"{self.help} (default: {', '.join(part for part in (self.default, self.meaning) if part)})"


_PACK_KINDS = ("auto", *map(str, PackKind))

# The order of help texts and of the documentation. A test compares the table there with this one.
SETTINGS = (
    Setting("backend", "auto", "What runs machines: qemu, smolvm, or a name that a plugin knows", meaning="QEMU", metavar="NAME"),
    Setting(
        "accel",
        "auto",
        "How QEMU runs guest code",
        meaning="KVM if a test guest runs on it, else emulation",
        choices=("auto", "kvm", "hvf", "tcg"),
    ),
    Setting(
        "catalog",
        "",
        "Folder of images and packs, shared by all workers and runs",
        meaning="pytest-vmbottle in the user's cache folder",
        metavar="DIR",
        tests_only=True,
    ),  # the command line says it before its subcommand
    Setting(
        "missing",
        "",
        "What happens to tests if this host cannot run their machine",
        meaning="fail if CI is set, else skip",
        choices=("skip", "fail"),
        tests_only=True,
    ),
    Setting(
        "pack",
        "auto",
        "Kind of pack that machines are cloned from: template and stream have RAM, disk is booted",
        meaning="the best that works",
        choices=_PACK_KINDS,
    ),
    Setting("run-as", "", "User that QEMU runs as, if root starts it", meaning="root", metavar="USER[:GROUP]"),
    Setting("rebuild", "", "Build all packs of the run again, even if they exist", meaning="off", flag=True),
    Setting("timeout-factor", "1", "Multiply all time-outs by this number", metavar="NUMBER"),
    Setting(
        "memory-budget",
        "",
        "RAM for the machines of all workers and runs together",
        meaning="four fifths of the available memory",
        metavar="SIZE",
    ),
    Setting("infra-retries", "1", "How many times to try again, on a fresh machine, if one could not be provided", metavar="COUNT"),
    Setting(
        "registry",
        "",
        "Repository of an OCI registry that is asked for packs and images before they are made",
        meaning="none",
        metavar="HOST/NAME",
    ),
    Setting("registry-push", "", "Push the packs and images that are made to the registry", meaning="off", flag=True),
    Setting(
        "spares",
        "auto",
        "How many machines of a worker's next test are made while a test runs; `auto`: one, where a processor is left for it",
        metavar="COUNT",
        tests_only=True,
    ),
    Setting(
        "artifacts",
        "failed",
        "Which tests with machines leave artifacts: files that explain what happened",
        choices=("never", "failed", "always"),
        tests_only=True,
    ),
    Setting(
        "output",
        "",
        "Folder of the artifacts, which is emptied of those of an earlier run",
        meaning="vmbottle-artifacts in pytest's root folder",
        metavar="DIR",
        tests_only=True,
    ),
    Setting(
        "keep",
        "never",
        "Whose machines live on after the run, for `vmbottle machine shell`: of failed tests, or of all",
        choices=("never", "failed", "always"),
        tests_only=True,
    ),
    Setting("keep-for", "2h", "How long such a machine lives", metavar="DURATION", tests_only=True),
    Setting(
        "capsule",
        "never",
        "Which tests leave a capsule: their machines as they are at the failure, for `vmbottle replay`",
        choices=("never", "failed"),
        tests_only=True,
    ),
    Setting("fail-on-leak", "", "Fail a run that leaves machines, folders or locks behind", meaning="off", flag=True, tests_only=True),
    Setting(
        "baselines",
        "",
        "File of the instruction counts that `vm_benchmark` compares with",
        meaning="vm-baselines.json in pytest's root folder",
        metavar="FILE",
        tests_only=True,
    ),
    Setting("new-baselines", "", "Store the counts of this run as the baselines", meaning="off", flag=True, tests_only=True),
    Setting("shard", "", "Run one part of the suite, such as 2/4: see `vmbottle ci plan`", meaning="all", metavar="I/N", tests_only=True),
    Setting(
        "hosts",
        "",
        "Hosts on which the workers of pytest-xdist run",
        meaning="this one",
        metavar="ssh://HOST,...",
        tests_only=True,
    ),
    Setting(
        "durations",
        "",
        "JUnit report, or folder of reports, that says how long tests take: for --vm-shard",
        meaning="what pytest's cache has",
        metavar="PATH",
        tests_only=True,
    ),
    Setting(
        "smolvm-images",
        "",
        "References that replace image names with smolvm; an empty one is smolvm's own Alpine",
        meaning="none",
        metavar="NAME=REFERENCE,...",
        pairs=True,
    ),
)


@attrs.frozen(kw_only=True)
class Settings:
    """Values of all settings, checked.

    Attributes:
        backend: Name of the backend, or `auto`.
        accelerator: Name of QEMU's accelerator, or `auto`.
        catalog: The catalog's folder; empty for the user's own.
        skips_missing: Whether a test whose machine this host cannot run is skipped, rather than an error.
        pack_kind: The only kind of pack to clone machines from, if any.
        account: The account that QEMU runs as; None for our own.
        rebuild: Whether packs are made again.
        timeout_factor: Factor of all time-outs.
        memory_budget: Bytes of RAM for all machines; None for a part of the available memory.
        infra_retries: Number of retries for a machine that could not be started.
        registry: The repository that is asked for packs and images; empty for none.
        registry_push: Whether what is made goes there.
        spares: How many machines are made before they are asked for; None for one where a processor is left for it.
        artifacts: Which tests leave artifacts: `never`, `failed` or `always`.
        output: The folder of artifacts; empty for the default.
        keep: Whose machines live on after the run: `never`, `failed` or `always`.
        keep_seconds: Seconds that they live.
        capsule: Which tests leave a capsule: `never` or `failed`.
        fail_on_leak: Whether a run that leaves something behind fails.
        baselines: The file of instruction counts; empty for the default.
        new_baselines: Whether the counts of this run replace those in it.
        shard: The number of this part of the suite, and of how many; None for all of it.
        hosts: The hosts of workers; none for this one.
        durations: The report of how long tests take; empty for pytest's cache.
        images: References by image name, for a backend with images of its own.
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
    registry: str
    registry_push: bool
    spares: int | None
    artifacts: str
    output: str
    keep: str
    keep_seconds: float
    capsule: str
    fail_on_leak: bool
    baselines: str
    new_baselines: bool
    shard: tuple[int, int] | None
    hosts: tuple[HostAddress, ...]
    durations: str
    images: Mapping[str, str]

    def backend_for(self, asked: str = "auto") -> str:
        """Return the name of the backend that a machine asks for: `auto` is the setting, and that by default QEMU."""
        wanted = self.backend if asked == "auto" else asked
        return "qemu" if wanted == "auto" else wanted

    def spares_of(self, workers: int) -> int:
        """Return how many machines each of so many workers may make before they are asked for."""
        if self.spares is not None:
            return self.spares
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return int(processors > workers)

    @classmethod
    def read(cls, *sources: Callable[[Setting], object], prefix: str = "--") -> Self:
        """Read all settings; the first source that has a value counts, then the default.

        Args:
            sources: Functions that return a setting's value; None or an empty text for none.
            prefix: Prefix of options, for messages.

        Raises:
            SpecError: A setting has an invalid value; the message begins with its option.
        """

        def given(name: str, read: Callable[[str], Any]) -> Any:
            setting = next(each for each in SETTINGS if each.name == name)
            found = (source(setting) for source in sources)
            # An empty value counts as none, so that an environment variable can be emptied to get the default.
            text = next((str(value) for value in found if value not in (None, "")), setting.default)
            try:
                if setting.choices and text and text not in setting.choices:
                    raise SpecError(f"takes {' or '.join(setting.choices)}, not {text!r}")
                return read(text)
            except SpecError as error:
                # Messages of our own go on after the option's name; those of parsers stand alone.
                between = " " if str(error).startswith("takes ") else ": "
                raise SpecError(f"{prefix}{name}{between}{error}") from None

        # All fields, so that a wrong setting is told even if nothing uses it in this run.
        found = cls(**{field: given(name, read) for field, (name, read) in _FIELDS.items()})
        if found.registry_push and not found.registry:
            raise SpecError(f"{prefix}registry-push: to where? Give {prefix}registry as well")
        if found.hosts and found.new_baselines:
            raise SpecError(f"{prefix}new-baselines stores the counts of this host: leave {prefix}hosts out")
        return found


def _is_yes(text: str) -> bool:
    # As people write it in environment variables and ini files.
    return text.lower() not in ("", "0", "false", "no", "off")


def _skips(text: str) -> bool:
    # CI services set CI. There a skipped test looks like a passed one, while a developer may have no KVM.
    return (text or ("fail" if os.environ.get("CI") else "skip")) == "skip"


def _pack_kind(text: str) -> PackKind | None:
    return None if text == "auto" else PackKind(text)


def _timeout_factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    # NaN fails here too. A factor of 0 would let every wait end at once.
    if not 0 < factor < float("inf"):
        raise SpecError(f"takes a number above 0, not {text!r}")
    return factor


def _memory_budget(text: str) -> int | None:
    return parse_size(text) if text else None


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:  # noqa: PLR2004 - more is a mistake
        raise SpecError(f"takes a whole number, 0 or more, not {text!r}")
    return int(text)


def _spares(text: str) -> int | None:
    return None if text == "auto" else _count(text)


def _registry(text: str) -> str:
    if not text:
        return text
    # Imported here and not above: most runs have no registry.
    from importlib.util import find_spec

    from pytest_vmbottle.spec.reference import Reference

    if find_spec("oras") is None:
        raise SpecError("needs the library oras: pip install 'pytest-vmbottle[oci]'")
    if Reference.parse(text).artifact:
        raise SpecError(f"takes a repository, HOST/NAME, and not one artifact in it: {text!r}")
    return text


def _hosts(text: str) -> tuple[HostAddress, ...]:
    if not text:
        return ()
    # Imported here and not above: most runs are on one host.
    from pytest_vmbottle.spec.host_address import HostAddress

    return HostAddress.parse_all(text)


def _shard(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
    if text and (match is None or not 1 <= int(match[1]) <= int(match[2])):
        raise SpecError(f"takes I/N with I from 1 to N, such as 2/4, not {text!r}")
    return (int(match[1]), int(match[2])) if match else None


def parse_pairs(text: str) -> dict[str, str]:
    """Parse `name = reference` entries into a dictionary.

    >>> parse_pairs("debian-12 =, web = './web.tar'")
    {'debian-12': '', 'web': './web.tar'}

    Raises:
        SpecError: An entry is not a pair.
    """
    pairs = {}
    # By line ends as well, for ini files.
    for entry in filter(None, map(str.strip, re.split("[,\\n]", text))):
        name, equals, reference = (part.strip() for part in entry.partition("="))
        if not equals or not name:
            raise SpecError(f"{entry!r} is not of the form name = reference")
        # Quotes are accepted, as in TOML.
        pairs[name] = reference.strip("\"'")
    return pairs


def _account(text: str) -> Account | None:
    """Return the account that QEMU runs as, if root starts it.

    Nobody but root can choose that, and nobody else needs to: it may stand in an ini file for all.
    """
    if not text or os.geteuid() != 0:
        return None
    # Imported here and not above: most runs have no need of it, nor of what it takes.
    from pytest_vmbottle.host.account import Account

    return Account.parse(text)


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
    "infra_retries": ("infra-retries", _count),
    "registry": ("registry", _registry),
    "registry_push": ("registry-push", _is_yes),
    "spares": ("spares", _spares),
    "artifacts": ("artifacts", str),
    "output": ("output", str),
    "keep": ("keep", str),
    "keep_seconds": ("keep-for", parse_duration),
    "capsule": ("capsule", str),
    "fail_on_leak": ("fail-on-leak", _is_yes),
    "baselines": ("baselines", str),
    "new_baselines": ("new-baselines", _is_yes),
    "shard": ("shard", _shard),
    "hosts": ("hosts", _hosts),
    "durations": ("durations", str),
    "images": ("smolvm-images", parse_pairs),
}
