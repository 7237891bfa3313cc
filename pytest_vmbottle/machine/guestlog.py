"""OOM kills and unit failures, read from the guest's logs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import attrs

from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.result import printable

__all__ = ["JOURNALS", "KILLS", "UNITS", "Unit", "killed", "shortened", "troubled"]

# The uptime comes last, on a line of its own: times in the kernel's log count from the boot too, so the guest's wall clock does not matter.
KILLS = r"dmesg | grep -a 'Killed process [0-9]' | tail -n 20; cat /proc/uptime"
"""Lists the last kills of the OOM killer, and the uptime."""
# Some kernels write the user between the number and the name.
_KILL = re.compile(r"\[ *([0-9]+\.[0-9]+)\] .*Killed process ([0-9]+)\b[^(]*\((.{1,32}?)\)")
_SLACK = 2.0
"""Seconds by which two clocks may differ."""
UNITS = read_script(__package__, "units.sh")
"""Prints the uptime, and the state of the units that are running, activating or failed."""
# The names of units are words and never part of the text: they come from the guest.
JOURNALS = 'for unit in "$@"; do echo "-- $unit:"; journalctl --no-pager -q -o cat -n 5 -u "$unit"; done'
"""Prints the last lines of the journals of units."""
# For people who read an error: a guest that is broken may have a hundred failed units.
_MOST_UNITS = 5
_MOST_LINES = 40
_MOST_CHARACTERS = 200


def killed(said: str, seconds: float) -> list[str]:
    """Return the processes that the OOM killer ended in the last `seconds`, from the output of `KILLS`."""
    # The answer of a guest without dmesg, or of a hostile one: whatever does not match is left out.
    *lines, uptime = said.splitlines() or [""]
    since = _number(uptime) - seconds - _SLACK
    found = [match for line in lines if (match := _KILL.match(line)) and _number(match[1]) >= since]
    return [f"{match[2]} ({printable(match[3])})" for match in found[-_MOST_UNITS:]]


@attrs.frozen
class Unit:
    """A systemd unit, by its properties."""

    properties: Mapping[str, str]

    @property
    def name(self) -> str:
        """Return the unit's name."""
        return self.properties.get("Id", "")

    @property
    def changed(self) -> float:
        """Return when its state changed, in seconds since the boot."""
        return _number(self.properties.get("StateChangeTimestampMonotonic", "")) / 1e6

    @property
    def is_troubled(self) -> bool:
        """Tell whether the unit failed, or was restarted because it failed."""
        # A service with `Restart=` is active or activating again by now, so its state alone would hide that it keeps failing.
        is_restarted = self.properties.get("NRestarts", "0") not in ("", "0") or self.properties.get("SubState") == "auto-restart"
        return self.properties.get("ActiveState") == "failed" or is_restarted

    def __str__(self) -> str:
        """Return name and state, with control characters neutralised."""
        restarts = self.properties.get("NRestarts", "")
        state = f"{self.properties.get('ActiveState')} ({self.properties.get('SubState')}, result {self.properties.get('Result')})"
        return printable(
            f"{self.name} is {state}"
            + (f", restarted {restarts} {'time' if restarts == '1' else 'times'}" if restarts not in ("", "0") else "")
        )


def troubled(said: str, seconds: float) -> list[Unit]:
    """Return the units that failed or were restarted in the last `seconds`, from the output of `UNITS`."""
    uptime, _, rest = said.partition("\n")
    since = _number(uptime) - seconds - _SLACK
    found = [unit for unit in _units(rest) if unit.name and unit.is_troubled and unit.changed >= since]
    return sorted(found, key=lambda unit: unit.changed)[-_MOST_UNITS:]


def _units(shown: str) -> Iterator[Unit]:
    # `systemctl show` puts an empty line between units.
    for block in shown.split("\n\n"):
        yield Unit({name: value for name, _, value in (line.partition("=") for line in block.splitlines())})


def shortened(text: str) -> str:
    """Return the last lines of a text, each shortened, with control characters neutralised."""
    return "\n".join(printable(line[:_MOST_CHARACTERS]) for line in text.splitlines()[-_MOST_LINES:])


def _number(text: str) -> float:
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    # The digits are bounded: `float` of a guest's text could be infinite, which no comparison survives.
    return float(first) if re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,9})?", first) else 0.0
