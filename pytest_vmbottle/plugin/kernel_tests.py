"""The kernel's own tests as subtests of a test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pytest_vmbottle.machine.ktap import KernelTest
    from pytest_vmbottle.result import Result

__all__ = ["KernelTests", "Subtests"]


class Subtests(Protocol):
    """The fixture `subtests` of pytest 9, or of pytest-subtests."""

    def test(self, msg: str | None = None) -> AbstractContextManager[object]:
        """Begin a subtest."""


class KernelTests:
    """Type of the fixture `vm_kernel_tests`: called with what tests of a kernel printed, it reports each of them."""

    def __init__(self, subtests: Subtests | None) -> None:
        """Take pytest's subtests, if it has them."""
        self._subtests = subtests

    def __call__(self, printed: str | Result) -> list[KernelTest]:
        """Report the results in KTAP, and return them.

        Each test is a subtest, which fails, is skipped or passes. Where pytest has no subtests, the test fails with the names of all that
        failed.

        Args:
            printed: The text, or the result of the command that printed it.

        Raises:
            AssertionError: There is not a single result, or without subtests, some failed.
        """
        from pytest_vmbottle.machine.ktap import parse_ktap

        __tracebackhide__ = True
        text = printed if isinstance(printed, str) else printed.stdout
        found = parse_ktap(text)
        if not found:
            raise AssertionError(f"there is no result in KTAP in what was printed; its last lines are\n{text[-1000:]}")
        if self._subtests is not None:
            for test in found:
                with self._subtests.test(msg=test.name):
                    _judge(test)
        elif failed := [test for test in found if not test.ok]:
            names = "\n".join(f"not ok {test.name}" for test in failed)
            raise AssertionError(f"{len(failed)} of {len(found)} tests of the kernel failed:\n{names}\n{failed[0].output}")
        return found


def _judge(test: KernelTest) -> None:
    __tracebackhide__ = True
    if test.skipped is not None:
        pytest.skip(test.skipped)
    if not test.ok:
        pytest.fail(f"not ok {test.name}\n{test.output}".rstrip(), pytrace=False)
