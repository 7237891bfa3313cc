"""The pictures of the documentation: `REPORT_PICTURES=docs/images pytest -m browser tests/browser/test_pictures.py` takes them anew."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import until
from tests.unit.report.artificial import write_many

if TYPE_CHECKING:
    from tests.browser.test_page_in_a_browser import Open

MOST = 200_000
"""Bytes of a picture, which all who clone the repository get."""


@pytest.mark.browser
@pytest.mark.parametrize(("name", "scheme"), [("report-timeline", "light"), ("report-event", "dark")])
def test_a_picture_of_the_page_is_small(tmp_path: Path, open_run: Open, name: str, scheme: str) -> None:
    page = open_run(write_many(tmp_path / "run", 1000), color_scheme=scheme, viewport={"width": 1280, "height": 1010}).page
    if name == "report-event":
        page.locator("#detail").scroll_into_view_if_needed()
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
    until(page, "document.getElementById('list').getAttribute('aria-activedescendant')")
    picture = page.screenshot(path=Path(os.environ.get("REPORT_PICTURES", tmp_path)) / f"{name}.png")

    assert 10_000 < len(picture) < MOST
