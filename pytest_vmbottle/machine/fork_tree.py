"""States of a machine by what was done to it, kept as forks, so that nothing is done twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Self, TypeVar

import attrs

from pytest_vmbottle.errors import MachineError, VMBottleError

if TYPE_CHECKING:
    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.result import Result

__all__ = ["ForkTree", "KeptMachine", "KeptPath"]

_T = TypeVar("_T")

_READ = ("exists", "is_dir", "is_file", "read_bytes", "read_text")
_WRITE = ("chmod", "mkdir", "rmtree", "symlink_to", "touch", "unlink", "write_bytes", "write_text")
_VERBS = (*_READ, *_WRITE)
"""The verbs of `GuestPath` that return plain values."""


@attrs.frozen
class _Outcome:
    """Value that was returned, or error that was raised."""

    value: object = None
    error: Exception | None = None

    @classmethod
    def of(cls, do: Callable[[Machine], object], machine: Machine) -> _Outcome:
        """Do it, and keep how it ends."""
        try:
            return cls(value=do(machine))
        except (VMBottleError, OSError) as error:
            return cls(error=error)

    def is_like(self, other: _Outcome) -> bool:
        """Tell whether both ended in the same way; what was printed may have times and process ids in it."""
        ends = [(type(each.error), getattr(each.value, "returncode", None)) for each in (self, other)]
        return ends[0] == ends[1]

    def again(self) -> object:
        """Return or raise it again."""
        if self.error is not None:
            raise self.error.with_traceback(None)
        return self.value


@attrs.define(eq=False)
class _Node:
    """A state: what was done last, and how that ended.

    Attributes:
        parent: The state before; None for the first one.
        do: What was done to get from there to here.
        outcome: What that returned or raised.
        seconds: How long it took.
        machine: A machine that is in this state, paused; None if there is none any more.
        used: When it was asked for last, as a count.
        children: The states after it, by what was done.
    """

    parent: _Node | None = None
    do: Callable[[Machine], object] = attrs.field(default=lambda _: None, repr=False)
    outcome: _Outcome = _Outcome()
    seconds: float = 0.0
    machine: Machine | None = None
    used: int = 0
    children: dict[str, _Node] = attrs.field(factory=dict, repr=False)

    def back(self) -> Iterator[_Node]:
        """Go back from here to the first state."""
        node: _Node | None = self
        while node is not None:
            yield node
            node = node.parent

    @property
    def has_machines(self) -> bool:
        """Tell whether there is a machine in a state after this one."""
        return any(child.machine is not None or child.has_machines for child in self.children.values())


class ForkTree:
    """States of a machine, each reached by commands from the one before.

    What was done once is not done again: its outcome is known. A state from which something new is tried is a fork of the nearest one that
    is kept, to which the few commands between are done again. Whatever else is in a state must follow from its commands alone.
    """

    def __init__(self, vm: Machine, *, most: int = 4, again: float = 0.5) -> None:
        """Take a machine, which is paused from the beginning of the block to its end.

        Args:
            vm: The machine, in the first state.
            most: The most states that are kept as machines; each counts in the memory budget as a machine does.
            again: Seconds of commands that may be done again to reach a state. What takes longer is kept.
        """
        self._root = _Node(machine=vm)
        self._vm, self._most, self._again = vm, most, again
        self.asked = 0
        """How many commands were asked for."""
        self.done = 0
        """How many commands were done, those included that were done again."""

    def __enter__(self) -> Self:
        self._vm.pause()
        return self

    def __exit__(self, *error: object) -> None:
        for child in self._root.children.values():
            self._drop_below(child)
        self._vm.resume()

    def machine(self) -> KeptMachine:
        """Return the machine in its first state, for a block."""
        return KeptMachine(self, self._root)

    # -- for the machines ------------------------------------------------------------------------------------------------------------

    def touch(self, node: _Node) -> None:
        """Note that a state is asked for."""
        self.asked += 1
        for each in node.back():
            each.used = self.asked

    def machine_at(self, node: _Node) -> Machine:
        """Return a running machine in a state, by a fork of the nearest one that is kept."""
        kept, *between = _since_kept(node)
        machine = self._forked(kept)
        for each in between:
            outcome = self.do(each.do, machine)
            if not outcome.is_like(each.outcome):
                machine.discard()
                raise MachineError(f"done again, a command ended with {outcome}, and before with {each.outcome}", machine=self._vm.name)
        return machine

    def do(self, do: Callable[[Machine], object], machine: Machine) -> _Outcome:
        """Do something to a machine."""
        self.done += 1
        return _Outcome.of(do, machine)

    def keep(self, node: _Node, machine: Machine) -> None:
        """Keep a machine as that of a state."""
        if node.machine is not None:
            machine.discard()
            return
        try:
            machine.pause()
        except MachineError:  # it has died of what was done to it
            machine.discard()
            return
        node.machine = machine

    def is_far(self, node: _Node) -> bool:
        """Tell whether the commands since the nearest state that is kept take too long to be done again."""
        return sum(each.seconds for each in _since_kept(node)[1:]) > self._again

    # -- what is kept ----------------------------------------------------------------------------------------------------------------

    def _forked(self, kept: _Node) -> Machine:
        assert kept.machine is not None  # noqa: S101 - whoever calls has looked
        # Before there is one more, for which there may be no memory.
        self._make_room(kept)
        kept.machine.resume()
        try:
            return kept.machine.fork()
        finally:
            kept.machine.pause()

    def _make_room(self, needed: _Node) -> None:
        """End the machines that were not asked for for longest; never one that a fork stands on."""
        spared = set(map(id, needed.back()))
        while len(machines := [node for node in self._below(self._root) if node.machine is not None]) >= self._most:
            ends = [node for node in machines if not node.has_machines and id(node) not in spared]
            if not ends:
                return
            self._drop(min(ends, key=lambda node: node.used))

    def _below(self, node: _Node) -> Iterator[_Node]:
        for child in node.children.values():
            yield child
            yield from self._below(child)

    def _drop_below(self, node: _Node) -> None:
        for child in node.children.values():
            self._drop_below(child)
        self._drop(node)

    def _drop(self, node: _Node) -> None:
        if node.machine is not None:
            node.machine.discard()
            node.machine = None


def _since_kept(node: _Node) -> list[_Node]:
    """Return the states from the nearest one that is kept to this one."""
    found: list[_Node] = []
    for each in node.back():
        found.insert(0, each)
        if each.machine is not None:
            break
    return found


class KeptMachine:
    """A machine in a state of a `ForkTree`: what is done to it leads to the next one.

    It runs commands and reads and writes files, as `Machine` does.
    """

    def __init__(self, tree: ForkTree, node: _Node) -> None:
        """Take the tree, and the state to begin with."""
        self._tree, self._node = tree, node
        self._machine: Machine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def exec(self, command: str | list[str], **keywords: Any) -> Result:
        """Run a command (see `Machine.exec`)."""
        return self.do(("exec", command, keywords), lambda vm: vm.exec(command, **keywords))

    def path(self, path: str | PurePosixPath) -> KeptPath:
        """Return a path in its guest (see `Machine.path`)."""
        return KeptPath(self, PurePosixPath(path))

    def close(self) -> None:
        """Leave it; what it has reached is kept as long as there is room."""
        if self._machine is not None:
            machine, self._machine = self._machine, None
            self._tree.keep(self._node, machine)

    def do(self, words: object, do: Callable[[Machine], _T]) -> _T:
        """Do something that these words tell, unless it was done in this state before.

        Args:
            words: What it is; whatever has the same `repr` is the same.
            do: Function that does it.
        """
        key = repr(words)
        known = self._node.children.get(key)
        if known is None:
            known = self._new(key, do)
        else:
            # The machine that is here stays here.
            self.close()
        self._node = known
        self._tree.touch(known)
        return known.outcome.again()  # type: ignore[return-value]

    def _new(self, key: str, do: Callable[[Machine], object]) -> _Node:
        if self._machine is not None and self._tree.is_far(self._node):
            self.close()
        if self._machine is None:
            self._machine = self._tree.machine_at(self._node)
        began = time.monotonic()
        outcome = self._tree.do(do, self._machine)
        node = _Node(parent=self._node, do=do, outcome=outcome, seconds=time.monotonic() - began)
        self._node.children[key] = node
        return node


class KeptPath:
    """A path in the guest of a `KeptMachine`, with the verbs of `GuestPath` that read and write."""

    def __init__(self, machine: KeptMachine, path: PurePosixPath) -> None:
        """Take the machine and the path."""
        self._machine, self._path = machine, path

    def __truediv__(self, name: str) -> KeptPath:
        """Return a path below this one."""
        return KeptPath(self._machine, self._path / name)

    def __str__(self) -> str:
        return str(self._path)

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        if verb not in _VERBS:
            raise AttributeError(f"a path of a kept machine has no {verb!r}; it has {', '.join(_VERBS)}")

        def done(*words: object, **keywords: object) -> Any:
            did = ("path", str(self._path), verb, words, keywords)
            return self._machine.do(did, lambda vm: getattr(vm.path(self._path), verb)(*words, **keywords))

        return done
