"""For the whole repository: `pytester`, and the examples in docstrings and documentation as tests."""

from __future__ import annotations

from doctest import ELLIPSIS, NORMALIZE_WHITESPACE

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

pytest_plugins = ["pytester"]

_docstrings = Sybil(
    parsers=[DocTestParser(ELLIPSIS | NORMALIZE_WHITESPACE)],
    patterns=[f"pytest_vmbottle/{folders}*.py" for folders in ("", "*/", "*/*/", "*/*/*/")],
)
_pages = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md"])

pytest_collect_file = (_docstrings + _pages).pytest()
