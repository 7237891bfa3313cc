"""What the records of a guest say afterwards: whom its OOM killer ended, and which of its units came to grief."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import attrs

from pytest_vmbottle.result import printable

__all__ = ["JOURNALS", "KILLS", "UNITS", "Unit", "killed", "shortened", "troubled"]

KILLS = r"dmesg | grep -a 'Killed process [0-9]' | tail -n 20; cat /proc/uptime"
"""Asks for the last whom the OOM killer ended, and how late it is."""
_KILL = re.compile(r"\[ *([0-9]+\.[0-9]+)\] .*Killed process ([0-9]+)\b[^(]*\((.{1,32}?)\)")
_SLACK = 2.0
"""Seconds by which two clocks may differ."""
_SHOWN = "Id,ActiveState,SubState,Result,NRestarts,StateChangeTimestampMonotonic"
# Only of those that run or came to grief: to show all of them takes a guest without KVM ten seconds.
UNITS = f"""
cat /proc/uptime
systemctl list-units --all --plain --no-legend --no-pager --state=running,activating,failed '*.service' '*.socket' '*.mount' |
  while read -r unit rest; do echo "$unit"; done | xargs -r systemctl show -p {_SHOWN}
"""
"""Asks how late it is, and for the state of the units that run, begin or have failed."""
JOURNALS = 'for unit in "$@"; do echo "-- $unit:"; journalctl --no-pager -q -o cat -n 5 -u "$unit"; done'
"""Asks for the last lines of the journals of units."""
_MOST_UNITS = 5
_MOST_LINES = 40
_MOST_CHARACTERS = 200


def killed(said: str, seconds: float) -> list[str]:
    """The processes that the OOM killer has ended in the last seconds, as an answer to `KILLS` tells."""
    *lines, uptime = said.splitlines() or [""]
    since = _number(uptime) - seconds - _SLACK
    found = [match for line in lines if (match := _KILL.match(line)) and _number(match[1]) >= since]
    return [f"{match[2]} ({printable(match[3])})" for match in found[-_MOST_UNITS:]]


@attrs.frozen
class Unit:
    """A unit of systemd's, by its properties."""

    properties: Mapping[str, str]

    @property
    def name(self) -> str:
        """What systemd calls it."""
        return self.properties.get("Id", "")

    @property
    def changed(self) -> float:
        """When its state did, in seconds since the boot."""
        return _number(self.properties.get("StateChangeTimestampMonotonic", "")) / 1e6

    @property
    def is_troubled(self) -> bool:
        """Whether it failed, or was restarted because it did."""
        is_restarted = self.properties.get("NRestarts", "0") not in ("", "0") or self.properties.get("SubState") == "auto-restart"
        return self.properties.get("ActiveState") == "failed" or is_restarted

    def __str__(self) -> str:
        """It and its state, control characters neutralised."""
        restarts = self.properties.get("NRestarts", "")
        state = f"{self.properties.get('ActiveState')} ({self.properties.get('SubState')}, result {self.properties.get('Result')})"
        return printable(f"{self.name} is {state}" + (f", restarted {restarts} times" if restarts not in ("", "0") else ""))


def troubled(said: str, seconds: float) -> list[Unit]:
    """The units that failed or were restarted in the last seconds, as an answer to `UNITS` tells."""
    uptime, _, rest = said.partition("\n")
    since = _number(uptime) - seconds - _SLACK
    found = [unit for unit in _units(rest) if unit.name and unit.is_troubled and unit.changed >= since]
    return sorted(found, key=lambda unit: unit.changed)[-_MOST_UNITS:]


def _units(shown: str) -> Iterator[Unit]:
    for block in shown.split("\n\n"):
        yield Unit({name: value for name, _, value in (line.partition("=") for line in block.splitlines())})


def shortened(text: str) -> str:
    """The last lines of a text, each of them cut to a length, control characters neutralised."""
    return "\n".join(printable(line[:_MOST_CHARACTERS]) for line in text.splitlines()[-_MOST_LINES:])


def _number(text: str) -> float:
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    return float(first) if re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,9})?", first) else 0.0
