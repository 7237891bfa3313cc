"""Certainty of instruction counts: `python benchmarks/instructions.py [ROUNDS]`, on a computer that is as busy as you like.

Equal work is measured again and again, each time as `vm_benchmark` does it, in clones that come and go; then the same work with half a
percent more. Prints the spread, how often equal work was taken for more, and how often more work was noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from statistics import median_low

from pytest_vmbottle import Machine, MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_root
from pytest_vmbottle.provision import Provisioner, Settings

WORK = "import sys; print(sum(number * number % 7 for number in range(int(sys.argv[1]))))"
AMOUNT, MORE = 200_000, 1.005
LIMIT = 0.25
PER_CLONE = 5


def counts(provisioner: Provisioner, rounds: int, amount: int) -> Iterator[int]:
    """Measure a work, a few times in each clone."""
    spec = MachineSpec(source="debian-12", cpu_clock="instructions")
    while rounds > 0:
        with provisioner.machine(spec) as vm:
            counted(vm, amount)
            for _ in range(min(PER_CLONE, rounds)):
                yield median_low([counted(vm, amount) for _ in range(3)])
        rounds -= PER_CLONE


def counted(vm: Machine, amount: int) -> int:
    """Count the instructions of a work, once."""
    with vm.count_instructions() as count:
        vm.exec(["python3", "-S", "-c", WORK, str(amount)], env={"PYTHONHASHSEED": "0"})
    return count.total


def main(rounds: int) -> None:
    """Measure, and print."""
    catalog = Catalog(default_root())
    settings = Settings(report=lambda text: print(text, flush=True))
    provisioner = Provisioner(catalog, QemuBackend(proofs=catalog.root), name="qemu", settings=settings)
    baseline, *equal = counts(provisioner, rounds + 1, AMOUNT)
    least = counted_start(provisioner)
    more = list(counts(provisioner, max(1, rounds // 5), AMOUNT + round(AMOUNT * (MORE - 1) * baseline / (baseline - least))))
    bar = baseline * (1 + LIMIT / 100)
    print(f"equal work: {min(equal):,} to {max(equal):,} instructions, a spread of {(max(equal) - min(equal)) / min(equal):.3%}")
    print(f"equal work above {LIMIT} %: {sum(count > bar for count in equal)} of {len(equal)}")
    noticed = sum(count > bar for count in more)
    print(f"more work, by {min(more) / baseline - 1:.2%} at least, above {LIMIT} %: {noticed} of {len(more)}")


def counted_start(provisioner: Provisioner) -> int:
    """Count what the program takes without its work."""
    return next(counts(provisioner, 1, 0))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
