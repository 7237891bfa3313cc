"""The kernel's own tests as subtests, and where pytest has none."""

from __future__ import annotations

import pytest

TESTS = """
KTAP = "KTAP version 1\\n1..3\\nok 1 fine\\n# value is 5\\nnot ok 2 wrong\\nok 3 other # SKIP no root\\n"

def test_it(vm_kernel_tests):
    found = vm_kernel_tests(KTAP)
    assert [test.name for test in found] == ["fine", "wrong", "other"]

def test_nothing(vm_kernel_tests):
    vm_kernel_tests("Segmentation fault")
"""
HAS_SUBTESTS = hasattr(pytest, "Subtests")


@pytest.mark.skipif(not HAS_SUBTESTS, reason="subtests are of pytest 9")
def test_each_is_a_subtest_with_its_output(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-rA")
    said = result.stdout.str()
    assert "value is 5" in said
    assert "no root" in said
    assert "Segmentation fault" in said
    result.stdout.fnmatch_lines(["*SUBFAILED*wrong*", "*test_nothing*"])
    assert result.ret == 1


def test_without_subtests_the_test_fails_with_all_names(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-p", "no:subtests", "-p", "no:pytest_subtests")
    result.stdout.fnmatch_lines(["*1 of 3 tests of the kernel failed:*", "*not ok wrong", "*value is 5*"])
    result.assert_outcomes(failed=2)
