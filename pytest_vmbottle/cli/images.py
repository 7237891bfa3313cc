"""`vmbottle image`: base images, from which machines start."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pytest_vmbottle.cli.command import SHORT, Failure, as_packages, check_each, emit, examples, json_option, open_catalog, say, show_table
from pytest_vmbottle.cli.completion import image_names, official_names, recipe_names
from pytest_vmbottle.cli.groups import Group
from pytest_vmbottle.errors import CatalogError, SpecError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import size_on_disk
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.shown import printable

if TYPE_CHECKING:
    from pytest_vmbottle.catalog.catalog import Catalog
    from pytest_vmbottle.images import DeclaredImage, Image, ImageStore, Traits

__all__ = ["image"]

# Seconds to wait for another build of the same image.
_BUILD_SECONDS = 3600.0


@click.group(
    cls=Group,
    epilog=examples("vmbottle image build debian-12", "vmbottle image pull fedora-44", "vmbottle image add disk.qcow2 --name mine"),
)
def image() -> None:
    """Base images, from which machines start."""


def _traits(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for a disk's properties; the command gets them as `arch` and `traits`."""

    @click.option("--arch", type=click.Choice(["x86_64", "aarch64"]), help="Architecture of the image; by default this computer's.")
    @click.option("--firmware", type=click.Choice(["bios", "uefi"]), help="Firmware that boots it; by default uefi for aarch64, else bios.")
    @click.option("--user", default="", metavar="NAME", help="User to whom its cloud-init gives our SSH key.")
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
        from pytest_vmbottle.host.arch import host_arch
        from pytest_vmbottle.images import Traits, default_firmware

        # Not as click's default, which would be found out at each import.
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
    epilog=examples(
        "vmbottle image build debian-12",
        "vmbottle image build debian-12 --include nginx,curl --name debian-web",
    )
)
@click.argument("recipe", shell_complete=recipe_names)
@click.option("--include", metavar="PKG,PKG", multiple=True, callback=as_packages, help="More packages to install in it.")
@click.option("--name", help="Name of the image; by default the recipe's.")
def build(*, recipe: str, include: list[str], name: str | None) -> None:
    """Build a base image from a RECIPE, such as debian-12, and replace an image of that name.

    RECIPE may also be the name of an image that the project around the current folder declares, in its pyproject.toml or vmbottle.toml. It
    is downloaded if the declaration says so.

    This takes a minute or two, as root or not. Packages come from this computer's own sources. Two simultaneous builds of the same image do
    the work once. The image's name and sha256 are written to stdout.
    """
    from pytest_vmbottle import images

    declared = _declared().get(recipe)
    if declared is not None:
        # They stand in the declaration, whose digest decides whether the image is built again.
        if include or name:
            raise click.UsageError(f"{recipe} is declared in {declared.origin}: change its name and packages there")
        _make_declared(declared)
        return
    catalog = open_catalog()
    store, name = _images(catalog), name or recipe
    # Before the lock, whose file has the name in its own: a name that is a path would lead elsewhere.
    images.store.check_name(name)
    # Remembered before the lock is waited for: another process may build the same image meanwhile, which then need not be built twice.
    before = _stored(store, name)
    with catalog.lock(f"image-{name}", deadline=Deadline(_BUILD_SECONDS), waiting=say, label=f"the image {name}") as tell:
        built = _stored(store, name)
        # The same as before is no news: the user asks for a new one. Another one was made by the process that we waited for.
        if built is None or built == before or not _is_of(built, recipe, include):
            built = images.build(store, recipe, name=name, include=include, progress=_said_and(tell))
    click.echo(f"{built.name} {built.sha256}")


def _said_and(tell: Callable[[str], None], show: Callable[[str], None] = say) -> Callable[[str], None]:
    """Return a function that sends a progress line to the user and to waiting processes."""

    def both(line: str) -> None:
        show(line)
        tell(line)

    return both


def _declared() -> dict[str, DeclaredImage]:
    """Return the images that the project around the current folder declares."""
    from pytest_vmbottle.images import find_declared_images

    try:
        return find_declared_images(Path.cwd())
    except SpecError as error:
        raise click.UsageError(printable(str(error))) from None


def _make_declared(declared: DeclaredImage) -> None:
    from pytest_vmbottle.images import PULL_SECONDS

    catalog = open_catalog()
    store, name = _images(catalog), declared.stored_name
    # Before the lock, as in `build`.
    before = _stored(store, name)
    deadline = Deadline(PULL_SECONDS if declared.kind == "url" else _BUILD_SECONDS)
    with catalog.lock(f"image-{name}", deadline=deadline, waiting=say, label=f"the image {declared.name}") as tell:
        made = _stored(store, name)
        if made is None or made == before:
            made = declared.make(store, progress=_said_and(tell))
    click.echo(f"{declared.name} {made.sha256}")


def _stored(store: ImageStore, name: str) -> Image | None:
    with suppress(CatalogError):  # a damaged one is built again
        return store.get(name)
    return None


def _is_of(found: Image, recipe: str, include: Sequence[str]) -> bool:
    """Tell whether the process that we waited for has built this very image."""
    from pytest_vmbottle.images import RECIPES

    described, _, extras = found.description.partition(", with ")
    # The description is all that an image tells of its making.
    return recipe in RECIPES and described == RECIPES[recipe].description and extras == ", ".join(include)


@image.command(
    epilog=examples(
        "vmbottle image pull fedora-44",
        "vmbottle image pull debian-13 --name debian-13-cloud",
        "vmbottle image pull ubuntu-24.04 --update",
        "vmbottle image pull https://example.org/disk.qcow2 --sha256 1f3a... --name mine",
        "vmbottle image pull ghcr.io/team/packs:rescue",
    )
)
@click.argument("source", metavar="NAME|URL|HOST/NAME:TAG", shell_complete=official_names)
@click.option("--name", help="Name of the image; by default the official one's; needed with a URL.")
@click.option("--sha256", help="With a URL: the digest that the file must have.")
@click.option("--update", is_flag=True, help="Replace an image of this name if its content differs.")
@click.option("--offline", is_flag=True, help="Download nothing: fail if the image is not in the catalog.")
@_traits
def pull(  # noqa: PLR0913 - one for each option
    *, source: str, name: str | None, sha256: str | None, update: bool, offline: bool, arch: str, traits: Traits
) -> None:
    """Download the official cloud image NAME of a distribution, or a disk image from a URL or a registry.

    `vmbottle image ls --available` lists the official ones. The download must have the checksum that the distribution publishes beside it,
    or the given --sha256. If the stored image is still the published one, nothing is downloaded; if another one is published by now,
    --update takes it. An interrupted download resumes when the command is run again.

    HOST/NAME:TAG, or HOST/NAME@DIGEST, is an image that `vmbottle image push` put into a registry.

    Only https is used, through the proxy that HTTPS_PROXY names. An image for another architecture than this computer's is called
    NAME-ARCH. The image's name and sha256 are written to stdout.
    """
    from pytest_vmbottle import images

    # Schemes other than https are refused where it is downloaded.
    by_url = "://" in source
    if "/" in source and not by_url:
        _check_pull(by_url=by_url, name=name, sha256=sha256)
        pulled = _pull_artifact(open_catalog(), source, name=name)
        click.echo(f"{pulled.name} {pulled.sha256}")
        return
    _check_pull(by_url=by_url, name=name, sha256=sha256)
    # Names of other architectures have a suffix, so that both can be stored.
    name = name or images.pulled_name(source, arch)
    images.store.check_name(name)
    catalog = open_catalog()
    deadline = Deadline(images.PULL_SECONDS)
    with (
        catalog.lock(f"image-{name}", deadline=deadline, waiting=say, label=f"the image {name}") as tell,
        _meter() as (progress, meter, every),
    ):
        steps = _said_and(tell, progress)
        options = images.PullOptions(update=update, offline=offline, progress=steps, meter=meter, every=every)
        if by_url:
            pulled = images.pull_url(_images(catalog), source, sha256=str(sha256), name=name, arch=arch, traits=traits, options=options)
        else:
            pulled = images.pull(_images(catalog), source, name=name, arch=arch, options=options)
    click.echo(f"{pulled.name} {pulled.sha256}")


def _pull_artifact(catalog: Catalog, artifact: str, *, name: str | None) -> Image:
    from pytest_vmbottle.cli.travel import exchange_of, settings_of_environment

    exchange, reference = exchange_of(catalog, settings_of_environment(), artifact)
    if not reference.artifact and not name:
        raise click.UsageError("which image? Write HOST/NAME:TAG, or say by --name which one of the recipes' it is")
    return exchange.pull_image(reference.artifact, name=name or "")


@image.command("push", epilog=examples("vmbottle image push debian-12 ghcr.io/team/packs"))
@click.argument("name", shell_complete=image_names)
@click.argument("repository", metavar="HOST/NAME[:TAG]")
@click.option("--replace", is_flag=True, help="Replace another image that the tag has.")
def push_image(*, name: str, repository: str, replace: bool) -> None:
    """Push an image to a registry.

    Without TAG it is found there by its name, this computer's architecture and the recipe that it was built from, which is how runs with
    --vm-registry look for it. Its reference with its digest is written to stdout.
    """
    from pytest_vmbottle.cli.travel import exchange_of, settings_of_environment
    from pytest_vmbottle.images.store import unknown_image

    catalog = open_catalog()
    exchange, reference = exchange_of(catalog, settings_of_environment(), repository)
    found = _images(catalog).get(name)
    if found is None:
        raise unknown_image(name, _images(catalog).names())
    artifact = exchange.push_image(found, tag=reference.tag, replace=replace)
    click.echo(f"{reference.repository}@{artifact.digest}")


def _check_pull(*, by_url: bool, name: str | None, sha256: str | None) -> None:
    if by_url and not (name and sha256):
        raise click.UsageError("a URL needs --name, and --sha256 with the digest that the maker of the image publishes")
    if not by_url:
        # What these options say is known of an official image, so one that is given is a contradiction.
        context = click.get_current_context()
        given = [
            option
            for option, parameter in (("--sha256", "sha256"), ("--firmware", "firmware"), ("--user", "user"), ("--ready-when", "readiness"))
            # By its source and not by its value: the default of an option is no contradiction.
            if context.get_parameter_source(parameter) is ParameterSource.COMMANDLINE
        ]
        if given:
            raise click.UsageError(f"only with a URL: {', '.join(given)}; for an official image this is known")


@contextmanager
def _meter() -> Iterator[tuple[Callable[[str], None], Callable[[str], None], float]]:
    """Yield functions for steps and for download progress, and the seconds between reports.

    On a terminal, progress is one line that is overwritten again and again.
    """
    # A log has no line that can be overwritten, so it gets one from time to time.
    if not sys.stderr.isatty():
        yield say, say, 5.0
        return
    # To the line's beginning, and delete to its end: a shorter text would leave the rest of a longer one.
    begin = "\r\x1b[K"

    def over(words: str) -> None:
        # One column less, because a full line would wrap and could not be overwritten.
        click.echo(begin + printable(words)[: shutil.get_terminal_size().columns - 1], err=True, nl=False)

    try:
        yield (lambda words: click.echo(begin + printable(words), err=True)), over, 0.2
    finally:
        # Afterwards the line is free for what comes next, an error too.
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
        emit(records)
    else:
        rows = [(str(record["name"]), verb, str(record[verb])) for record in records for verb in ("build", "pull") if record[verb]]
        show_table(("NAME", "BY", "DESCRIPTION"), rows)


@image.command("ls", epilog=examples("vmbottle image ls", "vmbottle image ls --available", "vmbottle image ls --json | jq -r '.[].name'"))
@click.option("--available", is_flag=True, help="List what can be built and pulled instead.")
@json_option
def list_images(*, available: bool, as_json: bool) -> None:
    """List the images; SIZE is what they take on disk.

    Those that the project around the current folder declares come last.
    """
    if available:
        _list_available(as_json=as_json)
        return
    declared, store = _declared(), _images(open_catalog(make=False))
    records = []
    # One damaged image must not hide the others.
    for name in store.names():
        try:
            found = store.get(name)
        except CatalogError as error:
            records.append({"name": name, "damaged": str(error)})
            say(str(error))
        else:
            records += [_image_record(found)] if found else []
    records += [_declared_record(each, store.names()) for each in declared.values()]
    if as_json:
        emit(records)
    elif records:
        show_table(("NAME", "SHA256", "SIZE", "DISK", "CREATED", "DESCRIPTION"), (_image_row(record) for record in records))
    else:
        say("There are no images yet: `vmbottle image build debian-12` makes one, `vmbottle image pull debian-12` downloads one.")


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
        # Blocks, not the apparent size: disk images have holes.
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
        where = {"path": f"{record['source']}, in place"}.get(record["kind"], record["stored"] or "made when it is needed")
        return (record["name"], "declared", "-", "-", "-", f"{where} ({record['declared']})")
    sizes = (format_size(record["size"]), format_size(record["virtual_size"]))
    return (record["name"], record["sha256"][:SHORT], *sizes, record["created"], record["description"])


@image.command(
    epilog=examples(
        "vmbottle image add disk.qcow2 --name mine",
        "vmbottle image add disk.raw --name mine --sha256 1f3a...",
        "vmbottle image add arm.qcow2 --name mine-arm --arch aarch64 --user admin",
        "vmbottle image add root.raw --name mine --kernel vmlinuz --initrd initrd.img --cmdline 'root=/dev/vda rw console=ttyS0'",
    )
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Name of the image.")
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

    It must boot by its firmware or by the given --kernel, and have the QEMU guest agent, or cloud-init and SSH. The image's name
    and sha256 are written to stdout.
    """
    added = _images(open_catalog()).add(
        file, name=name, sha256=sha256, kernel=kernel, initrd=initrd, cmdline=cmdline, arch=arch, traits=traits, progress=say
    )
    click.echo(f"{added.name} {added.sha256}")


@image.command("rm", epilog=examples("vmbottle image rm debian-web"))
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=image_names)
def remove_images(*, names: tuple[str, ...]) -> None:
    """Remove images. Packs that were built from them can no longer be used; they stay until they are pruned.

    An image that a test run or a machine uses is not removed.
    """
    catalog = open_catalog(make=False)
    store = _images(catalog)
    for name in names:
        found = _stored(store, name)
        # All are checked before the first is removed.
        if found is not None and catalog.in_use(found.disk.parent):
            raise Failure(f"the image {name} is in use: try again when the test run, or the machine (vmbottle machine ls), has ended")
    # Each once, or the second time would be an error.
    for name in dict.fromkeys(names):
        store.remove(name)
        say(f"removed the image {name}")


@image.command("verify", epilog=examples("vmbottle image verify", "vmbottle image verify debian-12"))
@click.argument("names", metavar="[NAME...]", nargs=-1, shell_complete=image_names)
def verify_images(*, names: tuple[str, ...]) -> None:
    """Read images, by default all, and compare them with their digests. The exit status is 1 if one differs."""
    store = _images(open_catalog(make=False))
    check_each({name: (name, partial(store.verify, name, progress=say)) for name in names or store.names()})
