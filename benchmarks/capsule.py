"""Cost of a capsule: time to save one at a failure, and from `vmbottle replay` to the first command in it.

In turns with `vmbottle machine run`, which starts a clone of the same pack in the same way: the ratio says what a replay takes beyond that.
Only ratios within one run mean something. The exit status is 1 if a bar is missed.

    python benchmarks/capsule.py --own 50 -n 11
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import closing

from pytest_vmbottle import Machine, MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_root
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.standalone.capsules import Capsule
from pytest_vmbottle.standalone.stored import Stored

SAVED, REPLAYED, RUN, EXPORTED = (
    "failure to capsule, s",
    "`replay` with one command, s",
    "`machine run` with one command, s",
    "file of `capsule export`, MiB",
)
BARS = {SAVED: 2.0, REPLAYED: 1.5}
MOST = 2.0
"""Most times that a replay takes as long as a new clone."""


def timed(catalog: Catalog, *words: str) -> float:
    """Return the seconds that a command takes."""
    argv = [sys.executable, "-m", "pytest_vmbottle", "--catalog", str(catalog.root), *words]
    began = time.perf_counter()
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return time.perf_counter() - began


def saved(vm: Machine, provisioner: Provisioner, catalog: Catalog) -> Capsule:
    """Save a machine as a failed test's machine is saved."""
    stored = Stored.of(vm.snapshot("failed"), provisioner.origin(vm.spec), "failed")
    machines = {"vm": (stored, provisioner.fingerprint(vm.spec))}
    return Capsule.save(catalog.root, machines, test="benchmark.py::capsule", error="")


def measured(vm: Machine, provisioner: Provisioner, catalog: Catalog, figures: dict[str, list[float]]) -> None:
    """Measure once."""
    began = time.perf_counter()
    capsule = saved(vm, provisioner, catalog)
    figures[SAVED].append(time.perf_counter() - began)
    file = catalog.root / "benchmark.vmcapsule"
    try:
        figures[REPLAYED].append(timed(catalog, "replay", capsule.name, "--exec", "true"))
        figures[RUN].append(timed(catalog, "machine", "run", str(vm.spec.image), "true"))
        timed(catalog, "capsule", "export", capsule.name, "-o", str(file))
        figures[EXPORTED].append(file.stat().st_size / (1 << 20))
    finally:
        file.unlink(missing_ok=True)
        capsule.remove()


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--own", type=int, default=50, help="MiB that the machine has written")
    parser.add_argument("-n", type=int, default=11, help="rounds")
    options = parser.parse_args(arguments)
    figures: dict[str, list[float]] = {name: [] for name in (SAVED, REPLAYED, RUN, EXPORTED)}
    settings = Settings(report=lambda text: print(text, flush=True))
    with closing(Catalog(default_root())) as catalog:
        provisioner = Provisioner(catalog, QemuBackend(proofs=catalog.proofs), name="qemu", settings=settings)
        with closing(provisioner), provisioner.machine(MachineSpec(source="debian-12")) as vm:
            vm.exec(f"head -c {options.own}M /dev/urandom > /dev/shm/own")
            for _ in range(options.n):
                measured(vm, provisioner, catalog, figures)
    missed = False
    print(f"{options.own} MiB written; medians of {options.n}")
    for name, values in figures.items():
        bar, median = BARS.get(name), statistics.median(values)
        missed |= bar is not None and median > bar
        print(f"{name:45} {median:8.3f}{'' if bar is None else f'   at most {bar:g}'}")
    ratio = statistics.median(figures[REPLAYED]) / statistics.median(figures[RUN])
    print(f"a replay takes {ratio:.2f} times as long as a new clone, at most {MOST:g}")
    return int(missed or ratio > MOST)


if __name__ == "__main__":
    sys.exit(main())
