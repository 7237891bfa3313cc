"""Time of `vmbottle machine exec NAME true`, beside `vm.exec(["true"])` in the same machine and the start of Python, in turns.

python benchmarks/machine_exec.py --catalog ~/.cache/pytest-vmbottle -n 100
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_vmbottle import Machine, MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_root
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.standalone.client import Kept
from pytest_vmbottle.standalone.daemon import Daemon
from pytest_vmbottle.standalone.line import listen
from pytest_vmbottle.standalone.record import RUNNING, Record

MOST = 1.3
"""The command takes at most so many times as long as the fixture, besides the start of Python."""
NAME = f"bench{os.getpid()}"


@contextmanager
def served(catalog: Catalog) -> Iterator[Machine]:
    """A machine that answers this process and, as one of `vmbottle machine`, others too."""
    provisioner = Provisioner(catalog, QemuBackend(proofs=catalog.proofs), name="qemu", settings=Settings(report=print))
    place, spec = Kept(catalog.root / "machines" / NAME), MachineSpec(source="debian-12")
    try:
        with provisioner.machine(spec) as machine, place.claimed(again=False) as hold, listen(hold) as server:
            Daemon(machine, place, Record(name=NAME, source="debian-12", state=RUNNING), provisioner.origin(spec)).listen(server)
            yield machine
    finally:
        provisioner.close()
        place.discard()


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def python(*words: str, catalog: Path | None = None, stdin: int = subprocess.DEVNULL) -> None:
    environment = os.environ | ({"VMBOTTLE_CATALOG": str(catalog)} if catalog else {})
    subprocess.run([sys.executable, "-P", *words], env=environment, stdin=stdin, stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    """Print the medians, and the time of the command beside what it may take."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--catalog", type=Path, default=default_root())
    parser.add_argument("-n", type=int, default=100, metavar="TURNS")
    given = parser.parse_args()
    catalog, command = Catalog(given.catalog), ("-m", "pytest_vmbottle", "machine", "exec", NAME, "true")
    reader, writer = os.pipe()
    try:
        with served(catalog) as machine:
            works: dict[str, Callable[[], object]] = {
                "the start of Python": lambda: python("-c", "pass"),
                "vmbottle machine exec --help": lambda: python("-m", "pytest_vmbottle", "machine", "exec", "--help"),
                'vm.exec(["true"])': lambda: machine.exec(["true"]),
                "vmbottle machine exec": lambda: python(*command, catalog=given.catalog),
                "the same, with a pipe as its input": lambda: python(*command, catalog=given.catalog, stdin=reader),
            }
            works["vmbottle machine exec"]()
            machine.lifecycle.bulk_channel(Deadline(120))  # the login that the daemon has begun
            taken: dict[str, list[float]] = {name: [] for name in works}
            for turn in range(given.n):
                # The order changes from turn to turn: what comes first may find another state of the guest.
                for name in list(works)[:: 1 if turn % 2 else -1]:
                    taken[name].append(milliseconds(works[name]))
    finally:
        catalog.close()
        os.close(reader)
        os.close(writer)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    for name, median in medians.items():
        print(f"{name:36} {median:7.1f} ms")
    most = medians["the start of Python"] + MOST * medians['vm.exec(["true"])']
    print(f"the command may take at most {most:.1f} ms: the start of Python, and {MOST} times the fixture's")


if __name__ == "__main__":
    main()
