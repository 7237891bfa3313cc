"""Options: from the command line, the environment, the ini file, in this order; wrong values stop the run before it begins."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.plugin.options import Options
from pytest_vmbottle.settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., pytest.RunResult]

ONE = '@pytest.mark.vm("debian-12")\ndef test_it(vm): print("factor", vm._factor)\n'


def said(result: pytest.RunResult) -> str:
    return result.stdout.str() + "\n" + result.stderr.str()


def test_the_command_line_wins_over_the_environment_and_that_over_the_ini_file(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    def factor(*args: str) -> str:
        found = re.search(r"factor (\S+)", said(run(ONE, "-s", *args, passed=1)))
        assert found is not None
        return found[1]

    assert factor() == "1.0"
    pytester.makeini("[pytest]\nvm_timeout_factor = 2\n")
    assert factor() == "2.0"
    monkeypatch.setenv("VMBOTTLE_TIMEOUT_FACTOR", "3")
    assert factor() == "3.0"
    assert factor("--vm-timeout-factor=4") == "4.0"
    monkeypatch.setenv("VMBOTTLE_TIMEOUT_FACTOR", "")
    assert factor() == "2.0"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("accel", "xen"),
        ("missing", "maybe"),
        ("pack", "ram"),
        ("run-as", "nobody-of-that-name"),
        ("run-as", "root"),
        ("timeout-factor", "0"),
        ("timeout-factor", "much"),
        ("timeout-factor", "nan"),
        ("memory-budget", "lots"),
    ],
)
@pytest.mark.parametrize("way", ["command line", "environment", "ini"])
def test_a_wrong_value_is_a_usage_error_whichever_way_it_comes(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, option: str, value: str, way: str
) -> None:
    name = option.replace("-", "_")
    args = [f"--vm-{option}={value}"] if way == "command line" else []
    if way == "environment":
        monkeypatch.setenv(f"VMBOTTLE_{name.upper()}", value)
    if way == "ini":
        pytester.makeini(f"[pytest]\nvm_{name} = {value}\n")
    result = pytester.runpytest_inprocess("--collect-only", *args)

    assert result.ret == 4
    assert re.search(rf"^ERROR: --vm-{option}\b.*'{value}'", said(result), re.MULTILINE)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("cpuss = 2", "'cpuss'"),
        ("cpus = many", "cpus='many'"),
        ("debian-12", "'debian-12'"),
    ],
)
def test_wrong_defaults_in_the_ini_file_are_a_usage_error(pytester: pytest.Pytester, lines: str, message: str) -> None:
    pytester.makeini(f"[pytest]\nvm_defaults =\n    {lines}\n")
    result = pytester.runpytest_inprocess("--collect-only")

    assert result.ret == 4
    assert re.search(rf"^ERROR: .*{message}", said(result), re.MULTILINE)


def test_every_option_is_in_the_help_with_its_environment_variable_and_ini_name(pytester: pytest.Pytester) -> None:
    text = re.sub(r"\s+", " ", said(pytester.runpytest_inprocess("--help")))

    for setting in SETTINGS:
        name = setting.name.replace("-", "_")
        assert f"--vm-{setting.name}" in text
        assert f"{setting.sentence}. Also VMBOTTLE_{name.upper()} and ini vm_{name}." in text


@pytest.mark.parametrize("way", ["command line", "environment", "ini"])
def test_what_names_of_images_stand_for_can_be_said_everywhere(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "ini":
        pytester.makeini("[pytest]\nvm_smolvm_images =\n    debian-12 =\n    web = './web.tar'\n")
    if way == "environment":
        monkeypatch.setenv("VMBOTTLE_SMOLVM_IMAGES", "debian-12 =\nweb=./web.tar")
    config = pytester.parseconfig(*(["--vm-smolvm-images=debian-12=,web=./web.tar"] if way == "command line" else []))

    assert Options.of(config).images == {"debian-12": "", "web": "./web.tar"}


MISSING = """
from pytest_vmbottle import BackendUnavailable

class Broken(FakeBackend):
    def launch(self, *args, **keywords):
        raise BackendUnavailable("QEMU is missing", "Run apt-get install qemu-system-x86")

@pytest.hookimpl(tryfirst=True)
def pytest_vmbottle_make_backend(config, name):
    return Broken()
"""


@pytest.mark.parametrize(
    ("args", "variables", "outcome"),
    [
        ((), {}, "skipped"),
        ((), {"CI": "true"}, "errors"),
        (("--vm-missing=fail",), {}, "errors"),
        (("--vm-missing=skip",), {"CI": "true"}, "skipped"),
        ((), {"VMBOTTLE_MISSING": "fail"}, "errors"),
    ],
)
def test_where_machines_cannot_be_run_tests_are_skipped_and_with_ci_or_if_told_so_fail(
    run: Run, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], variables: dict[str, str], outcome: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = run(ONE, "-rs", *args, conftest=MISSING, status=1 if outcome == "errors" else 0, **{outcome: 1})

    assert "apt-get install qemu-system-x86" in said(result)


@pytest.mark.parametrize("where", ["option", "mark"])
def test_a_backend_that_nobody_knows_is_a_mistake_and_no_reason_to_skip(run: Run, where: str) -> None:
    text = ONE if where == "option" else ONE.replace('vm("debian-12"', 'vm("debian-12", backend="vmware"')
    result = run(text, *(["--vm-backend=vmware"] if where == "option" else []), "--vm-missing=skip", status=1, errors=1)

    assert "'vmware'" in said(result)
    assert "INFRA" not in said(result)


def test_a_catalog_in_the_ini_file_is_seen_from_the_root_folder(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    (pytester.path / "sub").mkdir()
    pytester.makeini("[pytest]\nvm_catalog = .vmbottle\n")
    monkeypatch.delenv("VMBOTTLE_CATALOG", raising=False)
    monkeypatch.chdir(pytester.path / "sub")
    config = pytester.parseconfig("--rootdir", str(pytester.path))

    assert Options.of(config).catalog == str(pytester.path / ".vmbottle")


def built(result: pytest.RunResult) -> list[tuple[str, str]]:
    """How many packs a run built, and how many it used again."""
    return re.findall(r"(\d+) packs? .*(\d+) reused", said(result))


def test_rebuild_makes_every_pack_again_once(run: Run) -> None:
    text = ONE + ONE.replace("test_it", "test_again")
    assert built(run(text)) == [("1", "0")]
    assert built(run(text)) == [("0", "1")]
    assert built(run(text, "--vm-rebuild")) == [("1", "0")]
    assert built(run(text)) == [("0", "1")]


def test_a_catalog_that_cannot_be_used_is_told_in_words(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(ONE, f"--vm-catalog={tmp_path / 'file'}", status=1, errors=1)

    assert "--vm-catalog" in said(result)
    assert "Traceback" not in said(result)
    assert "catalog.py" not in said(result)
