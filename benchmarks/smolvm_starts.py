"""How long smolvm takes to give out a machine, by each way to make one: from nothing, from a pack, from a checkpoint, or as a branch.

All ways take turns in one run, so that whatever else the computer does meanwhile falls on all of them alike: only ratios within one run
mean something. A machine is there when it has run a command. It must have the file that was left for it on the disk and, where RAM is kept,
the one in memory. What it then reads of `/dev/urandom` should be its own, for two with the same bytes would make the same keys; a kernel
has new random numbers after a time, so this is also looked at where machines follow one another at once. All this needs a KVM that runs
guests; docs/smolvm.md says what to do elsewhere.

    python benchmarks/smolvm_starts.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import attrs

from pytest_vmbottle.backends.smolvm import Engine, find_program
from pytest_vmbottle.backends.smolvm.engine import Creation
from pytest_vmbottle.errors import SmolvmError

MEMORY = 256 << 20
FLAW = "before the agent was ready"
"""A start that fails with it may be tried once more; how often that was is told."""


@attrs.define
class Bench:
    """One engine with its sources, and what was measured with them, in seconds."""

    engine: Engine
    folder: Path
    seconds: dict[str, list[float]] = attrs.field(factory=dict)
    repeated: dict[str, int] = attrs.field(factory=dict)
    random: dict[str, list[str]] = attrs.field(factory=dict)
    wrong: list[str] = attrs.field(factory=list)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds.setdefault(what, []).append(time.monotonic() - began)

    def say(self, name: str, script: str) -> str:
        argv = self.engine.exec_argv(name, ["sh", "-c", script])
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=True)
        return done.stdout

    def begin(self, what: str, name: str, made_of: Creation, *, branchable: bool = False) -> None:
        """Creates and starts a machine; again if the start failed in the one way that is known."""
        for attempt in (1, 2, 3):
            self.engine.create(name, made_of)
            try:
                self.engine.start(name, branchable=branchable)
            except SmolvmError as error:
                if FLAW not in str(error) or attempt == 3:
                    raise
                self.repeated[what] = self.repeated.get(what, 0) + 1
                self.engine.delete(name)
            else:
                return

    def measure(self, what: str, make: Callable[[str], object], *, left: str) -> None:
        """Has a machine made, checks it, and removes it."""
        name = f"bench-{secrets.token_hex(4)}"
        try:
            with self.timed(what):
                make(name)
                said = self.say(name, "cat /root/disk /dev/shm/ram 2>/dev/null; head -c 16 /dev/urandom | od -An -tx1")
            *lines, random = said.splitlines()
            self.random.setdefault(what, []).append(random)
            found = "".join(f"{line}\n" for line in lines)
            if found != left:
                self.wrong.append(f"{what}: {found!r} instead of {left!r}")
        finally:
            self.engine.delete(name)

    def of_their_own(self, what: str) -> str:
        """How many of the machines that were looked at have random bytes that no other one had, of how many."""
        seen = Counter(self.random.get(what, ()))
        return f"{sum(count == 1 for count in seen.values())} of {seen.total()}" if seen else ""


def prepare(bench: Bench) -> tuple[Path, Path, str]:
    """A pack, a checkpoint, and a running machine to branch, of one preparation; how long each takes is measured too."""
    leave = "echo disk > /root/disk; echo ram > /dev/shm/ram; sync"
    bench.begin("once", "plain", Creation(memory=MEMORY))
    bench.say("plain", leave)
    with bench.timed("once: stop and pack"):
        bench.engine.stop("plain")
        packed = bench.engine.pack(bench.folder / "bench", machine="plain")
    bench.engine.delete("plain")
    with bench.timed("once: start --branchable"):
        bench.begin("once: start --branchable", "warm", Creation(memory=MEMORY), branchable=True)
    bench.say("warm", leave)
    with bench.timed("once: checkpoint"):
        bench.engine.checkpoint("warm", bench.folder / "bench.checkpoint")
    return packed, bench.folder / "bench.checkpoint", "warm"


def look(bench: Bench, what: str, make: Callable[[str], object]) -> None:
    """Has a few machines made one right after the other."""
    for _ in range(3):
        bench.measure(what, make, left="disk\nram\n")


def run(bench: Bench, rounds: int) -> None:
    packed, checkpoint, warm = prepare(bench)
    try:
        look(
            bench,
            "at once: create from a checkpoint, start",
            partial(bench.begin, "at once", made_of=Creation(memory=MEMORY, packed=checkpoint)),
        )
        # The first one freezes the source, and has to write the snapshot that the others use.
        look(bench, "at once: branch", partial(bench.engine.branch, warm))
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for what, source, left in (
                ("create, start", None, ""),
                ("create from a pack, start", packed, "disk\n"),
                ("create from a checkpoint, start", checkpoint, "disk\nram\n"),
            ):
                bench.measure(what, partial(bench.begin, what, made_of=Creation(memory=MEMORY, packed=source)), left=left)
            bench.measure("branch", partial(bench.engine.branch, warm), left="disk\nram\n")
    finally:
        bench.engine.delete(warm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="write the single measurements as JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="starts-", dir="/var/tmp") as name:
        bench = Bench(engine=Engine(find_program(), Path(name) / "s"), folder=Path(name))
        run(bench, asked.rounds)
    if asked.json:
        print(json.dumps({"seconds": bench.seconds, "repeated": bench.repeated, "random": bench.random, "wrong": bench.wrong}))
    else:
        print(f"{'until a command has run':40} median   least    most  repeated  with random bytes of their own")
        for what, seconds in bench.seconds.items():
            figures = f"{statistics.median(seconds):6.2f}  {min(seconds):6.2f}  {max(seconds):6.2f}"
            repeated = bench.repeated.get(what, 0)
            print(f"{what:40} {figures}  {repeated:2} of {len(seconds) + repeated:2}  {bench.of_their_own(what)}")
        for problem in bench.wrong:
            print(f"not the machine that was prepared: {problem}")
    sys.exit(1 if bench.wrong else 0)


if __name__ == "__main__":
    main()
