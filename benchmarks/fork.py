"""Cost of a fork: pause of its machine, time to its first command, memory of its own.

In turns with a snapshot that has all of the RAM, as it is written where the quick way cannot be gone, and as it was for all snapshots once.
Then forks of forks, each of the one before: neither time nor memory may grow with their depth. Only ratios within one run mean something.
The exit status is 1 if a bar is missed.

    python benchmarks/fork.py --own 50 -n 11 --depth 10 --chains 3
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import attrs
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
RAM, CODE, KERNEL, DATA, LIBRARIES = PARTS = (
    "  of the guest's RAM, MiB",
    "  code translated for the emulation, MiB",
    "  the guest's kernel, MiB",
    "  QEMU's own data, MiB",
    "  what its libraries have of it alone, MiB",
)
FLAT = 1.15
"""What the deepest fork of a chain may cost, over the first one."""
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


def parts(machine: Machine) -> dict[str, float]:
    """MiB that a machine's QEMU shares with nobody, by what they are."""
    found, kernel = dict.fromkeys(PARTS, 0.0), machine.lifecycle.boot_source.kernel
    for area in psutil.Process(machine.pid).memory_maps(grouped=False):
        if area.path.endswith("/ram.img"):
            name = RAM
        elif "x" in area.perms and area.path.startswith("[anon"):
            name = CODE
        else:
            name = DATA if area.path.startswith("[") else LIBRARIES
        found[name] += (area.private_dirty + area.private_clean) / (1 << 20)
    # QEMU reads it into its own memory, for the next boot.
    found[KERNEL] = kernel.stat().st_size / (1 << 20) if kernel is not None else 0.0
    found[DATA] -= found[KERNEL]
    return found


def measured(vm: Machine, noted: list[float], figures: dict[str, list[float]], pages: float) -> None:
    """Measure once."""
    noted.clear()
    began = time.perf_counter()
    fork = vm.fork()
    memory = own_memory(fork) - pages
    for name, value in parts(fork).items():
        figures[name].append(value)
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


@attrs.frozen(kw_only=True)
class Depth:
    """What a fork costs whose machine is a fork of a fork, and so on.

    Attributes:
        first: Seconds from the call to the end of its first command.
        memory: MiB that its QEMU shares with nobody.
        pages: MiB that were written of its machine.
        files: Files that its root disk consists of.
    """

    first: float
    memory: float
    pages: float
    files: int


def descend(vm: Machine, depth: int) -> list[Depth]:
    """Fork a machine, then the fork, and so on; each writes something before it is forked."""
    found, machine = list[Depth](), vm
    for number in range(depth):
        machine.exec(f"echo {number} >> /root/depth; echo {number} >> /dev/shm/depth; sync")
        began = time.perf_counter()
        machine = machine.fork()
        machine.exec(["true"])
        first, source = time.perf_counter() - began, machine.lifecycle.boot_source
        assert source.saved is not None
        pages = (source.saved / "own.bin").stat().st_size / (1 << 20)
        found.append(Depth(first=first, memory=own_memory(machine), pages=pages, files=len(source.disks) + 1))
    return found


def grown(chains: list[list[Depth]], growth: Callable[[Depth], float]) -> float:
    """The median of a figure at the greatest depth, over its median at the first."""
    first, *_, last = zip(*chains, strict=True)
    return statistics.median(map(growth, last)) / statistics.median(map(growth, first))


def flat(chains: list[list[Depth]]) -> bool:
    """Print what forks cost by their depth, and tell whether that does not grow."""
    print(f"\n{'depth':>5} {'first command, s':>18} {'own memory, MiB':>17} {'own pages, MiB':>16} {'files of the disk':>19}")
    for depth, figures in enumerate(zip(*chains, strict=True), 1):
        first, memory, pages, files = (
            statistics.median(getattr(each, name) for each in figures) for name in ("first", "memory", "pages", "files")
        )
        if depth in {1, 5, len(chains[0])}:
            print(f"{depth:5} {first:18.3f} {memory:17.1f} {pages:16.1f} {files:19.0f}")
    time_grown, memory_grown = grown(chains, lambda each: each.first), grown(chains, lambda each: each.memory)
    print(f"the deepest takes {time_grown:.2f} times the first's time, and {memory_grown:.2f} times its memory   at most {FLAT:g}")
    return max(time_grown, memory_grown) <= FLAT


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--own", type=int, default=50, help="MiB that the machine has written")
    parser.add_argument("-n", type=int, default=11, help="rounds")
    parser.add_argument("--depth", type=int, default=10, help="how deep forks of forks go")
    parser.add_argument("--chains", type=int, default=3, help="how often that is measured")
    parser.add_argument("--catalog", type=Path, default=None, help="where packs are (default: the usual place)")
    options = parser.parse_args(arguments)
    figures: dict[str, list[float]] = {name: [] for name in (STILL, FIRST, RESTORE, OWN, *PARTS, WHOLE_STILL, WHOLE)}
    catalog = Catalog(options.catalog or default_root())
    settings = Settings(report=lambda text: print(text, flush=True))
    provisioner = Provisioner(catalog, QemuBackend(proofs=catalog.proofs), name="qemu", settings=settings)
    with closing(provisioner), stills() as noted, provisioner.machine(MachineSpec(source="debian-12")) as vm:
        vm.exec(f"head -c {options.own}M /dev/urandom > /dev/shm/own")
        written = vm.lifecycle.snapshot("first")
        pages = (written.path / "own.bin").stat().st_size / (1 << 20)
        for _ in range(options.n):
            measured(vm, noted, figures, pages)
        chains = list[list[Depth]]()
        for _ in range(options.chains):
            first = vm.fork()
            chains.append(descend(first, options.depth))
            first.discard()
    missed = not flat(chains)
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
