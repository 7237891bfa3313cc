"""CPU time that the command `vmbottle` takes to start, with what it loads: `python benchmarks/startup.py [--runs N]`.

Times are CPU time of the process, user and system, the least of all runs: other work on the computer adds to it, nothing takes from it.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile

CALLS: dict[str, tuple[str, ...]] = {
    "python": ("-c", "pass"),
    "import click": ("-c", "import click"),
    "import attrs": ("-c", "import attrs"),
    "import pytest_vmbottle": ("-c", "import pytest_vmbottle"),
    "vmbottle --help": ("-m", "pytest_vmbottle", "--help"),
    "vmbottle machine --help": ("-m", "pytest_vmbottle", "machine", "--help"),
    "vmbottle machine ls": ("-m", "pytest_vmbottle", "machine", "ls"),
    "vmbottle machine exec": ("-m", "pytest_vmbottle", "machine", "exec", "nosuch", "true"),
    "vmbottle machine start --help": ("-m", "pytest_vmbottle", "machine", "start", "--help"),
    "vmbottle pack ls": ("-m", "pytest_vmbottle", "pack", "ls"),
    "vmbottle image ls": ("-m", "pytest_vmbottle", "image", "ls"),
}


def cpu_seconds(argv: tuple[str, ...], environment: dict[str, str]) -> float:
    """The CPU time of one run."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    subprocess.run([sys.executable, "-P", *argv], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return used() - before


def slowest_imports(argv: tuple[str, ...], environment: dict[str, str], count: int) -> list[str]:
    """The modules whose own code takes longest when a call imports them."""
    ended = subprocess.run([sys.executable, "-P", "-X", "importtime", *argv], env=environment, capture_output=True, text=True, check=False)
    rows = [line.removeprefix("import time:").split("|") for line in ended.stderr.splitlines() if line.startswith("import time:")]
    times = sorted(((int(own), name.strip()) for own, _, name in rows if own.strip().isdecimal()), reverse=True)
    return [f"{name} {own / 1000:.1f} ms" for own, name in times[:count]]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=9)
    options.add_argument("--imports", type=int, default=0, metavar="N", help="also show the N slowest imports of each call")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "VMBOTTLE_CATALOG": f"{folder}/catalog"}
        for name, argv in CALLS.items():
            print(f"{name:32} {min(cpu_seconds(argv, environment) for _ in range(given.runs)) * 1000:6.0f} ms")
            for line in slowest_imports(argv, environment, given.imports):
                print(f"{'':8}{line}")


if __name__ == "__main__":
    main()
