"""For the whole repository: `pytester`, and the examples in docstrings and documentation as tests."""

from __future__ import annotations

from doctest import ELLIPSIS, NORMALIZE_WHITESPACE

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

pytest_plugins = ["pytester"]

_docstrings = Sybil(
    parsers=[DocTestParser(ELLIPSIS | NORMALIZE_WHITESPACE)],
    patterns=[f"pytest_vmbottle/{folders}*.py" for folders in ("", "*/", "*/*/", "*/*/*/")],
    excludes=[
        "pytest_vmbottle/machine/machine.py",
        "pytest_vmbottle/machine/clock.py",
        "pytest_vmbottle/machine/faults.py",
        "pytest_vmbottle/guest/path.py",
    ],  # tests/real/test_docstrings.py gives theirs a machine
)
_pages = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md", "docs/*/*.md"])

pytest_collect_file = (_docstrings + _pages).pytest()


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Runs tests with this plugin and no other one that happens to be installed; `-p` names more."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p vmbottle")
    # Whether there are any depends on the host, and most tests count machines.
    monkeypatch.setenv("VMBOTTLE_SPARES", "0")
    return pytester
