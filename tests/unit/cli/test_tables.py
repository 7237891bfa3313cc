"""Tables of the command: as wide as the terminal, in full in a pipe."""

from __future__ import annotations

import sys

import pytest

from pytest_vmbottle.cli.command import show_table

HEAD = ("NAME", "STATE", "REASON")
ROWS = [("web", "stopped", "it was shut down as asked " * 8), ("d" * 41, "error", "-")]


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, columns: int, terminal: bool = True) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    show_table(HEAD, ROWS)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("columns", [40, 80, 100, 160])
def test_a_table_fits_the_terminal_by_its_widest_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    lines = shown(monkeypatch, capsys, columns=columns)

    assert max(map(len, lines)) == columns
    assert lines[1].split()[:2] == ["web", "stopped"]
    assert lines[1].endswith("…")
    assert len({line.index(word) for line, word in zip(lines, ("STATE", "stopped", "error"), strict=True)}) == 1


def test_a_wide_terminal_and_a_pipe_get_all_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wide = shown(monkeypatch, capsys, columns=400)
    piped = shown(monkeypatch, capsys, columns=80, terminal=False)

    assert wide == piped
    assert ROWS[0][2].strip() in wide[1]


def test_a_terminal_that_is_too_narrow_for_anything_gets_narrow_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(monkeypatch, capsys, columns=5)[0].split() == ["NAME", "STATE", "REASON"]
