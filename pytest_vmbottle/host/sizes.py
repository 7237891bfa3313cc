"""Parsing and formatting of sizes in bytes, and of durations."""

from __future__ import annotations

import re

from pytest_vmbottle.errors import SpecError

__all__ = ["format_size", "parse_duration", "parse_size"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_size(value: int | str) -> int:
    """Parse ``"512M"``, ``"2G"``, ``"1.5GiB"`` or a number into bytes; units are powers of 1024.

    >>> parse_size("512M")
    536870912
    """
    # A bool is an int in Python, and memory=True would be one byte.
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise SpecError(f"{value!r} is not a size: write bytes or a string such as '512M' or '2G'")
    if isinstance(value, int):
        size = value
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:I?B)?\s*", value.upper())
        if match is None:
            raise SpecError(f"{value!r} is not a size: write bytes or a string such as '512M' or '2G'")
        size = int(float(match[1]) * _UNITS[match[2]])
    if size <= 0:
        raise SpecError(f"{value!r} is not a size: it must be larger than 0")
    return size


def parse_duration(text: str) -> float:
    """Parse a duration such as ``"90s"``, ``"12h"`` or ``"7d"`` into seconds.

    >>> parse_duration("1.5h")
    5400.0
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])", text.strip().lower())
    if match is None:
        raise SpecError(f"{text!r} is not a duration: write a number and s, m, h, d or w, such as '12h' or '7d'")
    return float(match[1]) * _SECONDS[match[2]]


def format_size(size: int) -> str:
    """Format a number of bytes for people.

    >>> format_size(1536 << 20)
    '1.5 GiB'
    """
    # Ten bits are a factor of 1024, and the bits of a number say how often it is in there: a logarithm without rounding.
    power = min((size.bit_length() - 1) // 10, 4) if size else 0
    amount = size / (1 << 10 * power)
    digits = 1 if power and amount < 10 else 0  # noqa: PLR2004 - two figures are enough
    return f"{amount:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
