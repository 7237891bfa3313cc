"""Figures of machines, for a client and in the text format of Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_vmbottle.errors import VMBottleError
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.service.shared import Shared
from pytest_vmbottle.standalone.client import Kept

if TYPE_CHECKING:
    from pytest_vmbottle.service.machines import Machines

__all__ = ["STATES", "Scrape", "exposition", "figures"]

STATES = ("provisioning", "running", "paused", "stopped", "off", "error")
_MOMENT = 0.1
"""Seconds over which the use of processors is measured for Prometheus, which computes rates of its own from counters."""
_PATIENCE = 5.0
"""Seconds after which a machine that does not answer is left out: Prometheus waits for 10 s."""
_MIB = 1 << 20
_COUNTERS = frozenset({"read_bytes", "write_bytes"})
_HELP = {
    "cpu_percent": "Processor time of the node, 100 for one processor.",
    "rss_bytes": "RAM of the node that the machine holds.",
    "threads": "Threads of the hypervisor.",
    "read_bytes": "Bytes read from storage for the machine.",
    "write_bytes": "Bytes written to storage for the machine.",
}


async def figures(kept: Kept, machines: Machines, *, seconds: float) -> dict[str, Any]:
    """Return a machine's figures, with its processor time over a number of seconds.

    Raises:
        MachineError: It is not running.
    """
    found: dict[str, Any] = await machines.long.run(partial(kept.ask, {"verb": "metrics", "seconds": seconds}))
    rss = found.get("rss_bytes")
    about = {"rss_mib": None if rss is None else round(rss / _MIB, 3), "rss_human": None if rss is None else format_size(rss)}
    return {"id": kept.name, "ts": time.time()} | found | about


class Scrape:
    """Figures of all machines, which are asked for once however many ask at the same time."""

    def __init__(self, machines: Machines) -> None:
        """Take the machines."""
        self._machines = machines
        self._text = Shared(self._ask)

    async def text(self) -> str:
        """Return the figures in Prometheus' text format, version 0.0.4."""
        return await self._text.get()

    async def _ask(self) -> str:
        found = await self._machines.all()
        running = [each["name"] for each in found if each["state"] == "running"]
        answers = await asyncio.gather(*(self._one(name) for name in running))
        return exposition(found, dict(zip(running, answers, strict=True)))

    async def _one(self, name: str) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(_PATIENCE):
                return await figures(await self._machines.kept(name), self._machines, seconds=_MOMENT)
        except (VMBottleError, OSError, TimeoutError):  # it has just ended, or its guest hangs
            return {}


def exposition(machines: Iterable[Mapping[str, Any]], figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the states of machines, and figures by their names, in Prometheus' text format."""
    found = list(machines)
    states = Counter(each["state"] for each in found)
    lines = _family("machines", "gauge", "Machines by state.", [({"state": state}, states[state]) for state in STATES])
    each_state = [({"name": each["name"], "state": state}, int(each["state"] == state)) for each in found for state in STATES]
    lines += _family("machine_state", "gauge", "1 for the state that the machine is in.", each_state)
    for figure in dict.fromkeys(name for known in figures.values() for name in known):
        values = [({"name": name}, known[figure]) for name, known in figures.items() if _is_number(known.get(figure))]
        # Times are on a clock of the node, and the rest is there in bytes.
        if values and not figure.endswith("time") and figure not in ("ts", "rss_mib"):
            counts = figure.removeprefix("guest_") in _COUNTERS
            about = _HELP.get(figure) or f"{figure.replace('_', ' ')}, as the guest's kernel tells it."
            lines += _family(f"machine_{figure}{'_total' if counts else ''}", "counter" if counts else "gauge", about, values)
    return "".join(f"{line}\n" for line in lines)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _family(name: str, kind: str, about: str, values: Iterable[tuple[Mapping[str, str], float]]) -> list[str]:
    name = f"vmbottle_{name}"
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *(f"{name}{{{_labels(labels)}}} {value}" for labels, value in values)]


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
