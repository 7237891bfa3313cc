"""Time of the verbs of `GuestPath`, beside `vm.exec(["true"])` in the same machine, in turns: only the ratios mean something.

python benchmarks/paths.py --catalog ~/.cache/pytest-vmbottle -n 30
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

from pytest_vmbottle import Machine, MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_root
from pytest_vmbottle.provision import Provisioner, Settings

MOST = 1.2
"""A verb takes at most so many times as long as the command; with much data it has no bar."""
TRUE = 'exec ["true"]'


def verbs(machine: Machine) -> dict[str, Callable[[], object]]:
    """Each leaves things as they were, so that it can be done again."""
    folder = machine.path("/srv/paths")
    folder.mkdir()
    file, link, other = folder / "file", folder / "link", folder / "other"
    file.write_text("content\n")
    link.symlink_to(file)
    return {
        "exists": file.exists,
        "is_dir": folder.is_dir,
        "stat": file.stat,
        "owner": file.owner,
        "read_bytes": file.read_bytes,
        "write_bytes": lambda: file.write_bytes(b"content\n"),
        "write_bytes, a new file": lambda: (folder / f"new{time.monotonic_ns() % 8}").write_bytes(b"content\n"),
        "iterdir": lambda: list(folder.iterdir()),
        "glob": lambda: list(folder.glob("f*")),
        "mkdir": lambda: other.mkdir(exist_ok=True),
        "touch": file.touch,
        "chmod": lambda: file.chmod(0o600),
        "readlink": link.readlink,
        "unlink": lambda: (folder / "nothing").unlink(missing_ok=True),
        "rename": lambda: file.rename(file),
    }


def of_much(machine: Machine) -> dict[str, Callable[[], object]]:
    works: dict[str, Callable[[], object]] = {}
    for size in (64 << 10, 1 << 20, 4 << 20, 16 << 20):
        file = machine.path(f"/srv/much{size}")
        works[f"write_bytes, {size >> 10} KiB"] = partial(file.write_bytes, bytes(size))
        works[f"read_bytes, {size >> 10} KiB"] = file.read_bytes
        works[f"write_bytes, {size >> 10} KiB"]()
    return works


def main() -> None:
    """Print the ratios; the exit status is 1 if a verb takes longer than it may."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--catalog", type=Path, default=default_root())
    parser.add_argument("-n", type=int, default=30, metavar="TURNS")
    given = parser.parse_args()
    taken: dict[str, list[float]] = {}
    with (
        closing(Catalog(given.catalog)) as catalog,
        closing(Provisioner(catalog, QemuBackend(proofs=catalog.proofs), name="qemu", settings=Settings(report=print))) as provisioner,
        provisioner.machine(MachineSpec(source="debian-12", memory=1 << 30)) as machine,
    ):
        plain, much = verbs(machine), of_much(machine)
        works = {TRUE: lambda: machine.exec(["true"]), **plain, **much}
        for turn in range(given.n):
            # The order changes from turn to turn: what comes first may find another state of the guest.
            for name in list(works)[:: 1 if turn % 2 else -1]:
                began = time.perf_counter()
                works[name]()
                taken.setdefault(name, []).append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    ratios = {name: medians[name] / medians[TRUE] for name in works}
    slow = [name for name in plain if ratios[name] > MOST]
    for name, ratio in ratios.items():
        print(f"{name:26} {ratio:6.2f}{'  too slow' if name in slow else ''}")
    print(f"verbs may take {MOST} times as long as {TRUE}, which took {medians[TRUE] * 1000:.1f} ms")
    sys.exit(bool(slow))


if __name__ == "__main__":
    main()
