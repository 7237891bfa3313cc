"""Results in KTAP, as kselftest and KUnit print them, and as a guest may."""

from __future__ import annotations

import time

import pytest

from pytest_vmbottle.machine.ktap import KernelTest, parse_ktap

KSELFTEST = """\
TAP version 13
1..2
# timeout set to 45
# selftests: net: reuse
# TAP version 13
# 1..3
# ok 1 bind # some note
# value is 5, not 6
# not ok 2 connect
# ok 3 raw # SKIP needs root
# # Totals: pass:1 fail:1 xfail:0 xpass:0 skip:1 error:0
not ok 1 selftests: net: reuse # exit=1
# selftests: net: loop
not ok 2 selftests: net: loop # TIMEOUT 45 seconds
"""
KUNIT = """\
[    0.418] KTAP version 1
[    0.418] 1..1
[    0.419][    T1]     KTAP version 1
[    0.419]     # Subtest: example
[    0.419]     1..2
[    0.420]     ok 1 adds
[    0.421]     # subtracts: EXPECTATION FAILED at lib/example.c:7
[    0.422]     not ok 2 subtracts
[    0.423] usb 1-1: new device
[    0.424] not ok 1 example
"""


def test_parts_of_a_program_of_kselftest_are_tests_and_what_they_printed_is_theirs() -> None:
    bind, connect, raw, loop = parse_ktap(KSELFTEST)
    assert (bind.name, bind.ok, bind.skipped) == ("selftests: net: reuse/bind", True, None)
    assert (connect.name, connect.ok, connect.output) == ("selftests: net: reuse/connect", False, "# value is 5, not 6")
    assert (raw.ok, raw.skipped) == (True, "needs root")
    assert (loop.name, loop.ok) == ("selftests: net: loop", False)
    assert loop.output.endswith("TIMEOUT 45 seconds")


def test_results_of_kunit_are_found_in_the_kernels_log() -> None:
    adds, subtracts = parse_ktap(KUNIT)
    assert (adds.name, adds.ok) == ("example/adds", True)
    assert (subtracts.name, subtracts.ok) == ("example/subtracts", False)
    assert "lib/example.c:7" in subtracts.output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("okay\nnot okay\nok then", [("then", True)]),
        ("ok 1 - name", [("name", True)]),
        ("ok 1", [("1", True)]),
        ("not ok 1 a # TODO later\nnot ok 2 b # XFAIL known", [("a", True), ("b", True)]),
        ("1..3\nok 1 a", [("a", True), ("all tests", False)]),
        ("1..0 # SKIP no hardware", []),
        ("  1..2\n  ok 1 x\nok 1 top", [("top/x", True), ("top", False)]),
        ("  ok 1 x\nnot ok 1 top", [("top/x", True), ("top", False)]),
        ("  not ok 1 x\nnot ok 1 top", [("top/x", False)]),
        ("    ok 1 x\n  ok 1 y\nok 1 z", [("z/y/x", True)]),
        ("ok 1 a\nBail out! no memory", [("a", True), ("Bail out!", False)]),
        ("ok 1 \x1b[31mred", [("\\x1b[31mred", True)]),
    ],
)
def test_each_result_is_told_once(text: str, expected: list[tuple[str, bool]]) -> None:
    assert [(test.name, test.ok) for test in parse_ktap(text)] == expected


def test_what_is_missing_of_a_plan_is_said() -> None:
    assert parse_ktap("1..3\nok 1 a")[-1] == KernelTest(name="all tests", ok=False, output="of 3 tests that were planned, 2 have no result")


def test_a_guest_cannot_keep_the_reader_busy() -> None:
    began = time.monotonic()
    assert parse_ktap("ok " + " " * 900_000 + "#\n" + "  " * 400_000 + "ok 1 a\n" + "# " * 400_000)
    assert len(parse_ktap("".join(f"ok {number} a\n" for number in range(50_000)))) == 50_000
    assert time.monotonic() - began < 20
