"""Tracebacks without the frames of this package, which explain nothing to a test's author; `--full-trace` shows them."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest_vmbottle
from pytest_vmbottle.errors import VMBottleError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = ["hide_our_frames"]

_OURS = str(Path(pytest_vmbottle.__file__).parent) + "/"
_MEANT = (VMBottleError, LookupError, OSError, TypeError, ValueError)
"""Errors that the package raises on purpose; all others, and these two kinds of LookupError, are faults of its own."""
_FAULTS = (IndexError, KeyError)
_LIBRARIES = tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def hide_our_frames(error: BaseException) -> None:
    """Remove this package's frames from an error and its causes, and causes that have no others than ours and those of libraries.

    An error that the package did not mean to raise keeps them: whoever reports it needs them.
    """
    if _is_fault(error):
        return
    # Errors can be each other's causes: a circle must not keep this going for ever.
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        is_ours = _is_raised_by_us(current)
        _unlink(current)
        cause = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
        if cause is not None and is_ours and not any(map(_is_users, _files(cause))):
            # The test's author would read of our own errors first, whose story the last one tells already.
            current.__cause__, current.__suppress_context__ = None, True
            return
        current = cause


def _is_fault(error: BaseException) -> bool:
    users = [index for index, file in enumerate(_files(error)) if _is_users(file)]
    ours = [index for index, file in enumerate(_files(error)) if file.startswith(_OURS)]
    is_from_us = bool(ours) and (not users or ours[-1] > users[-1])
    # What is no Exception, such as pytest's outcomes and Ctrl-C, came to us from elsewhere.
    return is_from_us and isinstance(error, Exception) and (not isinstance(error, _MEANT) or isinstance(error, _FAULTS))


def _files(error: BaseException) -> Iterator[str]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename
        trace = trace.tb_next


def _is_raised_by_us(error: BaseException) -> bool:
    # The innermost frame: an error that a test's own function raised is never ours, though we called it.
    *_, last = ("", *_files(error))
    return last.startswith(_OURS)


def _is_users(file: str) -> bool:
    # "<" is code without a file, such as what attrs generates.
    return not file.startswith((_OURS, "<", *_LIBRARIES))


def _unlink(error: BaseException) -> None:
    """Take our frames out of the linked list, but never all of them."""
    first = _after_ours(error.__traceback__)
    if first is None:
        return
    # The first entry belongs to whoever caught the error, and pytest has a reference to it.
    error.__traceback__ = first
    each: TracebackType | None = first
    while each is not None:
        each.tb_next = _after_ours(each.tb_next)
        each = each.tb_next


def _after_ours(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OURS):
        trace = trace.tb_next
    return trace
