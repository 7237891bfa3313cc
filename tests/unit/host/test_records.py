"""Records are written whole or not at all, and whatever stands in the place of one is told from it at once."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_vmbottle.host import records

FACTS = {"name": "web", "size": 7, "more": [None, True, 1.5, "ü"]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10
)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    records.write(path, FACTS)
    records.write(path, FACTS | {"size": 8}, version=2)

    assert records.read(path, version=2) == FACTS | {"size": 8}
    assert [each.name for each in tmp_path.iterdir()] == ["record.json"]
    assert path.stat().st_mode & 0o777 == 0o600


@settings(max_examples=50)
@given(st.dictionaries(st.text(), JSON))
def test_whatever_json_can_say_is_read_back(tmp_path_factory: pytest.TempPathFactory, facts: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    records.write(path, facts)
    assert records.read(path) == facts


def test_a_record_from_before_there_were_versions_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old").write_text(json.dumps(FACTS))
    assert records.read(tmp_path / "old") == FACTS


def test_a_record_without_a_version_is_its_facts_alone(tmp_path: Path) -> None:
    records.write(tmp_path / "plain", FACTS, version=0, mode=0o400)
    assert json.loads((tmp_path / "plain").read_bytes()) == FACTS == records.read(tmp_path / "plain")
    assert (tmp_path / "plain").stat().st_mode & 0o777 == 0o400


def test_facts_of_which_nothing_can_be_made_are_a_damaged_record(tmp_path: Path) -> None:
    records.write(tmp_path / "record", FACTS)
    assert records.read_as(tmp_path / "record", lambda facts: int(facts["size"])) == 7
    with pytest.raises(records.Damaged, match=r"^it lacks 'port'$"):
        records.read_as(tmp_path / "record", lambda facts: int(facts["port"]))
    for make in (lambda facts: int(facts["name"]), lambda facts: facts + 1, lambda facts: facts["size"].strip()):
        with pytest.raises(records.Damaged, match=r"."):
            records.read_as(tmp_path / "record", make)


def test_a_record_of_a_newer_version_is_refused_and_stays(tmp_path: Path) -> None:
    records.write(tmp_path / "new", FACTS, version=2)
    with pytest.raises(records.Damaged, match="version 2"):
        records.read(tmp_path / "new")
    assert records.read(tmp_path / "new", version=2) == FACTS


def test_any_changed_letter_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    records.write(path, {"name": "web", "size": 7})
    whole = path.read_text()
    noticed = 0
    for at, letter in enumerate(whole):
        if letter.isalnum():
            path.write_text(whole[:at] + ("1" if letter != "1" else "2") + whole[at + 1 :])
            try:
                # A changed word of the frame makes it a record of the oldest version, which says nothing that is asked for.
                noticed += "name" not in records.read(path)
            except ValueError:
                noticed += 1
    assert noticed == sum(letter.isalnum() for letter in whole)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


def _socket(path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.path.relpath(path))
    listening.close()


def _link(path: Path) -> None:
    records.write(path.with_name("elsewhere"), FACTS)
    path.symlink_to("elsewhere")


def text(content: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


NONSENSE: dict[str, Callable[[Path], object]] = {
    "empty": text(""),
    "half": text("{"),
    "binary": text(bytes(range(256))),
    "a list": text("[]"),
    "a number": text("5"),
    "nothing": text("null"),
    "not a number": text('{"size": NaN}'),
    "endless": text('{"size": -Infinity}'),
    "said twice": text('{"name": "a", "name": "b"}'),
    "deep": text("[" * 100_000),
    "deep objects": text('{"a":' * 100_000),
    "no checksum": text('{"version": 1, "sha256": null, "record": {}}'),
    "wrong record": text('{"version": 1, "sha256": "", "record": []}'),
    "a version that is none": text('{"version": true, "sha256": "", "record": {}}'),
    "huge": _huge,
    "a link": _link,
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("make", NONSENSE.values(), ids=NONSENSE)
def test_whatever_is_no_record_is_refused_without_waiting(
    tmp_path: Path, make: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "record.json")
    with pytest.raises((records.Damaged, OSError)):
        records.read(tmp_path / "record.json")


def test_a_record_that_is_not_there_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        records.read(tmp_path / "record.json")


@settings(max_examples=300)
@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_file_raises_anything_but_that_it_is_no_record(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(content)
    with suppress(records.Damaged):
        assert isinstance(records.read(path), dict)
