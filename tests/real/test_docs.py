"""The documentation's examples, run on real machines as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"^```\w+ title=\"([^\"]+)\"\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPTIONS = ("-p", "no:cacheprovider", "--vm-missing=fail", "--strict-markers", "--strict-config")


def blocks(page: str) -> list[str]:
    """The Python code blocks of a page."""
    return _BLOCK.findall((ROOT / page).read_text())


def count_tests(page: str) -> int:
    """The number of tests in a page's code blocks."""
    return len(re.findall(r"^ *def test_", "\n".join(blocks(page)), re.MULTILINE))


ELSEWHERE = {
    "docs/extending.md": "on the fake backend, below",
    "docs/images.md": "they need images of other distributions",
    "docs/smolvm.md": "they need smolvm",
}
PAGES = [str(path.relative_to(ROOT)) for folder in ("docs", "docs/how-to") for path in sorted((ROOT / folder).glob("*.md"))]


@pytest.mark.guests
@pytest.mark.parametrize("page", ["README.md", *(page for page in PAGES if count_tests(page) and page not in ELSEWHERE)])
def test_every_example_of_a_page_passes(inner: pytest.Pytester, page: str) -> None:
    for name, text in _FILE.findall((ROOT / page).read_text()):
        (inner.path / name).write_text(text)
    inner.makepyfile(test_page="\n\n".join(blocks(page)))
    result = inner.runpytest_subprocess(*_OPTIONS)
    outcomes = result.parseoutcomes()
    assert outcomes.keys() == {"passed"}
    assert outcomes["passed"] >= count_tests(page)


def test_the_example_without_machines_passes_on_the_fake_backend(inner: pytest.Pytester, tmp_path: Path) -> None:
    conftest, test = blocks("docs/extending.md")
    inner.makeconftest(conftest)
    inner.makepyfile(test)
    result = inner.runpytest_subprocess(*_OPTIONS, "--vm-backend=fake", f"--vm-catalog={tmp_path / 'catalog'}")
    result.assert_outcomes(passed=1)
