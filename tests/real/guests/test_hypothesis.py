"""Sequences of steps on a real machine, of which none is done twice."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule, run_state_machine_as_test

from pytest_vmbottle import CommandFailed, Machine
from pytest_vmbottle.hypothesis import MachineStates, explore
from pytest_vmbottle.machine.fork_tree import ForkTree

QUEUE = """#!/usr/bin/python3
import json, sys
try:
    queue = json.load(open("/srv/queue"))
except FileNotFoundError:
    queue = []
if sys.argv[1] == "put":
    queue.append(int(sys.argv[2]))
elif queue:
    # Of two and more it gives back the wrong one.
    print(queue.pop(0 if len(queue) < 2 else 1))
json.dump(queue, open("/srv/queue", "w"))
"""
OPTIONS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    stateful_step_count=8,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
    print_blob=False,
)


class Rules:
    """The queue, and what it ought to do."""

    vm: Any
    last: ClassVar[list[str]]

    @initialize()
    def begin(self) -> None:
        self.model: list[int] = []
        self.steps: list[str] = []
        type(self).last = self.steps
        self.vm.exec("sleep 1")

    @rule(number=st.integers(0, 1))
    def put(self, number: int) -> None:
        self.steps.append(f"put {number}")
        self.vm.exec(["/srv/q", "put", str(number)])
        self.model.append(number)

    @rule()
    def get(self) -> None:
        self.steps.append("get")
        found = self.vm.exec(["/srv/q", "get"]).stdout.split()
        assert found == [str(self.model.pop(0))] if self.model else not found


@pytest.mark.vm("debian-12")
def test_the_shortest_sequence_that_fails_is_found_with_less_than_half_of_the_commands(vm: Machine) -> None:
    vm.path("/srv/q").write_text(QUEUE, mode=0o755)
    with ForkTree(vm) as tree:
        states: Any = type("Queue", (Rules, MachineStates), {"tree": tree})
        with pytest.raises(AssertionError):
            run_state_machine_as_test(states, settings=OPTIONS)
        assert states.last == ["put 0", "put 1", "get"]
        assert tree.done * 2 < tree.asked, "how many can be left out depends on the memory that there is for forks: see benchmarks/"
    assert not vm.path("/srv/queue").exists()


class Correct(MachineStates):
    @rule(number=st.integers(0, 1))
    def counts(self, number: int) -> None:
        self.vm.exec(["sh", "-c", f"echo {number} >> /srv/all"])
        assert self.vm.path("/srv/all").read_text().endswith(f"{number}\n")


@pytest.mark.vm("debian-12")
def test_rules_that_hold_leave_the_machine_as_it_was(vm: Machine) -> None:
    explore(Correct, vm, options=settings(OPTIONS, max_examples=4, stateful_step_count=4))
    assert not vm.path("/srv/all").exists()


@pytest.mark.vm("debian-12")
def test_a_state_has_what_was_done_before_it_and_nothing_of_the_others(vm: Machine) -> None:
    with ForkTree(vm, most=3) as tree:
        for last in ("one", "two", "three", "two"):
            with tree.machine() as kept:
                kept.exec("sleep 1.5; echo begun > /run/state")
                (kept.path("/root") / "file").write_text(last)
                assert kept.exec("cat /run/state /root/file").stdout == f"begun\n{last}"
                with pytest.raises(CommandFailed):
                    kept.exec("exit 3")
                with pytest.raises(FileNotFoundError):
                    kept.path("/root/nothing").read_text()
        assert tree.done == 1 + 3 * 4, "each command once, the last round from memory"
        with tree.machine() as kept, pytest.raises(AttributeError, match="write_text"):
            kept.path("/root").glob("*")
    assert not vm.path("/root/file").exists()
