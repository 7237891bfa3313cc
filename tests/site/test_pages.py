"""The pages of the site, as they were built: links that lead somewhere, all names, and nothing from another host."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import attrs
import pytest

import pytest_vmbottle
from tests.site.conftest import ROOT

HERE = "http://here/"
FETCHED = {
    "img": "src",
    "script": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
    "object": "data",
}
"""Attributes whose address a browser fetches at once, by their elements."""


@attrs.frozen
class Page:
    """What a page has and what it leads to."""

    ids: set[str] = attrs.field(factory=set)
    links: list[str] = attrs.field(factory=list)
    fetched: list[str] = attrs.field(factory=list)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.page.ids.update(found[name] for name in ("id", "name") if name in found)
        if tag == "a" and "href" in found:
            self.page.links.append(found["href"])
        # An address that only says where this page is kept is not fetched.
        if tag == "link" and found.get("rel") not in ("canonical", "prev", "next"):
            self.page.fetched.append(found["href"])
        if tag in FETCHED and FETCHED[tag] in found:
            self.page.fetched.append(found[FETCHED[tag]])


@pytest.fixture(scope="session")
def pages(built: Path) -> dict[str, Page]:
    """All pages, by their addresses below the site."""
    found = {}
    for path in built.rglob("*.html"):
        reader = _Reader()
        reader.feed(path.read_text())
        name = str(path.relative_to(built))
        found["" if name == "index.html" else name.removesuffix("index.html")] = reader.page
    return found


def inner(page: str, address: str) -> tuple[str, str] | None:
    """The path and the anchor of an address within the site; None for one elsewhere."""
    whole, anchor = urldefrag(urljoin(HERE + page, address))
    parts = urlsplit(whole)
    return (unquote(parts.path[1:]), unquote(anchor)) if whole.startswith(HERE) else None


def test_every_link_leads_to_a_page_and_a_place_that_are_there(pages: dict[str, Page], built: Path) -> None:
    dead = []
    # The page for what is not found has absolute addresses of where the site is published.
    for name, page in pages.items():
        for link in page.links if name != "404.html" else ():
            target = inner(name, link)
            if target is None:
                continue
            path, anchor = target
            is_there = (path in pages and (not anchor or anchor in pages[path].ids)) or (path not in pages and (built / path).is_file())
            dead += [(name, link)] * (not is_there)

    assert sum(len(page.links) for page in pages.values()) > 1000
    assert dead == []


def test_pages_and_styles_fetch_nothing_from_another_host(pages: dict[str, Page], built: Path) -> None:
    fetched = [(name, address) for name, page in pages.items() if name != "404.html" for address in page.fetched]
    styles = [
        (path.name, url) for path in built.rglob("*.css") for url in re.findall(r"(?:url\(|@import )[\"']?([^)\"']+)", path.read_text())
    ]

    assert len(fetched) > 100
    assert [each for each in fetched if inner(*each) is None] == []
    assert [each for each in styles if each[1].startswith(("http:", "https:", "//"))] == []


def test_what_is_fetched_is_there(pages: dict[str, Page], built: Path) -> None:
    missing = [(name, address) for name, page in pages.items() for address in page.fetched if not _file(built, name, address)]

    assert [each for each in missing if each[0] != "404.html"] == []


def _file(built: Path, name: str, address: str) -> bool:
    target = inner(name, address)
    return address.startswith("data:") or (target is not None and (built / target[0]).is_file())


def test_every_public_name_has_a_place_of_its_own_and_pages_of_others_can_lead_to_it(pages: dict[str, Page], built: Path) -> None:
    ids = {name for page, found in pages.items() if page.startswith("reference/") for name in found.ids}
    missing = [name for name in pytest_vmbottle.__all__ if f"pytest_vmbottle.{pytest_vmbottle._LATER[name]}.{name}" not in ids]

    assert missing == []
    assert (built / "objects.inv").stat().st_size > 1000


def test_examples_in_docstrings_are_code(built: Path) -> None:
    page = (built / "reference" / "machine" / "index.html").read_text()

    assert page.count('class="gp">&gt;&gt;&gt; </span>') > 40
    assert "<blockquote>" not in page


def test_the_search_finds_words_of_pages_and_names_of_the_reference(built: Path) -> None:
    places = {entry["location"]: entry["text"] for entry in json.loads((built / "search" / "search_index.json").read_text())["docs"]}

    assert "crashes/" in places
    assert "reference/machine/#pytest_vmbottle.machine.machine.Machine.power_cut" in places


def test_every_page_of_the_sources_is_in_the_navigation(pages: dict[str, Page]) -> None:
    sources = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in (ROOT / "docs").rglob("*.md")}
    addresses = {"" if name == "index" else f"{name.removesuffix('index').rstrip('/')}/" for name in sources}
    linked = {target[0] for link in pages[""].links if (target := inner("", link)) is not None}

    assert addresses - linked == set()
