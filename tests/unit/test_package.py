"""The package's names: all are there, and what only machines need is loaded when it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import pytest_vmbottle

# Of the package itself, rooms included, and of what comes from elsewhere, that pytest and attrs do not load anyway.
MOST_MODULES = 28
SUITE = """
import sys, json, pytest, attrs
before = set(sys.modules)
from pytest_vmbottle import Layer, MachineSpec, SpecError, layer
import pytest_vmbottle.plugin
print(json.dumps(sorted(name for name in set(sys.modules) - before if name.partition(".")[0] not in ("attr", "attrs", "tomllib"))))
"""


def _printed(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout


def test_a_suite_without_machines_loads_few_modules_and_none_that_machines_need() -> None:
    loaded = json.loads(_printed(SUITE))

    assert len(loaded) <= MOST_MODULES, loaded
    assert not {"machine", "guestpath", "process", "transfer", "metrics"} & {name.rpartition(".")[2] for name in loaded}


def test_every_name_can_be_imported_and_is_listed_before_it_is_loaded() -> None:
    names = pytest_vmbottle.__all__
    listed = "import pytest_vmbottle as p; print(sorted(set(p.__all__) - set(dir(p))))"
    imported = _printed(f"{listed}; from pytest_vmbottle import {', '.join(names)}")

    assert imported == "[]\n"
    assert {name for name in names if getattr(pytest_vmbottle, name).__name__ != name} == set()
    assert _printed("from pytest_vmbottle import *; print(Machine.__name__, layer.__name__)") == "Machine layer\n"


def test_a_name_that_there_is_not_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="Machin"):
        _ = pytest_vmbottle.Machin  # type: ignore[attr-defined]
    assert not hasattr(pytest_vmbottle, "pytestmark")
