"""Orders for new machines without pytest: a source and keywords, checked before anything is made."""

from __future__ import annotations

import base64
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.spec import PREPARATION, Layer, MachineSpec, Source, check_keywords
from pytest_vmbottle.standalone.client import LABEL, Kept, find
from pytest_vmbottle.standalone.stored import Stored

if TYPE_CHECKING:
    from pytest_vmbottle.spec import File

__all__ = ["PACK", "Order", "forwards", "free_name", "new_order", "source_of", "spec_keywords"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,40}")
"""Name of a machine: that of a spec, of which a folder can be named."""
_LAYER = re.compile(r"(.+\.py)::([A-Za-z_]\w*)", re.DOTALL)
_SNAPSHOT = re.compile(rf"({_NAME.pattern})@({LABEL.pattern})")
_MAX_PORT = 65535
PACK = "pack:"
"""Prefix of a source that is a pack, by the beginning of its key."""


@attrs.frozen(kw_only=True)
class Order:
    """A machine to be started.

    Attributes:
        place: The machine's folder.
        facts: The daemon's instructions (see `Kept.start`).
        snapshot: The snapshot that it starts from, if that is its source.
    """

    place: Kept
    facts: Mapping[str, Any]
    snapshot: Stored | None = None


def new_order(  # noqa: PLR0913 - all that makes a machine
    machines: Path,
    *,
    catalog: Path,
    source: str,
    name: str | None,
    keywords: Mapping[str, Any],
    settings: Mapping[str, str],
    folder: Path,
) -> Order:
    """Return the order for a machine; nothing is made yet.

    Args:
        machines: The folder of all machines.
        catalog: The catalog's folder.
        source: The name of an image, the path of a disk (with a slash), `pack:KEY`, `FILE.py::LAYER` or `MACHINE@LABEL`.
        name: The machine's name; by default one that is free, after the source.
        keywords: Keywords of the `vm` mark, as JSON has them. The content of a file in `files` is `{"text": ...}`, `{"b64": ...}` or
            `{"host": PATH}`, perhaps with a `"mode"`. A port in `ports` is one of the guest, or a pair of it and the port of 127.0.0.1 that
            leads to it.
        settings: Settings by their names.
        folder: The folder of the project, whose images can be named.

    Raises:
        SpecError: A keyword, the source or the name is invalid.
        CatalogError: There is no such snapshot.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise SpecError(f"name={name!r}: takes a letter, then letters, digits, - or _, at most 41 in all")
    place = Kept(machines / (name or free_name(machines, source)))
    given = {key: value for key, value in keywords.items() if key != "name"}
    snapshot = None
    if (found := _SNAPSHOT.fullmatch(source)) is not None:
        snapshot = Stored.read(find(machines, found[1]).snapshot_folder(found[2]))
        _check_fits(snapshot, given, source)
        given = {**snapshot.keywords, **given}
    elif source.startswith(PACK):
        packs.find(catalog / "packs", source.removeprefix(PACK))
        _check_unprepared(given, source)
        check_keywords(spec_keywords(given))
    else:
        # For its errors, which tell the caller which keyword was wrong, before a daemon is started.
        MachineSpec.resolve(source_of(source, folder), spec_keywords({**given, "name": place.name}))
    facts = {
        "catalog": str(catalog),
        "folder": str(folder),
        "settings": dict(settings),
        # The daemon works in another folder, so a relative path is made absolute here.
        "keywords": given | {"source": _absolute(source, folder), "name": place.name},
    }
    return Order(place=place, facts=facts, snapshot=snapshot)


def _check_fits(snapshot: Stored, given: Mapping[str, Any], source: str) -> None:
    _check_unprepared(given, source)
    differs = snapshot.spec(**spec_keywords(given)).boot_digest() != snapshot.spec().boot_digest()
    if differs:
        raise SpecError(f"{source}: a snapshot is restored with the processors, the memory, the disk and the display that it was made with")


def _check_unprepared(given: Mapping[str, Any], source: str) -> None:
    if PREPARATION & given.keys():
        words = ", ".join(sorted(PREPARATION & given.keys()))
        raise SpecError(f"{source}: it is restored as it was saved, so {words} cannot be done beforehand: do it when the machine runs")


def free_name(machines: Path, source: str) -> str:
    """Return the first free name of web, web-2, web-3 and so on."""
    # The last part of a path, a layer's own name, a snapshot's machine.
    plain = re.split(r"::|:", source)[-1].partition("@")[0]
    # 30 of 41 characters: the rest is for a number.
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", Path(plain).name.partition(".qcow2")[0])[:30].strip("-")
    stem = stem if _NAME.fullmatch(stem) else f"vm-{stem}".strip("-")
    number = 1
    # Of two starts at once, `Kept.start` refuses the second.
    while (machines / (name := stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return name


def _absolute(source: str, folder: Path) -> str:
    """Return a source that means the same in every folder; names and references such as `library/alpine` as they are."""
    layer = _LAYER.fullmatch(source)
    path = folder / (layer[1] if layer else source)
    if layer:
        return f"{path}::{layer[2]}"
    return str(path) if "/" in source and path.exists() else source


def source_of(text: str, folder: Path) -> Source:
    """Return the source of a spec that a text names.

    Raises:
        SpecError: There is no such file, or no such layer in it.
    """
    if (layer := _LAYER.fullmatch(text)) is not None:
        return _layer(folder / layer[1], layer[2])
    # smolvm takes references to images of registries, which have slashes too: they are no paths.
    return folder / text if "/" in text and (folder / text).exists() else text


def _layer(file: Path, name: str) -> Layer:
    """Import a Python file and return a layer in it."""
    if not file.is_file():
        raise SpecError(f"{file}::{name}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"_vmbottle_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise SpecError(f"{file}: it is no Python file")
    module = importlib.util.module_from_spec(spec)
    # As pytest does: modules beside the file, or beside the package that it is in, can be imported.
    root = next(parent for parent in file.parents if not (parent / "__init__.py").exists())
    sys.path.insert(0, str(root))
    # A layer's source is found by the module of its function.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SpecError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not isinstance(found, Layer):
        layers = ", ".join(key for key, value in vars(module).items() if isinstance(value, Layer)) or "none"
        raise SpecError(f"{file} has no layer {name!r} (there: {layers})")
    return found


def spec_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords as a spec takes them, from how JSON has them.

    Raises:
        SpecError: A file has no content that can be read.
    """
    plain = dict(keywords)
    if isinstance(ports := keywords.get("ports"), list):
        plain["ports"] = [port[0] if _is_pair(port) else port for port in ports]
    if isinstance(files := keywords.get("files"), Mapping):
        plain["files"] = {path: _file(path, content) for path, content in files.items()}
    return plain


def forwards(keywords: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the pairs in `ports`: ports of the guest, with those of 127.0.0.1 that lead to them."""
    ports = keywords.get("ports")
    return [(port[0], port[1]) for port in (ports if isinstance(ports, list) else ()) if _is_pair(port)]


def _is_pair(port: object) -> bool:
    return isinstance(port, list | tuple) and len(port) == 2 and all(type(each) is int and 0 < each <= _MAX_PORT for each in port)  # noqa: PLR2004


def _file(path: str, content: Any) -> File:
    if not isinstance(content, Mapping) or len({"text", "b64", "host"} & content.keys()) != 1:
        raise SpecError(f"files={path!r}: takes one of text, b64 and host, and perhaps a mode")
    if "host" in content:
        data: str | bytes | Path = Path(content["host"])
    elif "text" in content:
        data = str(content["text"])
    else:
        try:
            data = base64.b64decode(content["b64"], validate=True)
        except (ValueError, TypeError) as error:
            raise SpecError(f"files={path!r}: b64 is no base64: {error}") from None
    return data if content.get("mode") is None else (data, content["mode"])
