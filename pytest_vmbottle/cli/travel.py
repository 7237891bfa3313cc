"""`vmbottle pack export` and `import`: packs that travel from one computer to another."""

from __future__ import annotations

import os
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

__all__ = ["export_pack", "import_packs"]


@click.command(
    "export",
    epilog=examples(
        "vmbottle pack export 140eda -o web.vmpack",
        "vmbottle pack export tests/conftest.py::web -o web.vmpack",
        "vmbottle pack export 140eda -o web.vmpack --without-parents",
    ),
)
@click.argument("pack", metavar="KEY|LAYER", shell_complete=pack_keys)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File to write.")
@click.option("--without-parents", is_flag=True, help="Leave out what it stands on, which whoever imports it must then have.")
def export_pack(*, pack: str, output: Path, without_parents: bool) -> None:
    """Write a pack into a file, for another computer.

    The file has the pack, the packs below it and the image, compressed, each of them as what differs from the one below. The pack is told
    by the beginning of its key, or by a layer, FILE::NAME, whose pack is built if need be. The file's path is written to stdout.
    """
    from pytest_vmbottle.travel.packs import Exporter

    if not output.absolute().parent.is_dir():
        raise Failure(f"there is no folder {output.absolute().parent}")
    catalog, settings = open_catalog(), _settings()
    found = _of_layer(catalog, settings, pack) if "::" in pack else _of_key(catalog, pack)
    if not found.manifest.backend.startswith("qemu"):
        raise Failure("only packs of QEMU can be exported; `vmbottle pack build` writes those of smolvm into files")
    exporter = Exporter(catalog=catalog, fingerprint=_backend(catalog, settings).fingerprint, say=say)
    exporter.write(found, output.absolute(), parents=not without_parents)
    say(f"{format_size(output.stat().st_size)}")
    click.echo(output)


@click.command("import", epilog=examples("vmbottle pack import web.vmpack"))
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def import_packs(*, file: Path) -> None:
    """Import the packs of a file.

    They are checked in full, and refused if this computer could not restore them. The keys of new packs are written to stdout.

    A pack has the RAM of a running machine and the state of its devices: import only files of people whom you trust.
    """
    from pytest_vmbottle.travel.packs import Importer

    catalog = open_catalog()
    importer = Importer(catalog=catalog, fingerprint=_backend(catalog, _settings()).fingerprint, say=say)
    for pack in importer.read(file):
        click.echo(pack.key)


def _settings() -> Settings:
    from pytest_vmbottle.settings import Settings

    return Settings.read(lambda setting: os.environ.get(setting.env))


def _backend(catalog: Catalog, settings: Settings) -> Backend:
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

    provision = Provision(timeout_factor=settings.timeout_factor, report=say, warn=say, declared=find_declared_images(Path.cwd()))
    provisioner = Provisioner(catalog, _backend(catalog, settings), name="qemu", settings=provision)
    try:
        return provisioner.pack(MachineSpec.resolve(source_of(layer, Path.cwd()), {}))
    finally:
        provisioner.close()
