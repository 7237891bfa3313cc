"""Completion of words in a shell: the script for it, and the names of what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pytest_vmbottle.cli.command import SHORT, catalog_root, examples

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = [
    "capsule_names",
    "completion",
    "copy_sides",
    "image_names",
    "lineages",
    "machine_names",
    "official_names",
    "pack_keys",
    "recipe_names",
    "snapshot_labels",
    "sources",
]

# After a colon or an at-sign bash would complete a new word, and pack:KEY, web:/ and web@LABEL are one.
_AFTER = {"bash": "COMP_WORDBREAKS=${COMP_WORDBREAKS//[:@]}\n", "zsh": "", "fish": ""}
# By its text: to import a conftest could take seconds, or do something. Comments and other decorators may stand in between.
_LAYER = re.compile(r"^@(?:\w+\.)?layer\(.*?^def (\w+)\(", re.MULTILINE | re.DOTALL)

Words = Iterable[tuple[str, str]]
"""Words with their explanations, which fish and zsh show."""
_Find = Callable[[click.Context, str], Words]
_Complete = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]


@click.command(
    epilog=examples(
        "vmbottle completion bash >> ~/.bashrc",
        "vmbottle completion zsh >> ~/.zshrc",
        "vmbottle completion fish > ~/.config/fish/completions/vmbottle.fish",
    )
)
@click.argument("shell", type=click.Choice(list(_AFTER)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Write the script that completes words of this command in a shell.

    Completed are commands, options, and the names of machines, images, recipes, layers and packs.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is not None:
        # By this name the shell calls it: the one that the entry point has.
        click.echo(kind(ctx.find_root().command, {}, "vmbottle", "_VMBOTTLE_COMPLETE").source() + _AFTER[shell], nl=False)


def _completing(*, files: bool = False) -> Callable[[_Find], _Complete]:
    """Turn a function that finds words into one that click calls.

    Args:
        files: Whether the names of files are completed where no word fits.
    """

    def decorate(find: _Find) -> _Complete:
        @wraps(find)
        def complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
            # A message would be written over the line that the user types, and without words there is nothing to complete.
            with suppress(Exception):
                from click.shell_completion import CompletionItem

                found = [CompletionItem(word, help=text) for word, text in find(ctx, incomplete) if word.startswith(incomplete)]
                return found or [CompletionItem(incomplete, type="file")] * files
            return []

        return complete

    return decorate


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


@_completing()
def machine_names(ctx: click.Context, _: str) -> Words:
    """Find the names of machines."""
    return ((name, "machine") for name in _names(catalog_root(ctx) / "machines"))


@_completing()
def image_names(ctx: click.Context, _: str) -> Words:
    """Find the names of images in the catalog."""
    return _images(catalog_root(ctx))


@_completing()
def recipe_names(_: click.Context, __: str) -> Words:
    """Find the names of images that can be built."""
    from pytest_vmbottle.images.recipes import RECIPES

    return ((name, recipe.description) for name, recipe in RECIPES.items())


@_completing()
def official_names(_: click.Context, __: str) -> Words:
    """Find the names of images that can be downloaded."""
    from pytest_vmbottle.images.cloud import CLOUD_IMAGES

    return ((name, image.description) for name, image in CLOUD_IMAGES.items())


@_completing()
def pack_keys(ctx: click.Context, _: str) -> Words:
    """Find the keys of packs."""
    return _packs(catalog_root(ctx))


@_completing(files=True)
def sources(ctx: click.Context, _: str) -> Words:
    """Find all that machines start from: images and recipes, machines, snapshots, layers and packs."""
    from pytest_vmbottle.images.recipes import RECIPES

    root = catalog_root(ctx)
    yield from _images(root)
    yield from ((name, recipe.description) for name, recipe in RECIPES.items())
    for name in _names(root / "machines"):
        yield name, "machine"
        yield from ((f"{name}@{label}", "snapshot") for label in _names(root / "machines" / name / "snapshots"))
    yield from _layers(Path())
    yield from ((f"pack:{key}", name) for key, name in _packs(root))


@_completing(files=True)
def lineages(ctx: click.Context, _: str) -> Words:
    """Find all that a bisection searches: capsules, images and recipes, layers and packs."""
    from pytest_vmbottle.images.recipes import RECIPES

    root = catalog_root(ctx)
    yield from ((name, "capsule") for name in _names(root / "capsules"))
    yield from _images(root)
    yield from ((name, recipe.description) for name, recipe in RECIPES.items())
    yield from _layers(Path())
    yield from ((f"pack:{key}", name) for key, name in _packs(root))


@_completing()
def snapshot_labels(ctx: click.Context, _: str) -> Words:
    """Find the labels of a machine's snapshots."""
    return ((label, "snapshot") for label in _names(catalog_root(ctx) / "machines" / str(ctx.params.get("name")) / "snapshots"))


@_completing(files=True)
def capsule_names(ctx: click.Context, _: str) -> Words:
    """Find the names of capsules."""
    return ((name, "capsule") for name in _names(catalog_root(ctx) / "capsules"))


@_completing(files=True)
def copy_sides(ctx: click.Context, _: str) -> Words:
    """Find the sides of copies that are in machines."""
    return ((f"{name}:/", "machine") for name in _names(catalog_root(ctx) / "machines"))


def _images(root: Path) -> Words:
    return ((name.removesuffix(".json"), "image") for name in _names(root / "images" / "names"))


def _packs(root: Path) -> Iterator[tuple[str, str]]:
    for key in _names(root / "packs"):
        with suppress(OSError, ValueError):
            yield key[:SHORT], str(json.loads((root / "packs" / key / "pack.json").read_text())["name"])


def _layers(folder: Path) -> Iterator[tuple[str, str]]:
    for conftest in (folder / "conftest.py", *sorted(folder.glob("*/conftest.py"))):
        with suppress(OSError, ValueError):
            yield from ((f"{conftest}::{name}", "layer") for name in _LAYER.findall(conftest.read_text()))
