"""The documentation's examples, run on real machines as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPTIONS = ("-p", "no:cacheprovider", "--vm-missing=fail", "--strict-markers", "--strict-config")


def blocks(page: str) -> list[str]:
    """The Python code blocks of a page."""
    return _BLOCK.findall((ROOT / page).read_text())


@pytest.mark.parametrize(
    ("page", "at_least"),
    [
        ("README.md", 3),
        pytest.param("docs/tests.md", 13, marks=pytest.mark.guests),
        pytest.param("docs/machines.md", 14, marks=pytest.mark.guests),
        pytest.param("docs/faults.md", 2, marks=pytest.mark.guests),
        pytest.param("docs/crashes.md", 1, marks=pytest.mark.guests),
    ],
)
def test_every_example_of_a_page_passes(inner: pytest.Pytester, page: str, at_least: int) -> None:
    inner.makepyfile(test_page="\n\n".join(blocks(page)))
    result = inner.runpytest_subprocess(*_OPTIONS)
    outcomes = result.parseoutcomes()
    assert outcomes.keys() == {"passed"}
    assert outcomes["passed"] >= at_least


def test_the_example_without_machines_passes_on_the_fake_backend(inner: pytest.Pytester, tmp_path: Path) -> None:
    conftest, test = blocks("docs/extending.md")
    inner.makeconftest(conftest)
    inner.makepyfile(test)
    result = inner.runpytest_subprocess(*_OPTIONS, "--vm-backend=fake", f"--vm-catalog={tmp_path / 'catalog'}")
    result.assert_outcomes(passed=1)
