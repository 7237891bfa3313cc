"""The page of a run as its reader has it: opened as a file, read, searched, zoomed, and unharmed by hostile texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.report.run import MARK
from pytest_vmbottle.shown import visible
from tests.browser.conftest import Opened, until
from tests.unit.report.artificial import HOSTILE, PLANTED, png, write_hostile, write_many, write_planted, write_test

if TYPE_CHECKING:
    from playwright.sync_api import Page

Open = Callable[..., Opened]
MOST_ELEMENTS = 1000
LEFT, RIGHT = 124, 64
"""Margins of the timeline in page.js."""


def _span(page: Page) -> tuple[float, float]:
    """The seconds that the timeline shows."""
    first, last = page.text_content("#span").split(" to ")
    return float(first.removesuffix(" s")), float(last.removesuffix(" s"))


def _chosen(page: Page) -> str:
    text: str = page.text_content("#list [aria-selected=true] .words")
    return text


def _elements(page: Page) -> int:
    count: int = page.evaluate("document.getElementsByTagName('*').length")
    return count


def _lanes(page: Page) -> dict[str, float]:
    box: dict[str, float] = page.locator("canvas.lanes").bounding_box()
    return box


def _background(page: Page) -> str:
    colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return colour


def _type(page: Page, text: str) -> None:
    """Searches, and waits for what is found: the page does so a moment after the last letter."""
    page.keyboard.press("/")
    page.fill("#search", text)
    until(page, "document.getElementById('matches').textContent !== ''")


@pytest.mark.browser
def test_the_cause_of_each_failure_can_be_read_without_a_click_but_on_its_test(tmp_path: Path, open_run: Open) -> None:
    opened = open_run(write_planted(tmp_path))
    page = opened.page
    tests = page.locator("#tests button")
    assert tests.count() == len(PLANTED) + 1
    assert "passed" in tests.last.inner_text()
    for planted in PLANTED:
        tests.filter(has_text=f"::test_{planted.name}").click()
        text = page.inner_text("main")
        assert planted.cause in text, planted.name
        assert planted.error in text, planted.name
        assert f"::test_{planted.name}" in page.inner_text("main h2")
    assert opened.misdeeds == []
    assert opened.requests == [(tmp_path / "index.html").as_uri()]


@pytest.mark.browser
def test_hostile_texts_are_shown_and_do_nothing(tmp_path: Path, open_run: Open) -> None:
    opened = open_run(write_hostile(tmp_path))
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.click("#zoom-whole")
    seen = set()
    page.focus("#list")
    while (chosen := page.get_attribute("#list", "aria-activedescendant")) not in seen:
        seen.add(chosen)
        for more in page.locator("#detail button").all():
            more.click()
        page.keyboard.press("k")
    assert len(seen) > 50
    text = page.inner_text("main")
    assert all(line in text for hostile in HOSTILE for line in visible(hostile).split("\n"))
    _type(page, "<script>alert")
    page.keyboard.press("Escape")

    assert opened.misdeeds == []
    assert opened.requests == [(tmp_path / "index.html").as_uri()]
    assert page.locator("main :is(script, img, svg, iframe, style)").count() == 0
    targets = page.eval_on_selector_all("main a", "links => links.map((link) => link.getAttribute('href'))")
    assert len(targets) == 4
    assert all(target.startswith("./test_hostile/") for target in targets)


@pytest.mark.browser
def test_twenty_thousand_events_are_few_elements_wherever_the_reader_is(tmp_path: Path, open_run: Open) -> None:
    opened = open_run(write_many(tmp_path, 20_000))
    page = opened.page
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    ready = page.evaluate("performance.getEntriesByName('test-shown')[0].startTime")
    # Told, not checked: a computer that is busy is no mistake of the page.
    print(f"20,000 events: first paint after {paint:.0f} ms, first test shown after {ready:.0f} ms")  # noqa: T201

    assert _elements(page) < MOST_ELEMENTS
    last = page.locator("#list .row").last.get_attribute("aria-posinset")
    assert last == page.locator("#list .row").first.get_attribute("aria-setsize") == "17500"
    page.evaluate("document.getElementById('list').scrollTop = 0")
    page.wait_for_selector("#list [aria-posinset='1']")
    page.evaluate("document.getElementById('list').scrollTop = 200000")
    page.wait_for_selector("#list [aria-posinset='9100']")
    assert _elements(page) < MOST_ELEMENTS
    assert opened.misdeeds == []


@pytest.mark.browser
def test_the_timeline_is_zoomed_by_the_wheel_and_by_dragging(tmp_path: Path, open_run: Open) -> None:
    opened = open_run(write_many(tmp_path, 1000))
    page = opened.page
    whole = first, last = _span(page)
    box = _lanes(page)
    width = box["width"] - LEFT - RIGHT
    middle = box["x"] + LEFT + width / 2
    page.mouse.move(middle, box["y"] + 60)
    page.mouse.wheel(0, -400)
    until(page, f"document.getElementById('span').textContent !== '{first:.3f} s to {last:.3f} s'")
    near = _span(page)
    assert near[1] - near[0] < (last - first) * 0.6
    assert sum(near) / 2 == pytest.approx((first + last) / 2, rel=0.02)
    page.click("#zoom-whole")
    assert _span(page) == whole

    page.mouse.move(middle, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(middle + 100, box["y"] + 60)
    page.mouse.up()
    dragged = _span(page)
    assert dragged[0] == pytest.approx((first + last) / 2, rel=0.02)
    assert dragged[1] - dragged[0] == pytest.approx((last - first) * 100 / width, rel=0.05)
    assert opened.misdeeds == []


@pytest.mark.browser
def test_the_timeline_is_zoomed_by_buttons_and_by_keys(tmp_path: Path, open_run: Open) -> None:
    opened = open_run(write_many(tmp_path, 1000))
    page = opened.page
    first, last = _span(page)
    page.click("#zoom-in")
    page.keyboard.press("+")
    near = _span(page)
    assert near[1] - near[0] == pytest.approx((last - first) / 4, rel=0.01)
    page.keyboard.press("ArrowLeft")
    assert _span(page)[0] < near[0]
    page.keyboard.press("-")
    page.click("#zoom-out")
    assert _span(page)[1] - _span(page)[0] == pytest.approx(last - first, rel=0.01)
    page.click("#zoom-in")
    page.keyboard.press("0")
    assert _span(page) == (first, last)
    assert opened.misdeeds == []


@pytest.mark.browser
def test_search_finds_any_text_of_an_event_and_ends_with_escape(tmp_path: Path, open_run: Open) -> None:
    write_planted(tmp_path)
    opened = open_run(write_many(tmp_path, 1000))
    page = opened.page
    page.locator("#tests button").filter(has_text="::test_restore").click()

    _type(page, "JOB 612 of many")  # in a command's output only
    assert page.text_content("#matches").startswith("1 of ")
    assert "job-612.service" in _chosen(page)
    assert "job 612 of many" in page.inner_text("#detail")
    page.fill("#search", "no space left")
    until(page, "[...document.querySelectorAll('#tests .count')].length === 2")
    page.keyboard.press("Escape")
    assert page.text_content("#matches") == ""
    assert page.evaluate("document.activeElement === document.body")
    assert page.input_value("#search") == ""
    assert opened.misdeeds == []


@pytest.mark.browser
def test_keys_go_from_event_to_event_and_from_test_to_test(tmp_path: Path, open_run: Open) -> None:
    opened = open_run(write_planted(tmp_path))
    page = opened.page
    page.locator("#tests button").filter(has_text="import_error").click()
    assert _chosen(page).startswith("✕ wait_for_port 8080")
    page.keyboard.press("k")
    assert _chosen(page) == "shopd[412]: ModuleNotFoundError: No module named 'redis'"
    page.focus("#list")
    page.keyboard.press("ArrowUp")
    assert "Traceback" in _chosen(page)
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("e")
    assert _chosen(page).startswith("✕ wait_for_port 8080")
    active = page.get_attribute("#list", "aria-activedescendant")
    assert page.get_attribute(f"#{active}", "aria-selected") == "true"

    title = page.inner_text("main h2")
    page.keyboard.press("]")
    assert page.inner_text("main h2") != title
    page.keyboard.press("[")
    assert page.inner_text("main h2") == title
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    assert "next event" in page.inner_text("#help")
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    assert opened.misdeeds == []


@pytest.mark.browser
def test_a_click_on_the_list_or_the_timeline_shows_the_whole_event(tmp_path: Path, open_run: Open) -> None:
    opened = open_run(write_planted(tmp_path))
    page = opened.page
    page.locator("#tests button").filter(has_text="wrong_config").click()
    page.locator("#list .row").filter(has_text="write_text").click()
    detail = page.inner_text("#detail")
    assert "file on web" in detail
    assert "/etc/nginx/nginx.conf" in detail

    # Where the timeline has the command: at its time, in the second row of the machine.
    box, (first, last) = _lanes(page), _span(page)
    row = page.locator("#list .row").filter(has_text="nginx -t")
    time = float(row.locator(".time").inner_text())
    x = LEFT + (time - first) / (last - first) * (box["width"] - LEFT - RIGHT)
    page.locator("canvas.lanes").click(position={"x": x + 1, "y": 22 + 20 + 19 + 9})
    detail = page.inner_text("#detail")
    assert "command on web" in detail
    for text in ("argv", "nginx -t", "user", "root", "status", "1", 'unknown directive "listn" in /etc/nginx/nginx.conf:4'):
        assert text in detail
    assert row.get_attribute("aria-selected") == "true"

    page.reload()  # the address tells which event it was
    until(page, "document.getElementById('detail') && document.getElementById('detail').textContent.includes('nginx -t')")
    assert opened.misdeeds == []


@pytest.mark.browser
def test_lanes_can_be_left_out_and_what_stands_out_shown_alone(tmp_path: Path, open_run: Open) -> None:
    page = open_run(write_many(tmp_path, 1000)).page
    rows = page.locator("#list .row")
    page.get_by_role("button", name="console").click()
    assert "console" not in {row.locator(".unseen").inner_text() for row in rows.all()}
    page.get_by_role("button", name="only what stands out").click()
    assert rows.count() == 2  # the full disk, and the end of the phase; the errors on the console are left out
    page.get_by_role("button", name="console").click()
    assert rows.count() == 5


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
def test_the_page_is_light_or_dark_as_the_system_is_until_the_reader_says_otherwise(
    tmp_path: Path, open_run: Open, scheme: str, other: str
) -> None:
    colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}
    opened = open_run(write_planted(tmp_path), color_scheme=scheme)
    page = opened.page
    assert _background(page) == colours[scheme]
    page.get_by_role("button", name=other.title(), exact=True).click()
    assert _background(page) == colours[other]
    page.reload()
    assert _background(page) == colours[other]
    assert opened.misdeeds == []


@pytest.mark.browser
def test_small_pictures_lists_and_links_are_there_for_all_readers(tmp_path: Path, open_run: Open) -> None:
    run = write_many(tmp_path, 1000)
    (run / "test_restore" / "web" / "screenshot.png").write_bytes(png())
    opened = open_run(run)
    page = opened.page
    assert page.evaluate("document.querySelector('figure img').naturalWidth") == 8
    assert page.get_by_role("img", name="Screen of web").count() == 1
    assert page.get_by_role("listbox", name="Events").count() == 1
    assert page.get_by_role("link", name="journal.txt").first.get_attribute("href") == "./test_restore/web/journal.txt"
    assert opened.misdeeds == []


@pytest.mark.browser
def test_absurd_times_stop_nothing(tmp_path: Path, open_run: Open) -> None:
    opened = open_run(write_hostile(tmp_path))
    page = opened.page
    page.locator("#tests button").filter(has_text="test_odd").click()
    assert "after 1970" in page.inner_text("main .facts >> nth=0")
    for _ in range(70):
        page.keyboard.press("+")
    page.keyboard.press("k")
    assert _chosen(page) == "sleep (900000000000000.00 s)"
    assert opened.misdeeds == []


@pytest.mark.browser
def test_hundreds_of_tests_are_listed_in_parts_and_no_tests_at_all_are_told(tmp_path: Path, open_run: Open) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / MARK).touch()
    page = open_run(tmp_path / "none", shown="document.getElementById('main').textContent").page
    assert page.inner_text("main") == "This run has no tests with artifacts."

    for number in range(450):
        write_test(tmp_path / "many" / f"test_{number:03}", [{"kind": "note", "text": f"note {number}"}], outcome="passed")
    page = open_run(tmp_path / "many").page
    tests = page.locator("#tests button[data-test]")
    assert tests.count() == 200
    page.get_by_role("button", name="Show more (250 left)").click()
    page.get_by_role("button", name="Show more (50 left)").click()
    assert tests.count() == 450
    tests.last.click()
    assert _chosen(page) == "note 449"


@pytest.mark.browser
def test_what_is_cut_of_a_long_line_is_a_button_away(tmp_path: Path, open_run: Open) -> None:
    write_test(tmp_path / "test_long", [], traceback=f"begin\n{'x' * 3000}y\nend\n")
    opened = open_run(tmp_path)
    page = opened.page
    traceback = page.locator("details").first
    assert "[2501 more]" in traceback.inner_text()
    assert "xy" not in traceback.inner_text()
    page.get_by_role("button", name="Show all 3,012 characters").click()
    assert "xy\nend" in traceback.inner_text()
    assert opened.misdeeds == []
