"""The report of a run as one HTML file: no server, no network, and nothing of a guest's text is ever markup or script.

The file has the page's own style and script, and the tests as JSON in elements that browsers do not run. Its Content-Security-Policy allows
scripts and styles by their digests only and nothing from elsewhere, so that a mistake here would still run nothing of a guest's.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs

from pytest_vmbottle.host.files import atomic_file
from pytest_vmbottle.report.events import LANES, Event, Rows, as_text, events_of, has_failed, lane_of, number, stands_out, start_of
from pytest_vmbottle.report.run import TestArtifacts
from pytest_vmbottle.report.words import describe_event, one_line
from pytest_vmbottle.shown import hidden, visible

__all__ = ["write_page"]

# In this order: page.js uses the library.
_SCRIPTS, _STYLES = ("uPlot.iife.min.js", "page.js"), ("uPlot.min.css", "page.css")
_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_EVENTS = 50_000
"""Events of a test at most; the latest are kept."""
_EVENT, _TEST = 768, 3 << 17
"""Bytes that a test's events may take: so many for each of them, and so many for all tests together."""
_MOST_TEST, _MOST_PAGE = 4 << 20, 48 << 20
"""Bytes of one test's events, and of a page from which on tests are listed without events."""
_TEXT, _SHORT, _WORDS = 1 << 14, 80, 160
"""Characters of a text in an event, of one that there is no room for, and of an event in words."""
_SMALL = 256
"""Bytes of an event's fields that are always kept."""
_LEFT_OUT = {"left out": "The fields of this event are in timeline.jsonl only."}
_FIELDS, _ELEMENTS = 32, 16
"""Fields of an event at most, and characters of an element of a list at least."""
_REPORT, _REPORTS, _LONGEST = 8 << 10, 1 << 19, 1 << 16
"""Bytes of a test's error, traceback and sections: so many for each test, so many for all of them, and in one text at most."""
_SCREENSHOT, _SCREENSHOTS = 1 << 18, 1 << 19
"""Bytes of a screenshot that is embedded, and of all that are."""
_ROWS = 4
"""Rows of a lane at most, for events that overlap."""
_LINKED = ("console.txt", "journal.txt", "metrics.csv", "machine.json", "screenshot.png")
_MEANING = ("machine", "kind", "time", "seconds")
"""Fields that each row of the page has anyway."""
# `<`, `>` and `&` could end the element or begin markup. The two separators are line ends to older JavaScript, and not to JSON.
_MARKUP = {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
_FLAG_FAILED, _FLAG_STANDS_OUT = 1, 2  # page.js has the same


def write_page(tests: Sequence[TestArtifacts], path: Path, *, title: str = "Test run") -> None:
    """Write the report of a run as one HTML file, which appears whole.

    Args:
        tests: The tests of the run. Failed ones are shown first, else in this order.
        path: The file. It links the files of the tests relative to its folder.
        title: The heading.
    """
    # A stable sort: within both groups the order stays.
    ordered = sorted(tests, key=lambda test: not test.failed)
    heading = _text(title, 1000)
    # Split first and filled then, so that nothing that is filled in can be taken for the place of the data.
    before, after = (_filled(part, heading) for part in _asset("page.html").split("{{data}}"))
    writer, index = _Writer(path.parent, max(1, len(ordered))), []
    with atomic_file(path, mode=0o644) as file:
        file.write(before)
        for place, test in enumerate(ordered):
            # One at a time: the events of all tests together may not fit into memory.
            entry, known = writer.test(test)
            index.append(entry)
            file.write(_data(f"test-{place}", known))
        counts = Counter(entry["outcome"] for entry in index)
        file.write(_data("run", _json({"title": heading, "lanes": LANES, "counts": counts, "tests": index})))
        file.write(after)


def _filled(template: str, title: str) -> bytes:
    """Return a part of the page with the assets that it names, in one pass: a title may look like the name of one."""
    scripts, styles = [_asset(name) for name in _SCRIPTS], [_asset(name) for name in _STYLES]
    policy = (
        # Digests and no 'unsafe-inline': a script that gets into the page by a mistake of ours does not run. Trusted types refuse markup
        # from strings (`innerHTML`).
        f"default-src 'none'; script-src {_digests(scripts)}; style-src {_digests(styles)}; img-src data:; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(title),
        "styles": "".join(f"<style>{style}</style>\n" for style in styles),
        "licence": _asset("uPlot.LICENSE.txt"),
        "scripts": "".join(f"<script>{script}</script>\n" for script in scripts),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template).encode()


@cache
def _asset(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")


def _digests(texts: Sequence[str]) -> str:
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)


def _data(name: str, text: str) -> bytes:
    """Return the JSON of `_json` as an element that no browser runs."""
    return f'<script type="application/json" id="{name}">{text}</script>\n'.encode()


def _json(value: object) -> str:
    """Return JSON in which nothing is markup, so that no text in it can end the element that it is in."""
    # Not as ASCII, which takes twice the room for most scripts but Latin.
    # `allow_nan=False`, because `JSON.parse` refuses NaN; all numbers went through `number` before.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in _MARKUP.items():
        text = text.replace(character, escape)
    return text


def _size(value: object) -> int:
    return len(_json(value).encode())


def _text(text: str, most: int) -> str:
    """Return a guest's text with its control characters visible and without its middle if it is long."""
    left_out = len(text) - most
    if left_out > 0:  # before anything else looks at it: it may have megabytes
        text = f"{text[: most // 3]}\n[{left_out} characters left out]\n{text[-(most * 2 // 3) :]}"
    return visible(hidden(text))


def _text_within(text: str, size: int) -> str:
    """Return a guest's text in a number of bytes of JSON, in which a character may take six of them."""
    # Halved until it fits: how many bytes a character takes is only known when it is written.
    most = size
    while _size(shown := _text(text, most)) > size and most > _SHORT:
        most //= 2
    return shown


@attrs.define
class _Writer:
    """Writer of tests as the page's script reads them, within the bounds of the whole page."""

    _root: Path
    _tests: int
    _bytes: int = 0
    _screenshots: int = 0

    def test(self, test: TestArtifacts) -> tuple[dict[str, Any], str]:
        """Return the entry of a test in the page's index, and all about it as JSON."""
        events = events_of(test)
        start = start_of(test, events)
        began, ended = number(test.began) or 0.0, number(test.ended) or 0.0
        entry = {
            "nodeid": _text(test.nodeid, 2000),
            "outcome": _text(test.outcome, 100),
            "phase": _text(test.phase, 100),
            "error": one_line(test.error, 500),
            "worker": _text(test.worker, 100),
            "began": began,
            "seconds": round(max(0.0, ended - began), 3),
            "count": sum(event.get("kind") != "metrics" for event in events),
        }
        known = _json({**self._reports(test), **self._shown_events(test, events, start)})
        # Counted after the test: the test that goes beyond the bound still has its events.
        self._bytes += len(known.encode())
        return entry, known

    def _reports(self, test: TestArtifacts) -> dict[str, Any]:
        """Return the texts of a test's report, and its files."""
        texts = [test.error, test.traceback, *(text for _, text in test.sections)]
        # A part for each test and a share of the rest, so that a run of few tests can show more of each.
        room = _REPORT + _REPORTS // self._tests
        for place, text in enumerate(texts):
            # What a short text leaves over is for those below it.
            texts[place] = _text_within(text, min(_LONGEST, room // (len(texts) - place)))
            room -= _size(texts[place])
        error, traceback, *sections = texts
        return {
            "error": error,
            "traceback": traceback,
            "sections": [[_text(title, _SHORT), text] for (title, _), text in zip(test.sections, sections, strict=True)],
            "files": [self._link(path) for path in (test.folder / "test.json", test.folder / "timeline.jsonl") if _is_plain(path)],
        }

    def _shown_events(self, test: TestArtifacts, events: list[dict[str, Any]], start: float) -> dict[str, Any]:
        # Machines of the test first, then names that only events have.
        names = [*dict.fromkeys([*test.machines, *(as_text(event.get("machine")) for event in events)])]
        samples = [event for event in events if event.get("kind") == "metrics"]
        shown = [event for event in events if event.get("kind") != "metrics"]
        # The latest, because a failure is at the end.
        kept = shown[-_MOST_EVENTS:] if self._bytes < _MOST_PAGE else []
        budget = min(_MOST_TEST, _EVENT * len(kept) + _TEST // self._tests)
        rows = _EventRows(self._root, test, start, {name: place for place, name in enumerate(names)})
        return {
            "machines": [self._machine(test, name, samples, start) for name in names],
            "left_out": len(shown) - len(kept),
            "kinds": rows.kinds,
            "events": rows.fitting(kept, budget),
        }

    def _machine(self, test: TestArtifacts, name: str, samples: list[dict[str, Any]], start: float) -> dict[str, Any]:
        own = [event for event in samples if as_text(event.get("machine")) == name]
        folder = _machine_folder(test, name)
        files = [path for file in _LINKED if folder and _is_plain(path := folder / file)]
        return {
            "name": one_line(name) or "(no machine)",
            "files": [self._link(path) for path in files],
            "screenshot": next((self._image(path) for path in files if path.suffix == ".png"), ""),
            "metrics": [
                [round(event["time"] - start, 3) for event in own],
                [number(event.get("cpu_percent")) for event in own],
                [number(event.get("rss_bytes")) for event in own],
            ],
        }

    def _link(self, path: Path) -> list[str]:
        return [_text(path.name, 500), _href(path, self._root)]

    def _image(self, path: Path) -> str:
        """Return a small screenshot as a URL that contains it; empty if it is to be linked."""
        try:
            size = path.stat().st_size
            # Looked at before it is read: the file may have any size.
            if size > min(_SCREENSHOT, _SCREENSHOTS - self._screenshots):
                return ""
            data = path.read_bytes()
        except OSError:
            return ""
        # What is no PNG is linked at most: the URL would give it a type that it does not have.
        if not data.startswith(_PNG):
            return ""
        self._screenshots += len(data)
        return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@attrs.define
class _EventRows:
    """Events of a test as lists, which are half the size of objects; page.js begins with the meaning of their elements."""

    _root: Path
    _test: TestArtifacts
    _start: float
    _machines: Mapping[str, int]
    kinds: list[str] = attrs.field(factory=list)
    _rows: dict[tuple[int, str], Rows] = attrs.field(factory=dict)

    def fitting(self, events: Sequence[Event], budget: int) -> list[list[Any]]:
        """Return events in a number of bytes: those that stand out and the latest with all their texts, the others with the room left."""
        # In the order of time, on which the rows of the lanes depend.
        heads = [self._head(event) for event in events]
        details = [self._detail(event, _TEXT) for event in events]
        sizes = [_size(detail) for detail in details]
        budget -= _size(heads) + sum(size for size in sizes if size <= _SMALL)
        large = [place for place, size in enumerate(sizes) if size > _SMALL]
        # What stands out first, then the latest: these get the room before the others.
        for place in sorted(large, key=lambda place: (stands_out(events[place]), place), reverse=True):
            if sizes[place] > budget:
                details[place] = self._detail(events[place], _SHORT)
            if (size := _size(details[place])) > budget:
                details[place], size = _LEFT_OUT, 0
            budget -= size
        return [[*head, *([detail] if detail else [])] for head, detail in zip(heads, details, strict=True)]

    def _head(self, event: Event) -> list[Any]:
        machine, lane = self._machines[as_text(event.get("machine"))], lane_of(event)
        seconds = number(event.get("seconds"))
        # Events without a duration have no extent that could overlap.
        row = 0 if seconds is None else self._rows.setdefault((machine, lane), Rows()).place(event["time"], seconds)
        kind = one_line(as_text(event.get("kind")))
        if kind not in self.kinds:
            self.kinds.append(kind)
        return [
            round((event["time"] - self._start) * 1000, 1),
            -1 if seconds is None else round(max(0.0, seconds) * 1000, 1),
            machine,
            LANES.index(lane),
            # Beyond the last row events overlap, rather than make the page endlessly high.
            min(row, _ROWS - 1),
            self.kinds.index(kind),
            _FLAG_FAILED * has_failed(event) + _FLAG_STANDS_OUT * stands_out(event),
            _words(event),
        ]

    def _detail(self, event: Event, most: int) -> dict[str, Any]:
        """Return the fields of an event that its row does not have."""
        # The fields of an event are bounded in number too: the file may be somebody else's.
        fields = [(name, each) for name, each in event.items() if name not in _MEANING and each not in (None, "", [])]
        detail = {_text(name, _SHORT): _value(each, most) for name, each in fields[:_FIELDS]}
        if self._is_said(detail, event):
            return {}
        for stream in ("stdout_file", "stderr_file"):
            if name := Path(as_text(event.get(stream))).name:
                folder = _machine_folder(self._test, as_text(event.get("machine")))
                if folder and _is_plain(path := folder / "outputs" / name):
                    detail[f"{stream}_href"] = _href(path, self._root)
        return detail

    def _is_said(self, detail: Mapping[str, Any], event: Event) -> bool:
        """Tell whether the words of an event are all that there is, as for most lines of a console."""
        return detail.keys() <= {"text"} and as_text(event.get("text")) in ("", _words(event))


def _words(event: Event) -> str:
    return one_line(describe_event(event), _WORDS)


def _value(value: Any, most: int) -> Any:
    """Return a field of an event as a text, a number or a list of texts."""
    if isinstance(value, str):
        return _text(value, most)
    if isinstance(value, list):
        # They share the room, whatever their number.
        kept = value[: max(1, most // _ELEMENTS)]
        shown = [_text(each if isinstance(each, str) else repr(each)[:most], max(_ELEMENTS, most // len(kept))) for each in kept]
        return [*shown, f"[{len(value) - len(kept)} more]"] if len(value) > len(kept) else shown
    exact = number(value)
    return exact if exact is not None else _text(repr(value)[:most], most)


def _machine_folder(test: TestArtifacts, name: str) -> Path | None:
    """Return the folder of a machine, if it is one within the test's own: the file that names it may come from anywhere."""
    relative = test.machines.get(name)
    if not relative or "\0" in relative:
        return None
    # An absolute path would replace the folder here, and is refused by the check below.
    folder = test.folder / relative
    # Resolved, because a link in the folder may lead out of it as well as its name.
    return folder if folder.resolve().is_relative_to(test.folder.resolve()) else None


def _is_plain(path: Path) -> bool:
    # A link in a copied folder may lead to any file of the computer that makes the report.
    return path.is_file() and not path.is_symlink()


def _href(path: Path, root: Path) -> str:
    """Return the URL of a file relative to the page's folder. It begins with `./`, so that no name is taken for a scheme."""
    return f"./{quote(os.fsencode(os.path.relpath(path, root)))}"
