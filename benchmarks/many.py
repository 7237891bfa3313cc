"""How many machines of one pack there can be at once: whether each is its own, how quickly they come, and what one takes of the memory.

All are asked for at the same moment. Each is told apart by a file of its own, on the disk and in RAM, that is read again when all of them
run; no two may have the same random bytes. Memory is what is theirs alone and their part of what they share
(the kernel's PSS): what none of them has written since it was poured is there once for all of them.

    python benchmarks/many.py --catalog ~/.cache/pytest-vmbottle -n 16
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import psutil

from pytest_vmbottle import Machine, MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_root
from pytest_vmbottle.provision import Provisioner, Settings

MINE = "/root/mine", "/dev/shm/mine"


def pour(provisioner: Provisioner, spec: MachineSpec, stack: ExitStack) -> tuple[Machine, float]:
    """A machine, and when it had run its first command."""
    machine = stack.enter_context(provisioner.machine(spec))
    for path in MINE:
        machine.exec(f"echo {machine.id} > {path}")
    return machine, time.perf_counter()


def is_right(machine: Machine) -> bool:
    """Whether it still has what was written to it alone."""
    return machine.exec(["cat", *MINE]).stdout.split() == [machine.id] * len(MINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", type=Path, default=None, help="where packs are (default: the usual place)")
    parser.add_argument("--image", default="debian-12")
    parser.add_argument("--memory", default="512M", help="of each machine")
    parser.add_argument("-n", type=int, default=16, help="machines")
    asked = parser.parse_args()
    spec = MachineSpec.resolve(asked.image, {"memory": asked.memory})
    catalog = Catalog(asked.catalog or default_root())
    backend = QemuBackend(proofs=catalog.proofs)
    report = Settings(report=lambda line: print(line, file=sys.stderr), memory_budget=asked.n * spec.memory)
    with closing(Provisioner(catalog, backend, name="qemu", settings=report)) as provisioner, ExitStack() as stack:
        provisioner.pack(spec)
        began = time.perf_counter()
        with ThreadPoolExecutor(asked.n) as pool:
            poured = list(pool.map(lambda _: pour(provisioner, spec, stack), range(asked.n)))
            right = sum(pool.map(is_right, [machine for machine, _ in poured]))
            random = set(pool.map(lambda each: each[0].exec("head -c 16 /dev/urandom | od -An -tx1").stdout, poured))
        seconds = max(at for _, at in poured) - began
        memory = sum(psutil.Process(machine.pid).memory_full_info().pss for machine, _ in poured)
    print(f"{asked.n} machines at once: {right} right, {len(random)} with random bytes of their own")
    print(f"{seconds:.2f} s until all had run commands: {asked.n / seconds:.1f} machines per second")
    print(f"{memory / asked.n / 2**20:.0f} MiB each, of {spec.memory >> 20} MiB that each has")
    sys.exit(0 if right == len(random) == asked.n else 1)


if __name__ == "__main__":
    main()
