"""Searches in the files of a real guest."""

from __future__ import annotations

import time

import pytest

from pytest_vmbottle import Machine, Match

pytestmark = pytest.mark.vm("debian-12")

NAMES = ["-n", "a:1:b", "line\nbreak", "tab\tand 'quotes\"", "$(id)", "grüße", b"\xff\xfe".decode("utf-8", "surrogateescape")]


@pytest.fixture
def place(session_vm: Machine) -> str:
    """A folder in the guest for one test."""
    return session_vm.exec(["mktemp", "-d", "/root/s.XXXXXX"]).stdout.strip()


def fill(machine: Machine, place: str, program: str) -> None:
    """Runs a Python program in a folder of the guest."""
    machine.exec(["python3", "-c", f"import os\n{program}"], cwd=place)


@pytest.mark.guests
def test_names_and_patterns_are_taken_literally_over_either_channel(either: Machine, place: str) -> None:
    pattern = "-e a.*[b$(id)\\'\" ü"
    fill(either, place, f"for name in {NAMES!r}:\n open(os.fsencode(name), 'w').write('no\\n' + {pattern!r} + ':7: x\\naaa [b id\\n')")
    found = either.search(pattern, place)

    assert found.by_path() == {f"{place}/{name}": [Match(path=f"{place}/{name}", line=2, text=f"{pattern}:7: x")] for name in NAMES}
    assert not found.truncated
    assert not found.timed_out


def test_a_regular_expression_ignores_case_in_the_files_that_are_asked_for(session_vm: Machine, place: str) -> None:
    fill(
        session_vm,
        place,
        "for folder in ('src', 'build', 'src/.git'): os.makedirs(folder)\n"
        "for path in ('src/a.py', 'src/a.c', 'build/b.py', 'src/.git/c.py'): open(path, 'w').write('Größe = 12\\nGRÖSSE=x\\nGRÖẞE = 34')",
    )
    folder = session_vm.path(place)
    found = session_vm.search("^größe = [0-9]+$", folder, regex=True, ignore_case=True, include="*.py", exclude_dirs=["build", ".g*"])

    assert found[0] == Match(path=f"{place}/src/a.py", line=1, text="Größe = 12")
    assert {match.path for match in found} == {f"{place}/src/a.py"}
    assert {match.path for match in session_vm.search("GRÖSSE=x", folder)} == {
        f"{place}/{name}" for name in ("src/a.py", "src/a.c", "build/b.py", "src/.git/c.py")
    }
    assert session_vm.search("größe = [0-9]+", folder, include=["*.py", "*.c"]) == []


@pytest.mark.guests
def test_binary_files_and_pipes_are_skipped_other_encodings_are_not_and_long_lines_are_cut(session_vm: Machine, place: str) -> None:
    fill(
        session_vm,
        place,
        "open('binary', 'wb').write(b'needle \\0\\n'); open('latin', 'wb').write(b'needle caf\\xe9\\n')\n"
        "open('long', 'w').write('needle ' + 'x' * 3_000_000 + '\\nneedle'); os.mkfifo('pipe'); os.symlink('latin', 'link')",
    )
    found = {match.path.removeprefix(f"{place}/"): match.text for match in session_vm.search("needle", place) if match.line == 1}

    assert found == {"latin": "needle caf\udce9", "long": "needle " + "x" * 993 + "…"}
    assert session_vm.search("needle", f"{place}/long")[1] == Match(path=f"{place}/long", line=2, text="needle")
    assert session_vm.search("needle", f"{place}/pipe") == []


@pytest.mark.guests
def test_what_is_left_out_is_reported(session_vm: Machine, place: str) -> None:
    fill(session_vm, place, "open('a\\nb', 'w').write('x\\n' * 30)")
    some, just_all = (session_vm.search("x", place, max_results=count) for count in (29, 30))

    assert ([match.line for match in some], some.truncated) == (list(range(1, 30)), True)
    assert ([match.line for match in just_all], just_all.truncated) == (list(range(1, 31)), False)


@pytest.mark.guests
def test_a_timeout_keeps_what_was_found(session_vm: Machine, place: str) -> None:
    fill(  # 60 GB to read, in 20 MB
        session_vm,
        place,
        "open('0', 'w').write('needle\\n' + ('x' * 99 + '\\n') * 200_000)\nfor number in range(1, 3000): os.link('0', str(number))",
    )
    began = time.monotonic()
    found = session_vm.search("needle", place, max_results=3000, timeout=1)
    session_vm.exec(["rm", "-r", place])

    assert 0 < len(found) < 3000
    assert {match.text for match in found} == {"needle"}
    assert found.timed_out
    assert time.monotonic() - began < 100
    assert session_vm.exec("pgrep -x grep", check=False).stdout == ""


def test_roots_and_patterns_that_cannot_be_are_errors_at_once(session_vm: Machine, place: str) -> None:
    with pytest.raises(FileNotFoundError):
        session_vm.search("x", f"{place}/none")
    with pytest.raises(ValueError, match="absolute"):
        session_vm.search("x", "etc")
    with pytest.raises(ValueError, match="Unmatched"):
        session_vm.search("(", place, regex=True)
    with pytest.raises(ValueError, match="NUL"):
        session_vm.search("a\0b", place)
    with pytest.raises(ValueError, match="newline"):
        session_vm.search("a\nb", place)
    with pytest.raises(ValueError, match="max_results=0"):
        session_vm.search("a", place, max_results=0)
    assert session_vm.search("(", place) == []


def test_a_grep_that_cannot_do_it_is_named(session_vm: Machine, place: str) -> None:
    grep = session_vm.path("/usr/local/bin/grep")  # found before the real one
    grep.write_text("#!/bin/sh\necho \"grep: unrecognized option '--null'\" >&2\nexit 2\n", mode=0o755)
    try:
        with pytest.raises(OSError, match="GNU grep"):
            session_vm.search("x", place)
    finally:
        grep.unlink()
