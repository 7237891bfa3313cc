"""The page that explains an error, named once at its end."""

from __future__ import annotations

import pytest_vmbottle
from pytest_vmbottle.errors import VMBottleError

__all__ = ["advise"]

_PAGE = "https://pytest-vmbottle.github.io/pytest-vmbottle/troubleshooting/"
_PLAIN = ("CommandFailed", "CommandSucceeded")
"""Errors by which a test fails as by an assertion: what they say is a guest's, and no page knows more of it."""


def advise(error: BaseException) -> str:
    """Return where the documentation explains an error, and make it the last line of its traceback.

    Empty for an error that is none of this package, or that a test fails by as by an assertion.
    """
    if not isinstance(error, VMBottleError):
        return ""
    # Of a public class: others are derived from those, and have no heading of their own.
    name = next(each.__name__ for each in type(error).__mro__ if each.__name__ in pytest_vmbottle.__all__)
    if name in _PLAIN:
        return ""
    line = f"help: {_PAGE}#{name.lower()}"
    # pytest raises the error of a fixture that several tests share in each of them.
    if line not in getattr(error, "__notes__", ()):
        error.add_note(line)
    return line
