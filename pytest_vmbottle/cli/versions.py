"""`vmbottle --version`: the versions of all that a report about a problem has to name."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import version

from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.commands import run_tool

__all__ = ["versions"]


def versions(program: str) -> Iterator[str]:
    """Yield a line for each: this program and its name, Python and pytest, QEMU, the system."""
    # The first line alone is as other programs have it, for scripts.
    yield f"{program}, version {version('pytest-vmbottle')}"
    yield f"{platform.python_implementation()} {platform.python_version()}, pytest {version('pytest')}"
    yield _qemu()
    yield f"{platform.system()} {platform.release()} on {platform.machine()}"


def _qemu() -> str:
    name = f"qemu-system-{host_arch()}"
    found = shutil.which(name)
    if found is None:
        return f"no {name} in the search path"
    try:
        told = run_tool([found, "--version"], timeout=10.0).output.splitlines()
    except OSError as error:
        told = [f"{name} cannot be run: {error.strerror}"]
    return f"{told[0] if told else f'{name} says nothing of its version'}, {found}"
