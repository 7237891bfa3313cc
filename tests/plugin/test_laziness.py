"""Who asks for no machine pays for none: no import, no folder, no question to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., pytest.RunResult]

OURS = ("catalog.catalog", "catalog.packs", "channels", "guest", "images", "machine", "provision")
HEAVY = (
    *("asyncio", "cattrs", "cryptography", "filelock", "paramiko", "psutil", "pycdlib", "qemu", "urllib3", "yaml"),
    *(f"pytest_vmbottle.{name}" for name in OURS),
)
PROBE = f"""
import atexit, sys

def tell():
    found = [name for name in {HEAVY!r} if name in sys.modules]
    with open("heavy", "w") as file:
        file.write(" ".join(found))

atexit.register(tell)
"""
TOUCHY = """
@pytest.hookimpl(tryfirst=True)
def pytest_vmbottle_make_backend(config, name):
    raise AssertionError("a backend was asked for")
"""
MARKED = """
import pytest
@pytest.mark.vm("debian-12")
def test_marked(vm, class_vm, session_vm, vm_factory): pass
"""


@pytest.fixture
def bare(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Runs pytest with this plugin and no other one, and says which heavy modules it imported; the default catalog is watched too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def bare(text: str, *args: str, status: int = 0, conftest: str = "") -> str:
        pytester.makeconftest("import pytest\n" + PROBE + conftest)
        pytester.makepyfile(test_it=text)
        result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *args)
        assert result.ret == status, result.stdout.str() + result.stderr.str()
        assert "vmbottle:" not in result.stdout.str()
        return (pytester.path / "heavy").read_text()

    return bare


@pytest.mark.parametrize("catalog", ["given", "default"])
def test_a_suite_without_machines_imports_nothing_heavy_and_makes_no_folder(
    bare: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, catalog: str
) -> None:
    if catalog == "default":
        monkeypatch.delenv("VMBOTTLE_CATALOG")
    heavy = bare("def test_it(tmp_path): assert 1 + 1 == 2\n", conftest=TOUCHY)

    assert heavy == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "status"),
    [
        *((option, 0) for option in ("--help", "--markers", "--fixtures", "--fixtures-per-test", "--collect-only", "--setup-plan")),
        ("-k nothing", 5),
        ("-m not_vm", 5),
    ],
)
def test_asking_about_a_suite_with_machines_touches_none(bare: Callable[..., str], tmp_path: Path, args: str, status: int) -> None:
    heavy = bare(MARKED, *args.replace("_", " ").split(" ", 1), status=status, conftest=TOUCHY)

    assert heavy == ""
    assert list(tmp_path.iterdir()) == []


def test_a_layer_and_the_public_names_can_be_imported_without_any_cost(bare: Callable[..., str]) -> None:
    assert (
        bare(
            'import pytest_vmbottle as v\n@v.layer("debian-12")\ndef web(vm): pass\ndef test_it(): assert v.MachineSpec(source=web).image\n'
        )
        == ""
    )


def test_a_suite_with_a_machine_does_import_what_it_needs(run: Run, pytester: pytest.Pytester) -> None:
    run('@pytest.mark.vm("debian-12")\ndef test_it(vm): pass\n', conftest=PROBE, process=True, passed=1)

    assert {"paramiko", "filelock", "psutil"} <= set((pytester.path / "heavy").read_text().split())
