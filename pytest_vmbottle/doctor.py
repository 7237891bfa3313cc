"""Checks of this host, asked of every part of the package: each tries what it needs, and names the remedy."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pytest_vmbottle.backends.make import NAMES, make
from pytest_vmbottle.catalog import checks as catalog
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host import checks as host
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.host.findings import Check, Finding, State, unknown
from pytest_vmbottle.images import checks as images
from pytest_vmbottle.settings import Settings

__all__ = ["Finding", "State", "can_run", "examine"]

_ORDER = (
    *("system", "qemu", "qemu-img", "accelerator", "packs", "smolvm", "smolvm machines", "catalog", "disk space", "memory", "setpriv"),
    *("rights", "open files", "mmdebstrap", "user namespaces", "archive keys"),
)
"""Order in which people read the findings; other topics come last."""


def can_run(findings: Iterable[Finding]) -> bool:
    """Return whether machines can be run: nothing that they need is missing or unknown."""
    return not any(finding.stops for finding in findings)


def examine(catalog_root: Path, settings: Settings) -> tuple[Finding, ...]:
    """Check everything that machines, packs and images need; raise nothing.

    Args:
        catalog_root: The catalog's folder, made if need be; probe results are remembered in it.
        settings: Settings of machines.
    """
    with _folder(catalog_root) as folder:
        checks = (*host.checks(settings.memory_budget), *_backends(folder, settings), *catalog.checks(catalog_root), *images.checks())
        # `find` turns an error of a check into a finding, so that one that breaks does not hide the others.
        return tuple(check.find() for check in sorted(checks, key=_place))


def _place(check: Check) -> int:
    return _ORDER.index(check.topic) if check.topic in _ORDER else len(_ORDER)


def _backends(folder: Path, settings: Settings) -> Iterator[Check]:
    chosen = settings.backend_for()
    for name in NAMES:
        # Of all backends, not only of the chosen one: what else could be used here is of interest, too.
        backend = make(name, settings, folder=folder)
        if backend is not None:
            yield from backend.checks(chosen=name == chosen)
    # A plugin's backend is known to pytest alone, so nothing can be said of it here.
    if chosen not in NAMES:
        yield Check("backend", partial(unknown, f"{chosen} comes with a plugin and was not checked: only pytest loads plugins"))


@contextmanager
def _folder(catalog_root: Path) -> Iterator[Path]:
    """Yield the folder in which backends remember their proofs.

    That is the catalog, or a temporary one if it cannot be used.
    """
    try:
        root = Catalog(catalog_root).root
        # Made to see whether it can be written.
        private_dir(root / "proofs")
    except (CatalogError, OSError):
        with tempfile.TemporaryDirectory(prefix="vmbottle-doctor-") as name:
            yield Path(name)
    else:
        yield root
