"""The page of the machines in Chromium: a machine is created, used on its terminal, and stopped."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.service.running import PATIENCE, Service

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
WATCH = "addEventListener('securitypolicyviolation', (event) => console.error(`violation: ${event.violatedDirective} ${event.blockedURI}`))"


@pytest.fixture
def page(service: Service) -> Iterator[Page]:
    """A page that is open; at its end it must have done nothing that a page of ours must not do."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    misdeeds: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=arguments) as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 1400})
        page.set_default_timeout(PATIENCE * 1000)
        page.add_init_script(WATCH)
        page.on("pageerror", lambda error: misdeeds.append(f"error: {error}"))
        page.on("console", lambda message: misdeeds.append(f"console: {message.text}"))
        page.on("request", lambda request: requests.append(request.url))
        yield page
    # The browser itself tells that the token was wrong once, and that a machine was asked for something while it ended.
    assert [each for each in misdeeds if not re.search(r"status of (401|404|409) ", each)] == []
    assert [url for url in requests if not url.startswith((service.url, "data:"))] == []
    assert [url for url in requests if service.token in url] == []


def log_in(page: Page, url: str, token: str) -> None:
    page.goto(url)
    page.fill("#token", token)
    page.keyboard.press("Enter")


def shows(page: Page, pattern: str) -> None:
    page.locator("#terminal .xterm-rows").filter(has_text=re.compile(pattern)).wait_for()


@pytest.mark.timeout(1200)
def test_a_machine_is_created_used_and_stopped(page: Page, service: Service) -> None:
    name = f"page{os.getpid()}"
    log_in(page, service.url, "0" * 32)
    page.locator("#message", has_text="the token is wrong").wait_for()
    log_in(page, service.url, service.token)
    page.fill("#name", name)
    page.click("#create button")
    row = page.locator("#machines tr").filter(has_text=name)
    row.locator(".state-provisioning").wait_for()
    row.locator(".state-running").wait_for()
    page.locator("#curve canvas").wait_for()
    assert "of memory" in page.inner_text("#figures")

    page.click("#open-terminal")
    shows(page, "# ")
    page.keyboard.type("uname\n")
    shows(page, "Linux")
    page.keyboard.type("sh -c 'echo beg''un; exec sleep 1000'\n")
    shows(page, "begun")
    page.keyboard.press("Control+C")
    page.keyboard.type("echo left with $?\n")
    shows(page, "left with 130")
    # What a guest prints is text: neither markup nor a command for the browser.
    page.keyboard.type("printf '<img src=x onerror=alert(1)>\\n' | tee /dev/console\n")
    shows(page, "<img src=x")
    page.locator("#console", has_text="<img src=x onerror=alert(1)>").wait_for()
    assert page.locator("img").count() == 0

    page.click("[data-action=stop]")
    row.locator(".state-stopped").wait_for()
    page.click("#delete")
    row.wait_for(state="detached")
    assert service.get(f"/vms/{name}").status == 404


def test_the_page_of_the_routes_shows_each_with_an_example(page: Page, service: Service) -> None:
    log_in(page, f"{service.url}docs", service.token)
    page.locator("details").first.wait_for()
    document = service.get("/openapi.json").json
    routes = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]

    shown = [" ".join(text.split()) for text in page.locator("summary").all_inner_texts()]
    assert [route for route in routes if not any(text.startswith(route) for text in shown)] == []
    page.locator("summary", has_text="Create a machine").click()
    assert '"base_image":"debian-12"' in page.inner_text("details[open] pre")
