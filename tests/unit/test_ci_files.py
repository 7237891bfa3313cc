"""The action and the workflows of the documentation are what the CI systems take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"<!-- (vendor\.[a-z-]+) -->\n```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL)

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())


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


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        *(("vendor.github-workflows", path) for path in WORKFLOWS),
        *(("custom.github-workflows-require-timeout", path) for path in WORKFLOWS),
        ("vendor.github-issue-config", FORMS / "config.yml"),
        *(("vendor.github-issue-forms", path) for path in sorted(FORMS.glob("*.yml")) if path.name != "config.yml"),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_a_workflow_or_a_form_of_this_project_has_the_form_of_one(schema: str, path: Path) -> None:
    ended = check(schema, path)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_no_more_rights_than_each_job_names_and_take_nothing_as_code(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert workflow["permissions"] == {}
    assert all("permissions" in job for job in workflow["jobs"].values())
    assert [step["run"] for step in steps if "${{" in step.get("run", "")] == []


def test_a_release_is_published_by_trust_in_the_workflow_and_says_where_it_comes_from() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    uses = [step["uses"].partition("@")[0] for step in jobs["publish"]["steps"]]
    assert jobs["publish"]["permissions"] == {"id-token": "write", "attestations": "write"}
    assert uses == ["actions/download-artifact", "actions/attest-build-provenance", "pypa/gh-action-pypi-publish"]
    assert "secrets." not in str(jobs)
    assert 'bash .ci/package dist "$TAG"' in [step.get("run") for step in jobs["build"]["steps"]]


def test_the_action_takes_all_its_inputs_and_none_of_them_as_code() -> None:
    steps = ACTION["runs"]["steps"]
    assert set(re.findall(r"\binputs\.([a-z]+)", str(steps))) == set(ACTION["inputs"])
    assert not [step["run"] for step in steps if "${{" in step.get("run", "")]


@pytest.mark.parametrize(
    ("run", "status"), [("true", 0), ("exit 3", 3), ("false\ntrue", 1), ("false | true", 1), ("[ \"a b\" = 'a b' ]\n[ $# = 0 ]", 0)]
)
def test_the_action_runs_the_tests_as_a_step_of_a_workflow_would(run: str, status: int) -> None:
    (step,) = (step for step in ACTION["runs"]["steps"] if step["name"] == "Run the tests")
    ended = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", step["run"]], env={"PATH": "/bin", "RUN": run}, check=False, timeout=60)
    assert ended.returncode == status


def test_the_artifacts_of_failed_tests_are_uploaded_right_after_them() -> None:
    tests, upload = ACTION["runs"]["steps"][-2:]
    assert (tests["env"], upload["uses"].partition("@")[0]) == ({"RUN": "${{ inputs.run }}"}, "actions/upload-artifact")
    assert upload["if"] == "failure() && inputs.run != ''"
    assert "VMBOTTLE_OUTPUT || 'vmbottle-artifacts'" in upload["with"]["path"]
