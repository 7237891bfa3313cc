"""Checks of what building images takes: its programs, user namespaces, and keys."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pytest_vmbottle.host.commands import run_tool
from pytest_vmbottle.host.files import read_or_empty
from pytest_vmbottle.host.findings import TOOL_SECONDS, Answer, Check, Command, Remedy, degraded, install, ok, unknown
from pytest_vmbottle.images.apt import apt_sources
from pytest_vmbottle.images.builder import required_tools, without_ids
from pytest_vmbottle.images.recipes import RECIPES

__all__ = ["checks"]

_CANNOT_BUILD = "images cannot be built here, only added"


def checks() -> tuple[Check, ...]:
    """Return the checks of building; machines run without it, from images that are added."""
    return Check("mmdebstrap", _tools), Check("user namespaces", _namespaces), Check("archive keys", _archive_keys)


def _tool(name: str) -> str | None:
    # Administrators' tools are not on the path of ordinary users.
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin")


def _tools() -> Answer:
    packages = required_tools(rootless=os.geteuid() != 0)
    paths = {name: _tool(name) for name in packages}
    lacking = [name for name, path in paths.items() if path is None]
    if lacking:
        remedy = install(sorted({packages[name] for name in lacking}))
        return degraded(f"there is no {' and no '.join(lacking)}: {_CANNOT_BUILD}", remedy, paths=paths)
    ended = run_tool([str(paths["mmdebstrap"]), "--version"], timeout=TOOL_SECONDS)
    said = ended.output.strip()[:200]
    if not ended.ok:
        remedy = install(["mmdebstrap"], "--reinstall")
        return degraded(f"{paths['mmdebstrap']} does not work, it printed {said!r}: {_CANNOT_BUILD}", remedy, paths=paths)
    return ok(f"{said} and {paths['mke2fs']} build images", paths=paths, version=said)


def _namespaces() -> Answer:
    """Find out whether an ordinary user can build images, which takes a user namespace with other ids in it: see subuid(5)."""
    if os.geteuid() == 0:
        return ok("root builds images without them", needed=False)
    newuidmap, mmdebstrap = _tool("newuidmap"), _tool("mmdebstrap")
    if newuidmap is None:
        return degraded(f"there is no newuidmap: without root, {_CANNOT_BUILD}", install(["uidmap"]), needed=True)
    remedy = without_ids()
    if remedy:
        return degraded(f"this user has no subordinate user and group ids: without root, {_CANNOT_BUILD}", remedy, needed=True)
    if mmdebstrap is None:
        return unknown("not tested, because mmdebstrap, which tests it, is missing", needed=True)
    # Tried as the builder does, because sysctls, AppArmor and containers can each forbid it.
    ended = run_tool([mmdebstrap, "--unshare-helper", "true"], timeout=TOOL_SECONDS)
    if not ended.ok:
        said = ended.output.strip()[-200:]
        text = f"this user cannot create one ({said!r}): without root, {_CANNOT_BUILD}"
        return degraded(text, _allow_namespaces(), needed=True)
    return ok("this user can create one, and builds images in it", needed=True)


def _allow_namespaces() -> str:
    # One is Debian's, one is AppArmor's. A kernel that lacks a switch has no such file, which reads as empty.
    switches = {"kernel.unprivileged_userns_clone": "1", "kernel.apparmor_restrict_unprivileged_userns": "0"}
    now = {name: read_or_empty(Path("/proc/sys", *name.split("."))).strip() for name in switches}
    wrong = [f"{name}={right}" for name, right in switches.items() if now[name] not in ("", right)]
    return Remedy.of(Command(("sudo", "sysctl", "-w", *wrong))) if wrong else ""


def _archive_keys() -> Answer:
    """Find out whether packages can be checked: those of this host's own sources, or else of the recipe's archive with its keys."""
    details = {name: {"keyring": str(recipe.keyring[0]), "there": recipe.keyring[0].exists()} for name, recipe in RECIPES.items()}
    lacking = {name: recipe for name, recipe in RECIPES.items() if not details[name]["there"] and not apt_sources(recipe.suite)}
    if lacking:
        remedy = install(sorted({recipe.keyring[1] for recipe in lacking.values()}))
        text = f"the keys that the packages of {' and '.join(lacking)} are signed with are missing: {_CANNOT_BUILD}"
        return degraded(text, remedy, **details)
    return ok(f"the packages of {' and '.join(RECIPES)} can be checked", **details)
