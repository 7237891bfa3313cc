"""Model-based tests of machines with Hypothesis, in which nothing is done twice (extra `hypothesis`).

Hypothesis tries many sequences of steps, and to shrink a failing one many that begin alike. Here a step that was tried in a state costs
nothing the next time, and a new one begins in a fork of the machine as the steps before had left it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from pytest_vmbottle.machine.fork_tree import ForkTree, KeptMachine

if TYPE_CHECKING:
    from pytest_vmbottle.machine.machine import Machine

__all__ = ["MachineStates", "explore"]


class MachineStates(RuleBasedStateMachine):
    """Rules about a machine: a `RuleBasedStateMachine` of Hypothesis whose `vm` remembers.

    What a rule does to `vm` must follow from what was done before, and from the values that the rule was given: a command that prints the
    time prints the same time again.

    Attributes:
        vm: The machine, in its first state when a sequence begins. It runs commands, and reads and writes files.
    """

    tree: ClassVar[ForkTree]

    def __init__(self) -> None:
        """Begin a sequence."""
        super().__init__()
        self.vm: KeptMachine = self.tree.machine()

    def teardown(self) -> None:
        """End a sequence."""
        self.vm.close()


def explore(states: type[MachineStates], vm: Machine, *, options: settings | None = None, most: int = 4) -> ForkTree:
    """Try sequences of rules on a machine, and report the shortest one that fails.

    The machine is paused meanwhile, and runs on from where it was.

    Args:
        states: The rules.
        vm: The machine.
        options: Hypothesis' settings; by default those of its state machines.
        most: The most machines that are kept beside it; each counts in the memory budget.

    Returns:
        What was tried.

    Raises:
        AssertionError: A rule failed, or whatever else it raised; Hypothesis has printed the sequence.
    """
    with ForkTree(vm, most=most) as tree:
        usual = options or settings(deadline=None, suppress_health_check=list(HealthCheck))
        run_state_machine_as_test(type(states.__name__, (states,), {"tree": tree}), settings=usual)
    return tree
