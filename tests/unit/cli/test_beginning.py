"""What `vmbottle init` writes into a project, and what it leaves alone. tests/real/test_beginning.py runs the result."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pytest_vmbottle.cli import main

WRITTEN = ["tests/test_machines.py", "pytest.ini", ".github/workflows/machines.yml"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def init(*words: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["init", *words], prog_name="vmbottle")
    assert result.exit_code == status, result.output
    return result


def files(project: Path) -> dict[str, str]:
    return {str(path.relative_to(project)): path.read_text() for path in project.rglob("*") if path.is_file()}


def test_an_empty_project_gets_a_test_its_settings_and_a_workflow_and_is_told_what_to_run(project: Path) -> None:
    result = init()

    assert result.stdout.splitlines() == WRITTEN
    assert sorted(files(project)) == sorted(WRITTEN)
    assert "  vmbottle doctor\n  pytest tests/test_machines.py\n" in result.stderr


def test_a_second_time_nothing_changes(project: Path) -> None:
    init()
    (project / "tests/test_machines.py").write_text("mine\n")
    before = files(project)
    result = init()

    assert files(project) == before
    assert result.stdout == ""
    assert "tests/test_machines.py is there already, and was left as it is\n" in result.stderr


def test_a_link_that_leads_nowhere_is_not_written_through(project: Path) -> None:
    (project / "tests").mkdir()
    (project / "tests" / "test_machines.py").symlink_to(project / "elsewhere.py")
    result = init()

    assert not (project / "elsewhere.py").exists()
    assert "tests/test_machines.py is there already" in result.stderr


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("pyproject.toml", "[tool.pytest.ini_options]\n", 'vm_defaults = ["source = debian-12", "memory = 1G"]'),
        ("pytest.toml", "", 'vm_defaults = ["source = debian-12", "memory = 1G"]'),
        (".pytest.ini", "", "    source = debian-12"),
        ("tox.ini", "[pytest]\n", "    source = debian-12"),
        ("setup.cfg", "[tool:pytest]\n", "    source = debian-12"),
        ("../pytest.ini", "[pytest]\n", "    source = debian-12"),
    ],
)
def test_settings_that_pytest_has_are_left_alone_and_the_lines_to_add_are_shown(project: Path, name: str, text: str, line: str) -> None:
    (project / name).write_text(text)
    result = init()

    assert (project / name).read_text() == text
    assert not (project / "pytest.ini").exists()
    assert line in result.stderr.splitlines()


@pytest.mark.parametrize(
    ("name", "text"), [("pyproject.toml", "[project]\n"), ("pyproject.toml", "not toml"), ("tox.ini", "[tox]\n"), ("setup.cfg", "not ini")]
)
def test_a_file_without_settings_of_pytest_leaves_room_for_some(project: Path, name: str, text: str) -> None:
    (project / name).write_text(text)

    assert "pytest.ini" in init().stdout.splitlines()


def test_a_workflow_is_written_only_where_github_would_find_it(project: Path) -> None:
    (project / ".git").mkdir()
    assert WRITTEN[2] in init().stdout.splitlines()

    (project / "part").mkdir()
    result = init("part")
    assert not (project / "part" / ".github").exists()
    assert f"in the top folder of the repository, {project}\n" in result.stderr
    assert "  cd part && pytest tests/test_machines.py\n" in result.stderr


def test_what_cannot_be_written_is_told_in_a_sentence(project: Path) -> None:
    (project / "tests").write_text("no folder")
    result = init(status=1)

    assert result.stderr == "Error: tests: File exists\n"
    assert files(project) == {"tests": "no folder"}


def test_the_workflow_uses_this_version_and_has_the_form_of_one(project: Path) -> None:
    init()
    path = project / WRITTEN[2]
    argv = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]

    assert f"uses: pytest-vmbottle/pytest-vmbottle@v{version('pytest-vmbottle')}\n" in path.read_text()
    assert subprocess.run(argv, check=False, capture_output=True, timeout=120).returncode == 0


@pytest.mark.usefixtures("project")
def test_pytest_takes_the_settings_and_finds_the_tests() -> None:
    init()
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--strict-markers", "--strict-config", "-p", "no:cacheprovider"]
    ended = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTEST_ADDOPTS": ""})

    assert ended.returncode == 0, ended.stdout
    assert "3 tests collected" in ended.stdout
