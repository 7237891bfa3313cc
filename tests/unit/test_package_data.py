"""Files of the package: what is read of scripts for guests, that all of them are of use, and that the wheel has all."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pytest_vmbottle.guest import search
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.images import builder
from pytest_vmbottle.machine import bulk, lan

CHECKOUT = Path(__file__).parents[2]
PACKAGE = CHECKOUT / "pytest_vmbottle"
PAGE = {path for path in (PACKAGE / "report" / "page").iterdir() if path.is_file()}
STARTER = set((PACKAGE / "cli" / "starter").iterdir())
SCRIPTS = {path for path in PACKAGE.rglob("scripts/*") if path.is_file()}


def _read_by(module: Path) -> set[Path]:
    """The scripts that a module reads."""
    calls = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Call)]
    words = [[ast.unparse(word) for word in call.args] for call in calls if ast.unparse(call.func) == "read_script"]
    return {module.parent / "scripts" / ast.literal_eval(name) for package, name in words if package == "__package__"}


def _included_by(script: Path) -> set[Path]:
    return {script.parent / name for name in re.findall(r"^\. \./(.+)$", script.read_text(), re.MULTILINE)}


def test_a_script_is_read_without_its_comments_and_with_those_that_it_includes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "room_of_scripts" / "scripts"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "all.sh").write_text(
        "#!/bin/sh\n# Does all.\n. ./part.sh\n\n  # shellcheck disable=SC1\n  echo '#' \\1 # ü\n. /etc/profile\n"
    )
    (folder / "part.sh").write_text("# A part.\nset -u\n. ./least.sh\n")
    (folder / "least.sh").write_text("umask 0\n")
    monkeypatch.syspath_prepend(tmp_path)

    assert read_script("room_of_scripts", "all.sh") == "#!/bin/sh\nset -u\numask 0\n\n  echo '#' \\1 # ü\n. /etc/profile\n"


def test_every_script_is_read_by_a_module_or_included_and_every_one_that_is_wanted_is_there() -> None:
    wanted = [_read_by(module) for module in PACKAGE.rglob("*.py")] + [_included_by(script) for script in SCRIPTS]

    assert set().union(*wanted) == SCRIPTS


def test_the_wheel_has_every_script_the_page_of_reports_and_what_a_project_begins_with(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=CHECKOUT, check=True)
    (wheel,) = tmp_path.glob("*.whl")

    assert SCRIPTS
    assert STARTER
    assert {path.suffix for path in PAGE} == {".html", ".css", ".js", ".txt"}
    assert {str(path.relative_to(CHECKOUT)) for path in SCRIPTS | PAGE | STARTER} - set(zipfile.ZipFile(wheel).namelist()) == set()


@pytest.mark.parametrize(
    ("word", "script"),
    [
        (f"exit {bulk._UNSEEN};", bulk._PUT),
        (f"exit {lan._NO_IP}\n", lan._SPARE),
        (f"exit {lan._NO_ADDRESS}\n", lan._SETTLE),
        (f"exit {search._BAD_GREP}\n", search._SCRIPT),
        (f"exit {search._BAD_PATTERN}\n", search._SCRIPT),
        (f'"/{builder._SCRIPT}"', builder._RUN_SCRIPT),
    ],
)
def test_a_module_and_its_script_mean_the_same_by_a_status_or_a_name(word: str, script: str) -> None:
    assert word in script
