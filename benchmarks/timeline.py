"""Cost of a machine's timeline: commands with and without it, in turns, and the memory that it takes.

python benchmarks/timeline.py --catalog ~/.cache/pytest-vmbottle -n 300
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from pathlib import Path

from pytest_vmbottle import Machine, MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_root
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.timeline import Timeline

MOST_PERCENT, MOST_BYTES = 3.0, 1 << 19
AT_ONCE = 5
"""Commands of one measurement."""


def seconds(machine: Machine) -> float:
    """Return how long a few commands take."""
    began = time.perf_counter()
    for _ in range(AT_ONCE):
        machine.exec(["true"])
    return (time.perf_counter() - began) / AT_ONCE


def measure(machine: Machine, number: int) -> tuple[float, float]:
    """Return the medians without and with a timeline, taken in turns."""
    timelines = {"without": Timeline(None), "with": machine.lifecycle.timeline}
    taken: dict[str, list[float]] = {"without": [], "with": []}
    for turn in range(2 * number):
        # The order changes from pair to pair: what comes first may find another state of the guest.
        name = ("with", "without")[(turn + turn // 2) % 2]
        machine.lifecycle.timeline = timelines[name]
        taken[name].append(seconds(machine))
    machine.lifecycle.timeline = timelines["with"]
    return statistics.median(taken["without"]), statistics.median(taken["with"])


def main() -> None:
    """Print both figures, beside what they may be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--catalog", type=Path, default=default_root())
    parser.add_argument("-n", type=int, default=300, metavar="PAIRS")
    given = parser.parse_args()
    catalog = Catalog(given.catalog)
    provisioner = Provisioner(catalog, QemuBackend(proofs=catalog.proofs), name="qemu", settings=Settings(report=print))
    try:
        tracemalloc.start()
        with provisioner.machine(MachineSpec(source="debian-12")) as machine:
            seconds(machine)
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(200):
                machine.lifecycle.timeline.note("note", text="x" * 4096)
            size = tracemalloc.get_traced_memory()[0] - before
            tracemalloc.stop()
            without, recorded = measure(machine, given.n)
    finally:
        provisioner.close()
        catalog.close()
    percent = 100 * (recorded / without - 1)
    print(f"exec true: {1000 * without:.2f} ms without, {1000 * recorded:.2f} ms with: {percent:+.1f} % (at most {MOST_PERCENT:.0f} %)")
    print(f"memory of 200 events of 4 KiB: {size / 1024:.0f} KiB (at most {MOST_BYTES >> 10} KiB)")


if __name__ == "__main__":
    main()
