"""The place of the catalog, if nothing else is said."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["default_reason", "default_root"]

_LASTING = (Path("/var/tmp"), Path("/tmp"))  # noqa: S108 - a folder there is only used if it is ours alone: see _check_ours
"""Public folders, the one that survives a boot first."""


def default_root() -> Path:
    """Return the default folder of the catalog.

    It is in the user's cache folder or, if that cannot be written, in a public one.
    """
    usual, name = _usual(), f"pytest-vmbottle-{os.geteuid()}"
    if usual is not None and _can_be_made(usual):
        return usual
    return next((folder / name for folder in _LASTING if _can_be_made(folder)), usual or _LASTING[0] / name)


def default_reason() -> str:
    """Return why the default is not in the user's cache folder; empty if it is there.

    Containers may have a read-only home.
    """
    usual = _usual()
    if usual is None:
        return "this user has no home folder"
    return "" if _can_be_made(usual) else f"{usual.parent} cannot be written"


def _usual() -> Path | None:
    """Return the place in the user's cache folder.

    None for a container's user without a name and without HOME.
    """
    # https://specifications.freedesktop.org/basedir-spec, and the custom of macOS.
    caches = os.environ.get("XDG_CACHE_HOME", "").strip() or ("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    # HOME may be relative or empty in a container. Not by `Path`, which raises where there is none.
    folder = Path(os.path.expanduser(caches), "pytest-vmbottle")  # noqa: PTH111
    return folder if folder.is_absolute() else None


def _can_be_made(folder: Path) -> bool:
    """Tell whether a folder is writable or could be made, with its missing parents."""
    there = next(each for each in (folder, *folder.parents) if os.path.exists(each))  # noqa: PTH110 - where we may not look, Path raises
    return os.access(there, os.W_OK | os.X_OK)
