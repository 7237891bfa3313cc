"""The `vmbottle` command: what this host can do, images, and packs.

Data goes to stdout and words to stderr. The exit status is 0 for done, 1 for failed, 2 for called wrongly, 3 for what this host cannot do.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from pytest_vmbottle._os import Deadline, format_size, parse_size, size_on_disk
from pytest_vmbottle.errors import BackendUnavailable, CatalogError, PackCorrupt, SpecError, VMBottleError
from pytest_vmbottle.result import printable

if TYPE_CHECKING:
    from pytest_vmbottle.catalog import Catalog
    from pytest_vmbottle.images import DeclaredImage, Image, ImageStore, Traits
    from pytest_vmbottle.packs import Pack

__all__ = ["main"]

_CANNOT, _INTERRUPTED = 3, 130
_BUILD_SECONDS = 3600.0
_SHORT = 12
"""Digits of a key that are shown."""


class _Failure(click.ClickException):
    """Ends the command with a sentence on stderr."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class _Cannot(_Failure):
    """The same, because of this host."""

    exit_code = _CANNOT


class _Commands(click.Group):
    """A group that turns errors into sentences, and being stopped into an orderly end."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command."""
        try:
            with _ended_in_order():
                return super().invoke(ctx)
        except VMBottleError as error:
            raise (_Cannot if isinstance(error, BackendUnavailable) else _Failure)(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has had enough; click ends us quietly
                raise
            raise _Failure(": ".join(str(part) for part in (error.filename, error.strerror or error) if part)) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(_INTERRUPTED)


@contextmanager
def _ended_in_order() -> Iterator[None]:
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
def _undisturbed() -> Iterator[None]:
    """Has signals wait for the end of a short block that must not be left half done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- parameters and output -------------------------------------------------------------------------------------------------------------


def _size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_size(value)
    except SpecError as error:
        raise click.BadParameter(str(error)) from None


def _duration(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is not a duration: write a number and s, m, h, d or w, such as '12h' or '7d'")
    return float(match[1]) * units[match[2]]


def _packages(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[str]:
    return [package for value in values for package in value.replace(",", " ").split()]


def _examples(*lines: str) -> str:
    """The end of a help text; the mark keeps the lines apart."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _say(words: str) -> None:
    click.echo(printable(words), err=True)


def _emit(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def _line(text: object) -> str:
    """The text on one line, safe on a terminal: names come from users, versions from programs."""
    return " ".join(printable(str(text)).split())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Writes aligned columns."""
    lines = [tuple(head), *(tuple(map(_line, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _age(seconds: float) -> str:
    """How long ago, roughly.

    >>> _age(200), _age(200_000)
    ('3 min', '2 d')
    """
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


_as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON.")


# -- the command -----------------------------------------------------------------------------------------------------------------------


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_examples("vmbottle doctor", "vmbottle image build debian-12", "vmbottle pack ls", "vmbottle pack prune --older-than 7d"),
)
@click.option(
    "--catalog",
    metavar="DIR",
    envvar="VMBOTTLE_CATALOG",
    type=click.Path(path_type=Path),
    help="Folder of images and packs; also VMBOTTLE_CATALOG. By default pytest-vmbottle in your cache folder.",
)
@click.version_option(package_name="pytest-vmbottle")
@click.pass_context
def main(ctx: click.Context, catalog: Path | None) -> None:
    """Real machines for pytest: what this computer can do, base images, and packs.

    Images and packs lie in a folder that all test runs share, the catalog. pytest fills it by itself when tests need it; these commands
    prepare it, show it and tidy it up.

    The exit status is 0 for done, 1 for failed, 2 for called wrongly, 3 for what this computer cannot do.
    """
    ctx.obj = catalog


def _root() -> Path:
    from pytest_vmbottle.catalog import default_root

    given: Path | None = click.get_current_context().obj
    return given.expanduser() if given is not None else default_root()


def _catalog() -> Catalog:
    from pytest_vmbottle.catalog import Catalog

    return Catalog(_root())


@main.command(
    epilog=_examples("vmbottle doctor", "vmbottle doctor --accel kvm", "vmbottle doctor --json | jq '.[] | select(.state != \"ok\")'")
)
@click.option(
    "--accel",
    type=click.Choice(["auto", "kvm", "hvf", "tcg"]),
    default="auto",
    envvar="VMBOTTLE_ACCEL",
    show_default=True,
    help="What machines are to be run with.",
)
@_as_json
def doctor(*, accel: str, as_json: bool) -> None:
    """Try out what this computer can do, and what mends the rest.

    Nothing is believed that was not tried: an accelerator has to run a guest, and a machine's RAM has to be restored. What was proved is
    remembered until the next boot or another QEMU.

    Each line has a state (ok, degraded, missing or unknown), a topic and a sentence; a command that mends it stands below. The exit status
    is 0 if machines can be run, else 3.
    """
    import attrs

    from pytest_vmbottle.doctor import can_run, examine

    findings = examine(_root(), accel=accel)
    if as_json:
        _emit([attrs.asdict(finding) for finding in findings])
    else:
        colours = {"ok": "green", "degraded": "yellow", "missing": "red", "unknown": "magenta"}
        for finding in findings:
            state = click.style(f"{finding.state:8}", fg=colours[finding.state])
            click.echo(f"{state}  {finding.topic:15}  {_line(finding.text)}")
            if finding.remedy:
                click.echo(f"{'':10}{'':15}  {_line(finding.remedy)}")
    if not can_run(findings):
        _say("No machine can be run here.")
        click.get_current_context().exit(_CANNOT)


# -- images ----------------------------------------------------------------------------------------------------------------------------


@main.group(
    epilog=_examples("vmbottle image build debian-12", "vmbottle image pull fedora-44", "vmbottle image add disk.qcow2 --name mine")
)
def image() -> None:
    """Base images, from which machines start."""


def _traits(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that say what a disk does not tell; the command gets them as `arch` and `traits`."""

    @click.option("--arch", type=click.Choice(["x86_64", "aarch64"]), help="What it runs on; by default what this computer is.")
    @click.option("--firmware", type=click.Choice(["bios", "uefi"]), help="What boots it; by default uefi for aarch64, else bios.")
    @click.option("--user", default="", metavar="NAME", help="The user that its cloud-init gives our SSH key.")
    @click.option(
        "--ready-when",
        "readiness",
        type=click.Choice(["cloud-init", "channel"]),
        default="cloud-init",
        show_default=True,
        help="A booted machine is ready when cloud-init has ended, or as soon as a command can be run in it.",
    )
    @wraps(command)
    def with_traits(*, arch: str | None, firmware: str | None, user: str, readiness: str, **rest: Any) -> None:
        from pytest_vmbottle.images import Traits, default_firmware
        from pytest_vmbottle.spec import host_arch

        arch = arch or host_arch()
        try:
            traits = Traits(firmware=firmware or default_firmware(arch), user=user, readiness=readiness)  # type: ignore[arg-type]
        except ValueError:
            raise click.BadParameter(f"{user!r} is not the name of a user", param_hint="--user") from None
        command(arch=arch, traits=traits, **rest)

    return with_traits


def _images(catalog: Catalog) -> ImageStore:
    from pytest_vmbottle.images import ImageStore

    return ImageStore(catalog.images)


@image.command(
    epilog=_examples(
        "vmbottle image build debian-12",
        "vmbottle image build debian-12 --include nginx,curl --name debian-web",
    )
)
@click.argument("recipe")
@click.option("--include", metavar="PKG,PKG", multiple=True, callback=_packages, help="More packages to have in it.")
@click.option("--name", help="What to call it, if not like the recipe.")
def build(*, recipe: str, include: list[str], name: str | None) -> None:
    """Build a base image from a RECIPE, such as debian-12; one of that name that is there is replaced.

    RECIPE may also be the name of an image that the project around the current folder declares, in its pyproject.toml or vmbottle.toml;
    if it is to be downloaded, that is done.

    This takes a minute or two, as root or not. Packages come from this computer's own sources. Two builds of the same image at once do
    the work once. The image's name and sha256 are written to stdout.
    """
    from pytest_vmbottle import images

    declared = _declared().get(recipe)
    if declared is not None:
        if include or name:
            raise click.UsageError(f"{recipe} is declared in {declared.origin}: its name and packages stand there")
        _make_declared(declared)
        return
    catalog = _catalog()
    store, name = _images(catalog), name or recipe
    images.store.check_name(name)
    before = _stored(store, name)
    with catalog.lock(f"image-{name}", deadline=Deadline(_BUILD_SECONDS), waiting=_say, label=f"the image {name}"):
        built = _stored(store, name)
        if built is None or built == before or not _is_of(built, recipe, include):
            built = images.build(store, recipe, name=name, include=include, progress=_say)
    click.echo(f"{built.name} {built.sha256}")


def _declared() -> dict[str, DeclaredImage]:
    """The images that the project around this folder declares."""
    from pytest_vmbottle.images import find_declared_images

    try:
        return find_declared_images(Path.cwd())
    except SpecError as error:
        raise click.UsageError(printable(str(error))) from None


def _make_declared(declared: DeclaredImage) -> None:
    from pytest_vmbottle.images import PULL_SECONDS

    catalog = _catalog()
    store, name = _images(catalog), declared.stored_name
    before = _stored(store, name)
    deadline = Deadline(PULL_SECONDS if declared.kind == "url" else _BUILD_SECONDS)
    with catalog.lock(f"image-{name}", deadline=deadline, waiting=_say, label=f"the image {declared.name}"):
        made = _stored(store, name)
        if made is None or made == before:
            made = declared.make(store, progress=_say)
    click.echo(f"{declared.name} {made.sha256}")


def _stored(store: ImageStore, name: str) -> Image | None:
    with suppress(CatalogError):  # a damaged one is built again
        return store.get(name)
    return None


def _is_of(found: Image, recipe: str, include: Sequence[str]) -> bool:
    """Whether somebody else, for whom we have waited, built just this."""
    from pytest_vmbottle.images import RECIPES

    described, _, extras = found.description.partition(", with ")
    return recipe in RECIPES and described == RECIPES[recipe].description and extras == ", ".join(include)


@image.command(
    epilog=_examples(
        "vmbottle image pull fedora-44",
        "vmbottle image pull debian-13 --name debian-13-cloud",
        "vmbottle image pull ubuntu-24.04 --update",
        "vmbottle image pull https://example.org/disk.qcow2 --sha256 1f3a... --name mine",
    )
)
@click.argument("source", metavar="NAME|URL")
@click.option("--name", help="What to call it, if not like the official image; needed with a URL.")
@click.option("--sha256", help="With a URL: the digest that the file must have.")
@click.option("--update", is_flag=True, help="Replace an image of this name that has another content.")
@click.option("--offline", is_flag=True, help="Download nothing: fail if it is not there.")
@_traits
def pull(  # noqa: PLR0913 - one for each option
    *, source: str, name: str | None, sha256: str | None, update: bool, offline: bool, arch: str, traits: Traits
) -> None:
    """Download the official cloud image NAME of a distribution, or a disk image from a URL.

    `vmbottle image ls --available` lists the official ones. What was downloaded must have the checksum that the distribution publishes
    beside it, or the --sha256 that is given here. If the image is there already and still the published one, nothing is downloaded; if
    another one is published by now, --update takes it. A download that was interrupted goes on when the command is run again.

    Only https is used, through the proxy that HTTPS_PROXY names. An image for another architecture than this computer's is called
    NAME-ARCH. The image's name and sha256 are written to stdout.
    """
    from pytest_vmbottle import images

    by_url = "://" in source
    _check_pull(by_url=by_url, name=name, sha256=sha256)
    name = name or images.pulled_name(source, arch)
    images.store.check_name(name)
    catalog = _catalog()
    deadline = Deadline(images.PULL_SECONDS)
    with (
        catalog.lock(f"image-{name}", deadline=deadline, waiting=_say, label=f"the image {name}"),
        _meter() as (progress, meter, every),
    ):
        options = images.PullOptions(update=update, offline=offline, progress=progress, meter=meter, every=every)
        if by_url:
            pulled = images.pull_url(_images(catalog), source, sha256=str(sha256), name=name, arch=arch, traits=traits, options=options)
        else:
            pulled = images.pull(_images(catalog), source, name=name, arch=arch, options=options)
    click.echo(f"{pulled.name} {pulled.sha256}")


def _check_pull(*, by_url: bool, name: str | None, sha256: str | None) -> None:
    if by_url and not (name and sha256):
        raise click.UsageError("a URL needs --name, and --sha256 with the digest that whoever made the image publishes")
    if not by_url:
        context = click.get_current_context()
        given = [
            option
            for option, parameter in (("--sha256", "sha256"), ("--firmware", "firmware"), ("--user", "user"), ("--ready-when", "readiness"))
            if context.get_parameter_source(parameter) is ParameterSource.COMMANDLINE
        ]
        if given:
            raise click.UsageError(f"{', '.join(given)} goes with a URL: of an official image this is known")


@contextmanager
def _meter() -> Iterator[tuple[Callable[[str], None], Callable[[str], None], float]]:
    """Where steps are told, where a download's progress is, and how often: on a terminal that is one line, written again and again."""
    if not sys.stderr.isatty():
        yield _say, _say, 5.0
        return
    begin = "\r\x1b[K"

    def over(words: str) -> None:
        click.echo(begin + printable(words)[: shutil.get_terminal_size().columns - 1], err=True, nl=False)

    try:
        yield (lambda words: click.echo(begin + printable(words), err=True)), over, 0.2
    finally:
        click.echo(begin, err=True, nl=False)


def _list_available(*, as_json: bool) -> None:
    from pytest_vmbottle.images import CLOUD_IMAGES, RECIPES

    records = [
        {
            "name": name,
            "build": RECIPES[name].description if name in RECIPES else None,
            "pull": CLOUD_IMAGES[name].description if name in CLOUD_IMAGES else None,
        }
        for name in sorted({*RECIPES, *CLOUD_IMAGES})
    ]
    if as_json:
        _emit(records)
    else:
        rows = [(str(record["name"]), verb, str(record[verb])) for record in records for verb in ("build", "pull") if record[verb]]
        _table(("NAME", "BY", "DESCRIPTION"), rows)


@image.command("ls", epilog=_examples("vmbottle image ls", "vmbottle image ls --available", "vmbottle image ls --json | jq -r '.[].name'"))
@click.option("--available", is_flag=True, help="List what can be built and pulled instead.")
@_as_json
def list_images(*, available: bool, as_json: bool) -> None:
    """List the images; SIZE is what they take on disk.

    Those that the project around the current folder declares come last.
    """
    if available:
        _list_available(as_json=as_json)
        return
    declared, store = _declared(), _images(_catalog())
    records = []
    for name in store.names():
        try:
            found = store.get(name)
        except CatalogError as error:
            records.append({"name": name, "damaged": str(error)})
            _say(str(error))
        else:
            records += [_image_record(found)] if found else []
    records += [_declared_record(each, store.names()) for each in declared.values()]
    if as_json:
        _emit(records)
    elif records:
        _table(("NAME", "SHA256", "SIZE", "DISK", "CREATED", "DESCRIPTION"), (_image_row(record) for record in records))
    else:
        _say("There are no images yet: `vmbottle image build debian-12` makes one, `vmbottle image pull debian-12` downloads one.")


def _declared_record(declared: DeclaredImage, names: Sequence[str]) -> dict[str, Any]:
    return {
        "name": declared.name,
        "declared": declared.origin,
        "kind": declared.kind,
        "source": declared.source,
        "stored": declared.stored_name if declared.stored_name in names else None,
        "damaged": None,
    }


def _image_record(found: Image) -> dict[str, Any]:
    return {
        "name": found.name,
        "sha256": found.sha256,
        "size": size_on_disk(found.disk.parent),
        "virtual_size": found.virtual_size,
        "format": found.format,
        "arch": found.arch,
        "created": found.created,
        "description": found.description,
        "disk": str(found.disk),
        "kernel": str(found.kernel) if found.kernel else None,
        "cmdline": found.cmdline,
        "firmware": found.firmware,
        "user": found.user,
        "readiness": found.readiness,
        "prepared": found.prepared,
        "damaged": None,
    }


def _image_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    if record["damaged"]:
        return (record["name"], "damaged", "-", "-", "-", "-")
    if "declared" in record:
        where = {"path": f"{record['source']}, where it lies"}.get(record["kind"], record["stored"] or "made when it is needed")
        return (record["name"], "declared", "-", "-", "-", f"{where} ({record['declared']})")
    sizes = (format_size(record["size"]), format_size(record["virtual_size"]))
    return (record["name"], record["sha256"][:_SHORT], *sizes, record["created"], record["description"])


@image.command(
    epilog=_examples(
        "vmbottle image add disk.qcow2 --name mine",
        "vmbottle image add disk.raw --name mine --sha256 1f3a...",
        "vmbottle image add arm.qcow2 --name mine-arm --arch aarch64 --user admin",
        "vmbottle image add root.raw --name mine --kernel vmlinuz --initrd initrd.img --cmdline 'root=/dev/vda rw console=ttyS0'",
    )
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="What to call it.")
@click.option("--sha256", help="The digest that the file must have.")
@click.option("--kernel", type=click.Path(path_type=Path), help="A kernel to boot directly, instead of by firmware; copied too.")
@click.option("--initrd", type=click.Path(path_type=Path), help="Its initial RAM disk.")
@click.option("--cmdline", default="", help="Its command line, such as 'root=/dev/vda rw console=ttyS0'.")
@_traits
def add(  # noqa: PLR0913 - an image has many parts
    *,
    file: Path,
    name: str,
    sha256: str | None,
    kernel: Path | None,
    initrd: Path | None,
    cmdline: str,
    arch: str,
    traits: Traits,
) -> None:
    """Copy a disk image FILE, qcow2 or raw, into the catalog.

    It must boot by its firmware, or by the --kernel that is given, and have the QEMU guest agent or cloud-init and SSH. The image's name
    and sha256 are written to stdout.
    """
    added = _images(_catalog()).add(file, name=name, sha256=sha256, kernel=kernel, initrd=initrd, cmdline=cmdline, arch=arch, traits=traits)
    click.echo(f"{added.name} {added.sha256}")


@image.command("rm", epilog=_examples("vmbottle image rm debian-web"))
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def remove_images(*, names: tuple[str, ...]) -> None:
    """Remove images. Packs that were made of them stay until they are pruned, but are of no use."""
    store = _images(_catalog())
    for name in dict.fromkeys(names):
        store.remove(name)
        _say(f"removed the image {name}")


@image.command("verify", epilog=_examples("vmbottle image verify", "vmbottle image verify debian-12"))
@click.argument("names", metavar="[NAME...]", nargs=-1)
def verify_images(*, names: tuple[str, ...]) -> None:
    """Read images, by default all, and compare them with the digests they were stored with. The exit status is 1 if one differs."""
    store = _images(_catalog())
    _check_each({name: (name, partial(store.verify, name)) for name in names or store.names()})


def _check_each(checks: Mapping[str, tuple[str, Callable[[], object]]]) -> None:
    """Writes for each label whether its check raises, and fails in the end if one did."""
    bad = 0
    for key, (label, check) in checks.items():
        try:
            check()
        except (CatalogError, OSError) as error:
            bad += 1
            click.echo(f"bad {key}")
            _say(f"{label}: {error}")
        else:
            click.echo(f"ok  {key}")
    if bad:
        raise _Failure(f"{bad} of {len(checks)} {'is' if bad == 1 else 'are'} not what was stored")


# -- packs -----------------------------------------------------------------------------------------------------------------------------


@main.group(epilog=_examples("vmbottle pack ls", "vmbottle pack show 140eda", "vmbottle pack prune --older-than 7d --dry-run"))
def pack() -> None:
    """Packs: prepared machines, of which tests get clones.

    A pack has a machine's disk and, where this computer can restore it, its RAM: then its clones are running when a test gets them.

    pytest makes them when it needs them, and again if they are gone. KEY is the beginning of a pack's key, as long as no other begins so.
    """


@pack.command("ls", epilog=_examples("vmbottle pack ls", "vmbottle pack ls --json | jq 'map(.size) | add'"))
@_as_json
def list_packs(*, as_json: bool) -> None:
    """List the packs, oldest first; SIZE is what they take on disk."""
    from pytest_vmbottle import packs

    catalog = _catalog()
    found, damaged = packs.scan(catalog.packs)
    taken = packs.sizes(found)
    records = [_pack_record(catalog, each, taken[each.key]) for each in found if each.key in taken]
    for key, error in damaged.items():
        _say(f"{error}; remove it with `vmbottle pack rm {key[:_SHORT]}`")
    if as_json:
        _emit(records + [{"key": key, "damaged": str(error)} for key, error in damaged.items()])
    elif records:
        _table(("KEY", "KIND", "NAME", "AGE", "SIZE", "MEMORY", "IN USE", "BACKEND"), map(_pack_row, records))
    elif not damaged:
        _say("There are no packs yet: pytest makes them when tests need machines.")
    _mention_quarantine(catalog)


def _mention_quarantine(catalog: Catalog) -> None:
    with suppress(OSError):  # what is just being removed
        aside = catalog.set_aside()
        if aside:
            size = format_size(sum(size_on_disk(each) for each in aside))
            _say(f"Damaged packs that were put aside take {size}; remove them with: vmbottle pack prune")


def _pack_record(catalog: Catalog, found: Pack, size: int) -> dict[str, Any]:
    about = found.manifest
    return {
        "key": found.key,
        "kind": about.kind,
        "name": about.name,
        "created": datetime.fromtimestamp(about.created, UTC).isoformat(timespec="seconds"),
        "age": max(0.0, time.time() - about.created),
        "size": size,
        "memory": about.memory,
        "disk_size": about.disk_size,
        "backend": about.backend,
        "image": about.image,
        "parent": about.parent,
        "in_use": catalog.in_use(found.path),
        "path": str(found.path),
        "damaged": None,
    }


def _pack_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    sizes = (format_size(record["size"]), format_size(record["memory"]))
    use = "yes" if record["in_use"] else "no"
    return (record["key"][:_SHORT], record["kind"], record["name"], _age(record["age"]), *sizes, use, record["backend"])


@pack.command(epilog=_examples("vmbottle pack show 140eda", "vmbottle pack show 140eda --json"))
@click.argument("key")
@_as_json
def show(*, key: str, as_json: bool) -> None:
    """Show a pack, its files, and the packs it stands on."""
    from pytest_vmbottle import packs

    catalog = _catalog()
    found = packs.read(packs.find(catalog.packs, key))
    record = _pack_record(catalog, found, found.size) | {"files": _files(found), "parents": _parents(catalog, found)}
    if as_json:
        _emit(record)
    else:
        for name, value in _described(record):
            click.echo(f"{name:10} {_line(value)}")


def _files(found: Pack) -> dict[str, dict[str, Any]]:
    sizes = {path.name: path.stat().st_size for path in found.path.iterdir()}
    return {name: {"digest": value, "size": sizes.get(name)} for name, value in found.manifest.files.items()}


def _described(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A pack's record for people: names and values."""
    yield from ((name, record[name]) for name in ("key", "kind", "name"))
    yield "created", f"{record['created']} ({_age(record['age'])} ago)"
    yield from ((name.replace("_", " "), format_size(record[name])) for name in ("size", "memory", "disk_size"))
    yield "in use", "yes" if record["in_use"] else "no"
    yield from ((name, record[name]) for name in ("backend", "image", "path"))
    for parent in record["parents"]:
        yield "on", f"{parent['key'][:_SHORT]} {parent['name'] or 'which is gone or damaged'}"
    for name, file in record["files"].items():
        yield "file", f"{name} ({'missing' if file['size'] is None else format_size(file['size'])}, {file['digest']})"


def _parents(catalog: Catalog, found: Pack) -> list[dict[str, Any]]:
    """The packs beneath one, uppermost first."""
    from pytest_vmbottle import packs

    parents: list[dict[str, Any]] = []
    key = found.manifest.parent
    while key is not None and key not in {parent["key"] for parent in parents}:
        try:
            below = packs.read(catalog.packs / key).manifest
        except (PackCorrupt, FileNotFoundError):
            return [*parents, {"key": key, "name": None, "kind": None}]
        parents.append({"key": key, "name": below.name, "kind": below.kind})
        key = below.parent
    return parents


@pack.command("verify", epilog=_examples("vmbottle pack verify", "vmbottle pack verify 140eda"))
@click.argument("keys", metavar="[KEY...]", nargs=-1)
def verify_packs(*, keys: tuple[str, ...]) -> None:
    """Read packs, by default all, and compare them with what was published. The exit status is 1 if one differs.

    A bad pack stays where it is; the next pytest that needs it puts it aside and makes it again.
    """
    from pytest_vmbottle import packs

    catalog = _catalog()
    if keys:
        paths = [packs.find(catalog.packs, key) for key in keys]
    else:
        found, damaged = packs.scan(catalog.packs)
        paths = [*(each.path for each in found), *(catalog.packs / key for key in damaged)]
    _check_each({path.name: (f"pack {path.name[:_SHORT]}", partial(_verify, catalog, path)) for path in paths})


def _verify(catalog: Catalog, path: Path) -> None:
    from pytest_vmbottle import packs

    hold = catalog.lease(path)
    try:
        found = packs.read(path)
        found.verify()
        packs.check_parent(found)
    finally:
        os.close(hold)


@pack.command("rm", epilog=_examples("vmbottle pack rm 140eda", "vmbottle pack rm 140eda 573fc2"))
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
def remove_packs(*, keys: tuple[str, ...]) -> None:
    """Remove packs. One that a test run uses, or that another one stands on, is not removed."""
    from pytest_vmbottle import packs

    catalog = _catalog()
    paths = dict.fromkeys(packs.find(catalog.packs, key) for key in keys)
    found, _ = packs.scan(catalog.packs)
    _check_removable(catalog, paths, found)
    ordered = [each.path for each in packs.children_first(each for each in found if each.path in paths)]
    for path in (*(path for path in paths if path not in ordered), *ordered):
        if not _discard(catalog, path):
            raise _Failure(f"the pack {path.name[:_SHORT]} is in use by now: try again when the test run that uses it has ended")
        click.echo(path.name)


def _check_removable(catalog: Catalog, paths: Iterable[Path], found: Sequence[Pack]) -> None:
    """Refuses the whole if one cannot go: nothing half done."""
    names = {path.name for path in paths}
    above = [each for each in found if each.manifest.parent in names and each.key not in names]
    if above:
        those = ", ".join(f"{each.key[:_SHORT]} ({each.manifest.name})" for each in above)
        command = " ".join(("vmbottle pack rm", *(each.key[:_SHORT] for each in above), *(name[:_SHORT] for name in sorted(names))))
        raise _Failure(f"{those} would stand on nothing: remove all of them with `{command}`")
    for path in paths:
        if catalog.in_use(path):
            raise _Failure(f"the pack {path.name[:_SHORT]} is in use: try again when the test run that uses it has ended")


def _discard(catalog: Catalog, path: Path) -> bool:
    with _undisturbed():
        return catalog.discard(path)


@pack.command(
    epilog=_examples("vmbottle pack prune --dry-run", "vmbottle pack prune --older-than 7d", "vmbottle pack prune --keep-size 10G")
)
@click.option("--older-than", callback=_duration, metavar="AGE", help="Remove packs that were made longer ago, such as 12h or 7d.")
@click.option(
    "--keep-size", callback=_size, metavar="SIZE", help="Remove the oldest packs until the others take no more than this, such as 10G."
)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
def prune(*, older_than: float | None, keep_size: int | None, dry_run: bool) -> None:
    """Remove packs that no test run uses, the oldest first, and whatever was found damaged and put aside.

    Without options these are all of them: pytest makes them again when it needs them. A pack that one which is kept stands on is kept.
    With both options each removes its share. The keys of what was removed are written to stdout.
    """
    from pytest_vmbottle import packs

    catalog = _catalog()
    found, damaged = packs.scan(catalog.packs)
    made_before = None if older_than is None else time.time() - older_than
    chosen = packs.prunable(found, held=lambda each: catalog.in_use(each.path), made_before=made_before, keep_size=keep_size)
    taken = packs.sizes(chosen)
    gone = [key for key in damaged if dry_run or _discard(catalog, catalog.packs / key)]
    stays: set[str | None] = set()
    for each in chosen:
        if each.key not in stays and (dry_run or _discard(catalog, each.path)):
            gone.append(each.key)
        else:  # somebody has begun to use it
            stays.add(each.manifest.parent)
    for aside in () if dry_run else catalog.set_aside():
        shutil.rmtree(aside, ignore_errors=True)
    for key in gone:
        click.echo(key)
    freed = format_size(sum(taken.get(key, 0) for key in gone))
    _say(f"{'would remove' if dry_run else 'removed'} {len(gone)} of {len(found) + len(damaged)} packs, {freed}")
