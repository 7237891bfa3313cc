"""`vmbottle --version`: the versions of all that a report about a problem has to name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["version_option"]


def _show(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:  # noqa: FBT001 - as click calls it
    if not wanted or ctx.resilient_parsing:
        return
    # Imported here, as in all commands: the help loads nothing that machines need.
    from pytest_vmbottle.cli.command import one_line

    for line in _lines(ctx.find_root().info_name or "vmbottle"):
        click.echo(one_line(line))
    ctx.exit()


def _lines(program: str) -> Iterator[str]:
    import platform
    from importlib.metadata import version

    # The first line alone is as other programs have it, for scripts.
    yield f"{program}, version {version('pytest-vmbottle')}"
    yield f"{platform.python_implementation()} {platform.python_version()}, pytest {version('pytest')}"
    yield _qemu()
    yield f"{platform.system()} {platform.release()} on {platform.machine()}"


def _qemu() -> str:
    import shutil
    from pathlib import Path

    from pytest_vmbottle.backends.qemu import proof
    from pytest_vmbottle.errors import BackendUnavailable
    from pytest_vmbottle.host.arch import host_arch

    try:
        name = f"qemu-system-{host_arch()}"
        found = shutil.which(name)
        return f"{proof.version(Path(found))}, {found}" if found else f"no {name} in the search path"
    except BackendUnavailable as error:
        return error.reason


version_option = click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show,
    help="Show the versions of the plugin, of Python, pytest and QEMU, and the system.",
)
