"""The question to a guest about itself after a failure: its journal, which has everything and costs one command."""

from __future__ import annotations

import datetime as dt
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_vmbottle.host.deadline import Deadline
    from pytest_vmbottle.machine.machine import Machine

__all__ = ["journal", "troubles_in"]

# Units in place of programs: a unit that failed is found by what systemd says of it, and its own words by its name.
_JOURNAL = ("journalctl", "--no-pager", "--quiet", "--boot", "--utc", "--output=with-unit", "--lines=20000")
# systemd's own messages about a unit come from `init.scope`, in which it runs; the unit's name is the first word there.
_ENTRY = re.compile(r"\S+ (?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC \S+ (?P<unit>[^\s\[]+)\[\d+\]: (?P<text>.*)")
_TROUBLE = re.compile(r"(?P<unit>\S+): (?:Failed with result |Scheduled restart job)")
_UNITS, _LINES = 5, 6
"""Most units, and most lines of each."""
_SLACK = 2.0
"""Seconds by which two clocks may differ."""


def journal(machine: Machine, *, deadline: Deadline) -> str:
    """Return the journal of this boot, with units and in UTC; empty if the guest has none.

    Raises:
        MachineError: The guest is gone.
        CommandTimeout: It did not answer in time.
    """
    guest = machine.guest
    return guest.run(_JOURNAL, guest.command(_JOURNAL, user="root"), deadline).stdout


def troubles_in(journal: str, *, since: float) -> list[str]:
    """Return the last messages of the units that failed or were restarted since a time, as a journal tells it."""
    # As text, because times of this format sort like numbers, and thousands of lines are compared.
    begin = dt.datetime.fromtimestamp(max(0.0, since - _SLACK), dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
    entries = [entry for line in journal.splitlines() if (entry := _ENTRY.match(line)) and entry["time"] >= begin]
    units = dict.fromkeys(found["unit"] for entry in entries if entry["unit"] == "init.scope" and (found := _TROUBLE.match(entry["text"])))
    lines = []
    for unit in list(units)[-_UNITS:]:
        said = [entry["text"] for entry in entries if entry["unit"] == unit or entry["text"].startswith(f"{unit}: ")]
        lines += [f"{unit}:", *(f"  {text}" for text in said[-_LINES:])]
    return lines
