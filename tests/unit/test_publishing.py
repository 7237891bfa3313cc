"""What a stranger sees of the package before it is installed: links that lead somewhere, versions that agree, and what to report."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SITE, REPOSITORY = PROJECT["urls"]["Documentation"], PROJECT["urls"]["Repository"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
OUTWARD = ("README.md", "SECURITY.md", ".github/ISSUE_TEMPLATE/config.yml")
"""Files that are read elsewhere than in a checkout."""


def links(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    return LINK.findall(text) if page.endswith(".md") else re.findall(r"url: (\S+)", text)


def place(link: str) -> Path | None:
    """The file of this checkout that an address of the project means; None for those that are made by whoever serves it."""
    path, _, _ = link.partition("#")
    if path.startswith(SITE):
        page = ROOT / "docs" / f"{path.removeprefix(SITE).rstrip('/') or 'index'}.md"
        return page if page.is_file() else page.with_suffix("") / "index.md"
    if path.startswith(f"{REPOSITORY}/blob/main/"):
        return ROOT / path.removeprefix(f"{REPOSITORY}/blob/main/")
    return None


@pytest.mark.parametrize("page", OUTWARD)
def test_links_in_what_is_read_elsewhere_are_whole_addresses_of_files_that_are_there(page: str) -> None:
    found = links(page)

    assert found
    assert [link for link in found if not link.startswith("https://")] == []
    assert [link for link in found if (file := place(link)) is not None and not file.is_file()] == []


def test_addresses_of_the_project_lead_to_its_site_and_its_repository() -> None:
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog"} <= PROJECT["urls"].keys()
    assert all(address.startswith((SITE, REPOSITORY)) for address in PROJECT["urls"].values())
    assert place(PROJECT["urls"]["Changelog"]) == ROOT / "CHANGELOG.md"


def test_the_version_is_the_newest_of_the_changelog_and_the_one_that_workflows_use() -> None:
    versions = re.findall(r"^## \[(\d\S+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    used = re.findall(r"uses: pytest-vmbottle/pytest-vmbottle@v(\S+)", (ROOT / "docs" / "ci.md").read_text())

    assert versions[0] == PROJECT["version"]
    assert set(used) == {PROJECT["version"]}


def test_classifiers_name_every_python_from_the_oldest_one_to_3_14() -> None:
    named = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.fullmatch(r".*:: 3\.\d+", name)]

    assert named == [f"3.{minor}" for minor in range(11, 15)]
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_the_sdist_has_what_the_repository_has(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path], cwd=ROOT, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tests/run", "docs/index.md", "pytest_vmbottle/py.typed"} <= names
    assert not {name for name in names if re.search(r"(^|/)(\.venv|\.git|__pycache__|vmbottle-artifacts)(/|$)|^site/", name)}


def test_whoever_reports_a_problem_is_asked_what_the_doctor_finds() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "problem.yml").read_text())
    needed = {each["attributes"]["label"] for each in form["body"] if each.get("validations", {}).get("required")}

    assert {"The output of `vmbottle --version`", "The output of `vmbottle doctor --json`"} <= needed
