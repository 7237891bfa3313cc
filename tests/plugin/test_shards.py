"""Parts of a suite for several runners, and what they need before they run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.plugin.conftest import CONFTEST, said

if TYPE_CHECKING:
    from pathlib import Path

    from tests.plugin.conftest import Run

SUITE = """
@layer("debian-12")
def web(vm):
    vm.exec("install web")


@layer(web)
def shop(vm):
    vm.exec("install shop")


@pytest.mark.vm(web)
@pytest.mark.parametrize("number", range(4))
def test_web(vm, number):
    pass


@pytest.mark.vm(shop)
@pytest.mark.parametrize("number", range(4))
def test_shop(vm, number):
    pass


@pytest.mark.vm("debian-12")
class TestShared:
    def test_one(self, class_vm):
        pass

    def test_two(self, class_vm):
        pass


def test_plain():
    pass
"""


def vmbottle(folder: Path, *words: str, status: int = 0) -> tuple[str, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "pytest_vmbottle", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == status, ended.stderr
    return ended.stdout, ended.stderr


def ran(result: pytest.RunResult) -> set[str]:
    return set(re.findall(r"^test_it\.py::(\S+) PASSED", said(result), re.MULTILINE)) | set(
        re.findall(r"PASSED test_it\.py::(\S+)", said(result))
    )


@pytest.mark.parametrize("workers", [pytest.param((), id="alone"), pytest.param(("-n2",), id="with workers", marks=pytest.mark.guests)])
def test_the_shards_of_a_suite_have_each_test_once(run: Run, workers: tuple[str, ...]) -> None:
    parts = [ran(run(SUITE, "-v", f"--vm-shard={number}/3", *workers)) for number in (1, 2, 3)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 11
    assert sum({"TestShared::test_one", "TestShared::test_two"} <= part for part in parts) == 1
    assert all(parts)


def test_tests_of_one_pack_go_to_one_runner(run: Run) -> None:
    parts = [ran(run(SUITE, "-v", f"--vm-shard={number}/2", "-k", "web or shop")) for number in (1, 2)]
    assert [len({test.partition("[")[0] for test in part}) for part in parts] == [1, 1]


@pytest.mark.guests
def test_times_of_an_earlier_run_are_known_from_its_cache_or_its_junit_report(run: Run) -> None:
    slow = SUITE.replace("def test_plain():\n    pass", "def test_plain():\n    import time; time.sleep(3)")
    run(slow, "--junit-xml=report.xml")
    for options in ((), ("--vm-durations=report.xml",), ("--vm-durations=.", "-p", "no:cacheprovider")):
        parts = [ran(run(SUITE, "-v", f"--vm-shard={number}/2", *options)) for number in (1, 2)]
        (with_plain,) = (part for part in parts if "test_plain" in part)
        assert len(with_plain) <= 3, options
        assert sum(map(len, parts)) == 11


@pytest.mark.parametrize("text", ["", "<x", "<testsuites/>"])
def test_a_report_without_times_is_a_usage_error(run: Run, pytester: pytest.Pytester, text: str) -> None:
    (pytester.path / "report.xml").write_text(text)
    assert "report.xml" in said(run(SUITE, "--vm-shard=1/2", "--vm-durations=report.xml", status=4))


@pytest.fixture
def suite(pytester: pytest.Pytester, catalog: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert catalog.is_dir()
    monkeypatch.setenv("VMBOTTLE_BACKEND", "fake")
    pytester.makeconftest(CONFTEST)
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    pytester.makepyfile(test_it=f"import pytest\nfrom pytest_vmbottle import layer, MachineSpec\n{SUITE}")
    return pytester.path


def test_a_plan_is_the_matrix_of_the_runs_that_follow_it(suite: Path, run: Run) -> None:
    out, _ = vmbottle(suite, "ci", "plan", "--shards", "3")
    jobs = json.loads(out)["include"]
    assert [job["shard"] for job in jobs] == ["1/3", "2/3", "3/3"]
    for job in jobs:
        found = ran(run(SUITE, "-v", f"--vm-shard={job['shard']}"))
        assert len(found) == job["tests"]
        assert any("web" in pack for pack in job["packs"]) == any("web" in test or "shop" in test for test in found)


UNASKED = """

@pytest.hookimpl(tryfirst=True)
def pytest_vmbottle_make_backend(config, name):
    raise AssertionError("a backend was asked for")
"""


def test_a_plan_asks_nothing_of_this_computer_makes_nothing_and_leaves_assertions_as_they_are(
    suite: Path, catalog: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeconftest(CONFTEST.replace("def pytest_vmbottle_make_backend", "def _unused") + UNASKED)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(catalog / "none"))
    out, words = vmbottle(suite, "ci", "plan", "--shards", "2")
    assert len(json.loads(out)["include"]) == 2
    assert words.strip() == ""
    assert not (catalog / "none").exists()
    # What pytest rewrites, it keeps under names of its own.
    assert not list(suite.glob("**/*-pytest-*.pyc"))


def test_an_assertion_in_a_layer_tells_its_values_where_packs_are_made(suite: Path) -> None:
    text = (suite / "test_it.py").read_text()
    (suite / "test_it.py").write_text(text.replace('vm.exec("install web")', 'assert vm.exec("install web").stdout == "done"'))
    assert re.search(r"AssertionError: assert .* == .done.\n.*where", vmbottle(suite, "warm", status=1)[1])


def test_packs_are_made_before_the_tests_that_then_build_none(suite: Path, run: Run) -> None:
    out, words = vmbottle(suite, "warm", "-k", "not plain")
    assert [line.split()[1] for line in out.splitlines()] == ["web", "shop", "debian-12"]
    assert "3 of 3" in words
    assert "passed" not in words
    assert re.search(r"0 packs built, [23] reused", said(run(SUITE, passed=11)))


def test_what_cannot_be_made_or_collected_is_told_without_a_traceback(suite: Path) -> None:
    (suite / "test_other.py").write_text("import pytest\n@pytest.mark.vm('debain-12')\ndef test_it(vm): pass\n")
    _, words = vmbottle(suite, "warm", "test_other.py", status=1)
    assert "debain-12" in words
    assert "Traceback" not in words
    (suite / "test_other.py").write_text("1 / 0\n")
    assert "ZeroDivisionError" in vmbottle(suite, "warm", status=1)[1]
    assert "ZeroDivisionError" in vmbottle(suite, "ci", "plan", "--shards", "2", status=1)[1]


def test_nothing_is_made_where_no_test_has_a_machine(suite: Path) -> None:
    assert vmbottle(suite, "warm", "-k", "plain")[0] == ""
