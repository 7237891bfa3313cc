"""Cost of a fork: pause of its machine, time to its first command, memory of its own.

In turns with a snapshot that has all of the RAM, as it is written where the quick way cannot be gone, and as it was for all snapshots once.
Only ratios within one run mean something. The exit status is 1 if a bar is missed.

    python benchmarks/fork.py --own 50 -n 11
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psutil

from pytest_vmbottle import Machine, MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.backends.qemu.instance import QemuInstance
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_root
from pytest_vmbottle.provision import Provisioner, Settings

STILL, FIRST, RESTORE, OWN = (
    "machine stands still, s",
    "call to first command, s",
    "restore of a snapshot, s",
    "memory beside own pages, MiB",
)
BARS = {STILL: 0.06, FIRST: 0.6, RESTORE: 0.4, OWN: 25.0}
WHOLE_STILL, WHOLE = "whole snapshot: machine stands still, s", "whole snapshot, s"


@contextmanager
def stills() -> Iterator[list[float]]:
    """Note how long machines stand still for what is written of them."""
    noted = list[float]()
    standing = QemuInstance._standing_still

    @contextmanager
    def timed(self: QemuInstance) -> Iterator[None]:
        began = time.perf_counter()
        with standing(self):
            yield
        noted.append(time.perf_counter() - began)

    QemuInstance._standing_still = timed  # type: ignore[method-assign]
    try:
        yield noted
    finally:
        QemuInstance._standing_still = standing  # type: ignore[method-assign]


def own_memory(machine: Machine) -> float:
    """MiB that a machine's QEMU shares with nobody."""
    return float(psutil.Process(machine.pid).memory_full_info().uss) / (1 << 20)


def measured(vm: Machine, noted: list[float], figures: dict[str, list[float]], pages: float) -> None:
    """Measure once."""
    noted.clear()
    began = time.perf_counter()
    fork = vm.fork()
    memory = own_memory(fork) - pages
    fork.exec(["true"])
    figures[FIRST].append(time.perf_counter() - began)
    figures[STILL].append(noted[-1])
    figures[OWN].append(memory)
    snapshot = vm.lifecycle.snapshot("own pages")
    began = time.perf_counter()
    fork.restore(snapshot)
    figures[RESTORE].append(time.perf_counter() - began)
    fork.lifecycle.stop()
    began = time.perf_counter()
    vm.lifecycle.snapshot("whole", whole=True)
    figures[WHOLE].append(time.perf_counter() - began)
    figures[WHOLE_STILL].append(noted[-1])


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--own", type=int, default=50, help="MiB that the machine has written")
    parser.add_argument("-n", type=int, default=11, help="rounds")
    options = parser.parse_args(arguments)
    figures: dict[str, list[float]] = {name: [] for name in (STILL, FIRST, RESTORE, OWN, WHOLE_STILL, WHOLE)}
    catalog = Catalog(default_root())
    settings = Settings(report=lambda text: print(text, flush=True))
    provisioner = Provisioner(catalog, QemuBackend(proofs=catalog.proofs), name="qemu", settings=settings)
    with closing(provisioner), stills() as noted, provisioner.machine(MachineSpec(source="debian-12")) as vm:
        vm.exec(f"head -c {options.own}M /dev/urandom > /dev/shm/own")
        written = vm.lifecycle.snapshot("first")
        pages = (written.path / "own.bin").stat().st_size / (1 << 20)
        for _ in range(options.n):
            measured(vm, noted, figures, pages)
    missed = False
    print(f"{pages:.0f} MiB of own pages; medians of {options.n}")
    for name, values in figures.items():
        bar, median = BARS.get(name), statistics.median(values)
        missed |= bar is not None and median > bar
        print(f"{name:45} {median:8.3f}{'' if bar is None else f'   at most {bar:g}'}")
    still, whole = statistics.median(figures[STILL]), statistics.median(figures[WHOLE_STILL])
    print(f"a whole snapshot has the machine stand still {whole / still:.0f} times as long")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
