"""`vmbottle init`: a first test, its settings and a workflow, written into a project that has none."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from configparser import ConfigParser
from configparser import Error as WrongIni
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import click

from pytest_vmbottle.cli.command import examples, one_line, say

__all__ = ["init"]

_TEST, _INI, _WORKFLOW = "tests/test_machines.py", "pytest.ini", ".github/workflows/machines.yml"
_LINES = {
    ".toml": 'vm_defaults = ["source = debian-12", "memory = 1G"]',
    "": "vm_defaults =\n    source = debian-12\n    memory = 1G",
}
"""The settings, for a file that is there already, by its kind."""


@click.command(epilog=examples("vmbottle init", "vmbottle init ~/src/project"))
@click.argument("folder", metavar="[DIR]", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path())
def init(*, folder: Path) -> None:
    """Write a first test with a machine, its settings, and a workflow for GitHub.

    Nothing that is there is changed: a file of the same name is kept, and if pytest has settings already, the lines to add are shown. The
    files are DIR/tests/test_machines.py, DIR/pytest.ini and DIR/.github/workflows/machines.yml; what they mean stands in them. DIR is the
    current folder by default. The paths of the files that were written go to stdout.
    """
    settings = next(_settings(folder.resolve()), None)
    repository = next((each for each in (folder.resolve(), *folder.resolve().parents) if (each / ".git").exists()), None)
    _write(folder / _TEST, "test_machines.txt")
    if settings is None:
        _write(folder / _INI, "pytest_ini.txt")
    else:
        lines = _LINES.get(settings.suffix, _LINES[""])
        say(f"{settings} has pytest's settings. These say what a machine is made of if its test does not:\n{lines}")
    if repository in (None, folder.resolve()):
        _write(folder / _WORKFLOW, "workflow.txt", {"VERSION": version("pytest-vmbottle")})
    else:
        say(f"no workflow was written: it has to be in the top folder of the repository, {repository}")
    there = "" if folder == Path() else f"cd {folder} && "
    say(f"\nNow run\n  vmbottle doctor\n  {there}pytest {_TEST}\nThe first run builds a Debian image; later ones take seconds.")


def _settings(folder: Path) -> Iterator[Path]:
    """Find the files with settings of pytest, in the order in which pytest looks: in a folder, then above it."""
    for each in (folder, *folder.parents):
        yield from (each / name for name in ("pytest.toml", ".pytest.toml", "pytest.ini", ".pytest.ini") if (each / name).is_file())
        if "pytest" in _toml(each / "pyproject.toml").get("tool", {}):
            yield each / "pyproject.toml"
        yield from (each / name for name, part in (("tox.ini", "pytest"), ("setup.cfg", "tool:pytest")) if _has_part(each / name, part))


def _toml(path: Path) -> Mapping[str, Mapping[str, object]]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    # Not ours to judge: pytest will say what is wrong with it.
    except (OSError, ValueError):
        return {}


def _has_part(path: Path, part: str) -> bool:
    parser = ConfigParser(interpolation=None)
    try:
        parser.read(path, encoding="utf-8")
    except (OSError, ValueError, WrongIni):
        return False
    return parser.has_section(part)


def _write(path: Path, template: str, values: Mapping[str, str] | None = None) -> None:
    """Write a file if there is none of its name, and tell which of both it was."""
    text = (resources.files(__package__) / "starter" / template).read_text(encoding="utf-8")
    for name, value in (values or {}).items():
        text = text.replace(name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # "x": it fails where anything has this name already, a link included.
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except BaseException:
                path.unlink()
                raise
    except FileExistsError:
        say(f"{path} is there already, and was left as it is")
    else:
        click.echo(one_line(path))
