"""Checks of the catalog: its folder, and the space for images and packs."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_reason, default_root
from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host import resources
from pytest_vmbottle.host.findings import Answer, Check, degraded, missing, ok
from pytest_vmbottle.host.sizes import format_size

__all__ = ["checks"]

_LITTLE_SPACE, _NO_SPACE = 10 << 30, 3 << 30


def checks(root: Path) -> tuple[Check, ...]:
    """Return the checks of the catalog in a folder, made if need be."""
    return Check("catalog", partial(_catalog, root), needed=True), Check("disk space", partial(_disk_space, root), needed=True)


def _catalog(root: Path) -> Answer:
    kind = resources.file_system(root)
    details = {"path": str(root), "file_system": kind, "network": resources.is_network_file_system(root)}
    try:
        catalog = Catalog(root)
    except CatalogError as error:
        return missing(str(error), "export VMBOTTLE_CATALOG=/var/tmp/vmbottle-$USER", **details)
    if catalog.root == default_root() and default_reason():
        text = f"{default_reason()}, so {catalog.root} is used: in a container it is removed together with the container"
        return degraded(text, "export VMBOTTLE_CATALOG=DIR  # a folder that is kept", **details)
    return ok(f"{catalog.root} can be used, on {kind or 'an unknown file system'}", **details)


def _disk_space(root: Path) -> Answer:
    # The catalog need not be there yet, so its nearest folder tells the file system.
    place = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.is_dir())
    usage = shutil.disk_usage(place)
    details = {"path": str(place), "free": usage.free, "total": usage.total}
    text = f"{format_size(usage.free)} of {format_size(usage.total)} are free for images and packs in {place}"
    if usage.free < _NO_SPACE:
        return missing(f"{text}, less than the {format_size(_NO_SPACE)} that an image and its packs need", "vmbottle pack prune", **details)
    if usage.free < _LITTLE_SPACE:
        return degraded(f"{text}, too little for many packs", "vmbottle pack prune --older-than 7d", **details)
    return ok(text, **details)
