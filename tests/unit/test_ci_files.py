"""The action and the workflows of the documentation are what the CI systems take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"<!-- (vendor\.[a-z-]+) -->\n```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL)


def check(schema: str, path: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(("schema", "text"), BLOCKS)
def test_a_workflow_of_the_documentation_has_the_form_of_its_system(tmp_path: Path, schema: str, text: str) -> None:
    path = tmp_path / "workflow.yml"
    path.write_text(text)
    ended = check(schema, path)
    assert ended.returncode == 0, ended.stdout


def test_workflows_of_all_systems_are_checked() -> None:
    assert {schema for schema, _ in BLOCKS} == {"vendor.github-workflows", "vendor.gitlab-ci", "vendor.buildkite"}
    assert (ROOT / "docs" / "ci.md").read_text().count("```yaml") == len(BLOCKS)


def test_the_action_has_the_form_of_one(tmp_path: Path) -> None:
    ended = check("vendor.github-actions", ROOT / "action.yml")
    assert ended.returncode == 0, ended.stdout
    wrong = tmp_path / "action.yml"
    wrong.write_text((ROOT / "action.yml").read_text().replace("      shell: bash\n", "", 1))
    assert check("vendor.github-actions", wrong).returncode == 1
