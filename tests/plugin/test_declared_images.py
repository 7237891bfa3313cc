"""Images that the project declares: tests name them, wrong ones are told before anything runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.images import ImageStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., pytest.RunResult]

# A builder that takes no time, writes down what it was asked for, and makes another disk each time.
BUILDER = """
import os, pathlib, time
from pytest_vmbottle.images import declared

def build(store, recipe, *, name, include, script, progress):
    with open("built", "a") as file:
        print(recipe, *include, script, file=file)
    time.sleep(0.5)
    disk = pathlib.Path(f"disk-{os.getpid()}.raw")
    disk.write_bytes(bytes(510) + b"\\x55\\xaa" + os.urandom(8) + bytes((1 << 20) - 520))
    return store.add(disk, name=name, replace=True)

declared.build = build
"""
MARKED = '@pytest.mark.vm("web")\ndef test_it(vm): pass\n'
BUILD = '[tool.vmbottle.images.web]\nbuild = "debian-12"\npackages = ["nginx"]\nrun = "id"\n'


def said(result: pytest.RunResult) -> str:
    return result.stdout.str() + "\n" + result.stderr.str()


def test_a_disk_that_the_project_declares_is_used_where_it_lies(run: Run, pytester: pytest.Pytester, tmp_path: Path) -> None:
    pytester.makefile(".toml", vmbottle='[images.web]\npath = "disk.raw"\n')
    (pytester.path / "disk.raw").write_bytes((tmp_path / "disk.raw").read_bytes())
    run(MARKED, passed=1)

    assert ImageStore(tmp_path / "catalog" / "images").names() == ("debian-12",)


def test_a_declared_image_goes_before_one_of_the_catalog(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makefile(".toml", vmbottle='[images.debian-12]\npath = "none.raw"\n')
    result = run('@pytest.mark.vm("debian-12")\ndef test_it(vm): pass\n', status=1, errors=1)

    assert re.search(r"vmbottle\.toml: images\.debian-12.*none\.raw", said(result))


@pytest.mark.parametrize("workers", [pytest.param((), id="alone"), pytest.param(("-n2",), id="xdist", marks=pytest.mark.guests)])
def test_a_declared_build_is_done_once_for_all_workers_and_runs(
    run: Run, pytester: pytest.Pytester, tmp_path: Path, workers: tuple[str, ...]
) -> None:
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\n" + BUILD)
    twice = MARKED + MARKED.replace("test_it", "test_again")
    run(twice, *workers, conftest=BUILDER, passed=2)
    run(twice, *workers, conftest=BUILDER, passed=2)

    assert (pytester.path / "built").read_text() == "debian-12 nginx id\n"
    (stored,) = [name for name in ImageStore(tmp_path / "catalog" / "images").names() if name.startswith("web-")]
    assert re.fullmatch(r"web-[0-9a-f]{12}", stored)


def test_a_changed_declaration_is_built_again(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\n" + BUILD)
    run(MARKED, conftest=BUILDER, passed=1)
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\n" + BUILD.replace("nginx", "curl"))
    run(MARKED, conftest=BUILDER, passed=1)

    assert (pytester.path / "built").read_text() == "debian-12 nginx id\ndebian-12 curl id\n"


@pytest.mark.parametrize("workers", [pytest.param((), id="alone"), pytest.param(("-n2",), id="xdist", marks=pytest.mark.guests)])
def test_a_wrong_declaration_is_a_usage_error_before_anything_runs(run: Run, pytester: pytest.Pytester, workers: tuple[str, ...]) -> None:
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\n" + BUILD.replace("build", "biuld"))
    result = run(MARKED + "def test_right():\n    open('ran', 'w').close()\n", *workers, status=4)

    assert len(re.findall(r"^(?:ERROR: )?.*pyproject\.toml: tool\.vmbottle\.images\.web\.biuld", said(result), re.MULTILINE)) == 1
    assert "'build'" in said(result)
    assert "Traceback" not in said(result)
    assert not (pytester.path / "ran").exists()


def test_a_suite_without_machines_is_not_bothered_with_declarations(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makefile(".toml", vmbottle="[images.web\n")

    run("def test_it(): pass\n", passed=1)


def test_a_project_is_found_above_the_folder_whose_tests_are_run(run: Run, pytester: pytest.Pytester, tmp_path: Path) -> None:
    pytester.makefile(".toml", vmbottle='[images.web]\npath = "disk.raw"\n')
    (pytester.path / "disk.raw").write_bytes((tmp_path / "disk.raw").read_bytes())
    inner = pytester.mkdir("inner")
    (inner / "test_inner.py").write_text(f"import pytest\n{MARKED}")

    run("def test_outer(): pass\n", str(inner), "--rootdir", str(inner), "-c", "/dev/null", "--confcutdir", str(pytester.path), passed=1)
