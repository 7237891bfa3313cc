"""`vmbottle pack export`, `import`, `push` and `pull`: packs that travel, in files and by a registry."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pytest_vmbottle.cli.command import Failure, examples, open_catalog, say
from pytest_vmbottle.cli.completion import pack_keys
from pytest_vmbottle.host.sizes import format_size

if TYPE_CHECKING:
    from pytest_vmbottle.backends.port import Backend
    from pytest_vmbottle.catalog.catalog import Catalog
    from pytest_vmbottle.catalog.packs import Pack
    from pytest_vmbottle.settings import Settings
    from pytest_vmbottle.spec.reference import Reference
    from pytest_vmbottle.travel.exchange import Exchange
    from pytest_vmbottle.travel.minisign import SecretKey

__all__ = [
    "check_folder",
    "exchange_of",
    "export_pack",
    "import_packs",
    "public_key_option",
    "pull_pack",
    "push_pack",
    "qemu_backend",
    "read_secret_key",
    "settings_of_environment",
    "sign_option",
]

sign_option = click.option(
    "--sign",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="SECRET-KEY",
    help="Sign the file with minisign's secret key in this file; the signature becomes FILE.minisig.",
)
public_key_option = click.option(
    "--public-key",
    envvar="VMBOTTLE_PUBLIC_KEY",
    metavar="KEY|FILE",
    help="Refuse the file unless FILE.minisig beside it is its signature with minisign's key; also VMBOTTLE_PUBLIC_KEY.",
)


@click.command(
    "export",
    epilog=examples(
        "vmbottle pack export 140eda -o web.vmpack",
        "vmbottle pack export tests/conftest.py::web -o web.vmpack",
        "vmbottle pack export 140eda -o web.vmpack --without-parents",
        "vmbottle pack export 140eda -o web.vmpack --sign packs.key",
    ),
)
@click.argument("pack", metavar="KEY|LAYER", shell_complete=pack_keys)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File to write.")
@click.option("--without-parents", is_flag=True, help="Leave out what it stands on, which whoever imports it must then have.")
@sign_option
def export_pack(*, pack: str, output: Path, without_parents: bool, sign: Path | None) -> None:
    """Write a pack into a file, for another computer.

    The file has the pack, the packs below it and the image, compressed, each of them as what differs from the one below. The pack is told
    by the beginning of its key, or by a layer, FILE::NAME, whose pack is built if need be. The file's path is written to stdout.
    """
    from pytest_vmbottle.travel.packs import Exporter

    check_folder(output)
    # First, since it may have to ask for a password, which may be wrong.
    key = read_secret_key(sign) if sign is not None else None
    catalog, settings = open_catalog(), settings_of_environment()
    found = _of_layer(catalog, settings, pack) if "::" in pack else _of_key(catalog, pack)
    if not found.manifest.backend.startswith("qemu"):
        raise Failure("only packs of QEMU can be exported; `vmbottle pack build` writes those of smolvm into files")
    exporter = Exporter(catalog=catalog, fingerprint=qemu_backend(catalog, settings).fingerprint, say=say)
    exporter.write(found, output.absolute(), parents=not without_parents)
    say(f"{format_size(output.stat().st_size)}")
    if key is not None:
        say(f"signed: {key.sign(output.absolute())}")
    click.echo(output)


def check_folder(output: Path) -> None:
    """Refuse an output file whose folder is not there, before anything is read."""
    if not output.absolute().parent.is_dir():
        raise Failure(f"there is no folder {output.absolute().parent}")


def read_secret_key(path: Path) -> SecretKey:
    """Read a secret key, whose password is asked for on the terminal."""
    from pytest_vmbottle.travel.minisign import SecretKey

    def ask() -> str:
        if not sys.stdin.isatty():
            raise Failure(f"{path} has a password, and there is no terminal to ask for it: use a key without one (minisign -G -W)")
        password: str = click.prompt(f"Password of {path}", hide_input=True, err=True)
        return password

    return SecretKey.read(path, ask)


@click.command("import", epilog=examples("vmbottle pack import web.vmpack", "vmbottle pack import web.vmpack --public-key packs.pub"))
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@public_key_option
def import_packs(*, file: Path, public_key: str | None) -> None:
    """Import the packs of a file.

    They are checked in full, and refused if this computer could not restore them. The keys of new packs are written to stdout.

    A pack has the RAM of a running machine and the state of its devices: import only files of people whom you trust.
    """
    from pytest_vmbottle.travel.minisign import PublicKey
    from pytest_vmbottle.travel.packs import Importer

    signer = PublicKey.read(public_key) if public_key is not None else None

    catalog = open_catalog()
    importer = Importer(catalog=catalog, fingerprint=qemu_backend(catalog, settings_of_environment()).fingerprint, say=say)
    for pack in importer.read(file, signer):
        click.echo(pack.key)


@click.command(
    "push", epilog=examples("vmbottle pack push 140eda ghcr.io/team/packs", "vmbottle pack push tests/conftest.py::web HOST/NAME:web")
)
@click.argument("pack", metavar="KEY|LAYER", shell_complete=pack_keys)
@click.argument("repository", metavar="HOST/NAME[:TAG]")
@click.option("--replace", is_flag=True, help="Replace packs of the same keys that others have pushed.")
def push_pack(*, pack: str, repository: str, replace: bool) -> None:
    """Push a pack to a registry, with what it stands on.

    Only what the repository has not is sent. A pack is found there by its key, and by TAG too if one is given. The login is that of `docker
    login`. The pack's reference with its digest, which always brings this very pack, is written to stdout.
    """
    catalog, settings = open_catalog(), settings_of_environment()
    exchange, reference = exchange_of(catalog, settings, repository)
    if reference.digest:
        raise Failure("a digest is what a push gives: write HOST/NAME or HOST/NAME:TAG")
    found = _of_layer(catalog, settings, pack) if "::" in pack else _of_key(catalog, pack)
    artifact = exchange.push(found, tag=reference.tag, replace=replace)
    click.echo(f"{reference.repository}@{artifact.digest}")


@click.command("pull", epilog=examples("vmbottle pack pull ghcr.io/team/packs:web", "vmbottle pack pull HOST/NAME@sha256:1f3a..."))
@click.argument("artifact", metavar="HOST/NAME:TAG|HOST/NAME@DIGEST")
def pull_pack(*, artifact: str) -> None:
    """Pull a pack from a registry, with what it stands on.

    It is checked in full, and refused if this computer could not restore it. The keys of new packs are written to stdout.

    A pack has the RAM of a running machine and the state of its devices: pull only those of people whom you trust. By a digest, whatever
    becomes of the registry, it is the very pack that had it when it was pushed.
    """
    exchange, reference = exchange_of(open_catalog(), settings_of_environment(), artifact)
    if not reference.artifact:
        raise Failure("which pack? Write HOST/NAME:TAG or HOST/NAME@sha256:DIGEST, as it was pushed")
    for pack in exchange.pull(reference.artifact):
        click.echo(pack.key)


def exchange_of(catalog: Catalog, settings: Settings, text: str) -> tuple[Exchange, Reference]:
    """Return the exchange between a catalog and the repository that a reference names, and the reference."""
    from pytest_vmbottle.spec.reference import Reference

    reference = Reference.parse(text)
    try:
        from pytest_vmbottle.travel.run_registry import open_exchange
    except ImportError as error:
        raise Failure(f"registries need the library {error.name}: pip install 'pytest-vmbottle[oci]'") from error
    return open_exchange(reference, catalog, lambda spec: qemu_backend(catalog, settings).fingerprint(spec), say), reference


def settings_of_environment() -> Settings:
    """Return the settings that the environment has."""
    from pytest_vmbottle.settings import Settings

    return Settings.read(lambda setting: os.environ.get(setting.env))


def qemu_backend(catalog: Catalog, settings: Settings) -> Backend:
    """Return the backend for QEMU, whose packs travel."""
    from pytest_vmbottle.backends.make import make

    backend = make("qemu", settings, folder=catalog.root, warn=say)
    if backend is None:
        raise Failure("this program has no backend for QEMU")
    return backend


def _of_key(catalog: Catalog, key: str) -> Pack:
    from pytest_vmbottle.catalog import packs

    return packs.read(packs.find(catalog.packs, key))


def _of_layer(catalog: Catalog, settings: Settings, layer: str) -> Pack:
    from pytest_vmbottle.images import find_declared_images
    from pytest_vmbottle.provision import Provisioner
    from pytest_vmbottle.provision import Settings as Provision
    from pytest_vmbottle.spec import MachineSpec
    from pytest_vmbottle.standalone.orders import source_of

    provision = Provision(
        timeout_factor=settings.timeout_factor,
        report=say,
        warn=say,
        declared=find_declared_images(Path.cwd()),
        registry=settings.registry,
        registry_push=settings.registry_push,
    )
    provisioner = Provisioner(catalog, qemu_backend(catalog, settings), name="qemu", settings=provision)
    try:
        return provisioner.pack(MachineSpec.resolve(source_of(layer, Path.cwd()), {}))
    finally:
        provisioner.close()
