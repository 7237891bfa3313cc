"""Options of a new machine: one for each keyword of the mark, and the settings."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytest_vmbottle.cli.command import as_packages, setting_options
from pytest_vmbottle.cli.words import LeadingOptions, env_option, pairs
from pytest_vmbottle.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["KEYWORDS", "WITHOUT_OPTION", "NewMachine", "given_keywords", "machine_options", "naming_options"]

_Decorator = Callable[[Callable[..., None]], Callable[..., None]]
_MAX_PORT = 65535


def _files(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, dict[str, str]]:
    files = {guest: Path(host).expanduser().absolute() for guest, host in pairs(ctx, parameter, values).items()}
    for path in files.values():
        if not path.is_file():
            raise click.BadParameter(f"there is no file {path}")
    # The daemon works in another folder, hence whole paths.
    return {guest: {"host": str(path)} for guest, path in files.items()}


def _shares(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    return {guest: str(Path(folder).expanduser().absolute()) for guest, folder in pairs(ctx, parameter, values).items()}


def _disks(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    # The daemon works in another folder, hence whole paths; a slash tells a path from a size.
    return {name: str(Path(value).absolute()) if "/" in value else value for name, value in pairs(ctx, parameter, values).items()}


def _whole_path(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    return str(Path(value).absolute()) if value else value


def _ports(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[int | list[int]]:
    ports: list[int | list[int]] = []
    for value in values:
        here, colon, port = value.rpartition(":")
        if not all(each.isdecimal() and 0 < int(each) <= _MAX_PORT for each in ((here, port) if colon else (port,))):
            raise click.BadParameter(f"{value!r} is neither a port of the guest, such as 80, nor HOST:GUEST, such as 8080:80")
        ports.append([int(port), int(here)] if colon else int(port))
    return ports


def _network(_: click.Context, __: click.Parameter, value: str | None) -> bool | str | list[str] | None:
    if value in (None, _NAT):
        return None if value is None else True
    # Names are checked with the spec, as those of a mark are.
    return str(value).split(",") if "/" in str(value) or "," in str(value) else str(value)


def _are_networks(value: str) -> bool:
    with suppress(ValueError):
        return all("/" in each and ipaddress.ip_network(each, strict=False) for each in value.split(","))
    return False


_NAT = "nat"

# The order of the help. The keywords and their meanings are those of `MachineSpec`, and each parameter has the name of its keyword.
KEYWORDS: dict[str, _Decorator] = {
    "cpus": click.option("--cpus", type=int, help="Virtual processors; 1 by default."),
    "cpu": click.option(
        "--cpu", metavar="MODEL", help="Model of the processors, with features, as QEMU names them; by default the best one here."
    ),
    "nested": click.option("--nested", is_flag=True, help="Let it run virtual machines itself, by KVM."),
    "memory": click.option("--memory", metavar="SIZE", help="RAM, such as 512M or 2G; 1G by default."),
    "disk": click.option("--disk", metavar="SIZE", help="Size of its disk; by default the image's own."),
    "disks": click.option(
        "--disks",
        multiple=True,
        metavar="NAME=SIZE|PATH",
        callback=_disks,
        help="Disk beside that one: an empty one of this size, or a disk image, which is not written to.",
    ),
    "display": click.option("--display", is_flag=True, help="Give it a screen and a keyboard, for `screenshot` and `send-keys`."),
    "network": click.option(
        "--network",
        is_flag=False,
        flag_value=_NAT,
        metavar="[LAN,...|CIDR,...]",
        callback=_network,
        help="Let it reach the network, or these networks only (smolvm), or the other machines of private LANs, by their names; by default "
        "it reaches nothing.",
    ),
    "ports": click.option(
        "-p",
        "--port",
        "ports",
        multiple=True,
        metavar="[HOST:]PORT",
        callback=_ports,
        help="TCP port of it to forward from this computer, from a free port or from HOST.",
    ),
    "packages": click.option(
        "--packages",
        "--package",
        "packages",
        multiple=True,
        metavar="PKG,...",
        callback=as_packages,
        help="Packages to install in it; saved in a pack, so they are installed once.",
    ),
    "files": click.option(
        "--file",
        "files",
        multiple=True,
        metavar="GUEST=HOST",
        callback=_files,
        help="File to write to it, after the packages: its path there, and a file of this computer.",
    ),
    "shares": click.option(
        "--share",
        "shares",
        multiple=True,
        metavar="GUEST=FOLDER",
        callback=_shares,
        help="Folder of this computer that it has at this path, too; it can write there.",
    ),
    "run": click.option(
        "--run", multiple=True, metavar="CMD", help="Shell command to run in it, after the files; saved in a pack as well."
    ),
    "user_data": click.option(
        "--user-data", type=click.File(encoding="utf-8"), metavar="FILE", help="User data for cloud-init; - is standard input."
    ),
    "kernel": click.option(
        "--kernel",
        metavar="FILE",
        callback=_whole_path,
        help="Kernel to boot, in place of the image's; with --append or --cmdline, as need be.",
    ),
    "initrd": click.option("--initrd", metavar="FILE", callback=_whole_path, help="Initial RAM disk for it."),
    "cmdline": click.option("--cmdline", metavar="WORDS", help="Command line of the kernel, in place of the image's."),
    "append": click.option("--append", metavar="WORDS", help="Words to add to the command line of the kernel, such as 'debug loglevel=7'."),
    "env": env_option,
    "user": click.option("--user", metavar="NAME", help="User that runs commands in it; root by default."),
    "arch": click.option("--arch", type=click.Choice(["x86_64", "aarch64"]), help="Its architecture; by default this computer's."),
    "fresh": click.option("--boot", "fresh", flag_value="boot", help="Boot it instead of restoring it from a pack."),
    "panic": click.option(
        "--panic",
        type=click.Choice(["fail", "expected"]),
        help="A kernel in trouble is an error, after which commands are refused, or it is expected.",
    ),
    "timeout": click.option(
        "--timeout", type=float, metavar="SECONDS", help="Seconds in which it must become ready; 120 by default, more if emulated."
    ),
}
WITHOUT_OPTION = {
    "name": "an option of its own beside those of the spec, since `run` and `start` take it differently",
    "backend": "a setting, whose option is made from the table of the settings",
    "capture": "recorded for the artifacts of a test, which a machine without one does not have",
    "cpu_clock": "for tests that count instructions",
    "track_writes": "for what a power cut of a test is to lose",
    "reset": "about machines that several tests share",
}
"""Keywords without an option in `KEYWORDS`, and the reasons."""

_OPTION_NAMES = {"ports": "--port", "files": "--file", "shares": "--share", "user_data": "--user-data", "fresh": "--boot"}


def machine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a new machine; the command gets them as `keywords` and `settings`."""

    @wraps(command)
    def with_keywords(settings: Mapping[str, str], **given: Any) -> None:
        keywords = given_keywords({key: given.pop(key) for key in KEYWORDS})
        # A keyword of the mark as well, and the stronger one.
        keywords |= {"backend": settings["backend"]} if "backend" in settings else {}
        command(keywords=keywords, settings=settings, **given)

    decorated: Callable[..., None] = setting_options()(with_keywords)
    # Decorators are applied from the last to the first.
    for option in reversed(KEYWORDS.values()):
        decorated = option(decorated)
    return decorated


def given_keywords(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those that were given, so that layers and the defaults of a spec hold for the others."""
    given = {key: value for key, value in values.items() if value is not False and value not in (None, (), [], {})}
    return given | {key: value.read() for key, value in given.items() if key == "user_data"} | _plain(given)


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) for key, value in given.items() if isinstance(value, tuple)}


@contextmanager
def naming_options() -> Iterator[None]:
    """Report an invalid spec as a wrong call, by the option that is wrong."""
    try:
        yield
    except SpecError as error:
        # Without the signature of the mark, which is for tests.
        told = str(error).partition("\n  the signature is")[0]
        keyword, assigned, _ = told.partition("=")
        option = _OPTION_NAMES.get(keyword, f"--{keyword}")
        raise click.BadParameter(told, param_hint=option if assigned and keyword.isidentifier() else "SOURCE") from None


class NewMachine(LeadingOptions):
    """Command with `machine_options`, whose `--network` takes a word only if it is meant for it."""

    def values(self, word: str, following: str) -> int:
        """Return the number of words that the option takes after its own."""
        if word == "--network":
            # click would give it any word that follows, here perhaps the name of an image.
            return int(following in (_NAT, "lan") or _are_networks(following))
        return super().values(word, following)
