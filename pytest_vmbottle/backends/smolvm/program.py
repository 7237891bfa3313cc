"""Search for the smolvm program, and check that it is the right one.

Two products go by that name. This one is of smol-machines: its machines are made by `smolvm machine create`, and the wheel `smolmachines`
carries it under the name `smol-vmm`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.host.commands import run_tool

__all__ = ["VARIABLE", "Program", "find_program", "judge"]

VARIABLE = "VMBOTTLE_SMOLVM"
"""The environment variable that names the program."""

_INSTALL = "Install it: pip install 'pytest-vmbottle[smolvm]'"
_OLDEST = (1, 0)
_SECONDS = 20.0
_VERSION = re.compile(r"^smolvm (\d+(?:\.\d+)+)", re.MULTILINE)
_VERBS = frozenset({"create", "start", "stop", "delete", "exec", "cp"})
_WHEEL = ("smol", "smol-vmm")


@attrs.frozen(kw_only=True)
class Program:
    """A smolvm program that can be used.

    Attributes:
        path: Path of the program.
        version: Its version, such as `"1.32.2"`.
        verbs: The subcommands of `smolvm machine`.
    """

    path: Path
    version: str
    verbs: frozenset[str]


def find_program(environ: Mapping[str, str] = os.environ) -> Program:
    """Find smolvm: the one that the environment names, or the first right one of the search path, or the wheel's.

    Raises:
        BackendUnavailable: There is none, or the named program is another one; the reason says what each candidate is.
    """
    named = environ.get(VARIABLE)
    if named:
        found = judge(Path(named))
        if isinstance(found, Program):
            return found
        # Named, so no other one will do: an error says more than a silent fallback.
        raise BackendUnavailable(f"{VARIABLE}={named}: {found}", f"{_INSTALL}, and unset {VARIABLE}")
    others = []
    for path in (*_on_path(environ.get("PATH", os.defpath)), *_in_wheel()):
        found = judge(path)
        if isinstance(found, Program):
            return found
        others.append(f"{path}: {found}")
    there = "; ".join(others) or "it is not in the search path, and the wheel smolmachines is not installed"
    raise BackendUnavailable(f"there is no smolvm of smol-machines here: {there}", _INSTALL)


def _on_path(path: str) -> Iterator[Path]:
    for folder in dict.fromkeys(path.split(os.pathsep)):
        program = Path(folder, "smolvm")
        # An empty entry of PATH means the current folder, whose programs are not run unasked.
        if folder and os.access(program, os.X_OK) and program.is_file():
            yield program


def _in_wheel() -> Iterator[Path]:
    """Yield the program inside the wheel.

    The wheel is not imported, because that loads a hypervisor.
    """
    package, name = _WHEEL
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        program = Path(folder, name)
        if os.access(program, os.X_OK):
            yield program


def judge(path: Path) -> Program | str:
    """Return the program at a path, or the reason that it is the wrong one."""
    try:
        asked = run_tool([path, "--version"], timeout=_SECONDS)
        told = run_tool([path, "machine", "--help"], timeout=_SECONDS)
    except OSError as error:
        return f"it cannot be run: {error.strerror}"
    # In clap's help each subcommand begins a line behind two blanks, and its description follows behind two or more.
    verbs = frozenset(re.findall(r"^  ([a-z][a-z-]*)  ", told.output, re.MULTILINE))
    version = _VERSION.search(asked.output)
    # By what it can do: the other product of this name has a version too.
    if not told.ok or not verbs >= _VERBS:
        return "it is another product of that name: it has no `smolvm machine create`"
    if version is None:
        return f"asked for its version, it printed {asked.output.strip()[:80]!r}"
    if tuple(map(int, version[1].split(".")[:2])) < _OLDEST:
        return f"it is smolvm {version[1]}, and 1.0 or later is needed"
    return Program(path=path, version=version[1], verbs=verbs)
