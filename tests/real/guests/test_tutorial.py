"""The tutorial, followed from its first page to its last one as it is printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_vmbottle.catalog.catalog import Catalog
from tests.real.printed import Reader

PAGES = sorted((Path(__file__).parents[3] / "docs" / "tutorial").glob("[0-9]*.md"))


@pytest.mark.timeout(1800)
def test_who_follows_the_tutorial_sees_what_it_shows(tmp_path: Path, vm_catalog: Catalog) -> None:
    names = {"CI", "PYTEST_ADDOPTS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD"}
    env = {name: value for name, value in os.environ.items() if name not in names and not name.startswith(("PYTEST_XDIST", "VMBOTTLE_"))}
    path = f"{Path(sys.executable).parent}:{env['PATH']}"
    reader = Reader(tmp_path, {**env, "PATH": path, "VMBOTTLE_CATALOG": str(vm_catalog.root), "COLUMNS": "80"})

    assert [reader.follow(page.read_text()) > 0 for page in PAGES] == [True] * 5
    workflow = tmp_path / ".github" / "workflows" / "machines.yml"
    argv = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(workflow)]
    assert subprocess.run(argv, check=False, timeout=120).returncode == 0
