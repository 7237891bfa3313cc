"""Pages in a real browser: Debian's chromium, driven by playwright. They run only where `-m browser` asks for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from pytest_vmbottle.report.page import write_page
from pytest_vmbottle.report.run import read_run
from tests.conftest import leave_out

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
SHOWN = "performance.getEntriesByName('test-shown').length > 0"
WATCH = "addEventListener('securitypolicyviolation', (event) => console.error(`violation: ${event.violatedDirective} ${event.blockedURI}`))"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items, Path(__file__).parent, "browser")


def until(page: Page, expression: str) -> None:
    """Waits for an expression to be true; `wait_for_function` would evaluate a string in the page, which the page does not allow."""
    deadline = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"not within 30 s: {expression}"
        page.wait_for_timeout(20)


@attrs.frozen
class Opened:
    """A page that is open, and what it did that a page of ours must not do."""

    page: Page
    misdeeds: list[str]
    requests: list[str]


def _refuse(dialog: Dialog, opened: Opened) -> None:
    opened.misdeeds.append(f"dialog: {dialog.message}")
    dialog.dismiss()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The browser, without its sandbox for root, whom it would refuse."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=arguments) as running:
        yield running


@pytest.fixture
def open_run(browser: Browser) -> Iterator[Callable[..., Opened]]:
    """Writes the page of a run, and opens it as a file."""
    contexts = []

    def open_page(run: Path, shown: str = SHOWN, **options: Any) -> Opened:
        write_page(read_run(run), run / "index.html")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, **options})
        contexts.append(context)
        opened = Opened(context.new_page(), [], [])
        page = opened.page
        page.add_init_script(WATCH)
        page.on("dialog", lambda dialog: _refuse(dialog, opened))
        page.on("pageerror", lambda error: opened.misdeeds.append(f"error: {error}"))
        page.on("console", lambda message: opened.misdeeds.append(f"console: {message.text}"))
        context.on("page", lambda other: opened.misdeeds.append(f"window: {other.url}"))
        page.on("request", lambda request: opened.requests.append(request.url))
        page.goto((run / "index.html").as_uri())
        until(page, shown)
        return opened

    yield open_page
    for context in contexts:
        context.close()
