"""Time to find and shrink a planted bug with `MachineStates`, beside the same rules with all steps of each sequence done anew.

Anew means: the machine is restored to the state before, and the steps are done in it. Both try the same sequences and must find the same
shortest one. Only the ratio within one run means something. The exit status is 1 if the bar is missed.

    python benchmarks/states.py
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from pytest_vmbottle import Machine, MachineSpec, Snapshot
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_root
from pytest_vmbottle.hypothesis import MachineStates
from pytest_vmbottle.machine.fork_tree import ForkTree
from pytest_vmbottle.provision import Provisioner, Settings

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.real.guests.test_hypothesis import OPTIONS, QUEUE, Rules

LEAST = 3.0
"""Bar: all steps done anew take at least so many times as long."""


class Anew(RuleBasedStateMachine):
    """Rules about a machine that begins each sequence in a restored state."""

    machine: ClassVar[Machine]
    before: ClassVar[Snapshot]

    def __init__(self) -> None:
        super().__init__()
        self.vm = self.machine
        self.vm.restore(self.before)


def seconds(kind: type, **members: object) -> float:
    """Find the bug; return how long that took."""
    states: Any = type("Queue", (Rules, kind), members)
    began = time.perf_counter()
    try:
        run_state_machine_as_test(states, settings=OPTIONS)
    except AssertionError:
        taken = time.perf_counter() - began
    else:
        sys.exit(f"{kind.__name__}: the bug was not found")
    if states.last != ["put 0", "put 1", "get"]:
        sys.exit(f"{kind.__name__}: the shortest sequence was not found, but {states.last}")
    return taken


def main() -> int:
    """Measure, print, and compare with the bar."""
    catalog = Catalog(default_root())
    settings = Settings(report=lambda text: print(text, flush=True))
    provisioner = Provisioner(catalog, QemuBackend(proofs=catalog.proofs), name="qemu", settings=settings)
    with closing(provisioner), provisioner.machine(MachineSpec(source="debian-12")) as vm:
        vm.path("/srv/q").write_text(QUEUE, mode=0o755)
        with ForkTree(vm) as tree:
            kept = seconds(MachineStates, tree=tree)
        print(f"kept states    {kept:8.1f} s, {tree.done} commands done of {tree.asked}")
        anew = seconds(Anew, machine=vm, before=vm.snapshot("before"))
        print(f"all done anew  {anew:8.1f} s")
    print(f"ratio          {anew / kept:8.2f}   at least {LEAST:g}")
    return int(anew / kept < LEAST)


if __name__ == "__main__":
    sys.exit(main())
