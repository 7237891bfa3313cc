"""The site in a real browser: every page asks this computer alone, has no broken picture, and can be read in the light and in the dark."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROKEN = "[...document.images].filter((picture) => !picture.complete || !picture.naturalWidth).map((picture) => picture.src)"
# What a page is wider than its window by; tables and code scroll within themselves.
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
BRIGHTNESS = """(() => {
    const [red, green, blue] = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number);
    return (red + green + blue) / 3;
})()"""


@attrs.frozen
class Opened:
    """A window of the browser, and what it asked for and complained of."""

    page: Page
    site: str
    requests: list[str] = attrs.field(factory=list)
    complaints: list[str] = attrs.field(factory=list)

    def go(self, path: str) -> Page:
        self.page.goto(self.site + path, wait_until="load")
        return self.page


Open = Callable[..., Opened]


@pytest.fixture
def open_site(browser: Browser, served: str) -> Iterator[Open]:
    """Opens a window that looks at the site."""
    contexts = []

    def open_window(width: int = 1280, scheme: str = "light") -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        contexts.append(context)
        opened = Opened(context.new_page(), served)
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.on(
            "response", lambda response: opened.complaints.extend([f"{response.status}: {response.url}"] * (response.status >= 400))
        )
        opened.page.on("pageerror", lambda error: opened.complaints.append(f"error: {error}"))
        opened.page.on("console", lambda message: opened.complaints.append(f"console: {message.text}"))
        return opened

    yield open_window
    for context in contexts:
        context.close()


def addresses(built: Path) -> list[str]:
    return sorted(str(path.relative_to(built)).removesuffix("index.html") for path in built.rglob("index.html"))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")], ids=["desk", "telephone"])
def test_every_page_asks_this_computer_alone_and_has_all_its_pictures(built: Path, open_site: Open, width: int, scheme: str) -> None:
    window = open_site(width, scheme)
    broken, wide = [], []
    for path in addresses(built):
        page = window.go(path)
        broken += page.evaluate(BROKEN)
        wide += [path] * (page.evaluate(OVERFLOW) > 0)

    assert len(window.requests) > 50
    assert [url for url in window.requests if not url.startswith((window.site, "data:", "blob:"))] == []
    assert (broken, wide, window.complaints) == ([], [], [])


@pytest.mark.parametrize(("scheme", "bright"), [("light", True), ("dark", False)])
def test_a_page_is_as_light_or_dark_as_the_reader_has_it(tmp_path: Path, open_site: Open, scheme: str, *, bright: bool) -> None:
    page = open_site(scheme=scheme).go("tests/")
    pictures = Path(os.environ.get("SITE_PICTURES", tmp_path))
    picture = page.screenshot(path=pictures / f"site-{scheme}.png")

    assert (page.evaluate(BRIGHTNESS) > 128) is bright
    assert len(picture) > 20_000


def test_a_reader_can_choose_the_dark(open_site: Open) -> None:
    page = open_site(scheme="light").go("tests/")
    for _ in range(2):  # from what the system has to the light, and then to the dark
        page.locator("label[for^=__palette_]:visible").click()

    assert page.evaluate(BRIGHTNESS) < 128


def test_a_search_finds_a_page(open_site: Open) -> None:
    window = open_site()
    page = window.go("")
    page.locator("input[name=query]").click()
    page.keyboard.type("power cut")
    page.locator(".md-search-result__link").first.wait_for()
    found = page.locator(".md-search-result__link").evaluate_all("(links) => links.map((link) => link.href)")

    assert any("/faults/" in link or "/crashes/" in link for link in found)
    assert [url for url in window.requests if not url.startswith((window.site, "data:", "blob:"))] == []
