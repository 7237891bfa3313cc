"""The page as a file: its structure, what is escaped, what it weighs. `tests/browser` opens it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import attrs
import pytest

from pytest_vmbottle.report.page import write_page
from pytest_vmbottle.report.run import read_run
from pytest_vmbottle.shown import visible
from tests.unit.report.artificial import (
    HOSTILE,
    PLANTED,
    many_events,
    png,
    write_hostile,
    write_many,
    write_planted,
    write_test,
)

CODE = ("script", "style")
NO_PAGE = ("iframe", "object", "embed", "link", "base", "form", "img", "svg", "audio", "video", "source", "area")


@attrs.define(slots=False, init=False)
class Parsed(HTMLParser):
    """A page as a parser of HTML sees it."""

    tags: list[tuple[str, dict[str, str | None]]]
    texts: list[tuple[str, str]]
    comments: list[str]

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.texts, self.comments = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in CODE:
            self.texts.append((tag, ""))

    def handle_data(self, text: str) -> None:
        if self.tags and self.tags[-1][0] in CODE and self.texts[-1][1] == "":
            self.texts[-1] = (self.texts[-1][0], text)

    def handle_comment(self, text: str) -> None:
        self.comments.append(text)

    @property
    def data(self) -> dict[str, Any]:
        """What the script is given, by the elements' ids."""
        scripts = [attributes for tag, attributes in self.tags if tag in CODE]
        texts = [text for _, text in self.texts]
        return {
            str(attributes["id"]): json.loads(text)
            for attributes, text in zip(scripts, texts, strict=True)
            if attributes.get("type") == "application/json"
        }

    def code(self, tag: str) -> list[str]:
        """Texts that browsers run, or style with."""
        elements = [attributes for name, attributes in self.tags if name in CODE]
        return [text for attributes, (name, text) in zip(elements, self.texts, strict=True) if name == tag and "type" not in attributes]


def _page(run: Path, **keywords: Any) -> str:
    write_page(read_run(run), run / "index.html", **keywords)
    return (run / "index.html").read_text()


def test_the_page_allows_its_own_scripts_and_styles_by_their_digests_and_nothing_else(tmp_path: Path) -> None:
    parsed = Parsed(_page(write_hostile(tmp_path)))
    (policy,) = (str(given["content"]) for tag, given in parsed.tags if given.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))

    assert rules.pop("default-src") == "'none'"
    assert rules.pop("img-src") == "data:"
    for tag in CODE:
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in parsed.code(tag)]
        assert rules.pop(f"{tag}-src").split() == [f"'sha256-{digest}'" for digest in digests]
        assert len(digests) == 2
    assert rules == {
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


def test_nothing_of_the_page_is_loaded_from_anywhere(tmp_path: Path) -> None:
    parsed = Parsed(_page(write_hostile(tmp_path)))

    assert [tag for tag, _ in parsed.tags if tag in NO_PAGE] == []
    urls = [value for _, given in parsed.tags for name, value in given.items() if name in ("src", "href", "srcset", "data", "action")]
    assert urls == ["#main"]
    for style in parsed.code("style"):
        assert "url(" not in style
        assert "@import" not in style
    for script in parsed.code("script"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|fetch\(|XMLHttpRequest|import\(", script
        )


@pytest.mark.parametrize("title", [*HOSTILE, "{{data}}"])
def test_a_title_is_text(tmp_path: Path, title: str) -> None:
    page = _page(write_planted(tmp_path), title=title)
    parsed = Parsed(page)
    assert len(parsed.code("script")) == 2
    assert [tag for tag, _ in parsed.tags if tag in NO_PAGE] == []
    assert parsed.data["run"]["title"] == visible(title)


def test_texts_of_guests_are_data_in_which_nothing_is_markup_and_no_control_is_left(tmp_path: Path) -> None:
    page = _page(write_hostile(tmp_path))
    parsed = Parsed(page)

    for element in re.findall(r'<script type="application/json" id="[\w-]+">(.*?)</script>\n', page, re.DOTALL):
        assert not re.search("[<>&\u2028\u2029]", element)
        assert element.isprintable(), ascii(element)
    assert parsed.comments == []
    shown = json.dumps(parsed.data, ensure_ascii=False)
    assert all(json.dumps(visible(text), ensure_ascii=False)[1:-1] in shown for text in HOSTILE)
    entry, odd = parsed.data["run"]["tests"]
    assert odd["seconds"] == 0
    assert entry["nodeid"].startswith("test_hostile[<script>alert('x')</script>\n</script>")
    assert "\\ud800" in entry["nodeid"]


def test_failed_tests_are_first_each_with_what_is_known_of_it(tmp_path: Path) -> None:
    data = Parsed(_page(write_planted(tmp_path))).data
    tests = data["run"]["tests"]

    assert data["run"]["counts"] == {"failed": 10, "passed": 1}
    assert [test["outcome"] for test in tests] == ["failed"] * 10 + ["passed"]
    for number, test in enumerate(tests[:-1]):
        (planted,) = (each for each in PLANTED if f"test_{each.name}" in test["nodeid"])
        known = data[f"test-{number}"]
        assert (test["error"], known["error"], test["phase"]) == (planted.error, planted.error, "call")
        assert planted.error in known["traceback"]
        assert known["sections"] == [["Captured log call", "INFO shop ready\n"]]
        assert planted.cause in json.dumps(known).replace('\\"', '"')


def test_files_are_linked_relative_to_the_page_whatever_their_names_are(tmp_path: Path) -> None:
    folder = write_test(
        tmp_path / "javascript:alert(1)#?%", [{"kind": "command", "status": 1, "stdout_file": "000001-stdout.txt", "stderr_file": "../x"}]
    )
    (folder / "web" / "outputs" / "000001-stdout.txt").touch()
    (folder / "web" / "metrics.csv").symlink_to("/etc/passwd")
    known = Parsed(_page(tmp_path)).data["test-0"]

    at = "./javascript%3Aalert%281%29%23%3F%25"
    assert known["files"] == [["test.json", f"{at}/test.json"], ["timeline.jsonl", f"{at}/timeline.jsonl"]]
    assert known["machines"][0]["files"] == [["console.txt", f"{at}/web/console.txt"], ["journal.txt", f"{at}/web/journal.txt"]]
    (event,) = known["events"]
    assert event[-1]["stdout_file_href"] == f"{at}/web/outputs/000001-stdout.txt"
    assert "stderr_file_href" not in event[-1]


@pytest.mark.parametrize("place", ["../other", "/etc", "web/../../other", "link", "nul\0"])
def test_folders_of_machines_outside_of_the_test_are_left_alone(tmp_path: Path, place: str) -> None:
    write_test(tmp_path / "other", [], machines=())
    (tmp_path / "other" / "console.txt").touch()
    folder = write_test(tmp_path / "test", [{"kind": "note"}])
    (folder / "link").symlink_to(tmp_path / "other")
    known = json.loads((folder / "test.json").read_text())
    (folder / "test.json").write_text(json.dumps({**known, "machines": {"web": place}, "began": 1.0}))

    assert Parsed(_page(tmp_path)).data["test-0"]["machines"][0]["files"] == []


def test_small_pictures_are_embedded_and_others_only_linked(tmp_path: Path) -> None:
    folder = write_test(tmp_path / "test", [], machines=("a", "b", "c"))
    (folder / "a" / "screenshot.png").write_bytes(png())
    (folder / "b" / "screenshot.png").write_bytes(png() + bytes(1 << 20))
    (folder / "c" / "screenshot.png").write_bytes(b"<svg onload=alert(1)>")
    a, b, c = Parsed(_page(tmp_path)).data["test-0"]["machines"]

    assert a["screenshot"] == f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    assert (b["screenshot"], c["screenshot"]) == ("", "")
    assert ["screenshot.png", "./test/b/screenshot.png"] in b["files"]


def test_metrics_are_curves_and_no_events_of_the_list(tmp_path: Path) -> None:
    samples = [{"kind": "metrics", "cpu_percent": 10.0 * number, "rss_bytes": None if number else 5} for number in range(3)]
    write_test(tmp_path / "test", [*samples, {"kind": "note", "text": "x"}])
    known = Parsed(_page(tmp_path)).data["test-0"]

    assert known["machines"][0]["metrics"] == [[0.0, 0.1, 0.2], [0.0, 10.0, 20.0], [5, None, None]]
    assert [event[7] for event in known["events"]] == ["x"]


def test_a_thousand_events_weigh_two_megabytes_at_most_even_if_all_of_them_are_as_large_as_can_be(tmp_path: Path) -> None:
    page = _page(write_many(tmp_path / "usual", 1000))
    assert len(page.encode()) < 400_000

    worst = "<\x00>" * 1365  # 4 KiB, as much as there is of a text in an event
    event = {"kind": "command", "argv": [worst] * 2, "status": 1, "stdout": worst, "stderr": worst, "env": ["A" * 99] * 99}
    write_test(
        tmp_path / "worst" / "test",
        [event] * 1000,
        error=worst,
        nodeid=worst,
        traceback=worst,
        sections=[["t", worst]] * 5,
        machines=("web",),
    )
    known = Parsed(page := _page(tmp_path / "worst")).data["test-0"]
    assert len(page.encode()) <= 2_000_000
    # Of what has no room, the latest have more of their texts.
    assert len(json.dumps(known["events"][-1])) > 20 * len(json.dumps(known["events"][0]))


def test_twenty_thousand_events_are_all_there_in_a_few_megabytes(tmp_path: Path) -> None:
    page = _page(write_many(tmp_path, 20_000))
    known = Parsed(page).data["test-0"]

    assert len(page.encode()) < 4_000_000
    assert len(known["events"]) + sum(len(machine["metrics"][0]) for machine in known["machines"]) == 20_000
    assert known["left_out"] == 0


def test_events_beyond_the_bound_are_left_out_from_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_vmbottle.report.page._MOST_EVENTS", 10)
    write_test(tmp_path / "test", [{"kind": "note", "text": str(number)} for number in range(30)])
    known = Parsed(_page(tmp_path)).data["test-0"]

    assert [event[7] for event in known["events"]] == [str(number) for number in range(20, 30)]
    assert known["left_out"] == 20


def test_tests_beyond_the_bound_of_a_page_are_listed_without_their_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_vmbottle.report.page._MOST_PAGE", 1000)
    write_test(tmp_path / "a", many_events(100), machines=("web", "db"))
    write_test(tmp_path / "b", many_events(100), machines=("web", "db"), outcome="passed")
    data = Parsed(_page(tmp_path)).data

    assert data["test-0"]["left_out"] == 0
    assert data["test-1"]["events"] == []
    assert data["test-1"]["left_out"] == data["run"]["tests"][1]["count"] > 50


def test_a_run_without_tests_and_a_test_without_files_have_a_page(tmp_path: Path) -> None:
    write_page([], tmp_path / "none.html")
    assert Parsed((tmp_path / "none.html").read_text()).data["run"]["tests"] == []

    folder = write_test(tmp_path / "test", [], machines=())
    (folder / "timeline.jsonl").unlink()
    known = Parsed(_page(tmp_path)).data["test-0"]
    assert (known["events"], known["machines"]) == ([], [])


def test_the_licence_of_the_library_is_in_the_page(tmp_path: Path) -> None:
    page = _page(write_planted(tmp_path))
    assert "Permission is hereby granted, free of charge" in page
    assert "Leon Sorokin" in page
