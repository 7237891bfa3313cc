"""Commands on a terminal of their own, whose output is collected: many programs behave otherwise there."""

from __future__ import annotations

import selectors
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle.channels.port import MAX_OUTPUT, Finished
from pytest_vmbottle.errors import MachineDied

if TYPE_CHECKING:
    from pytest_vmbottle.channels.port import Channel, Command, Terminal
    from pytest_vmbottle.host.deadline import Deadline

__all__ = ["run_on_terminal"]

_KIND, _SIZE = "xterm", (80, 24)
_KILLED = -9


def run_on_terminal(channel: Channel, command: Command, deadline: Deadline, *, kill: Callable[[], object]) -> Finished:
    """Run a command on a terminal to its end, with its input typed there and not ended.

    Args:
        channel: A channel that offers terminals.
        command: The command.
        deadline: When it is killed.
        kill: Function that kills it with all that it has started.

    Raises:
        Unsupported: The channel offers no terminals.
        MachineDied: The connection was lost.
    """
    named = attrs.evolve(command, env=tuple({"TERM": _KIND, **dict(command.env)}.items()))
    output = bytearray()
    with closing(channel.terminal(user="root", kind=_KIND, size=_SIZE, deadline=deadline, command=named)) as terminal:
        terminal.send(command.input)
        whole = True
        for data in _output(terminal, deadline):
            whole = whole and len(output) + len(data) <= MAX_OUTPUT
            # Read whatever becomes of it: a terminal that nobody reads holds the program up.
            output += data[: MAX_OUTPUT - len(output)]
        if deadline.expired:
            kill()
            return Finished(returncode=_KILLED, stdout=bytes(output), truncated=not whole, timed_out=True)
        status = terminal.status
    if status is None:
        raise MachineDied("the connection to the guest's terminal was lost")
    return Finished(returncode=status, stdout=bytes(output), truncated=not whole)


def _output(terminal: Terminal, deadline: Deadline) -> Iterator[bytes]:
    """Yield the output until its end, or until the deadline."""
    with selectors.DefaultSelector() as ready:
        ready.register(terminal, selectors.EVENT_READ)
        while not deadline.expired:
            if ready.select(deadline.remaining):
                data = terminal.receive()
                if not data:
                    return
                yield data
